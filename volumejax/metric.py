r"""The metric of the moves: for each leaf an orthogonal change of basis and the mean curvature of the cost in it.

A settled ensemble obeys E[∇U ∇Uᵀ] = E[∇²U], so second moments of gradients are mean curvatures. For a matrix leaf the
eigenvectors of E[G Gᵀ] and E[Gᵀ G] are a basis in which they are nearly diagonal, and which stays good far from the
anchor: it follows the data's covariance more than the weights. Of a long side only the leading ones are used:
reflections put them first and turn the rest anyhow. A small leaf has one basis for all of its coordinates, the
eigenvectors of their whole second moment, drawn towards the factors' where samples are few. The masses are

.. math:: m_i \propto (a + \beta c_i)^p

with p = 1 where the curvature is the same everywhere. Where every place is stiff in a few directions, and others than
its neighbours, masses as large as the mean of all places hold still what is free at most of them.

References: Gupta, Koren & Singer 2018 (Shampoo) for the two factors; Vyas et al. 2024 (SOAP) for the diagonal in their
basis; Girolami & Calderhead 2011 for curvature as the metric of Hamiltonian moves; Schreiber & Van Loan 1989 for
products of reflections.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PyTree
from numpy.typing import NDArray
from scipy.special import polygamma

__all__ = ["UNKNOWN", "Metric", "Rest", "fit_metric", "mass_power", "plain_metric"]

_LARGEST_SIDE, _FEWEST = 512, 8
"""Sides of a matrix up to this length are rotated as a whole. Of a longer one there are as many leading eigenvectors as
turn a column at the same cost, if that is no fewer than the second number."""
_PER_AXIS = 10
"""Samples an axis that eigenvectors take."""
_SPARE, _ROUNDS = 8, 2
"""Vectors beyond the leading ones, and rounds, in which a subspace is found."""
_LARGEST_JOINT = 256
"""Leaves up to this size are turned as a whole."""
_FLOOR = 0.1
"""Share of a leaf's own stiffness, as its spread tells it, that every coordinate has at least."""
_AGREES = 4.0
"""Factor by which a leaf may be wider or narrower than its curvature says, against all others, and not be rescaled."""
UNKNOWN, _LEAST_POWER = 0.25, 0.5
"""Unevenness that is taken where it has not been measured, from which on the power of the masses falls by as much as it
rises, and where that ends."""
_FELT = 0.1
"""Share of the prior's and tether's precision from which on a coordinate's curvature counts as felt."""
_CORRELATED = 4.0
"""Successive gradients of one chain count for this many times fewer."""


class Reflections(eqx.Module):
    """An orthogonal matrix Q = I − Y T Yᵀ of a side too long for a matrix, whose first columns are given.

    Arrays of the host or of a device.
    """

    vectors: Any
    """Y, [side, rank]."""
    mixing: Any
    """T, [rank, rank]."""

    def __len__(self) -> int:
        return len(self.vectors)


class Rest(NamedTuple):
    """The part of U that is not βC, at the samples that a metric is fitted to."""

    slopes: list[NDArray[np.float32]]
    """Its gradient over β, shapes as those of C."""
    precision: float
    """Its curvature: the mean of a."""
    squares: NDArray
    """Each leaf's mean square of δ where the chains stand now."""


