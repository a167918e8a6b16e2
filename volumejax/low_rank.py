r"""Direction proposals with a low-rank part: Σ = diag(s²) + F Fᵀ, or Σ⁻¹ = diag(p) + V Vᵀ.

Both are one map, with S = diag(s) or diag(p)^{-1/2}, orthonormal columns U and a stretch a for each:

    y = μ + S (I + U diag(a − 1) Uᵀ) z,   z ~ N(0, I)

where U g is the singular part of S⁻¹F, stretched by a = √(1 + g²), or of S V, shrunk by a = 1/√(1 + g²). This is the
Woodbury identity taken once and for all; its determinant is that of a rank × rank matrix. Nothing is D × D.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree
from volumejax.proposals import RayDraw, check_positive, ray_draw, sum_log
from volumejax.rows import add_rows, gram, like_row, mix_rows, over_rows, project
from volumejax.tree import is_traced, wide

__all__ = ["LowRank", "LowRankPrecision"]

_DEPENDENT = 1e-12
"""Share of a factor's square below which what is new in it counts as rounding."""


class _Stretched(eqx.Module):
    """The map y = μ + S (I + U diag(stretch − 1) Uᵀ) z and the density of its draws.

    U is rounded to float32 and then taken as it is: the determinant and the whitened mean are those of this very map,
    so that the density belongs to the draws even where a stretch is tiny and U no longer orthonormal enough.
    """

    scale: Any
    basis: PyTree[Float[Array, "rank ..."]]
    stretch: Float[Array, "rank"]
    log_stretch: Float[Array, ""]
    """log det (I + U diag(stretch − 1) Uᵀ)."""
    mean: Any
    white_pull: Float[Array, "rank"] | None
    """k in S⁻¹μ − U k, the whitened mean; None where there is no mean."""

    def __init__(self, scale: Any, white_factors: PyTree, invert: bool, mean: Any) -> None:
        """Orthonormalise the whitened factors; invert for those of a precision."""
        self.scale = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), scale)
        self.basis, self.stretch, self.log_stretch = _decompose(white_factors, invert)
        self.mean, self.white_pull = None, None
        if mean is not None:
            shifted = self.shifted(mean)
            self.mean, self.white_pull = shifted.mean, shifted.white_pull

    @property
    def rank(self) -> int:
        """Number of factors."""
        return self.stretch.shape[0]

    def check(self, params: PyTree) -> None:
        """Raise a ValueError where a part does not fit the parameters."""
        name = type(self).__name__
        check_positive(tree.broadcast_to(self.scale, params, f"{name} scale"), f"{name} scale")
        if jax.tree.structure(self.basis) != jax.tree.structure(params):
            raise ValueError(
                f"{name} factors are a pytree of another structure than the parameters; give one leaf of shape "
                "(rank, *leaf shape) for each leaf of the parameters"
            )
        for (path, leaf), rows in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(self.basis), strict=True
        ):
            if rows.shape[1:] != jnp.shape(leaf):
                raise ValueError(
                    f"{name} factors{jax.tree_util.keystr(path)} have shape {rows.shape}, the parameter there has "
                    f"shape {jnp.shape(leaf)}; use (rank, *leaf shape)"
                )
        if not is_traced(self.stretch) and not np.all(np.isfinite(self.stretch)):
            raise ValueError(f"{name} factors must be finite everywhere; compute them where the cost is finite")

    def draw(self, key: Key[Array, ""], params: PyTree) -> RayDraw:
        """Draw y = μ + S (I + U diag(stretch − 1) Uᵀ) z."""
        z = tree.normal_like(key, params)
        like = like_row(self.basis)
        scale = tree.broadcast_to(self.scale, like, "scale")
        mean = tree.broadcast_to(0.0 if self.mean is None else self.mean, like, "mean")
        with jax.enable_x64(True):
            # Where the stretch is small the sum below cancels: the projection has to be better than float32.
            added = (wide(self.stretch) - 1.0) * project(self.basis, z)
            y = jax.tree.map(
                lambda z, s, m: (wide(m) + wide(s) * z).astype(jnp.float32),
                add_rows(z, added, self.basis), scale, mean,
            )  # fmt: skip
            log_scale = jax.tree.map(lambda s, x: sum_log(s, math.prod(x.shape)), scale, like)
            log_det = jax.tree.reduce(jnp.add, log_scale, jnp.zeros((), jnp.float64)) + wide(self.log_stretch)
            if self.white_pull is None:
                zero = jnp.zeros((), jnp.float64)
                return ray_draw(y, zero, tree.dot(z, z), zero, log_det, tree.size(params))
            pull = wide(self.white_pull)
            white_mean = jax.tree.map(lambda m, s: wide(m) / wide(s), mean, scale)
            white_mean = add_rows(white_mean, -pull, self.basis)
            # The whitened y is known before rounding; solving for it again would amplify the rounding of y.
            white_y = jax.tree.map(lambda z, m: wide(z) + m, z, white_mean)
            return ray_draw(
                y,
                tree.dot(white_y, white_mean),
                tree.dot(white_y, white_y),
                tree.dot(white_mean, white_mean),
                log_det,
                tree.size(params),
            )

    def apply_covariance(self, vector: PyTree) -> PyTree:
        """Return Σ·vector, in float64."""
        with jax.enable_x64(True):
            scale = tree.broadcast_to(self.scale, like_row(self.basis), "scale")
            white = jax.tree.map(lambda x, s: wide(x) * wide(s), vector, scale)
            for _ in range(2):
                added = (wide(self.stretch) - 1.0) * project(self.basis, white)
                white = add_rows(white, added, self.basis)
            return jax.tree.map(lambda x, s: x * wide(s), white, scale)

    def shifted(self, mean: PyTree) -> "_Stretched":
        """Return this proposal with another mean, an offset from the anchor."""
        like = like_row(self.basis)
        full = jax.tree.map(
            lambda m, x: jnp.broadcast_to(jnp.asarray(m).astype(jnp.float32), x.shape),
            tree.broadcast_to(mean, like, f"{type(self).__name__} mean"), like,
        )  # fmt: skip
        with jax.enable_x64(True):
            scale = tree.broadcast_to(self.scale, like, "scale")
            white = jax.tree.map(lambda m, s: wide(m) / wide(s), full, scale)
            excess = wide(self.stretch) - 1.0
            system = jnp.eye(self.rank, dtype=jnp.float64) + gram(self.basis, self.basis) * excess[None, :]
            pull = excess * jnp.linalg.solve(system, project(self.basis, white))
        return eqx.tree_at(
            lambda p: (p.mean, p.white_pull), self, (full, pull.astype(jnp.float32)), is_leaf=lambda x: x is None
        )


