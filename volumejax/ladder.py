r"""From what a pilot saw to a ladder of ensembles: where the rungs stand, how long chains stay, how they move there.

With x = log a the work of a step −dx is (−X + ½ Σ p B) dx: X = ½ a|δ|² is the slope of U and B the effect of
stretching a leaf, coordinate by coordinate as soft as it is, or of sliding it along the prior's pull, by the p-th part
of what a free direction needs. Its
variance V at the best p, its memory τ in visits and the cost n of a visit set the density of rungs: dissipation
½∫Vτ/ρ and cost ∫nρ are balanced by ρ ∝ √(Vτ/n).
The part of it that fresh scatter makes leaves Bennett's ratio without bias, so memory gets a larger weight.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.interpolate import PchipInterpolator

from volumejax.ensemble import FIELDS, SHORT, STRETCHES, Rung, trajectories
from volumejax.metric import mass_power
from volumejax.ridge import RIDGE_PRICE

__all__ = [
    "Friction",
    "Survey",
    "Temperatures",
    "best_share",
    "kappa_ladder",
    "temperature_ladder",
    "trajectory_length",
]

Vector = NDArray[np.float64]

WANTED = 0.75
"""Mean Metropolis probability to which steps are tuned."""
_MOST_LONGER = 1.25
"""By which factor steps become longer or shorter at most where trajectories were refused too seldom or too often."""
_MANY_RUNGS = 400
"""From so many on chains move more often on a rung, and rungs are added only where the works ask for them."""
_FEW_CHAINS, _MANY_WORKS, _LOOK = 8, 16_000, 24.0
"""Up to so many chains that limit is on rungs times chains: the same moves on more rungs leave less to chance. Where
they move more than once on a rung they spend so many gradients there, since a look both ways costs four evaluations."""
_CROWDED, _FREE = 0.9, 0.97
"""Shares of trajectories inside, from which the maps stretch at all, and as much as they want to."""
_PROBE, _LOST = 0.1, 0.01
"""A map over so much of x may take this share of the chains through the wall."""
_MEMORY = 3.0
"""What remembered work counts against fresh scatter: both widen the bound, but only the first sets the passes apart."""
_SLOW = 7.0
"""Visits beyond the first that works are remembered for where bends soften the region most: on the digits network their
lag says 8 to 16, and the few visits of a pilot 2 to 15."""
_LONGEST_MEMORY = 20.0
"""Visits, at most, over which chains are taken to remember."""
_PER_SHARE, _EXACT, _SURE = 8.0, 0.01, 3.0
"""Works that tell the share of a stretch, the part of their variance that it may leave where fewer do, and standard
errors from which on a mean of B is no chance."""
_SHORTEST = 0.25
"""Share of their length that trajectories keep where the budget does not even do for the rungs."""
_RELEASE = 1.0
"""Energy that a step up the ladder may put into a chain, in standard deviations of its own."""
_SETTLING = 0.4
"""Length of the trajectories at one precision: only the cost has to settle, by its stiff directions."""
_MOVES, _COLD_MOVES = 8, 64
"""At most, down to the natural β and where it is colder than the ladder: there the region's shape changes with β."""
_PARTED, _LEAST_RISES, _MOST_RISES = 4.0, 6, 40
"""Nats by which segments may scatter against the guide unless the ridge takes its place, and rungs at least and at most
for that."""
_FINER, _DEARER, _RISING, _BEYOND, _WARMEST = 2, 4, 3.0, 2, 0.5
"""How many times as close rungs are there, as many gradients, and as long trajectories, and temperatures after the
natural one, but for the first, down to which share of it at most: the ridge hardly scatters, and the mass is near the
wall."""
_STAYING = 0.25
"""Share of a rung's moves that a visit to the last one has: chains are looked at more often where they stay."""
_DIRECT = 6
"""Lags from which on autocorrelations are summed rather than extrapolated from the first."""
_LARGEST_STEP = 0.7
"""In x: beyond that a ladder is guesswork."""
_BENT = 0.15
"""Unevenness of the curvature that tells a region with bends."""
_CLIFF = 4.0
"""Factor by which a variance is believed to fall from one stop to the next."""
_LARGEST_WORK = 2.0
"""Standard deviation of the work between two rungs, in nats, that acceptance ratios can still bridge."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the pilot measured, one row per stop, in the order of falling x.

    Attributes:
        x: log precision, shape (stops,).
        slope: X = ½ a|δ|² of each chain at each visit, for each stop an array of shape (visits, chains).
        stretching: B of each leaf, plain, by softness and of its slides, likewise with a last axis of FIELDS · leaves.
        leaf_variance: mean square of each leaf's δ, shape (stops, leaves).
        leaf_sizes: coordinates of each leaf.
        unevenness: of the curvature, from the metric.
        step_size: step that gave the wanted acceptance.
        spread: over how many e-folds steps have to be spread so that no chain is stuck.
        room: by how much each chain stayed below the cutoff, nats, likewise without the leaves.
        rises: the part of B that is the cost's, likewise.
        confined: λ(x) = β(E − C(θ0)), nats.
        lags: by how much X had to settle after a step from each stop but the first to the one before, for each unit of
            x, with its errors, shape (stops - 1,).
        shares: of the maps, shape (stops, FIELDS · leaves); None finds one stretch for all leaves from the works.
        walled: whether there may be other walls than the cost's: a prior's, a segment's, an arm's in few dimensions.
        inside: share of trajectories that the region allowed, where no one map fits all of it; else 1.
        beta: inverse temperature of the κ ladder.
        natural_beta: where the mean cost is the cutoff.
        unseen: scatter of β times the largest cost on a star's segments against its guide, nats.
        bulge: how many times as high as the guide that is.
        least_spread: e-folds over which steps are spread at least.
        ends_flat: whether the ladder ends at a = 0.
    """

    x: Vector
    slope: list[Vector]
    stretching: list[Vector]
    leaf_variance: Vector
    leaf_sizes: Vector
    unevenness: float
    step_size: Vector
    spread: Vector
    room: list[Vector]
    rises: list[Vector]
    confined: Vector
    lags: Vector
    shares: Vector | None
    walled: bool
    inside: Vector
    beta: float
    natural_beta: float
    unseen: float
    bulge: float
    least_spread: float
    ends_flat: bool

    @property
    def spreads(self) -> Vector:
        """Over how many e-folds steps are spread."""
        return np.maximum(self.spread, self.least_spread)

    def pressed(self, stop: int) -> bool:
        """Return whether β is below the natural one and chains stand closer to the wall than their energy varies there.

        Any map would lose some of them, and the slopes of few chains do not tell which.
        """
        near = self.beta * np.mean(self.room[stop]) < np.sqrt(self.confined[stop])
        return bool(self.beta < self.natural_beta and near)

    @property
    def typical_step(self) -> Vector:
        """The median of the steps drawn."""
        return self.step_size * np.exp(-0.5 * self.spreads)

    def restepped(self, x: Vector, acceptance: Vector) -> "Survey":
        """Return the survey with steps that fit what share of the trajectories was accepted at these x, falling.

        The energy at their ends is off by a normal error whose standard deviation s grows like the square of the step;
        2Φ(−s/2) of them are accepted.
        """
        seen = np.clip(np.interp(-self.x, -x, acceptance), 1e-3, 0.999)
        wanted, found = (-stats.norm.ppf(0.5 * np.asarray(share)) for share in (WANTED, seen))
        factor = np.clip(np.sqrt(wanted / found), 1.0 / _MOST_LONGER, _MOST_LONGER)
        return dataclasses.replace(self, step_size=self.step_size * factor)