class Metric(eqx.Module):
    """Per-leaf bases and curvatures, in the order of the leaves of the parameters."""

    left: list[Float[Array, "_ _"] | Reflections | None]
    right: list[Float[Array, "_ _"] | Reflections | None]
    """Of the columns, or of a whole leaf."""
    curvature: list[Float[Array, "..."]]
    """Mean of the second derivatives of C in the whitened, turned coordinates; leaves' shapes, float32."""
    beta: Float[Array, ""]
    """β at which it was fitted, float32."""
    unevenness: Float[Array, ""]
    """Var k / (E k)² of the curvatures k that a direction has from place to place, the mean over directions that the
    cost confines, float32: 0 for a quadratic cost."""
    excess: Float[Array, "leaves"]
    """By what factor each leaf's mean square of δ was more than its curvature says where that was measured, which holds
    the square of the mean too. NaN where the curvature is known but for a factor, float32."""

    def turned(self, vector: PyTree) -> PyTree:
        """Return the coordinates of `vector` in the bases of its leaves."""
        return self._apply(vector, transpose=True)

    def restored(self, vector: PyTree) -> PyTree:
        """Return the vector that has these coordinates."""
        return self._apply(vector, transpose=False)

    def masses(self, stiffness: Float[Array, "leaves"], precision: Array, beta: Array, like: PyTree) -> PyTree:
        """Return each coordinate's mass: its mean precision to the `mass_power`, in the unit that keeps Σ 1/m.

        Args:
            stiffness: one over the mean square of a leaf's coordinates.
            precision: a.
            beta: β.
            like: gives the structure.
        """
        means, scales = self._means(stiffness, precision, beta)
        power = mass_power(self.unevenness)
        powers = [mean**power for mean in means]
        unit = _inverse_sum(powers) / _inverse_sum(means)
        masses = [unit * scale * raised for scale, raised in zip(scales, powers, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), masses)

    def precisions(self, stiffness: Float[Array, "leaves"], precision: Array, beta: Array, like: PyTree) -> PyTree:
        """Return each coordinate's mean precision, ∝ a + βc.

        The unit is such that their inverses at `self.beta` add up to the whole mean square of δ, whatever the curvature
        says: where the region is wider, trajectories have further to go. A leaf whose own mean square is more than
        `_AGREES` times off, against all others or, where that is known, both against what it was where the metric was
        fitted and against what its curvature says, has another curvature here, and is rescaled by the rest.

        Args:
            stiffness: as for `masses`.
            precision: as for `masses`.
            beta: as for `masses`.
            like: as for `masses`.
        """
        means, scales = self._means(stiffness, precision, beta)
        return jax.tree.unflatten(jax.tree.structure(like), [s * mean for s, mean in zip(scales, means, strict=True)])

    def tether_shares(self, precision: Array, beta: Array, like: PyTree) -> PyTree:
        """Return the share that a has in each coordinate's mean precision a + βc.

        Args:
            precision: a, float32.
            beta: β, float32.
            like: gives the structure.
        """
        return jax.tree.unflatten(
            jax.tree.structure(like), [precision / (precision + beta * c) for c in self.curvature]
        )

    def _means(self, stiffness: Array, precision: Array, beta: Array) -> tuple[list[Array], list[Array]]:
        """Return mean precisions as the curvature has them, and the factor by which each leaf is to be rescaled."""
        least = [precision + _FLOOR * stiffness[leaf] for leaf in range(len(self.curvature))]
        widths = [jnp.sum(1.0 / (b + self.beta * c)) for b, c in zip(least, self.curvature, strict=True)]
        seen = [c.size / stiffness[leaf] for leaf, c in enumerate(self.curvature)]
        unit = jnp.sum(jnp.stack(widths)) / jnp.sum(jnp.stack(seen))
        scales = []
        for leaf, (width, found) in enumerate(zip(widths, seen, strict=True)):
            # With what the leaf was wider by where that was measured, or without it where the chains no longer lean.
            wide = self.excess[leaf]
            off = jnp.log(width / found) - jnp.where(jnp.isnan(wide), jnp.log(unit), 0.0)
            leaning = off + jnp.where(jnp.isnan(wide), 0.0, jnp.log(wide))
            nearer = jnp.where(jnp.abs(leaning) < jnp.abs(off), leaning, off)
            off = jnp.where(leaning * off > 0.0, nearer, 0.0)
            scales.append(jnp.exp(jnp.sign(off) * jnp.maximum(jnp.abs(off) - jnp.log(_AGREES), 0.0)))
        return [unit * (b + beta * c) for b, c in zip(least, self.curvature, strict=True)], scales

    def _apply(self, vector: PyTree, *, transpose: bool) -> PyTree:
        leaves, treedef = jax.tree.flatten(vector)
        return jax.tree.unflatten(
            treedef,
            [_turn_leaf(x, p, q, transpose) for x, p, q in zip(leaves, self.left, self.right, strict=True)],
        )


def mass_power(unevenness: Float[Array, ""] | float) -> Float[Array, ""]:
    """Return the power of the mean precisions that the masses are: 1 where they are much the same everywhere."""
    return jnp.clip(1.0 + UNKNOWN - unevenness, _LEAST_POWER, 1.0)