class LowRank(_Stretched):
    """Σ = diag(scale²) + F Fᵀ: a diagonal, and a few directions that reach further.

    Args:
        scale: standard deviations s, a pytree like the parameters (scalars or full leaves), positive.
        factors: F, a pytree like the parameters whose leaves have shape (rank, *leaf shape).
        mean: μ, an offset from the anchor; None for zero, or a pytree like the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> proposal = LowRank(scale=1e-6, factors=jnp.array([[3.0, 4.0]]))
        >>> x, y = proposal.draw(jax.random.key(0), jnp.zeros(2)).direction
        >>> print(f"{y / x:.3f}")  # along (3, 4)
        1.333
    """

    def __init__(self, scale: Any, factors: PyTree, mean: Any = None) -> None:
        """Take the singular part of S⁻¹F once, so that a ray costs two products with a D × rank matrix."""
        like = like_row(_checked(factors, "LowRank"))
        with jax.enable_x64(True):
            parts = tree.broadcast_to(scale, like, "LowRank scale")
            white = jax.tree.map(lambda f, s: wide(f) / _leading(_rounded(s)), factors, parts)
        super().__init__(scale, white, False, mean)


class LowRankPrecision(_Stretched):
    """Σ⁻¹ = diag(precision) + V Vᵀ: a diagonal, and a few directions that are stiffer.

    What a tempered posterior has: with eigenpairs (λ, u) of the curvature, V = √(βλ) u shortens the stiff directions.

    Args:
        precision: a pytree like the parameters (scalars or full leaves), positive.
        factors: V, a pytree like the parameters whose leaves have shape (rank, *leaf shape).
        mean: μ, an offset from the anchor; None for zero, or a pytree like the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> proposal = LowRankPrecision(precision=1.0, factors=jnp.array([[4e6, 3e6]]))
        >>> x, y = proposal.draw(jax.random.key(0), jnp.zeros(2)).direction
        >>> print(f"{y / x:.3f}")  # across (4, 3)
        -1.333
    """

    def __init__(self, precision: Any, factors: PyTree, mean: Any = None) -> None:
        """Take the singular part of S V once, so that a ray costs two products with a D × rank matrix."""
        like = like_row(_checked(factors, "LowRankPrecision"))
        with jax.enable_x64(True):
            parts = tree.broadcast_to(precision, like, "LowRankPrecision precision")
            scale = jax.tree.map(lambda p: _rounded(1.0 / jnp.sqrt(wide(p))), parts)
            white = jax.tree.map(lambda v, s: wide(v) * _leading(s), factors, scale)
            scale = jax.tree.map(lambda s: s.astype(jnp.float32), scale)
        super().__init__(scale, white, True, mean)


