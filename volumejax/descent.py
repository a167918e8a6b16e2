"""The way from the prior down to a cutoff: the next temperature, and what the levels say about each cutoff. NumPy."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from volumejax.metric import Metric
from volumejax.particles import Ladder, Visit

__all__ = ["Course", "Seen", "Way", "mean_cost", "next_beta", "reduced", "share_done", "share_inside", "useful_levels"]

Vector = NDArray[np.float64]

_USEFUL = 2.0
"""Levels whose samples tell a cutoff's mass with at most this many times the variance of the best are all used."""


class Course(NamedTuple):
    """What the pilot has fixed: the ladder, and which levels tell the mass at which cutoff."""

    ladder: Ladder
    metrics: dict[int, Metric]
    """From which level on each of them is used; ascending."""
    cutoffs: Vector
    """Ascending; the first is the one that was asked for."""
    useful: NDArray[np.bool_]
    """[cutoffs, levels]."""
    gradients: int


class Way:
    """What the pilot has settled so far, level by level."""

    def __init__(self, stiffness: Vector, prior: tuple[Vector, Vector]) -> None:
        """Begin at the prior, with the costs and log weights of its draws."""
        self.betas, self.steps, self.masses, self.seen = [0.0], [0.0], [stiffness], [prior]

    def add(self, beta: float, step: float, stiffness: Vector, visit: Visit) -> None:
        """Keep a level, with the costs and log weights that were seen there."""
        self.betas.append(beta)
        self.steps.append(step)
        self.masses.append(stiffness)
        log_weight = visit.log_weight[0] + visit.log_norm[0][:, None]
        self.seen.append((np.ravel(visit.cost[0]), np.ravel(log_weight)))

    def repeat(self, times: int) -> None:
        """Visit the last level as often again."""
        for kept in (self.betas, self.steps, self.masses, self.seen):
            kept += kept[-1:] * times

    @property
    def ladder(self) -> Ladder:
        """The levels as arrays."""
        return Ladder(np.array(self.betas), np.array(self.steps), np.stack(self.masses))


class Seen(NamedTuple):
    """What a chunk of islands has left."""

    log_masses: Vector
    """[islands, cutoffs]."""
    mean_cost: Vector
    """[islands, levels], and so are the next two."""
    ess: Vector
    acceptance: Vector
    prior_costs: Vector
    """[islands, particles]."""


def _relative(log_weight: Vector) -> Vector:
    """Return weights over the largest of their row; zeros where there is none."""
    return np.exp(log_weight - np.max(log_weight, axis=-1, keepdims=True, initial=-1e300))


def next_beta(beta: float, cost: Vector, log_weight: Vector, most: float, cutoff: float) -> float:
    """Return the next inverse temperature, at which the weights have become as uneven as is allowed.

    Their relative variance is taken as it is and, since few particles do not show it, as for log-normal weights too.
    """
    # Draws whose cost is infinite are lost at the first step, however short.
    own = np.where(np.isfinite(cost), _relative(log_weight), 0.0)
    own = own / np.sum(own)
    excess = np.where(np.isfinite(cost), cost, cost.min()) - cost.min()
    variance = float(own @ (excess - own @ excess) ** 2)

    def unevenness(step: float) -> float:
        gain = np.exp(-step * excess)
        return max(float(own @ gain**2 / (own @ gain) ** 2 - 1.0), step**2 * variance)

    low, high = math.log(1e-12 * max(beta, 1e-12)), math.log(1e12 * max(beta, 1.0))
    if unevenness(math.exp(high)) <= most:
        return max(2.0 * beta, 1.0 / cutoff)
    for _ in range(64):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if unevenness(math.exp(middle)) <= most else (low, middle)
    step = math.exp(low)
    there = beta + step
    # Beside a large β a short step is rounded, and upward would be further than is allowed.
    return there if there - beta <= step else math.nextafter(there, beta)


def mean_cost(cost: Vector, log_weight: Vector) -> float:
    """Return the weighted mean cost; draws without weight may have an infinite one."""
    weight = _relative(log_weight)
    return float(np.average(np.where(weight > 0.0, cost, 0.0), weights=weight))


def share_inside(cost: Vector, log_weight: Vector, cutoff: float) -> float:
    """Return the weighted share of the particles within the cutoff."""
    return float(np.average(cost <= cutoff, weights=_relative(log_weight)))


def share_done(typical: float, mean: float, cutoff: float) -> float:
    """Return how far the mean cost has come on the way from the prior's to the cutoff, as logarithms."""
    way = math.log(max(typical, cutoff) / cutoff)
    return float(np.clip(1.0 - math.log(max(mean, cutoff) / cutoff) / way, 0.0, 1.0)) if way > 0.0 else 1.0


def useful_levels(
    betas: Vector, seen: list[tuple[Vector, Vector]], cutoffs: Vector, unevenness: float
) -> NDArray[np.bool_]:
    """Return which levels tell the mass at each cutoff about as well as any, [cutoffs, levels].

    The variance is that of e^{βC} 1{C ≤ ε} at the level with what has gathered on the way there, per particle.
    """
    way = np.concatenate([[0.0], np.cumsum(np.where(np.diff(betas) > 0.0, unevenness, 0.0))])
    variance = np.empty((len(cutoffs), len(betas)))
    for k, (cost, log_weight) in enumerate(seen):
        for e, cutoff in enumerate(cutoffs):
            inside = cost <= cutoff
            x = (log_weight + betas[k] * np.where(inside, cost, 0.0))[inside]
            w = _relative(x)
            variance[e, k] = way[k] + (cost.size * np.sum(w**2) / np.sum(w) ** 2 - 1.0 if x.size else np.inf)
    return variance <= _USEFUL * variance.min(axis=1, keepdims=True)


def reduced(course: Course, prior_costs: Vector, visits: Visit) -> Seen:
    """Return each island's unbiased masses, and means at each level."""
    betas, cutoffs = course.ladder.beta, course.cutoffs
    islands = len(prior_costs)
    log_masses = np.full((len(cutoffs), len(betas), islands), -np.inf)
    for k, beta in enumerate(betas):
        if k == 0:
            cost, log_weight, log_norm = prior_costs, np.zeros(prior_costs.shape), np.zeros(islands)
        else:
            cost, log_weight, log_norm = visits.cost[k - 1], visits.log_weight[k - 1], visits.log_norm[k - 1]
        useful = course.useful[:, k]
        inside = cost <= cutoffs[useful, None, None]
        x = np.where(inside, log_weight + beta * np.where(inside, cost, 0.0), -np.inf)
        with np.errstate(divide="ignore"):
            log_masses[useful, k] = log_norm + logsumexp(x, axis=2) - math.log(x.shape[2])
    with np.errstate(divide="ignore"):
        joined = logsumexp(log_masses, axis=1) - np.log(course.useful.sum(axis=1))[:, None]
    costs = np.concatenate([prior_costs[None], visits.cost])
    present = np.isfinite(costs)
    shares = np.concatenate([np.zeros((1, *prior_costs.shape)), visits.log_weight])
    shares = np.where(present, _relative(shares), 0.0)
    means = np.sum(shares * np.where(present, costs, 0.0), axis=2) / np.maximum(np.sum(shares, axis=2), 1e-300)
    ones = np.ones((islands, 1))
    return Seen(
        log_masses=joined.T,
        mean_cost=means.T,
        ess=np.concatenate([ones, visits.ess.T], axis=1),
        acceptance=np.concatenate([ones, visits.acceptance.T], axis=1),
        prior_costs=prior_costs,
    )
