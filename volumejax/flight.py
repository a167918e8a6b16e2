"""The pilot's chains: how they step, what they have seen, and what they cost."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from volumejax import tree
from volumejax.annealing import Record, begin, pad, set_out, slopes
from volumejax.ensemble import CHEAP, FIELDS, SHORT, Ensemble, Position, Rung
from volumejax.functions import jit_ahead
from volumejax.ladder import WANTED, best_share, trajectory_length
from volumejax.metric import Rest, fit_metric, mass_power, plain_metric
from volumejax.parallel import Launcher
from volumejax.response import Response, flat_shares, respond, response_gradients

__all__ = ["POOLED", "Flight", "Gait", "Stop", "joined", "leaf_sizes", "stretchings", "variances", "work_scatter"]

T = TypeVar("T")

_MOST_STEPS = 120
_MOST_NUMBERS = 20_000_000
"""How many numbers are kept for the metric at most."""
_DEAR_FIT, _FRESH = 4_000_000, 0.25
"""Numbers from which on a fit costs more than a visit, and waits until this share of them is new."""
POOLED = 4
"""Records that say together how the maps should stretch where they stretch all alike."""
_ALIKE = 0.5
"""Of two log β, the difference up to which both tell the map to a third."""
_STEEPEST = 4.0
"""E-folds per unit of x by which a cost is believed to grow at most."""
_FREE = 0.5
"""λ up to which all is taken for free."""
_UNEVEN_SPREAD = 3.0
"""Where there are more, e-folds for each unit by which the power of the masses lies below 1, if trajectories are long:
a chain that comes by a place far stiffer than most has to leave it again."""
_UNSEEN = 1.5
"""How much higher than where the guide looks a cost may bulge elsewhere."""
_PRESSED = 3.0
"""Mean of B, in roots of D, that says that a wall is felt."""
_NEAR = 2.0
"""Standard deviations of the energy, and nats as well, within which of the cutoff it may be the cost's."""


@dataclasses.dataclass(frozen=True)
class Gait:
    """How the chains step."""

    step: float
    spread: float = 0.0

    def adapted(self, record: Record, stuck: float) -> "Gait":
        """Return the gait after a visit: towards the wanted acceptance, and wider where some chains never move."""
        mean = float(np.mean(record.acceptance[-1]))
        spread = self.spread + (0.5 if stuck > 0.1 and mean > 0.5 else -0.1)
        step = self.step * np.exp((0.7 if mean > 0.3 else 1.5) * (mean - WANTED))
        return Gait(float(np.clip(step, 1e-7, 1.2)), float(np.clip(spread, 0.0, 5.0)))


@dataclasses.dataclass
class Stop:
    """A place of the tether where the chains stayed, and what they said of it."""

    x: float
    """log a."""
    beta: float
    gait: Gait
    variance: np.ndarray
    """Mean square of each leaf's δ."""
    record: Record
    shares: np.ndarray
    """Of the maps that leave the least work there."""
    confined: float = 0.0
    """λ, the mean energy that the cost holds, in units of 1/β."""
    lag: float = np.inf
    """By how much the chains' X had to settle for each unit of x by which they had come up, with two standard
    errors."""