class Friction(NamedTuple):
    """What chains were seen to lag behind by: a pass of g gradients over a part of a ladder loses (∫ rate dx)²/g nats.

    So the least is lost where gradients are spent in proportion to it.
    """

    x: Vector
    """log a, falling, shape (points,)."""
    rate: Vector
    """Positive, (nats · gradients)^½ for each unit of x there."""

    def at(self, x: Vector) -> Vector:
        """Return the rate at other x."""
        return np.asarray(np.exp(np.interp(-x, -self.x, np.log(self.rate))))


class Temperatures(NamedTuple):
    """The temperature ladder, from cold to warm."""

    rungs: Rung
    joint: int
    """The rung at the κ ladder's β."""
    natural: int
    """The rung at the natural β; what comes after it is behind the wall."""

    @property
    def rises(self) -> bool:
        """Whether the ridge takes the guide's place."""
        return self.rungs.ridge is not None

    @property
    def shares(self) -> Vector:
        """The ridge's at each temperature."""
        return np.zeros(len(self.rungs.beta)) if self.rungs.ridge is None else np.asarray(self.rungs.ridge)

    @property
    def betas(self) -> Vector:
        """What multiplies the costs at each, shape (rungs,), or where the ridge rises (rungs, 2), guide and ridge."""
        beta, share = np.asarray(self.rungs.beta), self.shares
        return np.stack([beta * (1.0 - share), beta * share], axis=1) if self.rises else beta