def _decompose(white: PyTree, invert: bool) -> tuple[PyTree, Array, Array]:
    """Return U in float32 as rows, the stretch of each, and the log determinant of the stretching."""
    with jax.enable_x64(True):
        basis = _orthonormal(_orthonormal(white))
        # Rows of `white` are R times those of the basis, so the squares of its singular values are those of R.
        _, g, axes = jnp.linalg.svd(gram(white, basis))
        basis = jax.tree.map(lambda u: mix_rows(axes, u).astype(jnp.float32), basis)
        stretch = ((1.0 + g * g) ** (-0.5 if invert else 0.5)).astype(jnp.float32)
        excess = wide(stretch) - 1.0
        matrix = jnp.eye(g.shape[0], dtype=jnp.float64) + excess[:, None] * gram(basis, basis)
        return basis, stretch, jnp.linalg.slogdet(matrix)[1].astype(jnp.float32)


def _orthonormal(rows: PyTree) -> PyTree:
    """Return orthonormal rows with the same span, zeros where rows depend on each other.

    By the eigenvectors of the correlations: once is accurate to the condition of the rows, twice to rounding.
    """
    square = jnp.diagonal(gram(rows, rows))
    size = jnp.where(square > 0.0, jnp.sqrt(square), 1.0)
    unit = jax.tree.map(lambda r: r / over_rows(size, r), rows)
    share, axes = jnp.linalg.eigh(gram(unit, unit))
    new = share > _DEPENDENT * share.shape[0]
    mix = jnp.where(new, 1.0 / jnp.sqrt(jnp.where(new, share, 1.0)), 0.0)[:, None] * axes.T
    return jax.tree.map(lambda r: mix_rows(mix, r), unit)


def _rounded(x: Any) -> Array:
    return wide(jnp.asarray(x).astype(jnp.float32))


def _leading(s: Array) -> Array:
    return s if s.ndim == 0 else s[None]


def _checked(factors: PyTree, name: str) -> PyTree:
    leaves = jax.tree.leaves(factors)
    ranks = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(ranks) != 1 or ranks & {(), (0,)}:
        raise ValueError(
            f"{name} factors must be a pytree like the parameters with leaves of shape (rank, *leaf shape), got shapes "
            f"{[jnp.shape(leaf) for leaf in leaves]}; stack the factors along a new first axis"
        )
    return factors