class Flight:
    """The pilot's chains, and the bookkeeping of what they cost."""

    def __init__(
        self, ensemble: Ensemble, key: Array, chains: int, anchor_cost: float, batch_size: int | None,
        launchers: Sequence[Launcher], *, groups: int = 1,
    ) -> None:  # fmt: skip
        """Begin with `groups` times `chains` that stand nowhere yet.

        Groups go one after the other, so that the program compiled for one will do for a run of as many chains, or side
        by side where there are several launchers.
        """
        self.ensemble, self.key, self.batch_size, self.anchor_cost = ensemble, key, batch_size, anchor_cost
        self.chains = np.arange(groups * chains, dtype=np.int32).reshape(groups, chains)
        self.launchers = [launchers[group % len(launchers)] for group in range(groups)]
        self.visits, self.gradients, self.last_cost = 0, 0, 1
        self.floor = anchor_cost
        """The lowest cost seen, from which energies count: an anchor need not be a minimum."""
        self.metric = plain_metric(ensemble.frame.anchor, turns=ensemble.frame.walls is None)
        self.slopes: list[tuple[float, list[np.ndarray]]] = []
        self.pulls: list[tuple[float, list[np.ndarray]]] = []
        """a, and the gradient of what else U has there, over β."""
        self.unread, self.settled = 0, False
        """How many of them the metric does not know, and whether it takes chains for settled."""
        self.positions: list[Position]
        """Of each group; a new list after each visit."""
        self.pending = np.zeros(FIELDS * len(jax.tree.leaves(ensemble.frame.anchor)))
        """Logs by which the next visit first scales and slides the leaves, where that stays inside."""
        self.place: tuple[float, float] | None = None
        """(x, β) of the last visit, from which they set out."""
        self.recent: list[tuple[float, Record]] = []
        """The latest visits, each with its β."""
        self.response: tuple[float, Response] | None = None
        """What the maps were last found from, and log β there."""
        self.last = 0.0
        """λ at the end of the tether, once the chains have settled there."""
        self.memory = np.ones(self.chains.size)
        """Each chain's acceptance of late: near zero where it has been stuck for several moves."""

    @property
    def cutoff(self) -> float:
        """In nats."""
        return float(self.ensemble.cutoff)

    @property
    def room(self) -> float:
        """How far the cutoff lies above the lowest cost seen."""
        return self.cutoff - self.floor

    @property
    def stuck(self) -> float:
        """Share of chains that have not moved for a while."""
        return float(np.mean(self.memory < 0.08))

    def reference_precision(self, beta: float) -> float:
        """Return log a at which the cost is no more than a ripple on the reference, and take up positions there."""
        x, floor = 0.0, 0.0 if self.ensemble.frame.stiffness > 0.0 else -30.0
        for attempt in range(60):
            with jax.enable_x64(True):
                precision = jnp.float64(np.exp(x))
            start = jax.random.fold_in(self.key, 1_000_000 + attempt)
            self.positions = [
                begin(self.ensemble, start, precision, jnp.asarray(group), launcher.mesh)
                for group, launcher in zip(self.chains, self.launchers, strict=True)
            ]
            whole = joined(self.positions)
            reach = beta * (whole.reach - self.anchor_cost)
            if whole.toll is not None:
                reach = reach + whole.toll
            energy = float(np.mean(np.where(np.isfinite(reach), np.abs(reach), np.inf)))
            supported = np.mean(joined([_supported(self.ensemble, group) for group in self.positions]))
            if not np.isfinite(energy) or (self.ensemble.frame.walls is None and supported < 0.4):
                x += 3.0
            elif energy > 0.2:
                x += float(np.clip(np.log(energy / 0.1), 0.3, 3.0))
            elif energy > 0.02 or x <= floor:
                break
            else:
                x = max(x + float(np.clip(np.log(max(energy, 1e-9) / 0.1), -3.0, -0.3)), floor)
        self.revive()
        return max(x, floor)

    def revive(self) -> None:
        """Restart the chains that stand outside the region from those that stand inside, if there are any."""
        outside = ~joined([_permitted(self.ensemble, group) for group in self.positions])
        if outside.any() and not outside.all():
            inside = np.flatnonzero(~outside)
            source = np.where(outside, inside[np.arange(len(outside)) % len(inside)], np.arange(len(outside)))
            whole = joined(self.positions)
            with jax.enable_x64(True):
                self.positions = [
                    jax.device_put(
                        jax.tree.map(operator.itemgetter(source[group]), whole),
                        jax.tree.map(lambda x: x.sharding, here),
                    )
                    for group, here in zip(self.chains, self.positions, strict=True)
                ]

    def _launched(self, work: Callable[[Position, np.ndarray], T]) -> list[T]:
        """Return what comes of each group's positions and chains, where they are; it may still be on its way."""
        calls = [
            launcher.launch(work, positions, group)
            for launcher, positions, group in zip(self.launchers, self.positions, self.chains, strict=True)
        ]
        return [call.result() for call in calls]

    @property
    def as_one(self) -> bool:
        """Whether all leaves are stretched alike: chains of the star stay on their rays, and arms differ in leaves."""
        return bool(self.ensemble.checks) or self.ensemble.dimension < CHEAP

    @property
    def walled(self) -> bool:
        """Whether other walls than the cost's may push: a prior's, a segment's, an arm's in few dimensions."""
        frame = self.ensemble.frame
        return self.as_one or frame.walls is not None or frame.ball is not None

    def visit(self, x: float, beta: float, gait: Gait, variance: np.ndarray, confined: float) -> Record:
        """Let the chains move once and measure them; those that fell outside restart from the others."""
        spread = self.spread(gait, confined)
        steps = int(np.clip(np.ceil(self.length(confined) / gait.step * np.exp(0.5 * spread)), 2, _MOST_STEPS))
        # Two rungs: the chains step from the first onto the second by the pending map, and move there.
        left, self.place = self.place or (x, beta), (x, beta)
        rung = Rung(
            precision=np.exp([left[0], x, x]),
            beta=np.array([left[1], beta, beta]),
            masses=np.repeat(1.0 / variance[None], 3, axis=0),
            step_size=np.full(3, gait.step),
            spread=np.full(3, spread),
            num_steps=np.full(3, steps, np.int32),
            num_moves=np.array([0, 1, 1], np.int32),
            stretch=np.stack([self.pending, 0.0 * self.pending, 0.0 * self.pending]),
        )
        self.pending = 0.0 * self.pending
        table = pad(rung)
        journeys = self._launched(
            lambda positions, group: set_out(
                self.ensemble, self.metric, self.key, positions, table, [0, 1, 1], self.visits, self.batch_size, group
            )
        )
        self.positions = [journey.ends for journey in journeys]
        record = joined([journey.record() for journey in journeys], axis=1)
        self.visits += 2
        self.last_cost = int(rung.gradients[1])
        self.gradients += self.last_cost
        self.memory = 0.6 * self.memory + 0.4 * record.acceptance[-1]
        self.revive()
        here = Record(*(part[1:] for part in record))
        self.floor = float(np.min(here.cost, where=np.isfinite(here.cost), initial=self.floor))
        self.recent = [*self.recent[1 - POOLED :], (beta, here)]
        return here

    def follow(self, x: float, beta: float, variance: np.ndarray) -> None:
        """Let the next visit begin with the map that takes the chains to another β, as they tell it where they stand.

        What they do not settle in time they carry on: in many dimensions a few per cent of β are thousands of nats.
        """
        now = self.recent[-1][0]
        if self.as_one:
            near = [(b, record) for b, record in self.recent if abs(np.log(b / now)) < _ALIKE]
            energies = [b * np.where(np.isfinite(r.cost), r.cost - self.floor, np.nan) for b, r in near]
            shares = self._alike(best_share(energies, [record.stretchings for _, record in near]))
        else:
            if self.response is None or abs(np.log(now) - self.response[0]) > _ALIKE:
                self.respond(x, now, variance)
            assert self.response is not None
            response = self.response[1]
            # Nothing slides: that goes with the tether.
            shares = flat_shares(response.gram, response.cost, slides=False)
        self.pending = self.pending - 0.5 * shares * np.log(beta / now)

    def shares(self, seen: list[tuple[float, Record]], beta: float, variance: np.ndarray) -> np.ndarray:
        """Return the shares of a free direction's stretch and slide that leave the least variance of the work.

        Args:
            seen: log a and records of the latest visits; at the last the chains still stand.
            beta: their β.
            variance: mean square of each leaf's δ.
        """
        x, record = seen[-1]
        if self.as_one:
            slopes = [0.5 * np.exp(there) * record.square for there, record in seen]
            return self._alike(best_share(slopes, [record.stretchings for _, record in seen]))
        if self.confined(beta, record) < _FREE:
            return np.repeat([1.0, 0.0, 1.0, 0.0], len(self.pending) // FIELDS)
        response = self.respond(x, beta, variance)
        return flat_shares(response.gram, response.tether)

    def respond(self, x: float, beta: float, variance: np.ndarray) -> Response:
        """Return how the works of each chain answer to maps where it stands."""
        stiffness, precision, now = (jnp.asarray(n, jnp.float32) for n in (1.0 / variance, np.exp(x), beta))
        here = joined(
            self._launched(
                lambda positions, _: respond(
                    self.ensemble, self.metric, positions, stiffness, precision, now, self.batch_size
                )
            )
        )
        spent = response_gradients(self.ensemble)
        self.gradients += spent
        self.last_cost += spent
        self.response = (float(np.log(beta)), here)
        return here

    def growth(self, beta: float, record: Record, shares: np.ndarray) -> float:
        """Return by how many e-folds the cost grows per unit of −x along the maps last found; 0 where it is not known.

        In few dimensions there are arms, each with its own growth.
        """
        confined = self.confined(beta, record)
        if self.as_one or self.response is None or confined < _FREE:
            return 0.0
        rates = 0.5 * (self.response[1].cost @ shares) / confined
        known = rates[np.isfinite(rates)]
        return float(np.clip(np.mean(known), 0.0, _STEEPEST)) if known.size else 0.0

    def _alike(self, share: float) -> np.ndarray:
        """Return shares that stretch all leaves alike."""
        return np.repeat([share, 0.0, 0.0, 0.0], len(self.pending) // FIELDS)

    def gaussian_scatter(self, x: float) -> float:
        """Return the standard deviation of B in a Gaussian of that log a about its own mean."""
        frame = self.ensemble.frame
        return float(np.sqrt(2.0 * self.ensemble.dimension + float(frame.pulled(frame.pull)) * np.exp(-x)))

    def length(self, confined: float) -> float:
        """Return how long trajectories are at that λ."""
        last = max(self.last, confined, 60.0)
        return float(trajectory_length(np.asarray(confined), last, float(self.metric.unevenness)))

    def spread(self, gait: Gait, confined: float) -> float:
        """Return over how many e-folds steps are drawn."""
        if self.ensemble.dimension < CHEAP:
            # Any spread at all brings the short trajectories with it, which free chains that are held in an arm.
            return max(gait.spread, 1e-9)
        long = float(np.clip(self.length(confined) / (2.0 * SHORT * gait.step) - 1.0, 0.0, 1.0))
        return max(gait.spread, _UNEVEN_SPREAD * (1.0 - float(mass_power(self.metric.unevenness))) * long)

    def learn(self, x: float, beta: float, *, keep: int, settled: bool = False) -> None:
        """Fit the metric to the slopes where the chains stand now and stood at the visits before, `keep` at most."""
        share = jnp.float32(1.0 / beta)
        here = self._launched(lambda positions, _: slopes(self.ensemble, positions, self.batch_size, share))
        self.gradients += 1
        self.slopes.append((beta, joined(here)))
        if not self.walled:
            self.pulls.append((float(np.exp(x)), self._pulled(np.exp(x), beta)))
        numbers = self.ensemble.dimension * self.chains.size
        kept = min(keep, max(_MOST_NUMBERS // numbers, 2))
        self.slopes, self.pulls = self.slopes[-kept:], self.pulls[-kept:]
        self.unread += 1
        waits = numbers * len(self.slopes) > _DEAR_FIT and self.unread < _FRESH * len(self.slopes)
        if waits and settled == self.settled:
            return
        self.unread, self.settled = 0, settled
        together, pulls = (
            [np.concatenate(parts) for parts in zip(*(leaves for _, leaves in kept), strict=True)]
            for kept in (self.slopes, self.pulls)
        )
        betas = np.repeat([beta for beta, _ in self.slopes], self.chains.size)
        rest = None
        if not self.walled:
            squares = variances(self.ensemble, self.recent[-1][1])
            rest = Rest(pulls, float(np.mean([a for a, _ in self.pulls])), squares)
        turns = self.ensemble.frame.walls is None
        self.metric = fit_metric(together, betas, float(np.exp(x)), turns=turns, settled=settled, rest=rest)

    def _pulled(self, precision: float, beta: float) -> list[np.ndarray]:
        """Return the gradient of the prior's and the tether's part of U where the chains stand, over β, by leaf."""
        frame = self.ensemble.frame
        places = jax.tree.leaves(joined([p.displacement for p in self.positions]))
        pull = [0.0] * len(places) if frame.pull is None else [np.asarray(b) for b in jax.tree.leaves(frame.pull)]
        return [((precision * d + b) / beta).astype(np.float32) for d, b in zip(places, pull, strict=True)]

    def confined(self, beta: float, record: Record) -> float:
        """Return λ = β(E − the least), the mean over chains."""
        return max(beta * (float(np.nanmean(record.cost[-1])) - self.floor), 0.0)

    def expected(self, record: Record, x: float, beta: float) -> float:
        """Return λ as it would be if the chains had settled and did not feel the wall of the cost.

        They obey E B = 0, so that δ·∇E would then be larger by −B/β, and E with it. Far below the cutoff it is another
        wall that they feel, and E is what it is.
        """
        confined = self.confined(beta, record)
        stretching = float(np.mean(stretchings(self.ensemble, record, x, beta)))
        certain = np.sign(stretching) * max(abs(stretching) - _PRESSED * np.sqrt(self.ensemble.dimension), 0.0)
        near = beta * float(np.mean(self.cutoff - record.reach[-1])) < _NEAR * (np.sqrt(confined) + 1.0)
        felt = beta * float(np.mean(record.virial))
        if not (np.isfinite(certain) and felt > 0.0) or (certain < 0.0 and not near):
            return confined
        return confined * float(np.clip((felt - certain) / felt, 0.3, 5.0))

    def pressed(self, record: Record, x: float, beta: float) -> bool:
        """Whether the wall is felt: B, which has no mean without one, is far below zero."""
        stretching = stretchings(self.ensemble, record, x, beta).ravel()
        return bool(np.mean(stretching) < -_PRESSED * np.sqrt(self.ensemble.dimension))

    def bulge(self, record: Record) -> float:
        """Return how much higher the largest cost on the segment lies above the anchor's than the guide; at least 1."""
        seen = _seen_on_segments(record)
        if not seen.size:
            return 1.0
        rise = [float(np.mean(values)) - self.anchor_cost for values in seen]
        return float(np.clip(rise[0] / rise[1], 1.0, 3.0)) if rise[1] > 0.0 else 1.0

    def unseen(self, record: Record) -> float:
        """Return the standard deviation of the largest cost on the segment about the guide, in nats of the cost."""
        reach, guide = _seen_on_segments(record)
        return float(np.std(reach - guide)) if reach.size else 0.0

    def bulging(self, places: tuple[float, ...]) -> float | None:
        """Return where the cost on the chains' segments bulges far above what it is at these places; None if nowhere.

        Places are fractions of the way from the anchor.
        """
        ensemble = self.ensemble
        if not ensemble.checks:
            return None
        whole = joined([_segments(ensemble, group, self.batch_size) for group in self.positions])
        costs = np.mean(np.where(np.isfinite(whole), whole, self.cutoff), axis=0) - self.anchor_cost
        inner = np.flatnonzero((costs[1:-1] > costs[:-2]) & (costs[1:-1] > costs[2:])) + 1
        if not inner.size:
            return None
        fractions = np.arange(1, len(costs) + 1) / len(costs)
        top = inner[np.argmax(costs[inner])]
        unseen = costs[top] > _UNSEEN * max(np.interp(places, fractions, costs))
        return float(fractions[top]) if unseen else None

    def settle_gait(
        self, x: float, beta: float, gait: Gait, variance: np.ndarray, confined: float, *, most: int
    ) -> tuple[Gait, Record]:
        """Visit until the acceptance is about right, and return what was learnt with the last record."""
        for _ in range(most):
            record = self.visit(x, beta, gait, variance, confined)
            acceptance = float(np.mean(record.acceptance[-1]))
            gait = gait.adapted(record, self.stuck)
            if 0.6 < acceptance < 0.97:
                return gait, record
        return gait, self.visit(x, beta, gait, variance, confined)


@jit_ahead
def _segments(ensemble: Ensemble, positions: Position, batch_size: int | None) -> Float[Array, "chains checks"]:
    return jax.lax.map(ensemble.segment, positions.displacement, batch_size=batch_size or len(positions.cost))


@jit_ahead
def _supported(ensemble: Ensemble, positions: Position) -> Bool[Array, "chains"]:
    """Return which chains stand where the prior has mass."""
    return jax.vmap(ensemble.frame.supports)(positions.displacement)


@jit_ahead
def _permitted(ensemble: Ensemble, positions: Position) -> Bool[Array, "chains"]:
    """Return which chains stand inside the region."""
    return jax.vmap(ensemble.permits)(positions.reach, positions.displacement)


def _seen_on_segments(record: Record) -> np.ndarray:
    """Return the largest cost on the segment and the guide, shape (2, samples), where both are finite."""
    known = np.isfinite(record.reach) & np.isfinite(record.cost)
    return np.stack([record.reach[known], record.cost[known]])


def variances(ensemble: Ensemble, record: Record) -> np.ndarray:
    """Return each leaf's mean square of δ, never zero."""
    squares = record.leaf_squares.mean(axis=(0, 1)) / leaf_sizes(ensemble)
    return np.maximum(squares, 1e-12 * squares.max() + 1e-300)


def leaf_sizes(ensemble: Ensemble) -> np.ndarray:
    """Return how many numbers each leaf has, at least one."""
    return np.array([max(x.size, 1) for x in jax.tree.leaves(ensemble.frame.anchor)], np.float64)


def stretchings(ensemble: Ensemble, record: Record, x: float, beta: float) -> np.ndarray:
    """Return B = δ·∇U − D of each visit and chain."""
    return beta * record.virial + np.exp(x) * record.square + record.pulled - tree.size(ensemble.frame.anchor)


def joined(parts: list[Any], axis: int = 0) -> Any:
    """Return trees of arrays as one, on the host: several records' visits, or along axis 1 the chains of groups."""
    return jax.tree.map(lambda *arrays: np.concatenate([np.asarray(x) for x in arrays], axis), *parts)


def work_scatter(record: Record, x: float, shares: np.ndarray) -> float:
    """Return the standard deviation of the last works per unit of x with these shares."""
    work = 0.5 * np.exp(x) * record.square[-1] - 0.5 * np.nan_to_num(record.stretchings[-1]) @ shares
    return float(np.std(work, ddof=1))