def plain_metric(params: PyTree, *, turns: bool) -> Metric:
    """Return the metric that knows only the leaves' scales, with the same structure as a fitted one."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    sizes = [_bases(shape) if turns else (0, 0) for shape in shapes]
    left, right = ([_on_device(_no_turn(n)) if n else None for n in side] for side in zip(*sizes, strict=True))
    return Metric(
        left=left,
        right=right,
        curvature=[_on_device(np.zeros(shape)) for shape in shapes],
        beta=_on_device(np.ones(())),
        unevenness=_on_device(np.asarray(UNKNOWN)),
        excess=_on_device(np.full(len(shapes), np.nan)),
    )


def fit_metric(
    slopes: list[NDArray[np.float32]],
    betas: NDArray,
    precision: float,
    *,
    turns: bool,
    settled: bool = False,
    rest: Rest | None = None,
) -> Metric:
    """Fit the metric to gradients of C in whitened coordinates.

    Args:
        slopes: for each leaf an array of shape (samples, *leaf).
        betas: inverse temperature at which each sample was taken, shape (samples,).
        precision: a where they were taken.
        turns: False keeps the parameters' own basis, as the walls of a box demand.
        settled: whether the chains are, so that their forces tell the unevenness.
        rest: what comes to βC in U, for settled chains that no wall of the prior holds.
    """
    left, right, curvature, peaks = [], [], [], []
    roots, beta = np.sqrt(betas)[:, None, None].astype(np.float32), float(np.mean(betas))
    for leaf, slope in enumerate(slopes):
        shape = slope.shape[1:]
        grids = _grids(slope) * roots
        p = _basis(grids) if turns else None
        q = _basis(np.swapaxes(grids, 1, 2)) if turns else None
        factors = own = None
        if turns and _is_joint(shape):
            # Of the factors' basis, which is the parameters' own where there is none.
            factors = np.kron(*(np.eye(n) if b is None else b for b, n in zip((p, q), _sides(shape), strict=True)))
            flat = _turn(grids, *_single((p, q)), transpose=True, matmul=np.matmul).reshape(len(grids), -1)
            own = _joint_basis(flat)
            p, q = None, factors @ own

        def turned(values: NDArray, p: Any = p, q: Any = q, joint: bool = own is not None) -> NDArray:
            values = values.reshape(len(values), 1, -1) if joint else values
            return _turn(values, *_single((p, q)), transpose=True, matmul=np.matmul)

        forces = turned(grids)
        # The force has the second moment (βh)²/(a + βh) along a direction of curvature h that is settled at a.
        force = beta * np.mean(np.square(forces, dtype=np.float64), axis=0)
        felt = 0.5 * (force + np.sqrt(force * (force + 4.0 * precision))) / beta
        if rest is not None:
            # And more where C leans against the prior as a whole. Both together have a + βh, but for the noise.
            both = forces + turned(_grids(rest.slopes[leaf]) * roots)
            both = beta * np.mean(np.square(both, dtype=np.float64), axis=0)
            noise = rest.precision * np.sqrt(2.0 * _CORRELATED / len(slope))
            felt = np.minimum(felt, (np.maximum(both - rest.precision, 0.0) + noise) / beta)
        peaks.append(_peakedness(forces)[beta * felt > _FELT * precision])
        curvature.append(_on_device(_shrunk(felt, len(slope)).reshape(shape)))
        left.append(_on_device(p))
        right.append(_on_device(q))
    confined = np.concatenate(peaks)
    unevenness = float(np.mean(confined)) - 1.0 if settled and confined.size else UNKNOWN
    excess = np.full(len(slopes), np.nan)
    if rest is not None:
        least = precision + _FLOOR / rest.squares
        widths = [np.mean(1.0 / (b + beta * np.asarray(c))) for b, c in zip(least, curvature, strict=True)]
        excess = rest.squares / np.array(widths)
    return Metric(left, right, curvature, *(_on_device(np.asarray(x)) for x in (np.mean(betas), unevenness, excess)))


def _grids(leaf: NDArray) -> NDArray:
    """Return samples of a leaf as matrices, without what is not finite."""
    return np.nan_to_num(leaf, posinf=0.0, neginf=0.0).reshape(len(leaf), *_sides(leaf.shape[1:]))


def _single(values: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), values)


def _on_device(values: Any) -> Any:
    """Return float32 arrays, cast on the host: JAX would compile a cast for every shape."""
    return jax.tree.map(jnp.asarray, _single(values))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a leaf's rows and columns: all axes but the last, and the last."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _is_joint(shape: tuple[int, ...]) -> bool:
    return 1 < math.prod(shape) <= _LARGEST_JOINT


def _bases(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the sizes of a leaf's bases, 0 where there is none."""
    rows, columns = _sides(shape)
    if _is_joint(shape):
        return 0, rows * columns
    if min(rows, columns) == 1:
        return 0, 0
    return rows * (_rank(rows) > 0), columns * (_rank(columns) > 0)


def _rank(side: int) -> int:
    """Return how many eigenvectors of a side are used, 0 for none."""
    rank = side if side <= _LARGEST_SIDE else _LARGEST_SIDE**2 // (2 * side)
    return rank if rank >= min(side, _FEWEST) else 0


def _no_turn(side: int) -> NDArray | Reflections:
    """Return what turns nothing, in the structure of what turns that side."""
    rank = _rank(side)
    return np.eye(side) if rank == side else Reflections(np.zeros((side, rank)), np.zeros((rank, rank)))


