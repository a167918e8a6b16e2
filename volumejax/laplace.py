r"""The quadratic model of the region at the anchor, under the prior: an instant baseline, and never a bound.

.. math:: C(\theta_0 + S\delta) \approx C(\theta_0) + \tfrac12 \delta^\top H \delta, \quad
          H = S\,\nabla^2 C(\theta_0)\,S, \quad \delta \sim N(-b, I), \quad b = S^{-1}(\theta_0 - m)

with S the prior's σ. The region is then {Σ λᵢ χ²₁(bᵢ²) ≤ 2(ε − C(θ0))}, λ being the eigenvalues of H and bᵢ the
prior's offset along its eigenvectors; under Lebesgue measure it is an ellipsoid. The gradient is taken to vanish, and
directions of no or negative curvature to be free.

Source: the Laplace approximation, with its Gaussian integral replaced by the exact tail; stochastic Lanczos quadrature
after Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 38, 1075 (2017).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree
from numpy.typing import NDArray

from volumejax import exact, tree
from volumejax.frames import Frame, frame_of
from volumejax.hessian import hessian_product
from volumejax.lanczos import lanczos
from volumejax.parallel import require_threefry
from volumejax.priors import UniformBall, UniformBox
from volumejax.results import BoundKind, Kind, VolumeEstimate
from volumejax.spectrum import Rule, SpectrumTrace, gauss, gauss_radau
from volumejax.tails import LogMass, chi_square_measure, weighted_chi_square
from volumejax.validation import check_question, named

__all__ = ["DenseSpectrum", "LanczosSpectrum", "laplace_volume"]

Vector = NDArray[np.float64]
Product = Callable[[PyTree], PyTree]

_DENSE = 1_000
"""Dimension up to which the whole spectrum is computed unless told otherwise."""
_PROBE_KEY = 0
_ROUNDING = 8.0
"""Rounding of a curvature product, in units of float32 and of the largest curvature."""


class DenseSpectrum(eqx.Module):
    """All eigenvalues, from a D×D matrix: D curvature products and D³ operations.

    Args:
        batch_size: columns at a time.
    """

    batch_size: int = eqx.field(static=True, default=64)

    def __check_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"DenseSpectrum batch_size must be at least 1, got {self.batch_size}")


class LanczosSpectrum(eqx.Module):
    """Quadrature rules from a few random probes: no matrix, `num_probes`·`num_steps` curvature products.

    The Gauss and Gauss–Radau rules of a probe bracket its answer. The standard error is that of random vectors for a
    spectrum of this shape.

    Args:
        num_probes: random vectors. The standard error of log det H is √(2 Var(log λ)·D/num_probes).
        num_steps: k of each; the basis takes 4·k·D bytes. The bracket's width falls like e^{−4k/√κ}, κ being the
            condition number of H, or of 1 + H·(slope/cutoff) under a Gaussian prior, where small curvatures do not
            matter.
        floor: a number that no curvature of the cost lies below, such as a weight decay, in nats per squared unit of
            the parameters; the bracket narrows with it. None: zero under a Gaussian prior, and under Lebesgue measure
            2·10⁻⁶ of the largest, below which a curvature cannot be told from rounding and would count as flat.
    """

    num_probes: int = eqx.field(static=True, default=8)
    num_steps: int = eqx.field(static=True, default=80)
    floor: float | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.num_probes < 1 or self.num_steps < 1:
            raise ValueError(
                f"LanczosSpectrum needs a probe and a step or more, got {self.num_probes} and {self.num_steps}"
            )
        if self.floor is not None and not (math.isfinite(self.floor) and self.floor >= 0.0):
            raise ValueError(f"LanczosSpectrum floor must be zero or a positive number, got {self.floor}")


class _Measure(NamedTuple):
    """Curvatures, the number of directions that each stands for, and their total noncentrality."""

    nodes: Vector
    counts: Vector
    noncentrality: Vector


def laplace_volume(
    key: Key[Array, ""],
    cost: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    prior: Any,
    *,
    cutoff: float,
    spectrum: DenseSpectrum | LanczosSpectrum | None = None,
    product: Product | None = None,
) -> VolumeEstimate:
    """Return the log mass of the quadratic model of the region: exact for a quadratic cost at its minimum.

    For the host. `kind` is MODEL: real regions are wider or narrower than the quadratic, by thousands of nats for
    networks, and nothing here says in which direction.

    Args:
        key: typed threefry key, for the probes of `LanczosSpectrum`.
        cost: params -> scalar nats, twice differentiable.
        params: the anchor, a minimum of the cost, D numbers in all; `status` says where a gradient is left out.
        prior: `Gaussian`, or `Lebesgue` for a log volume.
        cutoff: ε in nats, above C(θ0).
        spectrum: `DenseSpectrum()` or `LanczosSpectrum(…)`; None takes the first up to D = 1,000.
        product: vector -> H·vector, pytrees like `params`, float32 and symmetric, in place of the Hessian of the cost:
            of a Gauss–Newton matrix, for instance, which has no negative curvature.

    Returns:
        A `VolumeEstimate` without bounds, with a `SpectrumTrace`; NumPy float64 leaves. `std_error` joins the probes'
        error with half the width of the bracket; 0 for a dense spectrum. Under Lebesgue measure a flat direction makes
        it +inf.

    Raises:
        ValueError: arguments that do not fit each other, or a uniform prior, whose walls no quadratic has.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> ball = lambda w: 0.5 * jnp.sum(w**2)
        >>> estimate = vj.laplace_volume(jax.random.key(0), ball, jnp.zeros(10), vj.Gaussian(1.0), cutoff=0.01)
        >>> print(f"{estimate.log_mass:.6f} {estimate.kind == vj.Kind.MODEL}")
        -27.821675 True

    Reference: docs/mathematics.md, "The quadratic model".
    """
    key = require_threefry(key)
    if isinstance(prior, UniformBall | UniformBox):
        raise ValueError(
            f"laplace_volume knows no walls, and {type(prior).__name__} has some; use vj.Gaussian, or vj.Lebesgue and "
            "subtract the log volume of the support where the region lies well inside"
        )
    if not isinstance(spectrum, DenseSpectrum | LanczosSpectrum | None):
        raise ValueError(f"spectrum must be DenseSpectrum or LanczosSpectrum, got {named(spectrum)}")
    params, _ = check_question(cost, params, prior, cutoff)
    if spectrum is None:
        spectrum = DenseSpectrum() if tree.size(params) <= _DENSE else LanczosSpectrum()
    room = float(cutoff) - float(_value(cost, params))
    if not room > 0.0:
        raise ValueError(f"the cost at the anchor leaves nothing of the cutoff {cutoff:g}; raise it")
    frame = frame_of(prior, params)
    whitened = _Whitened(hessian_product(cost, params) if product is None else product, frame.scale)
    model = _Model(frame, room)
    if isinstance(spectrum, DenseSpectrum):
        answer, error, trace = _dense(model, whitened, spectrum)
    else:
        answer, error, trace = _lanczos(model, whitened, spectrum, key)
    trace = dataclasses.replace(trace, descent=np.asarray(float(_descent(cost, params, whitened)) / room))
    prior_term = float(prior.anchor_term(params))
    scalars = {
        "log_mass": answer, "std_error": error, "lower": -np.inf, "upper": 0.0 if prior.proper else np.inf,
        "prior_term": prior_term, "volume_term": answer - prior_term,
    }  # fmt: skip
    unknown = ("mean_log_weight", "std_log_weight", "max_log_weight", "ess", "pareto_k", "noise")
    values: dict[str, Any] = {
        name: np.asarray(value, np.float64) for name, value in (scalars | dict.fromkeys(unknown, np.nan)).items()
    }
    return VolumeEstimate(
        **values,
        kind=np.asarray(Kind.MODEL, np.int32),
        bound_kind=np.asarray(BoundKind.NONE, np.int32),
        hysteresis=np.full(2, np.nan),
        scout_evaluations=np.asarray(0, np.int32),
        num_rays=spectrum.num_probes if isinstance(spectrum, LanczosSpectrum) else 0,
        region="quadratic model",
        trace=trace,
    )


@eqx.filter_jit
def _value(cost: Callable[[PyTree], Float[Array, ""]], params: PyTree) -> Float[Array, ""]:
    return cost(params)


@eqx.filter_jit
def _descent(cost: Callable[[PyTree], Float[Array, ""]], params: PyTree, product: "_Whitened") -> Float[Array, ""]:
    """Return by how much the quadratic with its gradient falls along that, ½ (g·g)²/(g·Hg), in nats."""
    slope = jax.tree.map(lambda g, s: s * g.astype(jnp.float32), jax.grad(cost)(params), product.scale)
    with jax.enable_x64(True):
        square, curvature = tree.dot(slope, slope), tree.dot(slope, product(slope))
        steepest = jnp.where(square > 0.0, jnp.inf, 0.0)
        return jnp.where(curvature > 0.0, 0.5 * square**2 / jnp.where(curvature > 0.0, curvature, 1.0), steepest)


class _Whitened(eqx.Module):
    """A product in whitened coordinates."""

    product: Product
    scale: PyTree

    def __call__(self, vector: PyTree) -> PyTree:
        product = self.product(jax.tree.map(lambda v, s: s * v, vector, self.scale))
        return jax.tree.map(lambda p, s: s * p.astype(jnp.float32), product, self.scale)


class _Model:
    """The prior, the room between the cost at the anchor and the cutoff, and the answer for a spectrum."""

    def __init__(self, frame: Frame, room: float) -> None:
        self.frame, self.room = frame, room
        self.dimension = tree.size(frame.anchor)
        self.log_unit = float(frame.offset)
        scale = np.concatenate([np.ravel(np.asarray(s, np.float64)) for s in jax.tree.leaves(frame.scale)])
        self.narrowest = float(scale.min())

    @property
    def is_flat(self) -> bool:
        """Whether the prior is Lebesgue measure."""
        return self.frame.pull is None

    def log_mass(self, measure: _Measure) -> LogMass:
        """Return the log mass, and slope, of Σ λᵢ χ²(bᵢ²) ≤ 2·room, or the log volume of the ellipsoid.

        Whole counts of one take the exact series or contour, fractions the contour alone.
        """
        felt = (measure.nodes > 0.0) & ((measure.counts > 0.0) | (measure.noncentrality > 0.0))
        nodes, counts, offsets = (x[felt] for x in measure)
        if self.is_flat:
            if np.sum(counts) < self.dimension * (1.0 - 1e-9):
                return LogMass(math.inf, math.nan)
            sphere = exact.ellipsoid(np.ones(self.dimension), cutoff=self.room)
            return LogMass(self.log_unit + sphere.log_mass - 0.5 * self.log_det(measure), sphere.slope)
        if not felt.any():
            return LogMass(0.0, 0.0)
        if np.all(counts == 1.0):
            return weighted_chi_square(nodes, offsets, 2.0 * self.room)
        return chi_square_measure(nodes, counts, offsets, 2.0 * self.room)

    def probe_error(self, measure: _Measure, slope: float, num_probes: int) -> float:
        """Return the standard error of log mass from the mean of that many probes, to first order.

        log mass is log E e^{−uQ} at the saddle, u·x being the slope: tr f with f = −½ log(1 + 2uλ), or −½ log λ under
        Lebesgue measure. For v uniform on the sphere of radius √D the variance of vᵀf(H)v is 2D²/(D+2) times that of f
        over the spectrum, which is far better known than the scatter of a few probes.
        """
        felt = measure.nodes > 0.0
        counts, nodes = measure.counts[felt], measure.nodes[felt]
        f = -0.5 * (np.log(nodes) if self.is_flat else np.log1p(slope / self.room * nodes))
        # Flat directions have f = 0.
        mean = counts @ f / self.dimension
        variance = max(counts @ np.square(f) / self.dimension - mean**2, 0.0)
        return float(math.sqrt(2.0 * self.dimension**2 / (self.dimension + 2) * variance / num_probes))

    def log_det(self, measure: _Measure) -> float:
        """Return Σ log λ."""
        felt = measure.nodes > 0.0
        return float(measure.counts[felt] @ np.log(measure.nodes[felt]))


def _dense(model: _Model, product: Product, spectrum: DenseSpectrum) -> tuple[float, float, SpectrumTrace]:
    anchor, dimension = model.frame.anchor, model.dimension
    matrix = np.asarray(_matrix(product, anchor, min(spectrum.batch_size, dimension)), np.float64)
    if not np.all(np.isfinite(matrix)):
        raise ValueError("the curvature at the anchor is NaN or infinite; the cost must be twice differentiable there")
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    pull = np.zeros(dimension) if model.is_flat else np.asarray(ravel_pytree(model.frame.pull)[0], np.float64)
    offsets = np.square(vectors.T @ pull)
    noise = _noise(values) if np.any(matrix - np.diag(np.diag(matrix))) else 0.0
    clean = np.where(values > noise, values, 0.0)
    measure = _Measure(clean, np.ones(dimension), offsets)
    answer = model.log_mass(measure).log_mass
    log_det = model.log_det(measure) - 2.0 * (model.log_unit if model.is_flat else 0.0)
    trace = SpectrumTrace(
        nodes=clean,
        counts=np.ones(dimension),
        bracket=np.full(2, answer),
        log_det=np.full(2, log_det if model.is_flat else np.nan),
        probe_error=np.asarray(0.0),
        floor=np.asarray(np.nan),
        products=np.asarray(dimension),
        negative=np.asarray(values[0] if values[0] < -_noise(values) else 0.0),
    )
    return answer, 0.0, trace


def _noise(values: Vector) -> float:
    """Return below what an eigenvalue is a zero: products are rounded to float32."""
    return _ROUNDING * float(np.finfo(np.float32).eps) * float(np.max(np.abs(values)))


@eqx.filter_jit
def _matrix(product: Product, anchor: PyTree, batch_size: int) -> Float[Array, "D D"]:
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), anchor))

    def column(index: Array) -> Array:
        return ravel_pytree(product(unravel(jnp.zeros_like(flat).at[index].set(1.0))))[0]

    return jax.lax.map(column, jnp.arange(flat.size), batch_size=batch_size)


def _lanczos(
    model: _Model, product: Product, spectrum: LanczosSpectrum, key: Key[Array, ""]
) -> tuple[float, float, SpectrumTrace]:
    key = jax.random.fold_in(key, _PROBE_KEY)
    runs = [
        lanczos(product, tree.normal_like(jax.random.fold_in(key, i), model.frame.anchor), spectrum.num_steps)
        for i in range(spectrum.num_probes)
    ]
    if not all(np.all(np.isfinite(run.diagonal)) for run in runs):
        raise ValueError("the curvature at the anchor is NaN or infinite; the cost must be twice differentiable there")
    rules = [gauss(run) for run in runs]
    noise = _noise(np.concatenate([rule.nodes for rule in rules]))
    floor = None if spectrum.floor is None else spectrum.floor * model.narrowest**2
    if floor is None:
        floor = 2.0 * noise if model.is_flat else 0.0
    pinned = [gauss_radau(run, floor) for run in runs]
    pull, anew = [], 0
    if not model.is_flat and (square := float(tree.dot(model.frame.pull, model.frame.pull))) > 0.0:
        run = lanczos(product, model.frame.pull, spectrum.num_steps)
        pull, anew = [(square, gauss(run), gauss_radau(run, floor))], len(run.diagonal)
    offsets = [[(square, rules_of[which]) for square, *rules_of in pull] for which in (0, 1)]

    # The even derivatives of −½ log(1 + 2uλ) are positive and the odd ones negative: Gauss is the lower side here, as
    # for the negative log det, and for the noncentral part alike.
    sides = [
        model.log_mass(_joined(model, side, own, noise)) for side, own in zip((rules, pinned), offsets, strict=True)
    ]
    bracket = np.sort([side.log_mass for side in sides])
    measure = _joined(model, rules, offsets[0], noise)
    finite = bool(bracket[1] < np.inf)
    probe_error = model.probe_error(measure, sides[0].slope, len(rules)) if finite else 0.0
    dets = [model.log_det(_joined(model, side, [], noise)) - 2.0 * model.log_unit for side in (pinned, rules)]
    lowest = min(float(rule.nodes[0]) for rule in rules)
    trace = SpectrumTrace(
        nodes=measure.nodes,
        counts=measure.counts,
        bracket=bracket,
        log_det=np.array(dets) if model.is_flat else np.full(2, np.nan),
        probe_error=np.asarray(probe_error),
        floor=np.asarray(floor),
        products=np.asarray(sum(len(run.diagonal) for run in runs) + anew),
        negative=np.asarray(lowest if lowest < -noise else 0.0),
    )
    middle, half = float(np.mean(bracket)), 0.5 * float(bracket[1] - bracket[0]) if finite else 0.0
    return middle, probe_error + half, trace


def _joined(model: _Model, rules: list[Rule], offsets: list[tuple[float, Rule]], noise: float) -> _Measure:
    """Return the spectrum that the probes' rules stand for in the mean, and the prior's offset over it."""
    nodes = [np.where(rule.nodes > noise, rule.nodes, 0.0) for rule in (*rules, *(rule for _, rule in offsets))]
    counts = [model.dimension / len(rules) * rule.weights for rule in rules]
    counts += [np.zeros_like(rule.nodes) for _, rule in offsets]
    shares = [np.zeros_like(rule.nodes) for rule in rules]
    shares += [square * rule.weights for square, rule in offsets]
    return _Measure(np.concatenate(nodes), np.concatenate(counts), np.concatenate(shares))