def kappa_ladder(
    survey: Survey, *, budget: float, most_steps: int, escort: float, overhead: float = 0.0,
    friction: Friction | None = None, whole: bool = False,
) -> Rung:  # fmt: skip
    """Return the rungs from the reference, at β = 0, down to the prior's own stiffness, for about `budget` gradients.

    Args:
        survey: from the pilot.
        budget: gradients per chain for one pass.
        most_steps: leapfrog steps of a trajectory, at most.
        escort: share of the best stretch that the maps take at most, between 0 and 1.
        overhead: what the end of a trajectory costs, in gradients.
        friction: says where the gradients are needed; None takes the survey's works and their memory for it.
        whole: whether trajectories keep their length where the budget does not do for the rungs, and it is exceeded.
    """
    shares, variance, memory = _smooth_work(survey, escort)
    # Of ½ a|δ|² the maps take the part that they stretch.
    squares = survey.leaf_variance * survey.leaf_sizes
    stretched = shares[:, : STRETCHES * len(survey.leaf_sizes)]
    share = np.sum(stretched * np.tile(squares, STRETCHES), axis=1) / np.sum(squares, axis=1)
    lengths = trajectory_length(survey.confined, survey.confined[-1], survey.unevenness)
    steps = np.clip(np.ceil(lengths / survey.typical_step), 2, most_steps)
    high, low = survey.x[0], survey.x[-1]
    grid = np.linspace(high, low, 2000)

    def on_grid(values: NDArray[np.floating]) -> Vector:
        return np.interp(-grid, -survey.x, values)

    spreads = on_grid(survey.spreads)
    # Where a variance ends between two stops is not known.
    near = [np.max(variance[max(i - 1, 0) : i + 2]) for i in range(len(variance))]
    v, n, tau, most = (
        np.exp(on_grid(np.log(values)))
        for values in (variance, steps, memory, np.maximum(variance, np.array(near) / _CLIFF))
    )
    floor = np.maximum(np.sqrt(most) / _LARGEST_WORK, 1.0 / _LARGEST_STEP)
    # On the way up a step puts (1 − p) X dx nats into the chain, which must not carry it through the wall.
    put_in = (1.0 - np.clip(on_grid(share), 0.0, 1.0)) * on_grid(np.array([np.mean(slope) for slope in survey.slope]))
    floor = np.maximum(floor, put_in / (_RELEASE * np.sqrt(on_grid(survey.confined)) + 3.0))
    width = (high - low) / (len(grid) - 1)

    def price() -> Vector:
        ends = trajectories(n, spreads)
        return np.asarray(n + (ends - 1.0) * np.maximum(n / SHORT, 1.0) + ends * (1.0 + overhead))

    ideal = np.sqrt(v * (1.0 + _MEMORY * (tau - 1.0)) / n) if friction is None else friction.at(grid) / price()

    def spent(scale: float) -> float:
        return float(np.sum(np.maximum(scale * ideal, floor) * price()) * width)

    if spent(0.0) > budget and not whole:
        # Rungs before length: shorter trajectories on a ladder that can be climbed.
        shorter = np.clip(budget / spent(0.0), _SHORTEST, 1.0)
        n, steps = np.maximum(shorter * n, 2.0), np.maximum(shorter * steps, 2.0)
    lower, upper = 0.0, 1e12
    for _ in range(100):
        middle = np.sqrt(max(lower, 1e-12) * upper)
        lower, upper = (middle, upper) if spent(middle) < budget else (lower, middle)
    density = np.maximum(max(lower, 1e-12) * ideal, floor)
    total = float(np.sum(density)) * width
    chains = survey.slope[0].shape[1]
    allowed = _MANY_WORKS / chains if chains <= _FEW_CHAINS else _MANY_RUNGS
    fewest, usual = (max(1, round(total / count)) for count in (allowed, _MANY_RUNGS))
    moves = np.clip(np.ceil(_LOOK / n), fewest, usual)
    # Further moves set no rungs further apart than the works allow.
    rungs = np.maximum(density / moves, floor)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (rungs[1:] + rungs[:-1]) * width)])
    count = max(int(np.ceil(cumulative[-1])), 2)
    x = np.interp(np.linspace(0.0, cumulative[-1], count + 1), cumulative, grid)
    precision = np.exp(x)
    # Smooth, since in many dimensions a share that is off by a thousandth is hundreds of nats.
    shares_x = PchipInterpolator(-survey.x, shares)(-x) if len(shares) > 1 else np.repeat(shares, len(x), axis=0)
    stretch = 0.5 * shares_x * np.append(x[:-1] - x[1:], 0.0)[:, None]
    if survey.ends_flat:
        precision, x = np.append(precision, 0.0), np.append(x, x[-1])
        stretch = np.concatenate([stretch, np.zeros((1, stretch.shape[1]))])
    masses = np.stack([np.interp(-x, -survey.x, -np.log(column)) for column in survey.leaf_variance.T], axis=1)
    step_size = np.exp(np.interp(-x, -survey.x, np.log(survey.step_size)))
    steps_x = np.exp(np.interp(-x, -survey.x, np.log(steps)))

    def from_reference(values: Vector, first: float) -> Vector:
        return np.concatenate([[first], values])

    # Rung 0 is the reference itself: the Gaussian of the first precision without the cost, drawn exactly.
    return Rung(
        precision=from_reference(precision, precision[0]),
        beta=from_reference(np.full(len(x), survey.beta), 0.0),
        masses=np.concatenate([np.exp(masses[:1]), np.exp(masses)]),
        step_size=from_reference(step_size, step_size[0]),
        spread=from_reference(np.interp(-x, -survey.x, survey.spreads), 0.0),
        num_steps=from_reference(np.asarray(np.round(steps_x), np.float64), 2.0).astype(np.int32),
        num_moves=from_reference(np.round(np.interp(-x, -grid, density / rungs)), 0.0).astype(np.int32),
        stretch=np.concatenate([np.zeros((1, stretch.shape[1])), stretch]),
    )


