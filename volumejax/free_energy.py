"""Free-energy differences from works, and what samples of several temperatures say together. NumPy, float64."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp

__all__ = [
    "acceptance_ratio",
    "log_cover",
    "log_mixture",
    "log_pieces",
    "log_total_mass",
    "overlap",
    "ratio_influences",
]

Vector = NDArray[np.float64]
_ROUNDS, _CLOSE = 100, 1e-11
"""Steps at most, and the relative length of the last one."""
_NEAREST, _NEAREST_SHARE = 24, 8
"""Samples nearest below a cutoff whose density counts: so many, or this part of all below it."""
_STEEP, _POINTS = 3.0, 65
"""Nats by which weights rise over these for it to count, and points at which the weights are taken."""
_UNEVEN = 4.0
"""By how many roots of them the samples just before may be more or fewer."""


def acceptance_ratio(forward: Vector, backward: Vector, guess: Vector | None = None) -> Vector:
    r"""Return Bennett's estimate of ΔF = −log Z'/Z between neighbouring ensembles, for many pairs at once.

    It solves Σ f(W_F − ΔF + log n_F/n_B) = Σ f(W_B + ΔF − log n_F/n_B), with f the logistic function of the negative.
    The left side grows with ΔF and the right side falls: Newton's method on the difference of their logarithms, which
    is nearly linear, and bisection where it does not get on. Works of +inf count as misses.

    Args:
        forward: works of the map from the first ensemble, shape (..., n_F); NaN marks what is absent.
        backward: works of the inverse map from the second, shape (..., n_B).
        guess: where to start, shape (...), e.g. from nearly the same works.

    Returns:
        ΔF in nats, shape (...); +inf or −inf where one side has no finite work at all, NaN where neither has.

    Reference: Bennett, J. Comput. Phys. 22, 245 (1976); with maps Jarzynski, Phys. Rev. E 65, 046122 (2002).
    """
    present_f, present_b = ~np.isnan(forward), ~np.isnan(backward)
    count_f, count_b = present_f.sum(-1), present_b.sum(-1)
    shift = np.log(np.maximum(count_f, 1)) - np.log(np.maximum(count_b, 1))
    finite_f, finite_b = np.isfinite(forward), np.isfinite(backward)
    w_f, w_b = np.where(finite_f, forward, np.inf), np.where(finite_b, backward, np.inf)
    reach = (
        1.0
        + np.abs(shift)
        + sum(np.max(np.where(finite, np.abs(works), 0.0), -1) for finite, works in ((finite_f, w_f), (finite_b, w_b)))
    )
    low, high = -2.0 * reach - 50.0, 2.0 * reach + 50.0
    has_f, has_b = finite_f.any(-1), finite_b.any(-1)
    known = has_f & has_b
    middle = np.zeros_like(reach) if guess is None else np.clip(np.nan_to_num(guess), low, high)
    length, done = high - low, ~known
    for _ in range(_ROUNDS):
        offset = (middle - shift)[..., None]
        left, right = expit(offset - w_f), expit(-offset - w_b)
        sum_l, sum_r = left.sum(-1), right.sum(-1)
        below = sum_l < sum_r
        low, high = np.where(below, middle, low), np.where(below, high, middle)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = 2.0 - (left * left).sum(-1) / sum_l - (right * right).sum(-1) / sum_r
            newton = middle - (np.log(sum_l) - np.log(sum_r)) / slope
            gets_on = (newton >= low) & (newton <= high) & (np.abs(newton - middle) <= 0.5 * length)
        following = np.where(gets_on, newton, 0.5 * (low + high))
        length, middle = np.abs(following - middle), np.where(done, middle, following)
        done = done | (length <= _CLOSE * (1.0 + np.abs(middle)))
        if np.all(done):
            break
    return np.where(known, middle, np.where(has_f, -np.inf, np.where(has_b, np.inf, np.nan)))


def ratio_influences(forward: Vector, backward: Vector, difference: Vector) -> tuple[Vector, Vector]:
    """Return by how much each work pulls Bennett's estimate up or down, to first order; 0 for what is absent.

    Works far apart from each other leave the estimate anywhere between them: none pulls further than half its way
    there, and half a nat.

    Args:
        forward: as for `acceptance_ratio`.
        backward: as for `acceptance_ratio`.
        difference: its result, shape (...).

    Returns:
        Influences in nats, shaped like the works; at the solution they sum to zero, but for that limit.
    """
    present_f, present_b = ~np.isnan(forward), ~np.isnan(backward)
    shift = np.log(np.maximum(present_f.sum(-1), 1)) - np.log(np.maximum(present_b.sum(-1), 1))
    offset = (difference - shift)[..., None]
    left = np.where(present_f, expit(offset - np.where(present_f, forward, np.inf)), 0.0)
    right = np.where(present_b, expit(-offset - np.where(present_b, backward, np.inf)), 0.0)
    slope = np.sum(left * (1.0 - left), -1) + np.sum(right * (1.0 - right), -1)
    slope = np.where(slope > 0.0, slope, np.inf)[..., None]
    d = difference[..., None]
    return tuple(
        np.clip(pull, -limit, limit)
        for pull, limit in (
            (-left / slope, 0.5 * (1.0 + np.where(present_f, np.abs(forward - d), 0.0))),
            (right / slope, 0.5 * (1.0 + np.where(present_b, np.abs(backward + d), 0.0))),
        )
    )  # pyright: ignore[reportReturnType]


def overlap(forward: Vector, backward: Vector, difference: Vector) -> Vector:
    """Return how alike two neighbouring ensembles are, between 0 and 1: the mean Metropolis probability of the map."""
    d = difference[..., None]

    def mean(works: Vector) -> Vector:
        present = ~np.isnan(works)
        kept = np.exp(np.minimum(0.0, -np.where(present, works, np.inf)))
        return np.sum(kept, -1) / np.maximum(np.sum(present, -1), 1)

    return 0.5 * (mean(forward - d) + mean(backward + d))


def log_mixture(costs: Vector, betas: Vector, counts: Vector, log_z: Vector) -> Vector:
    """Return log Σ_k N_k exp(−β_k C − log Z_k) of each sample, shape (samples,): how densely all rungs cover it.

    Costs may be several, shape (samples, guides), each with a β of its own, shape (rungs, guides).
    """
    energies = costs[:, None] * betas if costs.ndim == 1 else costs @ betas.T
    return log_cover(energies, counts, log_z)


def log_cover(energies: Vector, counts: Vector, log_z: Vector) -> Vector:
    """Return log Σ_k N_k exp(−E_k − log Z_k), shape (samples,), of energies of shape (samples, rungs)."""
    used = (counts > 0) & np.isfinite(log_z)
    if not used.any():
        return np.full(len(energies), np.nan)
    return np.asarray(logsumexp(np.log(counts[used]) - energies[:, used] - log_z[used], axis=1))


def log_total_mass(
    costs: Vector, reaches: Vector, betas: Vector, counts: Vector, log_z: Vector, cutoffs: Vector
) -> Vector:
    r"""Return log Σ 1{reach ≤ ε}/Σ_k N_k exp(−β_k C − log Z_k): the measure at β = 0 of each region, from all samples.

    Where the cost confines many directions, only samples within a nat or so of the cutoff count, and there may be none.
    Then they are taken to be as evenly spread there as the nearest of them are on the whole, if their density does not
    change over twice that distance: it is smooth on the scale of their scatter, which is far larger.

    Args:
        costs: of all samples, shape (samples,), or (samples, guides).
        reaches: what has to stay below the cutoff, shape (samples,).
        betas: temperatures, shape (rungs,), or (rungs, guides).
        counts: samples at each, shape (rungs,).
        log_z: log normalisers, shape (rungs,).
        cutoffs: ε, shape (cutoffs,).

    Returns:
        Log measures, shape (cutoffs,); −inf where no sample lies within, NaN where no normaliser is known.

    Reference: Shirts & Chodera, J. Chem. Phys. 129, 124105 (2008), with the normalisers given.
    """
    if not len(reaches):
        return np.full(len(cutoffs), -np.inf)
    log_density = log_mixture(costs, betas, counts, log_z)
    if np.any(np.isnan(log_density)):
        return np.full(len(cutoffs), np.nan)
    order = np.argsort(reaches)
    ordered, log_cumulative = reaches[order], np.logaddexp.accumulate(-log_density[order])
    places = np.searchsorted(ordered, cutoffs, side="right")
    masses = np.where(places > 0, log_cumulative[np.maximum(places, 1) - 1], -np.inf)
    if not np.array_equal(costs, reaches):
        return masses
    for i, (place, cutoff) in enumerate(zip(places, cutoffs, strict=True)):
        nearest = max(_NEAREST, place // _NEAREST_SHARE)
        rest = place - nearest
        if rest <= 0:
            continue
        low = float(np.mean(ordered[rest - 1 : rest + 1]))
        before = rest - np.searchsorted(ordered, 2.0 * low - cutoff)
        if abs(before - nearest) >= _UNEVEN * np.sqrt(nearest):
            continue
        grid = np.linspace(low, cutoff, _POINTS)
        log_weights = -log_mixture(grid, betas, counts, log_z)
        if log_weights[-1] - log_weights[0] > _STEEP:
            even = np.log(nearest / (cutoff - low)) + float(np.logaddexp.reduce(log_pieces(log_weights, grid)))
            masses[i] = np.logaddexp(log_cumulative[rest - 1], even)
    return masses


def log_pieces(logs: Vector, x: Vector) -> Vector:
    """Return log ∫ e^logs dx between neighbouring points along the last axis, the logs linear between them."""
    rises = np.maximum(np.abs(np.diff(logs)), 1e-9)
    return np.maximum(logs[..., :-1], logs[..., 1:]) + np.log(np.diff(x) * -np.expm1(-rises) / rises)
