"""Problems with a known answer: a cost, a prior, an anchor, a cutoff, and the exact log mass of the region.

The estimators are tested against these, and ``volumejax check`` runs them. The formulas are in
``volumejax.exact``. Where only the learning coefficient is known, from ``volumejax.coefficients``, there is no cutoff.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from volumejax import coefficients, exact, tree
from volumejax.functions import Function
from volumejax.priors import Gaussian, Lebesgue, UniformBox
from volumejax.tails import Numbers

__all__ = [
    "Reference",
    "ReferenceCost",
    "SingularReference",
    "deep_linear",
    "ellipsoid",
    "normal_crossing",
    "quadratic",
    "rank_one",
    "shell",
    "tanh_gain_of_square",
    "tanh_neuron",
]

_FLOAT32_LIMIT = 100_000
"""Above this dimension costs are summed in float64: a relative error η of the cost is Dη/2 nats."""


class ReferenceCost(Function):
    """A closed-form cost, params -> scalar nats: float32 up to D = 100,000, float64 above.

    Args:
        formula: (params, *constants) -> scalar, a module-level function.
        constants: its arrays, traced and not compiled in.
    """

    formula: Callable[..., Float[Array, ""]] = eqx.field(static=True)
    constants: tuple[Array, ...] = ()

    def __call__(self, params: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
        """Return the cost of `params`."""
        if tree.size(params) <= _FLOAT32_LIMIT:
            return self.formula(params, *self.constants)
        with jax.enable_x64(True):
            params, constants = jax.tree.map(lambda x: x.astype(jnp.float64), (params, self.constants))
            return self.formula(params, *constants)


@dataclass(frozen=True)
class Reference:
    """A volume problem and its answer.

    Attributes:
        name: family and size.
        cost: params -> scalar nats.
        params: the anchor, a pytree of float32, where the cost is zero.
        prior: a prior of ``volumejax.priors``.
        cutoff: ε, in nats.
        log_mass: exact log mass of all of {C ≤ ε}; a log volume under Lebesgue.
        star_log_mass: exact log mass of the part that rays from the anchor can see.
        curvature: diagonal of the cost's Hessian at the anchor, like `params`; None where the Hessian
            vanishes.
        learning_coefficient: λ, the slope as ε → 0.
        slope: d log_mass / d log ε at this cutoff.
    """

    name: str
    cost: ReferenceCost
    params: PyTree[Float[Array, "..."]]
    prior: Any
    cutoff: float
    log_mass: float
    star_log_mass: float
    curvature: PyTree[Float[Array, "..."]] | None
    learning_coefficient: float | None
    slope: float | None


@dataclass(frozen=True)
class SingularReference:
    """A cost whose learning coefficient is known and whose volume is not.

    Attributes:
        name: family and size.
        cost: params -> scalar nats.
        params: a true parameter, the most singular one, a pytree of float32, where the cost is zero.
        learning_coefficient: λ.
        multiplicity: m.
    """

    name: str
    cost: ReferenceCost
    params: PyTree[Float[Array, "..."]]
    learning_coefficient: float
    multiplicity: int


def quadratic(h: Numbers, *, cutoff: float, sigma: float = 1.0, minimum: Numbers = 0.0) -> Reference:
    """Return C = ½ Σ hᵢ(wᵢ−aᵢ)² under N(0, σ²I), with the anchor at its minimum.

    Args:
        h: curvatures, shape (D,), non-negative; zeros are flat directions.
        cutoff: ε > 0, in nats.
        sigma: the prior's standard deviation.
        minimum: a, a scalar or shape (D,).

    Example:
        >>> import numpy as np, volumejax.reference as vr
        >>> round(vr.quadratic(np.ones(10), cutoff=0.01).log_mass, 6)
        -27.821675
    """
    answer = exact.quadratic(h, cutoff=cutoff, sigma=sigma, minimum=minimum)
    weights = _vector(h)
    anchor = jnp.broadcast_to(jnp.asarray(minimum, jnp.float32), weights.shape)
    return Reference(
        name=f"quadratic, D={weights.size}",
        cost=ReferenceCost(_quadratic, (weights, anchor)),
        params=anchor,
        prior=Gaussian(sigma),
        cutoff=cutoff,
        log_mass=answer.log_mass,
        star_log_mass=answer.log_mass,
        curvature=weights,
        learning_coefficient=0.5 * int(np.count_nonzero(h)),
        slope=answer.slope,
    )


def ellipsoid(h: Numbers, *, cutoff: float) -> Reference:
    """Return C = ½ Σ hᵢwᵢ² under Lebesgue measure, with the anchor at zero.

    Args:
        h: curvatures, shape (D,), positive.
        cutoff: ε > 0, in nats.

    Example:
        >>> import numpy as np, volumejax.reference as vr
        >>> round(vr.ellipsoid(np.logspace(-3, 2, 100), cutoff=0.01).log_mass, 6)
        -229.277796
    """
    answer = exact.ellipsoid(h, cutoff=cutoff)
    weights = _vector(h)
    return Reference(
        name=f"ellipsoid, D={weights.size}",
        cost=ReferenceCost(_quadratic, (weights, jnp.zeros_like(weights))),
        params=jnp.zeros_like(weights),
        prior=Lebesgue(),
        cutoff=cutoff,
        log_mass=answer.log_mass,
        star_log_mass=answer.log_mass,
        curvature=weights,
        learning_coefficient=0.5 * weights.size,
        slope=answer.slope,
    )


def normal_crossing(k: Numbers, *, cutoff: float, gaussian: bool = False) -> Reference:
    """Return C = Π wᵢ^{2kᵢ} on the unit box, or under N(0, I) if `gaussian`, with the anchor at zero.

    Args:
        k: exponents, shape (d,), positive integers.
        cutoff: ε > 0.
        gaussian: the prior, as above.

    Example:
        >>> import volumejax.reference as vr
        >>> round(vr.normal_crossing((1, 2), cutoff=1e-2).log_mass, 6)
        -0.630256
    """
    answer = exact.normal_crossing(k, cutoff=cutoff, gaussian=gaussian)
    powers = np.atleast_1d(k)
    if not np.array_equal(powers, np.round(powers)):
        raise ValueError(f"k must be integers for a smooth cost, got {k}; round them")
    # Π wᵢ^kᵢ as a product of repeated entries: unlike a power it has all its derivatives at zero.
    repeats = jnp.asarray(np.repeat(np.arange(powers.size), powers.astype(int)))
    return Reference(
        name=f"normal crossing, k={tuple(powers.tolist())}",
        cost=ReferenceCost(_normal_crossing, (repeats,)),
        params=jnp.zeros(powers.size, jnp.float32),
        prior=Gaussian(1.0) if gaussian else UniformBox(0.0, 1.0),
        cutoff=cutoff,
        log_mass=answer.log_mass,
        star_log_mass=answer.log_mass,
        curvature=jnp.full(1, 2.0, jnp.float32) if powers.sum() == 1 else None,
        learning_coefficient=float(0.5 / np.max(k)),
        slope=answer.slope,
    )


def rank_one(m: int, n: int, *, cutoff: float) -> Reference:
    """Return C = |a|²|b|², a ∈ R^m and b ∈ R^n, under N(0, I), with the anchor at zero.

    Args:
        m: size of the leaf "a".
        n: size of the leaf "b".
        cutoff: ε > 0.

    Example:
        >>> import volumejax.reference as vr
        >>> round(vr.rank_one(3, 5, cutoff=1e-2).log_mass, 6)
        -9.565972
    """
    answer = exact.rank_one(m, n, cutoff=cutoff)
    return Reference(
        name=f"rank one, {m} by {n}",
        cost=ReferenceCost(_rank_one),
        params={"a": jnp.zeros(m, jnp.float32), "b": jnp.zeros(n, jnp.float32)},
        prior=Gaussian(1.0),
        cutoff=cutoff,
        log_mass=answer.log_mass,
        star_log_mass=answer.log_mass,
        curvature=None,
        learning_coefficient=0.5 * min(m, n),
        slope=answer.slope,
    )


def tanh_neuron(m: int, n: int, *, cutoff: float) -> Reference:
    """Return C = |a|² g(|b|), the mean over x ~ N(0, I) of |a tanh(b·x)|², under N(0, I), anchored at zero.

    Args:
        m: size of the leaf "b", the input weights.
        n: size of the leaf "a", the output weights.
        cutoff: ε > 0.

    Example:
        >>> import volumejax.reference as vr
        >>> round(vr.tanh_neuron(3, 5, cutoff=1e-2).log_mass, 6)
        -9.471281
    """
    answer = exact.tanh_neuron(m, n, cutoff=cutoff)
    return Reference(
        name=f"tanh neuron, {m} in, {n} out",
        cost=ReferenceCost(_tanh_neuron),
        params={"a": jnp.zeros(n, jnp.float32), "b": jnp.zeros(m, jnp.float32)},
        prior=Gaussian(1.0),
        cutoff=cutoff,
        log_mass=answer.log_mass,
        star_log_mass=answer.log_mass,
        curvature=None,
        learning_coefficient=0.5 * min(m, n),
        slope=answer.slope,
    )


def shell(dimension: int, *, cutoff: float, gaussian: bool = False) -> Reference:
    """Return C = (|w|²−1)² under Lebesgue measure, or N(0, I) if `gaussian`, with the anchor at e₁.

    The region goes round the back of the sphere, where rays from the anchor cannot see: the two log masses
    differ.

    Args:
        dimension: D, at least 2.
        cutoff: ε > 0.
        gaussian: the prior, as above.

    Example:
        >>> import volumejax.reference as vr
        >>> problem = vr.shell(3, cutoff=1e-2)
        >>> round(problem.log_mass, 5), round(problem.star_log_mass, 5)
        (0.22802, -2.10531)
    """
    answer = exact.shell(dimension, cutoff=cutoff, gaussian=gaussian)
    anchor = jnp.zeros(dimension, jnp.float32).at[0].set(1.0)
    return Reference(
        name=f"shell, D={dimension}",
        cost=ReferenceCost(_shell),
        params=anchor,
        prior=Gaussian(1.0) if gaussian else Lebesgue(),
        cutoff=cutoff,
        log_mass=answer.log_mass,
        star_log_mass=exact.shell_star(dimension, cutoff=cutoff, gaussian=gaussian).log_mass,
        curvature=8.0 * anchor,
        learning_coefficient=0.5,
        slope=answer.slope,
    )


def deep_linear(widths: Sequence[int], rank: int, *, scale: float = 1.0) -> SingularReference:
    r"""Return the population loss of a deep linear network, the true map having `rank` singular values of `scale`.

    With Q the product of the layers less the true map, and inputs uniform in the unit ball, whose covariance is
    I/(d_in + 2), the mean square error of an output is

    .. math:: C = \frac{\|Q\|_F^2}{(d_{in} + 2)\,d_{out}} .

    The anchor is balanced: every layer is scale^{1/L} on the first `rank` places of its diagonal and zero elsewhere,
    which makes it the true parameter of least norm too.

    Args:
        widths: [d_in, hidden …, d_out].
        rank: r of the true map.
        scale: its singular values, positive.

    Example:
        >>> import volumejax.reference as vr
        >>> problem = vr.deep_linear([5, 3, 5], 1)
        >>> problem.learning_coefficient, problem.multiplicity, float(problem.cost(problem.params))
        (8.0, 1, 0.0)
    """
    answer = coefficients.deep_linear(widths, rank)
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    sides = list(zip(widths[1:], widths[:-1], strict=True))
    values = jnp.full(rank, scale ** (1.0 / len(sides)), jnp.float32)
    params = {f"w{i}": _corner(values, *side) for i, side in enumerate(sides, start=1)}
    # From the rounded layers, so that the anchor's cost is exactly zero.
    target = _layer_product(params)
    return SingularReference(
        name=f"deep linear, {'-'.join(map(str, widths))}, rank {rank}",
        cost=ReferenceCost(_deep_linear, (target,)),
        params=params,
        learning_coefficient=answer.learning_coefficient,
        multiplicity=answer.multiplicity,
    )


def tanh_gain_of_square(square: Float[Array, ""]) -> Float[Array, ""]:
    """Return g = E tanh²(ρz), z ~ N(0, 1), from ρ²: smooth at zero, where g ≈ ρ².

    The rule of ``exact.tanh_gain`` in the dtype of the argument; relative error about 1e-6 in float32, 1e-13
    in float64. The branches that are not taken see an argument of one, so that gradients stay finite.

    Args:
        square: ρ² ≥ 0.
    """
    nodes, weights = (jnp.asarray(x, square.dtype) for x in exact.TANH_RULE)
    normal = weights / math.sqrt(2.0 * math.pi)
    is_tiny, is_low = square < 1e-5, square <= 1.0
    tiny = square * (1.0 - square * (2.0 - 17.0 / 3.0 * square))
    low = jnp.sqrt(jnp.where(is_tiny | ~is_low, 1.0, square))
    small = jnp.sum(normal * jnp.exp(-0.5 * nodes**2) * jnp.tanh(low * nodes) ** 2)
    high = jnp.sqrt(jnp.where(is_low, 1.0, square))
    spread = jnp.sum(normal / jnp.cosh(nodes) ** 2 * jnp.exp(-0.5 * (nodes / high) ** 2)) / high
    return jnp.where(is_tiny, tiny, jnp.where(is_low, small, 1.0 - spread))


def _quadratic(w: Array, h: Array, minimum: Array) -> Array:
    return 0.5 * jnp.sum(h * jnp.square(w - minimum))


def _normal_crossing(w: Array, repeats: Array) -> Array:
    return jnp.square(jnp.prod(w[repeats]))


def _rank_one(params: dict[str, Array]) -> Array:
    return jnp.sum(jnp.square(params["a"])) * jnp.sum(jnp.square(params["b"]))


def _tanh_neuron(params: dict[str, Array]) -> Array:
    return jnp.sum(jnp.square(params["a"])) * tanh_gain_of_square(jnp.sum(jnp.square(params["b"])))


def _shell(w: Array) -> Array:
    return jnp.square(jnp.sum(jnp.square(w)) - 1.0)


def _deep_linear(params: dict[str, Array], target: Array) -> Array:
    outputs, inputs = target.shape
    return jnp.sum(jnp.square(_layer_product(params) - target)) / ((inputs + 2.0) * outputs)


def _layer_product(params: dict[str, Array]) -> Array:
    layers = [params[f"w{i}"] for i in range(1, len(params) + 1)]
    product = layers[0]
    for layer in layers[1:]:
        product = jnp.matmul(layer, product, precision=jax.lax.Precision.HIGHEST)
    return product


def _corner(values: Array, rows: int, columns: int) -> Array:
    places = jnp.arange(values.size)
    return jnp.zeros((rows, columns), jnp.float32).at[places, places].set(values)


def _vector(values: Numbers) -> Float[Array, " D"]:
    return jnp.atleast_1d(jnp.asarray(np.asarray(values), jnp.float32))