def temperature_ladder(survey: Survey, *, decades: float, most_steps: int, budget: float) -> Temperatures:
    """Return the rungs at the prior's own stiffness from cold to natural β, by way of the κ ladder's.

    Neighbours differ by one and a half standard deviations of the energy, 1.5/√λ in log β. Where the largest cost
    on a star's segments scatters against its guide, the ridge takes the guide's place before β is lowered: most of the
    mass is where segments are flat and the guide is high, and chains that feel the guide alone stand still at the wall.

    Args:
        survey: from the pilot.
        decades: how far the coldest β lies above the κ ladder's, in powers of ten; 0 begins with that.
        most_steps: leapfrog steps of a trajectory, at most.
        budget: gradients per chain for one pass; four times as many where the ridge rises.
    """
    energy = max(float(survey.confined[-1]), 0.25)
    gap = min(1.5 / np.sqrt(energy), 0.7)
    top, middle, bottom = (
        np.log(survey.beta) + decades * np.log(10.0), np.log(survey.beta), np.log(survey.natural_beta)
    )  # fmt: skip
    parted = survey.unseen > _PARTED
    fine = _FINER if parted else 1
    above, below = (int(np.ceil((top - middle) / gap)), max(int(np.ceil(fine * (middle - bottom) / gap)), 1))
    beta = np.exp(np.concatenate([np.linspace(top, middle, above + 1), np.linspace(middle, bottom, below + 1)[1:]]))
    ridge, natural = np.zeros(len(beta)), above + below
    if parted:
        rise = fine * int(np.clip(np.ceil(survey.unseen / 1.5), _LEAST_RISES, _MOST_RISES))
        beyond = 1.0 - gap / fine * np.arange(1, fine * _BEYOND + 1)
        beyond = survey.natural_beta * beyond[beyond > _WARMEST]
        beta = np.concatenate([beta[: above + 1], np.full(rise, beta[above]), beta[above + 1 :], beyond])
        ridge = np.concatenate([ridge[: above + 1], np.linspace(0.0, 1.0, rise + 1)[1:], np.ones(below + len(beyond))])
        natural += rise
    # The metric grows with β, so that the step need not shrink.
    step_size = np.full(len(beta), survey.typical_step[-1])
    # Only the cost has to settle here, which takes a fraction of a period of the soft directions; where the ridge
    # rises segments have to settle too.
    count, rises = len(beta), (ridge > 0.0) & (beta == beta[above])
    affordable = int(np.clip(budget / count, 8, most_steps))
    length = np.where(rises, _RISING, 1.0)
    steps = np.clip(np.ceil(length * _SETTLING / step_size), 2, affordable)
    price = np.where(ridge > 0.0, RIDGE_PRICE, 1.0)
    dearer = _DEARER if parted else 1
    most = np.where(np.arange(count) < above, _COLD_MOVES, _MOVES * fine)
    moves = np.clip(np.max(length) / length * (dearer * budget / np.sum(price * (steps + 1.0))), 1, most)
    if parted:
        moves = np.maximum(np.round(np.append(moves[:-1], _STAYING * moves[-1])), 1)
    precision = 0.0 if survey.ends_flat else float(np.exp(survey.x[-1]))
    rungs = Rung(
        precision=np.full(count, precision),
        beta=beta,
        masses=np.repeat(1.0 / survey.leaf_variance[-1:], count, axis=0),
        step_size=step_size * np.exp(0.5 * survey.spreads[-1]),
        spread=np.full(count, survey.spreads[-1]),
        num_steps=steps.astype(np.int32),
        num_moves=moves.astype(np.int32),
        stretch=np.zeros((count, FIELDS * len(survey.leaf_sizes))),
        ridge=ridge if parted else None,
    )
    return Temperatures(rungs, above, natural)