def _basis(grids: NDArray) -> Any:
    """Return the eigenvectors of E[G Gᵀ], the parameters' own basis where samples are few, None where none is kept."""
    samples, side, other = grids.shape
    rank = _rank(side)
    if min(side, other) == 1 or rank == 0:
        return None
    if samples * other < _PER_AXIS * rank:
        return _no_turn(side)
    flat = np.moveaxis(grids, 1, 0).reshape(side, -1)
    if rank == side:
        return np.linalg.eigh((flat @ flat.T).astype(np.float64))[1]
    return _reflections(_leading(flat, rank))


def _leading(flat: NDArray, rank: int) -> NDArray:
    """Return the leading left singular vectors, by subspace iteration, the greatest last."""
    width = min(rank + _SPARE, *flat.shape)
    found = np.random.default_rng(0).standard_normal((flat.shape[0], width)).astype(flat.dtype)
    for _ in range(_ROUNDS):
        found = np.linalg.qr(flat @ (flat.T @ found))[0]
    within = found.T @ flat
    return found @ np.linalg.eigh((within @ within.T).astype(np.float64))[1][:, -rank:]


def _reflections(first: NDArray) -> Reflections:
    """Return Q whose first columns are those given, up to their signs, as the product of their Householder vectors."""
    side, rank = first.shape
    (geqrf,) = scipy.linalg.get_lapack_funcs(("geqrf",), (first,))
    packed, factors, *_ = geqrf(first)
    vectors = np.tril(packed[:, :rank], -1) + np.eye(side, rank)
    mixing, products = np.diag(factors), vectors.T @ vectors
    for j in range(1, rank):
        mixing[:j, j] = -factors[j] * mixing[:j, :j] @ products[:j, j]
    return Reflections(vectors, mixing)


def _joint_basis(flat: NDArray) -> NDArray[np.float64]:
    """Return the eigenvectors of the second moment, of which as much counts beside the diagonal as samples tell."""
    samples, size = flat.shape
    moment = (flat.T @ flat).astype(np.float64)
    trust = samples / (samples + size)
    return np.linalg.eigh(trust * moment + (1.0 - trust) * np.diag(np.diag(moment)))[1]


def _peakedness(grids: NDArray) -> NDArray:
    """Return each coordinate's E g⁴ / 3 (E g²)²: 1 for normal forces, E k² / (E k)² if their variance k is local.

    Of forces relative to their leaf's as a whole, which makes all of its directions stiff at once.
    """
    squares = np.square(grids) / np.maximum(np.mean(np.square(grids), axis=0), 1e-30)
    squares /= np.maximum(np.mean(squares, axis=tuple(range(1, squares.ndim)), keepdims=True), 1e-30)
    return np.mean(np.square(squares), axis=0) / (3.0 * np.maximum(np.square(np.mean(squares, axis=0)), 1e-30))


def _shrunk(curvature: NDArray, samples: int) -> NDArray:
    """Draw a leaf's log curvatures towards their mean as far as that many samples scatter by chance."""
    top = float(np.max(curvature))
    if top <= 0.0:
        return np.zeros_like(curvature)
    logs = np.log(np.maximum(curvature, 1e-12 * top))
    mean, spread = float(np.mean(logs)), float(np.var(logs))
    # The log of a mean square of n normal draws has variance ψ'(n/2).
    chance = float(polygamma(1, 0.5 * max(samples / _CORRELATED, 1.0)))
    trust = max(1.0 - chance / spread, 0.0) if spread > 0.0 else 0.0
    return np.exp(mean + trust * (logs - mean))


def _inverse_sum(leaves: list[Array]) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(1.0 / x) for x in leaves]))


def _turn_leaf(x: Array, p: Any, q: Any, transpose: bool) -> Array:
    if p is None and q is None:
        return x
    grid = x.reshape(-1 if p is None else len(p), -1 if q is None else len(q))
    return _turn(grid, p, q, transpose=transpose, matmul=_exact_matmul).reshape(x.shape)


def _turn(grid: Any, p: Any, q: Any, *, transpose: bool, matmul: Callable) -> Any:
    """Return P G Qᵀ, or Pᵀ G Q for the transpose; None turns nothing."""
    if isinstance(p, Reflections):
        mixing = p.mixing.T if transpose else p.mixing
        grid = grid - matmul(p.vectors, matmul(mixing, matmul(p.vectors.T, grid)))
    elif p is not None:
        grid = matmul(p.T if transpose else p, grid)
    if isinstance(q, Reflections):
        mixing = q.mixing if transpose else q.mixing.T
        return grid - matmul(matmul(matmul(grid, q.vectors), mixing), q.vectors.T)
    return grid if q is None else matmul(grid, q if transpose else q.T)


_exact_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
