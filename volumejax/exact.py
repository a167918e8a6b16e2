"""Exact log masses of the regions of ``volumejax.reference``, in float64 on the host.

Each family takes the arguments of its reference problem and returns the log mass of {C ≤ cutoff}, in nats,
with its slope d log mass / d log cutoff. Invalid arguments raise a ValueError.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from volumejax.tails import (
    LogMass,
    Numbers,
    log_gamma_p,
    log_total,
    stage_survival,
    weighted_chi_square,
    weighted_log_gamma,
)

__all__ = [
    "TANH_RULE",
    "ellipsoid",
    "normal_crossing",
    "quadratic",
    "rank_one",
    "shell",
    "shell_star",
    "tanh_gain",
    "tanh_neuron",
]

Vector = NDArray[np.float64]


def quadratic(h: Numbers, *, cutoff: float, sigma: float = 1.0, minimum: Numbers = 0.0) -> LogMass:
    """Return log Pr(½ Σ hᵢ(wᵢ−aᵢ)² ≤ cutoff) for w ~ N(0, σ²I).

    It is Pr(Σ hᵢσ² χ²₁(aᵢ²/σ²) ≤ 2 cutoff), whatever happens along directions with hᵢ = 0.

    Args:
        h: curvatures, shape (D,), non-negative.
        cutoff: ε > 0, in nats.
        sigma: the prior's standard deviation.
        minimum: a, a scalar or shape (D,).

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.quadratic([1.0, 0.5, 0.0], cutoff=0.1).log_mass, 6)
        -2.029874
    """
    h = _curvatures(h)
    _require_positive(cutoff, "cutoff")
    _require_positive(sigma, "sigma")
    noncentrality = np.broadcast_to(np.square(np.asarray(minimum, np.float64) / sigma), h.shape)
    felt = h > 0
    if not felt.any():
        return LogMass(0.0, 0.0)
    return weighted_chi_square(h[felt] * sigma**2, noncentrality[felt], 2.0 * cutoff)


def ellipsoid(h: Numbers, *, cutoff: float) -> LogMass:
    """Return the log volume of {½ Σ hᵢwᵢ² ≤ ε}, log V_D + (D/2) log 2ε − ½ Σ log hᵢ, for hᵢ > 0.

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.ellipsoid([2.0, 2.0], cutoff=1.0).log_mass, 6)  # the unit disc, log π
        1.14473
    """
    h = _curvatures(h)
    _require_positive(cutoff, "cutoff")
    if not np.all(h > 0):
        raise ValueError("an ellipsoid with some h = 0 has infinite volume; drop the flat directions")
    half = 0.5 * h.size
    return LogMass(float(_log_ball(h.size) + half * np.log(2.0 * cutoff) - 0.5 * np.log(h).sum()), half)


def normal_crossing(k: Numbers, *, cutoff: float, gaussian: bool = False) -> LogMass:
    """Return log Pr(Π wᵢ^{2kᵢ} ≤ cutoff) for w uniform on [0, 1]^d, or w ~ N(0, I) if `gaussian`.

    Uniform: −log cost is a sum of exponentials with rates 1/(2kᵢ). Gaussian: a product of powers of χ²₁
    variables.

    Args:
        k: exponents, shape (d,), positive.
        cutoff: ε > 0.
        gaussian: the prior, as above.

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.normal_crossing((1, 1), cutoff=1e-2).slope, 4)
        0.3486
    """
    k = np.atleast_1d(np.asarray(k, np.float64))
    _require_positive(cutoff, "cutoff")
    if k.ndim != 1 or k.size == 0 or not np.all(k > 0):
        raise ValueError(f"k must be a vector of positive exponents, got {k}; drop directions with k = 0")
    if gaussian:
        return weighted_log_gamma(np.full(k.shape, 0.5), k, np.log(cutoff))
    return LogMass(0.0, 0.0) if cutoff >= 1.0 else stage_survival(0.5 / k, -np.log(cutoff))


def rank_one(m: int, n: int, *, cutoff: float) -> LogMass:
    """Return log Pr(|a|²|b|² ≤ cutoff) for a ~ N(0, I_m) and b ~ N(0, I_n).

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.rank_one(4, 4, cutoff=1e-6).log_mass, 6)
        -28.419346
    """
    return _product_mass(m, n, cutoff, lambda t: 2.0 * t)


def tanh_neuron(m: int, n: int, *, cutoff: float) -> LogMass:
    """Return log Pr(|a|² g(|b|) ≤ cutoff) for b ~ N(0, I_m), a ~ N(0, I_n) and g = `tanh_gain`.

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.tanh_neuron(2400, 2410, cutoff=1e-2).log_mass, 6)
        -13712.664885
    """

    def log_gain(t: Vector) -> Vector:
        # g = ρ²(1 − 2ρ² + …): below t = −18 the correction is lost in rounding.
        return np.where(t < -18.0, 2.0 * t, np.log(tanh_gain(np.exp(np.maximum(t, -18.0)))))

    return _product_mass(m, n, cutoff, log_gain)


TANH_RULE = (0.25 * np.arange(81), np.where(np.arange(81) == 0, 0.25, 0.5))
"""Nodes and weights of a trapezoid rule for an even function on the whole line; see `tanh_gain`."""


def tanh_gain(rho: Numbers) -> Vector:
    """Return g(ρ) = E tanh²(ρz), z ~ N(0, 1), for ρ ≥ 0 of any shape, to about 1e-14 relative.

    The trapezoid rule converges geometrically: in z for ρ ≤ 1, and on 1 − g = E sech²(ρz) in ρz for larger ρ.

    Example:
        >>> import volumejax.exact as ve
        >>> round(float(ve.tanh_gain(1.0)), 6)
        0.394294
    """
    rho = np.asarray(rho, np.float64)
    nodes, weights = TANH_RULE
    normal = weights / np.sqrt(2.0 * np.pi)
    low, high = np.minimum(rho, 1.0)[..., None], np.maximum(rho, 1.0)[..., None]
    small = np.tanh(low * nodes) ** 2 @ (normal * np.exp(-0.5 * nodes**2))
    spread = np.exp(-0.5 * (nodes / high) ** 2) @ (normal / np.cosh(nodes) ** 2)
    return np.where(rho <= 1.0, small, 1.0 - spread / high[..., 0])


def shell(dimension: int, *, cutoff: float, gaussian: bool = False) -> LogMass:
    """Return the log mass of {(|w|²−1)² ≤ cutoff}: a log volume, or under N(0, I) if `gaussian`.

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.shell(3, cutoff=1e-2).log_mass, 6)
        0.228022
    """
    _check_shell(dimension, cutoff)
    s = np.sqrt(cutoff)
    ends = np.array([max(1.0 - s, 0.0), 1.0 + s])
    log_mass = float(_log_shell(dimension, ends[:1], ends[1], gaussian)[0])
    # From s = 1 on the inner end stays at zero and no longer moves with the cutoff.
    log_density = _log_square_density(dimension, ends[ends > 0], gaussian)
    return LogMass(log_mass, float(0.5 * s * np.exp(log_density - log_mass).sum()))


def shell_star(dimension: int, *, cutoff: float, gaussian: bool = False) -> LogMass:
    """Return the log mass of the part of the shell that is seen from e₁ along straight lines; see `shell`.

    Only the inner ball, of radius i = √(1−√ε), blocks the view. With α the angle from e₁ at the origin: up to
    α₁ = arccos i the whole shell is seen, beyond it the part with |w| ≥ i / cos(α − α₁), above the line that
    touches the inner ball. The slope is a central difference.

    Example:
        >>> import volumejax.exact as ve
        >>> round(ve.shell_star(3, cutoff=1e-2).log_mass, 6)
        -2.105309
    """
    _check_shell(dimension, cutoff)
    if cutoff >= 1.0:
        return shell(dimension, cutoff=cutoff, gaussian=gaussian)
    step = 1e-4
    moved = [np.sqrt(min(cutoff * np.exp(shift), 1.0)) for shift in (-step, 0.0, step)]
    below, here, above = (_log_star(dimension, s, gaussian) for s in moved)
    return LogMass(here, float(0.5 * (above - below) / np.log(moved[2] / moved[0])))


def _log_star(dimension: int, s: float, gaussian: bool) -> float:
    tangent = np.arctan2(np.sqrt(s), np.sqrt(1.0 - s))
    last = tangent + np.arctan2(np.sqrt(2.0 * s), np.sqrt(1.0 - s))
    parts = []
    for start, stop in ((0.0, tangent), (tangent, last)):
        angle, log_weight = _panels(start, stop)
        inner = (1.0 - s) / np.cos(np.maximum(angle - tangent, 0.0)) ** 2
        log_shell = _log_shell(dimension, np.minimum(inner, 1.0 + s), 1.0 + s, gaussian)
        parts.append(log_weight + (dimension - 2) * np.log(np.sin(angle)) + log_shell)
    log_normaliser = gammaln(0.5 * dimension) - gammaln(0.5 * (dimension - 1)) - 0.5 * np.log(np.pi)
    return float(log_total(np.concatenate(parts)) + log_normaliser)


def _log_shell(dimension: int, low: Vector, high: float, gaussian: bool) -> Vector:
    """Return the log mass of {low ≤ |w|² ≤ high}, an array like `low`."""
    half = 0.5 * dimension
    with np.errstate(divide="ignore"):
        if gaussian:
            top, bottom = log_gamma_p(half, 0.5 * high), log_gamma_p(half, 0.5 * low)
        else:
            unit = _log_ball(dimension)
            top, bottom = unit + half * np.log(high), unit + half * np.log(low)
        return top + np.log(-np.expm1(bottom - top))


def _log_square_density(dimension: int, square: Vector, gaussian: bool) -> Vector:
    """Return the log density of |w|²."""
    half = 0.5 * dimension
    if gaussian:
        return (half - 1.0) * np.log(square) - 0.5 * square - half * np.log(2.0) - gammaln(half)
    return _log_ball(dimension) + np.log(half) + (half - 1.0) * np.log(square)


def _panels(start: float, stop: float, num_panels: int = 500, order: int = 20) -> tuple[Vector, Vector]:
    """Return nodes and log weights of a composite Gauss-Legendre rule."""
    x, w = np.polynomial.legendre.leggauss(order)
    half = 0.5 * (stop - start) / num_panels
    centres = start + half * (2.0 * np.arange(num_panels) + 1.0)
    return (centres[:, None] + half * x).ravel(), np.tile(np.log(half * w), num_panels)


def _product_mass(m: int, n: int, cutoff: float, log_gain: Callable[[Vector], Vector]) -> LogMass:
    """Return log Pr(|a|² g(|b|) ≤ cutoff) for b ~ N(0, I_m) and a ~ N(0, I_n).

    By the trapezoid rule in t = log |b|. `log_gain(t)` is log g: increasing, at first like 2t. So the
    integrand is at most e^{m(t−first)} below the first node, and above the last one the chi density alone
    makes it negligible. A coarse pass finds where the mass is.
    """
    _require_positive(cutoff, "cutoff")
    if min(m, n) < 1:
        raise ValueError(f"m and n must be at least 1, got {m} and {n}")

    def log_terms(t: Vector) -> tuple[Vector, Vector]:
        rho = np.exp(t)
        log_chi = (1.0 - 0.5 * m) * np.log(2.0) - gammaln(0.5 * m) + m * t - 0.5 * rho**2
        y = np.exp(np.minimum(np.log(0.5 * cutoff) - log_gain(t), 700.0))
        return log_chi + log_gamma_p(0.5 * n, y), log_chi + 0.5 * n * np.log(y) - y - gammaln(0.5 * n)

    first, last = 0.5 * np.log(min(cutoff / n, 1.0)) - 50.0, np.log(np.sqrt(m) + 10.0)
    coarse = np.linspace(first, last, 2000)
    height = log_terms(coarse)[0]
    kept = np.flatnonzero(height > height.max() - 60.0)
    low, high = coarse[max(kept[0] - 1, 0)], coarse[min(kept[-1] + 1, coarse.size - 1)]
    t = np.linspace(low, high, 2 + int((high - low) * 10.0 * np.sqrt(m + n)))
    log_mass, log_density = (log_total(terms) + float(np.log(t[1] - t[0])) for terms in log_terms(t))
    return LogMass(min(log_mass, 0.0), float(np.exp(log_density - log_mass)))


def _log_ball(dimension: int) -> float:
    return 0.5 * dimension * np.log(np.pi) - gammaln(0.5 * dimension + 1.0)


def _curvatures(h: Numbers) -> Vector:
    h = np.atleast_1d(np.asarray(h, np.float64))
    if h.ndim != 1 or h.size == 0 or not np.all(np.isfinite(h) & (h >= 0)):
        raise ValueError("h must be a vector of finite curvatures, none below zero; clip it at zero")
    return h


def _check_shell(dimension: int, cutoff: float) -> None:
    _require_positive(cutoff, "cutoff")
    if dimension < 2:
        raise ValueError(f"a shell of dimension {dimension} is two intervals; use dimension 2 or more")


def _require_positive(value: float, name: str) -> None:
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}; give a number above zero")