def trajectory_length(confined: Vector, last: float, unevenness: float) -> Vector:
    """Return how long trajectories are, in units of the free directions' angular period over 2π.

    A quarter period where the ensemble is nearly Gaussian, or the curvature is the same everywhere; up to three and a
    half quarters where the region's bends make it softer than the prior: on the digits network the slowest modes then
    lose most of their memory in one trajectory. Less where masses are a lower power of the mean precisions: most
    directions then turn faster.
    """
    longer = 3.5 * float(mass_power(unevenness)) - 1.0
    return np.asarray(0.5 * np.pi * (1.0 + longer * _softened(confined, last, unevenness)))


def _softened(confined: Vector, last: float, unevenness: float) -> Vector:
    """Return how far bends make the region softer than the prior at that λ, between 0 and 1."""
    share = np.clip(np.asarray(confined) / max(last, 1.0), 0.0, 1.0)
    return np.asarray(np.clip(unevenness / _BENT, 0.0, 1.0) * share**4)


def _smooth_work(survey: Survey, escort: float) -> tuple[Vector, Vector, Vector]:
    """Return at each stop the best shares p, the variance of the work per unit of x, and its memory in visits.

    Moments are taken about the mean over chains, so that drift does not count, then their median over neighbours;
    the last stop, where the chains stay longest, speaks for itself and has the longest memory that is believed. Modes
    slower than the pilot's visits last are taken to be there where bends soften a region of many dimensions.
    """
    stops, leaves = len(survey.x), len(survey.leaf_sizes)
    x, b = (
        [v - v.mean(axis=1, keepdims=True) for v in values] for values in (survey.slope, survey.stretching)
    )  # fmt: skip
    shares, variance, memory = np.zeros((stops, FIELDS * leaves)), np.zeros(stops), np.ones(stops)
    for i in range(stops):
        near = list(range(max(i - 2, 0), min(i + 3, stops))) if i < stops - 1 else [i]
        if survey.shares is None:
            # The best stretch changes from stop to stop: as few of them as tell it.
            for ring in ([j for j in near if abs(i - j) <= r] for r in range(3)):
                here, there = [x[j] for j in ring], [b[j] for j in ring]
                shares[i, :leaves] = best_share(here, there)
                rest = sum(float(np.sum((v - 0.5 * w @ shares[i]) ** 2)) for v, w in zip(here, there, strict=True))
                explained = rest <= _EXACT * sum(float(np.sum(v**2)) for v in here)
                if explained or _samples(here) > _PER_SHARE * np.count_nonzero(np.any(b[i], axis=(0, 1))):
                    break
        else:
            shares[i] = survey.shares[i]
        shares[i] *= escort
        shares[i] *= (
            0.0
            if survey.pressed(i)
            else _bearable(shares[i], survey.room[i], survey.rises[i], survey.stretching[i] if survey.walled else None)
        )
        shares[i] *= float(np.clip((np.mean(survey.inside[near]) - _CROWDED) / (_FREE - _CROWDED), 0.0, 1.0))
        works = [x[j] - 0.5 * b[j] @ shares[i] for j in near]
        chains = works[0].shape[1]
        scatter = float(np.median([np.mean(w**2) for w in works])) * chains / max(chains - 1, 1)
        # Settled chains of that variance would lag by as much: more is scatter that they have brought with them.
        told = float(max(survey.lags[max(i - 1, 0) : i + 1], default=np.inf))
        variance[i] = max(min(scatter, told), 1e-6)
        memory[i] = _memory(works)
    memory = np.minimum(memory, memory[-1])
    if survey.shares is not None:
        memory = np.maximum(memory, 1.0 + _SLOW * _softened(survey.confined, survey.confined[-1], survey.unevenness))
    return shares, variance, memory


