"""Logarithms of sums, differences, means and volumes.

Everything is computed in the float dtype of the arguments (Python numbers take JAX's default). In high
dimension that has to be float64: call inside ``with jax.enable_x64(True):``.
"""

import math

import jax.numpy as jnp
from jax.scipy.special import gammaln, logsumexp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = ["log_ball_volume", "log_mean_exp", "log_sphere_area", "log_sub_exp"]


def log_ball_volume(dimension: ArrayLike, log_radius: ArrayLike = 0.0) -> Float[Array, "*shape"]:
    r"""Return the log volume of a ball.

    .. math:: \log V_D r^D = \tfrac{D}{2} \log \pi - \log \Gamma(\tfrac{D}{2} + 1) + D \log r

    Args:
        dimension: D ≥ 0, a scalar or an array.
        log_radius: log r, of the shape of `dimension` where both are arrays; −∞ gives −∞ for D > 0.

    Returns:
        The log volume in nats. The relative error is a few eps of its largest term: in float32 about 1 nat at
        D = 10⁶.

    Example:
        >>> import jax, volumejax.logmath as lm
        >>> with jax.enable_x64(True):
        ...     print(round(float(lm.log_ball_volume(3)), 12))  # log(4π/3)
        1.432411958301
    """
    dtype = jnp.result_type(float, log_radius)
    D = jnp.asarray(dimension, dtype)
    log_r = jnp.asarray(log_radius, dtype)
    radial_part = jnp.where(D == 0, 0.0, D * jnp.where(D == 0, 0.0, log_r))
    return 0.5 * D * math.log(math.pi) - gammaln(0.5 * D + 1.0) + radial_part


def log_sphere_area(dimension: ArrayLike) -> Float[Array, "*shape"]:
    r"""Return the log area of the unit sphere in D dimensions, :math:`\log(2 \pi^{D/2} / \Gamma(D/2))`.

    Args:
        dimension: D ≥ 1, a scalar or an array; the sphere is the boundary of the D-ball (2 points at D = 1).

    Returns:
        The log area in nats.

    Example:
        >>> import jax, volumejax.logmath as lm
        >>> with jax.enable_x64(True):
        ...     print(round(float(lm.log_sphere_area(3)), 12))  # log 4π
        2.531024246969
    """
    D = jnp.asarray(dimension, jnp.result_type(float))
    return math.log(2.0) + 0.5 * D * math.log(math.pi) - gammaln(0.5 * D)


def log_sub_exp(a: ArrayLike, b: ArrayLike) -> Float[Array, "*shape"]:
    r"""Return :math:`\log(e^a - e^b)` for a ≥ b.

    Args:
        a: the larger logarithm.
        b: the smaller one; −∞ gives a.

    Returns:
        The log of the difference, without overflow and without avoidable cancellation. −∞ where a = b, NaN
        where a < b.

    Example:
        >>> import volumejax.logmath as lm
        >>> round(float(lm.log_sub_exp(1000.0, 999.0)), 3)
        999.541
    """
    dtype = jnp.result_type(float, a, b)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    empty = b == -jnp.inf
    gap = jnp.where(empty, 0.0, jnp.where(empty, 0.0, a) - jnp.where(empty, 0.0, b))
    # log(1 − e^−gap): each form is accurate on its own side of gap = log 2 (Mächler 2012).
    is_near = gap < math.log(2.0)
    near = jnp.log(-jnp.expm1(-jnp.where(is_near, gap, 1.0)))
    far = jnp.log1p(-jnp.exp(-jnp.where(is_near, 1.0, gap)))
    return a + jnp.where(empty, 0.0, jnp.where(is_near, near, far))


def log_mean_exp(x: ArrayLike, axis: int | None = None) -> Float[Array, "*shape"]:
    r"""Return :math:`\log(\tfrac1n \sum_i e^{x_i})` along an axis.

    Args:
        x: logarithms, in nats; −∞ counts as a weight of zero.
        axis: the axis that is averaged away; None for all of them.

    Returns:
        The log of the mean: −∞ where every entry is −∞, NaN where one is NaN.

    Raises:
        ValueError: if there is nothing to average.

    Example:
        >>> import jax.numpy as jnp, volumejax.logmath as lm
        >>> float(lm.log_mean_exp(jnp.array([-1000.0, -1000.0])))
        -1000.0
    """
    x = jnp.asarray(x, jnp.result_type(float, x))
    count = x.size if axis is None else x.shape[axis]
    if count == 0:
        raise ValueError("log_mean_exp of no values; pass at least one")
    return logsumexp(x, axis=axis) - math.log(count)
