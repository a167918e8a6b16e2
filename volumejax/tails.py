r"""Left-tail probabilities in log space, in float64 on the host.

Every sum here is of terms of one sign, or runs along a path of steepest descent, so that a log probability of
−10⁶ is as good as one of −1. Each function returns the log probability with its slope, d log probability / d
log x.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root_scalar
from scipy.special import digamma, gammaincc, gammaln, loggamma, polygamma, xlogy

__all__ = [
    "LogMass",
    "Numbers",
    "chi_square_contour",
    "chi_square_measure",
    "chi_square_series",
    "log_gamma_p",
    "log_total",
    "stage_survival",
    "weighted_chi_square",
    "weighted_log_gamma",
]

Numbers = float | int | Sequence[float | int] | NDArray[Any] | jax.Array
"""What a vector, or a scalar, may be given as."""

Vector = NDArray[np.float64]
ComplexVector = NDArray[np.complex128]


class LogMass(NamedTuple):
    """The log of a mass in nats, and its derivative with respect to the log of the threshold."""

    log_mass: float
    slope: float


def log_total(log_terms: Vector) -> float:
    """Return the log of a sum of non-negative terms, from their logs.

    Example:
        >>> import numpy as np, volumejax.tails as vt
        >>> round(vt.log_total(np.array([-1000.0, -1000.0])) + 1000.0, 6)
        0.693147
    """
    peak = np.max(log_terms)
    if peak == -np.inf:
        return float(peak)
    return float(peak + np.log(np.exp(log_terms - peak).sum()))


def log_gamma_p(a: float, x: Numbers) -> Vector:
    """Return the log of the regularised lower incomplete gamma function P(a, x).

    The positive series where x < a + 1, which never underflows; SciPy's complement above. The error is about
    1e-15·(1 + a |log a|), absolute.

    Args:
        a: the order, a > 0.
        x: the limit, x ≥ 0, any shape.

    Example:
        >>> import volumejax.tails as vt
        >>> round(float(vt.log_gamma_p(500.0, 1.0)), 4)
        -2612.3285
    """
    x = np.asarray(x, np.float64)
    out = np.empty(x.shape)
    high = x >= a + 1.0
    out[high] = np.log1p(-gammaincc(a, x[high]))
    low = x[~high]
    term, total, k = np.ones_like(low), np.ones_like(low), 0
    while np.any(term > 1e-17 * total):
        k += 1
        term = term * low / (a + k)
        total += term
    with np.errstate(divide="ignore"):
        out[~high] = a * np.log(low) - low - gammaln(a + 1.0) + np.log(total)
    return out


def weighted_chi_square(weights: Numbers, noncentrality: Numbers, x: float) -> LogMass:
    """Return log Pr(Σ λᵢ χ²₁(δᵢ²) ≤ x), by whichever exact method is quickest.

    Equal weights without noncentrality are an incomplete gamma function. Otherwise Ruben's series if it is
    short, and the contour integral if not. The error of the logarithm is about 1e-12 + 1e-15·n.

    Args:
        weights: λ > 0, shape (n,).
        noncentrality: δ² ≥ 0, shape (n,).
        x: the threshold, x > 0.

    Example:
        >>> import volumejax.tails as vt
        >>> round(vt.weighted_chi_square([1.0, 2.0], [0.0, 3.0], 0.01).log_mass, 6)
        -7.144891
    """
    weights, noncentrality = np.asarray(weights, np.float64), np.asarray(noncentrality, np.float64)
    if np.ptp(weights) == 0 and not noncentrality.any():
        a, y = 0.5 * weights.size, 0.5 * x / weights[0]
        log_mass = float(log_gamma_p(a, y))
        return LogMass(log_mass, float(np.exp(a * np.log(y) - y - gammaln(a) - log_mass)))
    return chi_square_series(weights, noncentrality, x) or chi_square_contour(weights, noncentrality, x)


def chi_square_series(weights: Numbers, noncentrality: Numbers, x: float, *, max_terms: int = 4000) -> LogMass | None:
    r"""Return log Pr(Q ≤ x) for Q = Σ λᵢ χ²₁(δᵢ²) by Ruben's series, or None if that is long.

    .. math::

        \Pr(Q \le x) = \sum_k a_k F_{n+2k}(x/\beta) = \sum_j p_j \sum_{k \le j} a_k, \quad
        p_j = \frac{(x/2\beta)^{n/2+j} e^{-x/2\beta}}{\Gamma(n/2+j+1)}

    with β the smallest weight, so that the aₖ are a probability distribution and nothing cancels. Because Σ
    aₖ = 1, the terms beyond J add at most Σ_{j>J} pⱼ; J is chosen beforehand so that this is below e⁻⁴⁰ of
    a₀p₀ ≤ Pr(Q ≤ x).

    Args:
        weights: λ > 0, shape (n,).
        noncentrality: δ² ≥ 0, shape (n,).
        x: the threshold, x > 0.
        max_terms: the largest J that is worth while.

    References:
        H. Ruben, Ann. Math. Statist. 33, 542 (1962).

    Example:
        >>> import volumejax.tails as vt
        >>> answer = vt.chi_square_series([1.0, 2.0], [0.0, 3.0], 0.01)
        >>> answer and round(answer.log_mass, 6)
        -7.144891
    """
    lam, count, delta = _group(weights, noncentrality)
    beta, nu, y = lam[0], 0.5 * count.sum(), 0.5 * x / lam[0]
    order = nu + np.arange(max_terms + 1)
    log_p = order * np.log(y) - y - gammaln(order + 1.0)
    log_a0 = 0.5 * (np.sum(count * np.log(beta / lam)) - delta.sum())
    ratio = y / (order + 1.0)  # p_{j+1}/p_j, and a bound on all later ratios
    log_remainder = log_p + np.log(ratio) - np.log1p(-np.minimum(ratio, 0.9))
    enough = (ratio < 0.9) & (log_remainder < log_a0 + log_p[0] - 40.0)
    num_terms = int(np.argmax(enough)) + 1
    if not enough.any() or num_terms * lam.size > 40_000_000:
        return None

    shrink = 1.0 - beta / lam
    g, power = np.empty(num_terms), np.ones_like(lam)
    for r in range(1, num_terms):
        g[r] = power @ (count * shrink) + r * beta * (power @ (delta / lam))
        power = power * shrink
    a, log_a, log_scale = np.zeros(num_terms), np.full(num_terms, -np.inf), log_a0
    a[0], log_a[0] = 1.0, log_a0
    for k in range(1, num_terms):
        a[k] = g[k:0:-1] @ a[:k] / (2 * k)
        if a[k] > 0:
            log_a[k] = np.log(a[k]) + log_scale
        if a[k] > 1e200:  # earlier terms may vanish from `a`: beside this one they no longer count
            a, log_scale = a * 1e-200, log_scale + 200.0 * np.log(10.0)
    log_p, order = log_p[:num_terms], order[:num_terms]
    log_mass = log_total(log_p + np.logaddexp.accumulate(log_a))
    log_density = log_total(log_p + np.log(order) + log_a)
    return LogMass(min(log_mass, 0.0), float(np.exp(log_density - log_mass)))


def chi_square_contour(weights: Numbers, noncentrality: Numbers, x: float) -> LogMass:
    r"""Return log Pr(Q ≤ x) for Q = Σ λᵢ χ²₁(δᵢ²) by integrating its transform through the saddle point.

    A saddle-point approximation whose integral is done in full instead of expanded: exact for any number and
    spread of weights, in some tens of evaluations. The path s₀ + iτ + cτ² bends like the steepest descent of
    K at the saddle and leaves the singularities, all at real s ≥ 0, to its right.

    Args:
        weights: λ > 0, shape (n,).
        noncentrality: δ² ≥ 0, shape (n,).
        x: the threshold, x > 0.

    References:
        H. E. Daniels, Int. Stat. Rev. 55, 37 (1987); J. A. C. Weideman & L. N. Trefethen, Math. Comp. 76,
        1341 (2007).

    Example:
        >>> import volumejax.tails as vt
        >>> round(vt.chi_square_contour([1.0, 2.0], [0.0, 3.0], 0.01).log_mass, 6)
        -7.144891
    """
    return chi_square_measure(*_group(weights, noncentrality), x)


def chi_square_measure(weights: Numbers, counts: Numbers, noncentrality: Numbers, x: float) -> LogMass:
    r"""Return what `chi_square_contour` does where each weight stands for a number of terms, whole or not.

    A spectrum that is known as a quadrature rule gives such a measure; log E e^{sQ} is linear in it.

    Args:
        weights: λ > 0, shape (n,).
        counts: how many χ² terms have that weight, shape (n,), non-negative.
        noncentrality: their total δ² ≥ 0, shape (n,).
        x: the threshold, x > 0.

    Example:
        >>> import volumejax.tails as vt
        >>> round(vt.chi_square_measure([1.0, 2.0], [10.0, 0.5], [0.0, 3.0], 0.1).log_mass, 6)
        -22.655451
    """
    lam, count, delta = (np.asarray(v, np.float64) for v in (weights, counts, noncentrality))
    lam = lam / x  # the threshold becomes 1

    def cumulant(s: ComplexVector) -> ComplexVector:
        z = 2.0 * lam * s[:, None]
        return np.log1p(-z) @ (-0.5 * count) + (z / (1.0 - z)) @ (0.5 * delta)

    def slope_excess(u: float) -> float:
        q = 1.0 + 2.0 * lam * u
        return float(u * np.sum(lam / q * (count + delta / q)) - u + 1.0)

    highest = 0.5 * count.sum() + delta.sum() / 8.0 + 1.0
    u = _root(slope_excess, 1.0 - 1e-9, highest * (1.0 + 1e-9))
    q = 1.0 + 2.0 * lam * u
    v = 2.0 * lam * u / q
    second = np.sum(v**2 * (0.5 * count + delta / q))  # u²K″ and u³K‴
    third = np.sum(v**3 * (count + 3.0 * delta / q))
    bend = third / (6.0 * second * u)
    return _invert(cumulant, 1.0, saddle=-u, width=u / np.sqrt(second + 1.0), distance=u, bend=bend, cost=lam.size)


def weighted_log_gamma(shapes: Numbers, powers: Numbers, log_x: float) -> LogMass:
    """Return log Pr(Π (2Gᵢ)^pᵢ ≤ x) for independent Gᵢ ~ Gamma(shapeᵢ), from its moments.

    Args:
        shapes: shape (n,), positive; ½ makes 2G the square of a standard normal.
        powers: p > 0, shape (n,).
        log_x: the log of the threshold.

    Example:
        >>> import volumejax.tails as vt
        >>> round(vt.weighted_log_gamma([0.5, 0.5], [1.0, 1.0], -100.0).log_mass, 6)
        -46.517486
    """
    shapes, powers = np.asarray(shapes, np.float64), np.asarray(powers, np.float64)

    def cumulant(s: ComplexVector) -> ComplexVector:
        order = shapes + powers * s[:, None]
        return (loggamma(order) - gammaln(shapes)).sum(-1) + s * powers.sum() * np.log(2.0)

    def slope_excess(s: float) -> float:
        return float(powers @ (np.log(2.0) + digamma(shapes + powers * s)) - log_x - 1.0 / s)

    edge = float(np.min(shapes / powers))
    saddle = _root(slope_excess, -edge * (1.0 - 1e-12), -edge * 1e-12)
    curvature = powers**2 @ polygamma(1, shapes + powers * saddle) + saddle**-2
    distance = min(-saddle, edge + saddle)
    return _invert(cumulant, log_x, saddle=saddle, width=curvature**-0.5, distance=distance, cost=shapes.size)


def stage_survival(rates: Numbers, elapsed: float) -> LogMass:
    """Return log Pr(Σ Eᵢ > t) for independent exponentials Eᵢ with the given rates, repeated or not.

    Uniformisation: the stages are passed one after another at the ticks of a Poisson clock. The slope is the
    hazard, the derivative with respect to −t, the log of a threshold x = e^−t.

    Args:
        rates: shape (n,), positive.
        elapsed: t ≥ 0.

    Example:
        >>> import volumejax.tails as vt
        >>> round(vt.stage_survival([0.5, 0.5], 100.0).log_mass, 6)
        -46.068174
    """
    rates = np.asarray(rates, np.float64)
    clock = float(rates.max())
    mean, move = clock * elapsed, rates / clock
    alive, leaving = np.ones_like(rates), np.zeros_like(rates)
    leaving[-1] = rates[-1]
    num_ticks = int(mean + 12.0 * np.sqrt(mean)) + 60
    survival, density = np.empty(num_ticks), np.empty(num_ticks)
    for tick in range(num_ticks):
        survival[tick], density[tick] = alive[0], leaving[0]
        alive = (1.0 - move) * alive + move * np.append(alive[1:], 0.0)
        leaving = (1.0 - move) * leaving + move * np.append(leaving[1:], 0.0)
    ticks = np.arange(num_ticks)
    log_poisson = xlogy(ticks, mean) - mean - gammaln(ticks + 1.0)
    with np.errstate(divide="ignore"):
        log_mass, log_density = (log_total(log_poisson + np.log(part)) for part in (survival, density))
    return LogMass(min(log_mass, 0.0), float(np.exp(log_density - log_mass)))


def _invert(
    cumulant: Callable[[ComplexVector], ComplexVector],
    x: float,
    *,
    saddle: float,
    width: float,
    distance: float,
    cost: int,
    bend: float = 0.0,
) -> LogMass:
    r"""Return log Pr(X ≤ x), and its derivative in x, from K(s) = log E e^{sX}.

    .. math:: \Pr(X \le x) = \frac{1}{2\pi i} \int e^{\varphi(s)} ds, \quad \varphi(s) = K(s) - s x - \log(-s)

    along s = saddle + iτ + bend·τ², saddle < 0, by the trapezoid rule, in blocks of nodes until the terms
    vanish. The step resolves the peak (`width`) and the nearest singularity (`distance`); `cost` is the
    memory of one node. Along a straight path the integrand only falls; a bend along which it rises meets a
    ridge that the step may not resolve, and is reduced.
    """
    step = min(width / 3.0, distance / 8.0)
    block = int(np.clip(2_000_000 // cost, 8, 1024))
    peak = float(cumulant(np.array([complex(saddle)]))[0].real - saddle * x - np.log(-saddle))
    mass = density = size = 0.0
    last, start = np.inf, 0
    while last > 1e-18 * size:
        index = np.arange(start, start + block)
        tau = step * index
        s = np.asarray(saddle + 1j * tau + bend * tau**2, np.complex128)
        exponent = cumulant(s) - s * x - np.log(-s) - peak
        if bend > 0 and np.any(np.diff(exponent.real[exponent.real > -50.0]) > 1e-6):
            return _invert(cumulant, x, saddle=saddle, width=width, distance=distance, bend=bend / 4.0, cost=cost)
        term = np.exp(exponent) * (1.0 - 2j * bend * tau) * np.where(index == 0, 0.5, 1.0)
        mass += term.sum().real
        density += (-s * term).sum().real
        size += np.abs(term).sum()
        last = float(np.abs(term[-1]))
        start += block
    return LogMass(min(float(peak + np.log(step / np.pi * mass)), 0.0), float(density / mass))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    found = root_scalar(function, bracket=(low, high), method="brentq", xtol=1e-15 * abs(high - low))
    return float(found.root)


def _group(weights: Numbers, noncentrality: Numbers) -> tuple[Vector, Vector, Vector]:
    """Return the distinct weights in rising order, how many have each, and their total noncentrality."""
    distinct, index, count = np.unique(np.asarray(weights, np.float64), return_inverse=True, return_counts=True)
    delta = np.bincount(index, weights=np.asarray(noncentrality, np.float64), minlength=distinct.size)
    return distinct, np.asarray(count, np.float64), np.asarray(delta, np.float64)