def _samples(slopes: list[Vector]) -> float:
    """Return for how many independent works those of stops count: visits follow each other, means are taken off."""
    return 0.5 * sum(v.size for v in slopes) * (1.0 - 1.0 / slopes[0].shape[1])


def _bearable(shares: Vector, room: Vector, rises: Vector, stretchings: Vector | None) -> float:
    """Return the part of a stretch that chains can take: one that it would take through the wall stays.

    Where the cost rises towards the wall its slope tells which chains would be lost. Any other wall shows in the mean
    of B, which is less than zero by the share of chains that a stretch drives through it; None where there is none to
    look for, and where chains of many dimensions lag by hundreds of nats.
    """
    stretch = 0.5 * _PROBE * shares
    rise, room = rises @ stretch, np.maximum(room, 0.0)
    through = 0.0
    if stretchings is not None:
        flows = np.reshape(stretchings, (-1, len(shares))) @ stretch
        # Of so few visits as Student has it, each counted for half.
        count = max(0.5 * len(flows), 2.0)
        sure = float(stats.t.isf(stats.norm.sf(_SURE), count - 1.0))
        through = -float(np.mean(flows) + sure * np.std(flows) / np.sqrt(count))
    parts = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
    return next((p for p in parts if np.mean(p * rise > room) <= _LOST and p * through <= _LOST), 0.0)


def best_share(slopes: list[Vector], stretchings: list[Vector]) -> float:
    """Return the one share of a free direction's stretch, of all leaves, that leaves the least variance of the work.

    Args:
        slopes: X of each stop, shape (visits, chains).
        stretchings: B, shape (visits, chains, FIELDS · leaves).
    """
    leaves = stretchings[0].shape[-1] // FIELDS
    x = [v - v.mean(axis=1, keepdims=True) for v in slopes]
    b = [0.5 * np.sum(v[..., :leaves], axis=-1) for v in stretchings]
    b = [v - v.mean(axis=1, keepdims=True) for v in b]
    x, b = (np.concatenate([np.ravel(v) for v in values]) for values in (x, b))
    known = np.isfinite(x) & np.isfinite(b)
    square = float(np.sum(np.square(b[known])))
    return float(np.clip(np.sum(x[known] * b[known]) / square, 0.0, 1.0)) if square > 0.0 else 0.0


def _memory(works: list[Vector]) -> float:
    """Return 1 + 2 Σ autocorrelation over visits: summed where there are many, else a geometric series."""
    variance = np.mean([np.mean(w**2) for w in works])
    longest = min(len(w) for w in works) - 1
    if longest < 1 or variance <= 0.0:
        return 1.0
    kept = [np.mean([np.mean(w[k:] * w[:-k]) for w in works]) / variance for k in range(1, max(longest // 2, 1) + 1)]
    if longest < 2 * _DIRECT:
        return float(np.clip((1.0 + kept[0]) / max(1.0 - kept[0], 1e-3), 1.0, _LONGEST_MEMORY))
    gone = next((k for k, r in enumerate(kept) if r < 0.05), len(kept))
    return float(np.clip(1.0 + 2.0 * np.sum(kept[:gone]), 1.0, _LONGEST_MEMORY))
