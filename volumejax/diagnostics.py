"""How far a set of importance weights can be trusted. Log weights in nats, float64 throughout."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from scipy.special import betaincinv

__all__ = [
    "ChainMean",
    "certified_lower",
    "chain_mean",
    "effective_sample_size",
    "log_mean_error",
    "log_share_upper",
    "pareto_k",
    "pareto_k_limit",
    "skewed_mean_error",
    "split_r_hat",
]

_FEWEST = 25
"""With fewer weights the tail fit has under five points and says nothing."""


def effective_sample_size(log_weights: Float[Array | np.ndarray, "rays"]) -> Float[Array | np.ndarray, ""]:
    """Return Kish's effective sample size, (Σw)²/Σw²; 0 where every weight is 0."""
    with jax.enable_x64(True):
        xp = _namespace(log_weights)
        w = _relative(log_weights)
        square = xp.sum(w * w)
        return xp.asarray(xp.where(square > 0.0, xp.sum(w) ** 2 / xp.where(square > 0.0, square, 1.0), 0.0))


def log_mean_error(log_weights: Float[Array | np.ndarray, "rays"]) -> Float[Array, ""]:
    """Return the standard error of log mean w, sd(w)/(√n · mean w); +inf for a single ray or zero weights."""
    with jax.enable_x64(True):
        n = log_weights.shape[0]
        w = _relative(log_weights)
        mean = jnp.mean(w)
        if n < 2:
            return jnp.full((), jnp.inf, jnp.float64)
        error = jnp.std(w, ddof=1) / (math.sqrt(n) * jnp.where(mean > 0.0, mean, 1.0))
        return jnp.where(mean > 0.0, error, jnp.inf)


def skewed_mean_error(log_weights: Float[np.ndarray, "weights"]) -> float:
    """Return the standard error of log mean w for a few skewed weights; +inf where one is zero.

    The larger of `log_mean_error` and of what log-normal weights of this scatter s would have, √((e^{s²} − 1)/n): of
    sixteen such weights the largest is seldom seen, and at s = 1 the first alone is a third too small.
    """
    x = np.asarray(log_weights, np.float64)
    if len(x) < 2 or not np.all(np.isfinite(x)):
        return math.inf
    # In NumPy, since it is asked of many cutoffs, and JAX takes eight times as long op by op.
    w = np.exp(x - x.max())
    with np.errstate(over="ignore"):
        unevenness = max(float(np.var(w, ddof=1) / np.mean(w) ** 2), float(np.expm1(np.var(x, ddof=1))))
    return math.sqrt(unevenness / len(x))


def split_r_hat(groups: Float[np.ndarray, "groups draws"]) -> float:
    """Return the potential scale reduction of groups of draws, each split in two; NaN for fewer than four draws.

    Reference: Gelman, Carlin, Stern, Dunson, Vehtari & Rubin, Bayesian Data Analysis, 3rd ed., §11.4.
    """
    half = groups.shape[1] // 2
    if half < 2:
        return math.nan
    halves = np.concatenate([groups[:, :half], groups[:, -half:]]).astype(np.float64)
    within = float(np.mean(np.var(halves, axis=1, ddof=1)))
    between = float(np.var(np.mean(halves, axis=1), ddof=1))
    if within == 0.0:
        return 1.0 if between == 0.0 else math.inf
    return math.sqrt((half - 1) / half + between / within)


class ChainMean(NamedTuple):
    """The mean of correlated draws of several chains, with its standard error and the evidence for it."""

    mean: float
    std_error: float
    ess: float
    """Effective sample size: the number of independent draws that would know the mean as well."""
    r_hat: float


