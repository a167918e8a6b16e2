r"""The radial integral that turns a radius into a volume.

.. math:: \mathrm{radial}(D, a, b, R) = \log \int_0^R r^{D-1} \exp(-a r^2/2 + b r)\, dr

The exponent f(r) = (D−1) log r − a r²/2 + b r is concave, so all the mass lies in one window around its mode.
The window is bounded in closed form and integrated by Gauss–Legendre panels on both sides of the mode, relative
to the peak: nothing cancels or overflows, for D from 1 to 10¹².
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = ["radial", "radial_and_slope", "radial_mode"]

_DROP = 40.0
"""The window ends where the integrand has fallen by at least this many nats: e⁻⁴⁰ is below float64's epsilon."""


def _graded_rule(cuts: tuple[float, ...] = (0.0, 1 / 16, 1 / 4, 1.0), order: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Return a composite Gauss–Legendre rule on [0, 1], finest at 0 where the mode sits.

    One long panel would place its first nodes with an absolute error of one epsilon of the window, which a drop of 40
    nats multiplies by 40.
    """
    x, w = np.polynomial.legendre.leggauss(order)
    halves = [(low, (high - low) / 2) for low, high in itertools.pairwise(cuts)]
    nodes = np.concatenate([low + half * (1 + x) for low, half in halves])
    return nodes, np.concatenate([half * w for _, half in halves])


_NODES, _WEIGHTS = _graded_rule()


def radial(D: ArrayLike, a: ArrayLike, b: ArrayLike, R: ArrayLike) -> Float[Array, "*shape"]:
    """Return log ∫_0^R r^{D−1} exp(−a r²/2 + b r) dr in float64.

    The error is below 16·2⁻⁵³·(D(1 + |log ρ|) + aρ² + |b|ρ) with ρ the smaller of R and the integrand's peak.
    Differentiable in a, b and R.

    Args:
        D: dimension, at least 1.
        a: curvature of the exponent, a ≥ 0.
        b: slope of the exponent, of either sign.
        R: upper limit, 0 ≤ R ≤ ∞.

    Returns:
        The logarithm, in nats; the arguments broadcast. −inf at R = 0, +inf where the integral diverges
        (R = ∞ with a = 0 and b ≥ 0), NaN where an argument is NaN or out of range.

    Example:
        >>> import volumejax.radial as vr
        >>> float(vr.radial(3, 0.0, 0.0, 2.0))  # log(2³/3)
        0.9808292530117262
    """
    with jax.enable_x64(True):
        wide = [jnp.asarray(x).astype(jnp.float64) for x in (D, a, b, R)]
        shape = jnp.broadcast_shapes(*(x.shape for x in wide))
        return _radial(*(jnp.broadcast_to(x, shape) for x in wide))


def radial_and_slope(D: ArrayLike, a: ArrayLike, b: ArrayLike, R: ArrayLike) -> tuple[Array, Array]:
    """Return `radial(D, a, b, R)` and its derivative by log R, which is 0 at R = ∞ and D at R = 0."""
    with jax.enable_x64(True):
        D, a, b, R = (jnp.asarray(x).astype(jnp.float64) for x in (D, a, b, R))
        shape = jnp.broadcast_shapes(*(x.shape for x in (D, a, b, R)))
        D, a, b, R = (jnp.broadcast_to(x, shape) for x in (D, a, b, R))
        log_integral, _, _, density = _moments(D, a, b, R)
        bounded = jnp.isfinite(R) & (R > 0.0)
        slope = jnp.where(bounded, jnp.where(bounded, R, 1.0) * jnp.where(bounded, density, 0.0), 0.0)
        return log_integral, jnp.where(R == 0.0, D, slope)


def radial_mode(D: ArrayLike, a: ArrayLike, b: ArrayLike) -> Float[Array, "*shape"]:
    """Return the r ≥ 0 that maximises (D−1) log r − a r²/2 + b r, +inf where there is no maximum."""
    with jax.enable_x64(True):
        D, a, b = (jnp.asarray(x).astype(jnp.float64) for x in (D, a, b))
        n = D - 1.0
        # hypot, and the square roots taken apart, keep b² and a·n from overflowing.
        root = jnp.hypot(b, 2.0 * jnp.sqrt(a) * jnp.sqrt(n))
        up = (jnp.abs(b) + root) / 2.0
        rising = b >= 0.0
        top = jnp.where(rising, up, n)
        bottom = jnp.where(rising, a, up)
        return jnp.where(bottom > 0.0, top / jnp.where(bottom > 0.0, bottom, 1.0), jnp.inf)


@jax.custom_jvp
def _radial(D: Array, a: Array, b: Array, R: Array) -> Array:
    return _moments(D, a, b, R)[0]


@_radial.defjvp
def _radial_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    _, da, db, dR = tangents  # D is a count
    with jax.enable_x64(True):
        log_integral, mean, mean_square, density = _moments(*primals)
        # A tangent of 0 at R = ∞ must stay 0 where the density is 0 as well.
        return log_integral, -0.5 * mean_square * da + mean * db + density * dR


@jax.jit
def _moments(D: Array, a: Array, b: Array, R: Array) -> tuple[Array, Array, Array, Array]:
    """Return the log integral, E[r], E[r²] and the normalised density at R."""
    with jax.enable_x64(True):
        legal = (D >= 1.0) & (a >= 0.0) & (R >= 0.0) & jnp.isfinite(a) & jnp.isfinite(b) & jnp.isfinite(D)
        diverges = jnp.isinf(R) & (a == 0.0) & (b >= 0.0)
        empty = R == 0.0
        ordinary = legal & ~diverges & ~empty
        # Stand-ins keep the unused branch finite.
        D, a, b, R = (jnp.where(ordinary, x, y) for x, y in ((D, 1.0), (a, 1.0), (b, 0.0), (R, 1.0)))
        n = D - 1.0
        mode = jnp.minimum(R, radial_mode(D, a, b))
        at_end = mode >= R
        safe_mode = jnp.where(mode > 0.0, mode, 1.0)
        # At an inner mode the linear terms cancel exactly; what is left of them numerically is rounding.
        slope = jnp.where(at_end | (mode == 0.0), n / safe_mode - a * mode + b, 0.0)
        left, right = _window(n, a, slope, mode)
        left = jnp.minimum(left, mode)
        right = jnp.where(at_end, 0.0, jnp.minimum(right, R - mode))

        offset = functools.partial(_offset, n, a, slope, safe_mode)
        column = (-1,) + (1,) * mode.ndim
        nodes, weights = (jnp.reshape(jnp.asarray(x), column) for x in (_NODES, _WEIGHTS))
        t = jnp.concatenate([-left[None] * nodes, right[None] * nodes])
        values = jnp.concatenate([left[None] * weights, right[None] * weights]) * jnp.exp(jax.vmap(offset)(t))
        total = jnp.sum(values, axis=0)
        peak = jnp.where(n > 0.0, n * jnp.log(safe_mode), 0.0) - 0.5 * (a * mode) * mode + b * mode
        log_integral = peak + jnp.log(total)

        mean_t = jnp.sum(values * t, axis=0) / total
        mean = mode + mean_t
        variance = jnp.sum(values * (t - mean_t[None]) ** 2, axis=0) / total
        gap = jnp.where(jnp.isinf(R), 0.0, R - mode)
        density = jnp.where(jnp.isinf(R), 0.0, jnp.exp(offset(gap)) / total)

        log_integral = jnp.where(empty, -jnp.inf, jnp.where(diverges, jnp.inf, log_integral))
        log_integral = jnp.where(legal, log_integral, jnp.nan)
        at_zero = jnp.where(empty, 0.0, jnp.where(ordinary, 1.0, jnp.nan))
        return log_integral, at_zero * mean, at_zero * (mean * mean + variance), jnp.where(empty, jnp.inf, density)


def _window(n: Array, a: Array, slope: Array, mode: Array) -> tuple[Array, Array]:
    """Return distances to the left and right of the mode at which the exponent has surely dropped by `_DROP`."""
    # Left: log1p(x) − x ≤ −x²/2 gives a drop of at least slope·t + k t²/2.
    # In units of the mode, where neither factor can overflow.
    rise = jnp.maximum(slope, 0.0) * mode
    curvature = n + (a * mode) * mode
    inner = mode > 0.0
    left = mode * 2.0 * _DROP / jnp.where(inner, rise + jnp.sqrt(rise * rise + 2.0 * curvature * _DROP), 1.0)
    # Right: x − log1p(x) ≥ x²/(2 + 4x/3), or the Gaussian, or (for D = 1 with its mode at 0) the linear term.
    spread = 2.0 * _DROP / 3.0 + jnp.sqrt((2.0 * _DROP / 3.0) ** 2 + 2.0 * n * _DROP)
    by_power = jnp.where(n > 0.0, mode * spread / jnp.where(n > 0.0, n, 1.0), jnp.inf)
    by_square = jnp.where(a > 0.0, jnp.sqrt(2.0 * _DROP / jnp.where(a > 0.0, a, 1.0)), jnp.inf)
    by_slope = jnp.where(slope < 0.0, _DROP / jnp.where(slope < 0.0, -slope, 1.0), jnp.inf)
    return left, jnp.minimum(jnp.minimum(by_power, by_square), by_slope)


def _offset(n: Array, a: Array, slope: Array, mode: Array, t: Array) -> Array:
    """Return f(mode + t) − f(mode) without cancellation."""
    x = t / mode
    curved = jnp.where(n > 0.0, n * _log1p_minus(jnp.maximum(x, -1.0)), 0.0)
    return slope * t + curved - 0.5 * (a * t) * t


def _log1p_minus(x: Array) -> Array:
    """Return log(1 + x) − x for x ≥ −1, to full relative accuracy near 0."""
    # log(1+x) = 2 atanh(y), y = x/(2+x), and x = 2y/(1−y): the difference is −x y + 2 Σ y^{2k+1}/(2k+1).
    near = jnp.abs(x) < 0.25
    small = jnp.where(near, x, 0.0)
    y = small / (2.0 + small)
    y2 = y * y
    series = jnp.zeros_like(y)
    for k in range(11, 0, -1):
        series = (series + 1.0 / (2 * k + 1)) * y2
    by_series = 2.0 * y * series - small * y
    far = jnp.where(near, 1.0, x)
    return jnp.where(near, by_series, jnp.log1p(far) - far)