def chain_mean(draws: Float[np.ndarray, "chains draws"]) -> ChainMean:
    """Return the mean over chains and draws, and how well it is known.

    The autocorrelation is estimated over all chains, against the variance between and within them, and cut by Geyer's
    initial monotone sequence. The error is the larger of what that says and of the chains' own scatter about their
    mean, which also holds what is slower than a chain is long.

    References: Geyer, Statistical Science 7, 473 (1992); Vehtari, Gelman, Simpson, Carpenter & Bürkner, Bayesian
    Analysis 16, 667 (2021), eq. 10 and 11.

    Example:
        >>> import numpy as np
        >>> answer = chain_mean(np.random.default_rng(0).normal(size=(4, 1000)))
        >>> bool(abs(answer.mean) < 4 * answer.std_error), bool(0.01 < answer.std_error < 0.04)
        (True, True)
    """
    x = np.asarray(draws, np.float64)
    chains, count = x.shape
    mean = float(x.mean())
    if count < 4 or not np.all(np.isfinite(x)):
        return ChainMean(mean, math.inf, math.nan, math.nan)
    centred = x - x.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, 2 * count, axis=1)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)[:, :count].mean(axis=0) / count
    between = float(np.var(x.mean(axis=1), ddof=1)) if chains > 1 else 0.0
    total = float(covariance[0]) + between
    if total == 0.0:
        return ChainMean(mean, 0.0, float(x.size), 1.0)
    correlation = 1.0 - (covariance[0] - covariance) / total
    pairs = correlation[: 2 * (count // 2)].reshape(-1, 2).sum(axis=1)
    stop = np.flatnonzero(pairs <= 0.0)
    pairs = np.minimum.accumulate(pairs[: int(stop[0]) if stop.size else len(pairs)])
    time = max(2.0 * float(np.sum(pairs)) - 1.0, 1.0 / math.log10(max(x.size, 10)))
    error = math.sqrt(total * time / x.size)
    scatter = math.sqrt(between / chains)
    std_error = max(error, scatter)
    return ChainMean(mean, std_error, total / std_error**2, split_r_hat(x))


def pareto_k_limit(num_rays: int) -> float:
    """Return the k-hat above which n weights cannot support a standard error, min(0.7, 1 − 1/log10 n).

    Reference: Vehtari, Simpson, Gelman, Yao & Gabry, "Pareto smoothed importance sampling", JMLR 2024, §3.2.4.
    """
    return min(0.7, 1.0 - 1.0 / math.log10(num_rays)) if num_rays > 1 else -math.inf


def pareto_k(log_weights: Float[Array | np.ndarray, "rays"], resolution: ArrayLike = 0.0) -> Float[Array, ""]:
    """Return k-hat, the shape of a generalised Pareto distribution fitted to the largest weights.

    The fit is the empirical Bayes estimate of Zhang & Stephens (Technometrics 2009) to the min(n/5, 3√n) largest
    weights, shrunk towards 1/2 by ten pseudo-observations as in Vehtari et al. (JMLR 2024).

    Args:
        log_weights: log importance weights, in nats.
        resolution: how well each of them is known, in nats; a tail narrower than that is no tail.

    Returns:
        k-hat: −inf where the largest weights are equal; +inf where nothing can be fitted (fewer than 25 weights, a NaN
        or +inf among them, or a tail threshold below the smallest float64 relative to the largest weight).
    """
    with jax.enable_x64(True):
        n = log_weights.shape[0]
        if n < _FEWEST:
            return jnp.full((), jnp.inf, jnp.float64)
        tail = math.ceil(min(0.2 * n, 3.0 * math.sqrt(n)))
        x = jnp.asarray(log_weights).astype(jnp.float64)
        w = jnp.sort(_relative(x))
        threshold = w[n - tail - 1]
        excess = w[n - tail :] - threshold
        ordered = jnp.sort(x)
        flat = ordered[-1] - ordered[n - tail - 1] <= jnp.maximum(resolution, 64.0 * jnp.finfo(jnp.float64).eps)
        top = jnp.max(x)
        fits = jnp.isfinite(top) & (threshold > jnp.finfo(jnp.float64).tiny) & (excess[-1] > 0.0)
        k = _fit_shape(jnp.where(fits, excess, jnp.arange(1.0, tail + 1.0)))
        k = jnp.where(jnp.isfinite(k), k, jnp.inf)
        return jnp.where(jnp.isfinite(top) & flat, -jnp.inf, jnp.where(fits, k, jnp.inf))


def certified_lower(
    log_weights: Float[Array | np.ndarray, "rays"], probability: float = 0.05
) -> Float[Array | np.ndarray, ""]:
    r"""Return a lower bound on log E[w] that fails with at most `probability`, whatever the distribution of w ≥ 0.

    For blocks of fixed size the product of B block means has expectation (E w)^B, so by Markov's inequality
    log E w ≥ (1/B) Σ log(block mean) − log(1/p)/B with probability 1 − p. Three block sizes, n, about √n and 1, share
    the allowance equally; the best of the three counts.
    """
    n = log_weights.shape[0]
    sizes = sorted({1, math.isqrt(n), n})
    penalty = math.log(len(sizes) / probability)
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        xp = _namespace(log_weights)
        x = xp.append(xp.asarray(log_weights).astype(xp.float64), -np.inf)
        bounds = []
        for size in sizes:
            blocks = n // size
            edges = np.array([round(i * n / blocks) for i in range(blocks + 1)])
            members = edges[:-1, None] + np.arange(np.max(np.diff(edges)))
            # What sticks out of a shorter block is the weight 0 at the end.
            rows = x[np.where(members < edges[1:, None], members, n)]
            top = xp.max(rows, axis=1, keepdims=True)
            safe = xp.where(xp.isfinite(top), top, 0.0)
            log_sums = safe[:, 0] + xp.log(xp.sum(xp.exp(rows - safe), axis=1))
            bounds.append(xp.mean(log_sums - np.log(np.diff(edges))) - penalty / blocks)
        return xp.asarray(xp.max(xp.stack(bounds)))


def log_share_upper(passing: int, draws: int, probability: float = 0.05) -> float:
    """Return the log of Clopper and Pearson's upper limit for a share, which fails with at most `probability`.

    Example:
        >>> round(log_share_upper(0, 300), 2)  # log of about 3/300
        -4.61
    """
    if passing == draws:
        return 0.0
    return float(np.log(betaincinv(passing + 1, draws - passing, 1.0 - probability)))


def _namespace(log_weights: Array | np.ndarray) -> Any:
    """Return NumPy for what lies on the host, where JAX would take a hundred times as long op by op; else jax.numpy."""
    return np if isinstance(log_weights, np.ndarray) else jnp


def _relative(log_weights: Array | np.ndarray) -> Any:
    """Return the weights over their maximum; zeros where every weight is 0."""
    xp = _namespace(log_weights)
    x = xp.asarray(log_weights).astype(xp.float64)
    top = xp.max(x)
    return xp.exp(x - xp.where(xp.isneginf(top), 0.0, top))


def _fit_shape(excess: Float[Array, "tail"]) -> Float[Array, ""]:
    """Return the regularised shape of a generalised Pareto distribution from ascending excesses."""
    count = excess.shape[0]
    grid = 30 + math.isqrt(count)
    i = jnp.arange(1, grid + 1, dtype=jnp.float64)
    quartile = excess[max(int(count / 4.0 + 0.5) - 1, 0)]
    quartile = jnp.where(quartile > 0.0, quartile, jnp.finfo(jnp.float64).tiny)
    b = 1.0 / excess[-1] + (1.0 - jnp.sqrt(grid / (i - 0.5))) / (3.0 * quartile)
    shapes = jnp.mean(jnp.log1p(-b[:, None] * excess[None, :]), axis=1)
    profile = count * (jnp.log(-b / shapes) - shapes - 1.0)
    weight = jax.nn.softmax(jnp.where(jnp.isnan(profile), -jnp.inf, profile))
    b_hat = jnp.sum(jnp.where(weight > 0.0, b * weight, 0.0))
    k = jnp.mean(jnp.log1p(-b_hat * excess))
    return (count * k + 10.0 * 0.5) / (count + 10.0)
