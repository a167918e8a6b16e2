"""The pilot: a coarse run down to the prior and back, thrown away once it has set the ladder, β and the step sizes."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key

from volumejax import tree
from volumejax.annealing import Record, begin, laid_out_like, pad, slopes, travel
from volumejax.ensemble import SHORT, Ensemble, Position, Rung
from volumejax.ladder import Survey, best_shares, trajectory_length
from volumejax.metric import Metric, fit_metric, plain_metric

__all__ = ["Pilot", "fly"]

_TARGET = 0.75
"""Acceptance that the step sizes are tuned to."""
_WORK = 3.0
"""Standard deviation of the work between two stops, in nats."""
_RAISES = 8
"""Times that β is raised at one stop, at most, where the wall is felt."""
_HASTE = 3.0
"""By how much a small budget may stretch that."""
_MOST_STEPS = 120
_CAREFUL = 0.95
"""Share of the tuned step that is taken."""
_MARGIN = 3.5
"""By how many standard deviations the mean energy of the κ ladder lies below the cutoff."""
_DOWN, _THERE = 0.25, 0.3
"""Shares of the budget for the way down and for the stay at its end; the rest is for the way up."""
_LEAST_SETTLING, _MOST_SETTLING = 12, 64
"""Visits at the end of the way down, in which β and the metric settle."""
_LEAST_VISITS, _MOST_VISITS, _LAG = 4, 24, 1.5
"""Visits to each stop on the way up, and the standard errors of B from which on chains count as lagging behind."""
_HURRY = 2.0
"""By how much a budget that is twice overspent may thin these out, in visits and, together, in the number of stops."""
_RECENT, _MOST_NUMBERS = 12, 20_000_000
"""Visits on the way down whose slopes make the metric, and how many numbers are kept for it at most."""
_POOLED = 4
"""Stops whose records say together how the maps should stretch."""
_LEAST_MARGIN = 3.0
"""And by how many nats at least: with few confined directions the energy has an exponential tail."""
_CHEAP, _CHEAP_SPREAD = 1000, 1.0
"""Below so many dimensions steps are spread over so many e-folds, and maps stretch all leaves alike: where regions have
arms, no one step and no one map fits."""
_FEW, _FEW_SPREAD = 100, 2.5
"""The same where there are fewer still, and arms are narrower against the rest."""
_UNEVEN_SPREAD = 3.0
"""And where there are more: e-folds for each unit by which the power of the masses lies below 1, where trajectories
are long. A chain that comes by a place far stiffer than most has to leave it again."""
_PRESSED = 3.0
"""Mean of B, in roots of D, that says that the wall is felt."""
_INFINITE = (
    "the region looks unbounded and the prior is improper, so the mass is infinite; use a proper prior such as "
    "vj.Gaussian, vj.UniformBox or vj.UniformBall"
)
_ENDLESS = -40.0
"""log a at which a tether that still holds back chains holds them e²⁰ times as far out as the parameters are large."""
_UNBOUNDED, _WINDOW = 1.25, 20
"""A region without an end lets |δ|² grow by this factor in so many visits, time after time."""


class Pilot(NamedTuple):
    """What the pilot leaves behind."""

    survey: Survey
    metric: Metric
    ends: Position
    """Where its chains stood at the end of the way down: starts for the heating pass, independent of the main run."""
    gradients: int


@dataclasses.dataclass(frozen=True)
class _Gait:
    """How the chains step."""

    step: float
    spread: float = 0.0

    def adapted(self, record: Record, stuck: float) -> "_Gait":
        """Return the gait after a visit: towards the wanted acceptance, and wider where some chains never move."""
        mean = float(np.mean(record.acceptance[-1]))
        spread = self.spread + (0.5 if stuck > 0.1 and mean > 0.5 else -0.1)
        step = self.step * np.exp((0.7 if mean > 0.3 else 1.5) * (mean - _TARGET))
        return _Gait(float(np.clip(step, 1e-7, 1.2)), float(np.clip(spread, 0.0, 5.0)))


@dataclasses.dataclass
class _Stop:
    x: float
    beta: float
    gait: _Gait
    variance: np.ndarray
    record: Record
    confined: float = 0.0


def fly(
    ensemble: Ensemble,
    key: Key[Array, ""],
    *,
    chains: int,
    budget: float,
    anchor_cost: float,
    beta_factor: float,
    batch_size: int | None,
    mesh: Mesh | None,
    on_progress: Callable[[float], None],
) -> Pilot:
    """Run the pilot: down to the prior's own stiffness, there until β and the metric have settled, and back up.

    Raises:
        ValueError: an improper prior over an unbounded region.
    """
    flight = _Flight(ensemble, key, chains, anchor_cost, batch_size, mesh)
    room = float(ensemble.cutoff) - anchor_cost
    scouts = _descend(flight, room, beta_factor, _DOWN * budget, on_progress)
    beta, natural, settled = flight.settle_beta(scouts[-1], room, beta_factor, (_DOWN + _THERE) * budget)
    if ensemble.frame.stiffness == 0.0:
        flight.require_bounded(settled, beta)
    ends = flight.positions
    on_progress(_DOWN + _THERE)
    top = flight.reference_precision(beta)
    flight.positions = ends
    # What is left for the way up may not do for all that one would like to know.
    hurry = float(np.clip(0.5 * flight.gradients / ((_DOWN + _THERE) * budget), 1.0, _HURRY))
    stops = _ascend(flight, _plan(scouts, top, hurry), beta, settled, hurry, on_progress)
    return Pilot(_survey(flight, stops, beta, natural), flight.metric, ends, flight.gradients)


def _plan(scouts: list[_Stop], top: float, hurry: float) -> list[float]:
    """Return where the way up stops, rising: close together where the cost confines, far apart above."""
    rough, fine = 0.5 * np.sqrt(hurry), 0.2 * np.sqrt(hurry)
    bottom, felt = scouts[-1].x, [stop.x for stop in scouts if stop.confined > 5.0]
    bend = min(max(felt), top) if felt else bottom
    wide = np.linspace(top, bend, max(int(np.ceil((top - bend) / rough)), 1) + 1)
    # Closest at the end, where the region may bend.
    close = bottom + (bend - bottom) * np.linspace(1.0, 0.0, max(int(np.ceil((bend - bottom) / fine)), 1) + 1) ** 2
    return sorted({round(float(x), 9) for x in (*wide, *close)})


def _ascend(
    flight: "_Flight", plan: list[float], beta: float, settled: _Stop, hurry: float,
    on_progress: Callable[[float], None],
) -> list[_Stop]:  # fmt: skip
    """Go back up, with a few visits to each stop, and return the stops in the order of falling x."""
    ensemble, latest = flight.ensemble, settled
    least, most = (max(round(visits / hurry), 2) for visits in (_LEAST_VISITS, _MOST_VISITS))
    stops = [settled]
    for i, x in enumerate(plan[1:], start=1):
        rise = x - latest.x
        flight.pending = -0.5 * _rate([latest.record], [latest.x], flight.as_one)[1] * rise
        variance = latest.variance * np.exp(-rise)
        confined = flight.confined(beta, latest.record)
        gait, records = latest.gait, []
        # B has no mean where the chains have settled, or a negative one behind a wall; they lag while it is positive.
        while len(records) < least or (len(records) < most and _lags(ensemble, _joined(records[-least:]), x, beta)):
            records.append(flight.visit(x, beta, gait, variance, confined))
            gait = gait.adapted(records[-1], flight.stuck)
        record = _joined(records[-least:])
        latest = _Stop(x, beta, gait, _variances(ensemble, record), record)
        stops.append(latest)
        share = _DOWN + _THERE
        on_progress(share + (1.0 - share) * (i + 1) / len(plan))
    return stops[::-1]


def _target(energy: float, bulge: float, room: float, factor: float) -> float:
    """Return the β at which an energy λ = β(E − C0), seen `bulge` times as high on the segment, lies below the wall."""
    return factor * (bulge * energy + _MARGIN * np.sqrt(energy) + _LEAST_MARGIN) / room


def _descend(
    flight: "_Flight", room: float, factor: float, budget: float, on_progress: Callable[[float], None]
) -> list[_Stop]:
    """Go down to the prior's own stiffness in steps that the works allow, raising β as more and more is confined."""
    ensemble = flight.ensemble
    stiff = ensemble.frame.stiffness > 0.0
    beta = _target(0.1, 1.0, room, factor)
    x = flight.reference_precision(beta)
    gait, variance = _Gait(0.5), np.full(len(jax.tree.leaves(ensemble.frame.anchor)), np.exp(-x))
    stops: list[_Stop] = []
    while True:
        confined = 0.0 if not stops else flight.confined(beta, stops[-1].record)
        gait, record = flight.settle_gait(x, beta, gait, variance, confined, most=2 if stops else 5)
        for _ in range(_RAISES):
            wanted = _target(flight.expected(record, x, beta), flight.bulge(record), room, factor)
            if wanted < 1.05 * beta:
                break
            # The chains stand at the wall, and λ grows with β: go ahead of it.
            beta = min(1.1 * wanted, 4.0 * beta)
            gait, record = flight.settle_gait(x, beta, gait, variance, confined, most=1)
        flight.learn(x, beta, keep=_RECENT)
        variance = _variances(ensemble, record)
        stops.append(_Stop(x, beta, gait, variance, record, flight.expected(record, x, beta)))
        on_progress(_DOWN * min(1.0, flight.gradients / budget))
        if (stiff and x <= 0.0) or (not stiff and np.mean(0.5 * np.exp(x) * record.square[-1]) < 0.02):
            return stops
        if x < _ENDLESS:
            raise ValueError(_INFINITE)
        recent = stops[-_POOLED:]
        rate, shares = _rate([stop.record for stop in recent], [stop.x for stop in recent], flight.as_one)
        width = float(np.clip(_WORK / max(rate, 1e-9), 0.02, 0.5))
        if stiff:
            # A small budget makes the steps longer, but not so long that the wall comes before β can rise.
            left = max(budget - flight.gradients, 1.0)
            width = max(width, min(x * flight.last_cost / left, _HASTE * width, 0.5))
        # The next stop confines more.
        beta = max(beta, _target(1.2 * np.exp(width) * stops[-1].confined, flight.bulge(record), room, factor))
        following = max(x - width, 0.0) if stiff else x - width
        flight.pending = 0.5 * shares * (x - following)
        variance = variance * np.exp(min(0.5 * (x - following), 0.2))
        x = following


class _Flight:
    """The pilot's chains, and the bookkeeping of what they cost."""

    def __init__(
        self, ensemble: Ensemble, key: Array, chains: int, anchor_cost: float, batch_size: int | None,
        mesh: Mesh | None,
    ) -> None:  # fmt: skip
        self.ensemble, self.key, self.batch_size, self.anchor_cost = ensemble, key, batch_size, anchor_cost
        self.chains, self.mesh = jnp.arange(chains, dtype=jnp.int32), mesh
        self.visits, self.gradients, self.last_cost = 0, 0, 1
        self.metric = plain_metric(ensemble.frame.anchor, turns=ensemble.frame.walls is None)
        self.slopes: list[tuple[float, list[np.ndarray]]] = []
        self.positions: Position
        self.pending = np.zeros(2 * len(jax.tree.leaves(ensemble.frame.anchor)))
        """Logs by which the next visit first scales the leaves, where that stays inside."""
        self.memory = np.ones(len(self.chains))
        """Each chain's acceptance of late: near zero where it has been stuck for several moves."""

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
            self.positions = begin(self.ensemble, start, precision, self.chains, self.mesh)
            reach = np.asarray(self.positions.reach) - self.anchor_cost
            energy = beta * float(np.mean(np.where(np.isfinite(reach), np.abs(reach), np.inf)))
            supported = np.mean(np.asarray(jax.vmap(self.ensemble.frame.supports)(self.positions.displacement)))
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
        outside = ~np.asarray(_permitted(self.ensemble, self.positions))
        if outside.any() and not outside.all():
            inside = np.flatnonzero(~outside)
            source = np.where(outside, inside[np.arange(len(outside)) % len(inside)], np.arange(len(outside)))
            self.positions = laid_out_like(jax.tree.map(lambda p: p[source], self.positions), self.positions)

    @property
    def as_one(self) -> bool:
        """Whether all leaves are stretched alike: chains of the star stay on their rays, and arms differ in leaves."""
        return bool(self.ensemble.checks) or self.ensemble.dimension < _CHEAP

    def visit(self, x: float, beta: float, gait: _Gait, variance: np.ndarray, confined: float) -> Record:
        """Let the chains move once and measure them; those that fell outside restart from the others."""
        spread = self.spread(gait, confined)
        steps = int(np.clip(np.ceil(self.length(confined) / gait.step * np.exp(0.5 * spread)), 2, _MOST_STEPS))
        # Two rungs: the chains step from the first onto the second by the pending stretch, and move there.
        rung = Rung(
            precision=np.full(3, np.exp(x)),
            beta=np.full(3, beta),
            masses=np.repeat(1.0 / variance[None], 3, axis=0),
            step_size=np.full(3, gait.step),
            spread=np.full(3, spread),
            num_steps=np.full(3, steps, np.int32),
            num_moves=np.array([0, 1, 1], np.int32),
            stretch=np.stack([self.pending, 0.0 * self.pending, 0.0 * self.pending]),
        )
        self.pending = 0.0 * self.pending
        self.positions, record = travel(
            self.ensemble, self.metric, self.key, self.positions, pad(rung), [0, 1, 1], self.visits, self.batch_size
        )
        self.visits += 2
        self.last_cost = int(rung.gradients[1])
        self.gradients += self.last_cost
        self.memory = 0.6 * self.memory + 0.4 * record.acceptance[-1]
        self.revive()
        return Record(*(part[1:] for part in record))

    def length(self, confined: float) -> float:
        """Return how long trajectories are at that λ."""
        return float(trajectory_length(np.asarray(confined), max(confined, 60.0), float(self.metric.power)))

    def spread(self, gait: _Gait, confined: float) -> float:
        """Return over how many e-folds steps are drawn."""
        if self.ensemble.dimension < _CHEAP:
            # Any spread at all brings the short trajectories with it, which free chains that are held in an arm.
            return max(gait.spread, 1e-9)
        long = float(np.clip(self.length(confined) / (2.0 * SHORT * gait.step) - 1.0, 0.0, 1.0))
        return max(gait.spread, _UNEVEN_SPREAD * (1.0 - float(self.metric.power)) * long)

    def learn(self, x: float, beta: float, *, keep: int, yields: bool = False) -> None:
        """Fit the metric to the slopes where the chains stand now and stood at the visits before, `keep` at most."""
        here = slopes(self.ensemble, self.positions, self.batch_size)
        self.gradients += 1
        self.slopes.append((beta, [np.asarray(leaf) for leaf in here]))
        room = int(max(_MOST_NUMBERS // (self.ensemble.dimension * len(self.chains)), 2))
        self.slopes = self.slopes[-min(keep, room) :]
        together = [np.concatenate(parts) for parts in zip(*(leaves for _, leaves in self.slopes), strict=True)]
        betas = np.repeat([beta for beta, _ in self.slopes], len(self.chains))
        turns = self.ensemble.frame.walls is None
        self.metric = fit_metric(together, betas, float(np.exp(x)), turns=turns, yields=yields)

    def confined(self, beta: float, record: Record) -> float:
        """Return λ = β(E − C0), the mean over chains."""
        return max(beta * (float(np.nanmean(record.cost[-1])) - self.anchor_cost), 0.0)

    def expected(self, record: Record, x: float, beta: float) -> float:
        """Return λ as it would be if the chains had settled and felt no wall.

        They obey E B = 0, so that δ·∇E would then be larger by −B/β, and E with it.
        """
        confined = self.confined(beta, record)
        stretching = float(np.mean(_stretchings(self.ensemble, record, x, beta)))
        certain = np.sign(stretching) * max(abs(stretching) - _PRESSED * np.sqrt(self.ensemble.dimension), 0.0)
        felt = beta * float(np.mean(record.virial))
        if not (np.isfinite(certain) and felt > 0.0):
            return confined
        return confined * float(np.clip((felt - certain) / felt, 0.3, 5.0))

    def pressed(self, record: Record, x: float, beta: float) -> bool:
        """Whether the wall is felt: B, which has no mean without one, is far below zero."""
        stretching = _stretchings(self.ensemble, record, x, beta).ravel()
        return bool(np.mean(stretching) < -_PRESSED * np.sqrt(self.ensemble.dimension))

    def bulge(self, record: Record) -> float:
        """Return how much higher the largest cost on the segment lies above the anchor's than the guide; at least 1."""
        rise = [float(np.nanmean(values[-1])) - self.anchor_cost for values in (record.reach, record.cost)]
        return float(np.clip(rise[0] / rise[1], 1.0, 3.0)) if rise[1] > 0.0 and np.isfinite(rise[0]) else 1.0

    def settle_gait(
        self, x: float, beta: float, gait: _Gait, variance: np.ndarray, confined: float, *, most: int
    ) -> tuple[_Gait, Record]:
        """Visit until the acceptance is about right, and return what was learnt with the last record."""
        for _ in range(most):
            record = self.visit(x, beta, gait, variance, confined)
            acceptance = float(np.mean(record.acceptance[-1]))
            gait = gait.adapted(record, self.stuck)
            if 0.6 < acceptance < 0.97:
                return gait, record
        return gait, self.visit(x, beta, gait, variance, confined)

    def require_bounded(self, stop: _Stop, beta: float) -> None:
        """Let the chains go, and raise a ValueError if nothing holds them."""
        variance, gait, squares = stop.variance, stop.gait, [float(np.mean(stop.record.square[-1]))]
        for _ in range(3 * _WINDOW):
            gait, record = self.settle_gait(-np.inf, beta, gait, variance, 1e9, most=1)
            variance = _variances(self.ensemble, record)
            squares.append(float(np.mean(record.square[-1])))
            earlier, latest = np.mean(squares[: len(squares) // 2]), np.mean(squares[-len(squares) // 4 :])
            if len(squares) >= _WINDOW and latest < _UNBOUNDED * earlier:
                return
        raise ValueError(_INFINITE)

    def settle_beta(self, stop: _Stop, room: float, factor: float, until: float) -> tuple[float, float, _Stop]:
        """Return β of the κ ladder, the natural β and the last stop as the chains see it once they have settled there.

        λ = β(E C − C0) hardly depends on β. Changes of β are cut into small ones: trajectories after a sudden one would
        swing through the wall.

        Args:
            stop: where the descent ended.
            room: the cutoff less the cost at the anchor.
            factor: multiplies β.
            until: gradients spent in all when to stop.
        """
        beta, gait, variance = stop.beta, stop.gait, stop.variance
        energies: list[float] = []
        records: list[Record] = []
        while len(energies) < _LEAST_SETTLING or (
            len(energies) < _MOST_SETTLING and (self.gradients < until or self.pressed(record, stop.x, beta))
        ):
            gait, record = self.settle_gait(stop.x, beta, gait, variance, 1e9, most=1)
            records.append(record)
            self.learn(stop.x, beta, keep=_MOST_SETTLING, yields=self.ensemble.dimension >= _CHEAP)
            variance = _variances(self.ensemble, record)
            energies.append(max(self.expected(record, stop.x, beta), 0.1))
            wanted = _target(float(np.mean(energies[-_LEAST_SETTLING // 2 :])), self.bulge(record), room, factor)
            beta *= float(np.exp(np.clip(np.log(wanted / beta), -0.15, 0.15)))
        natural = self.bulge(record) * float(np.mean(energies[-_LEAST_SETTLING // 2 :])) / room
        return beta, natural, _Stop(stop.x, beta, gait, variance, _joined(records[-len(records) // 2 :]))


@eqx.filter_jit
def _permitted(ensemble: Ensemble, positions: Position) -> Bool[Array, "chains"]:
    """Return which chains stand inside the region."""
    return jax.vmap(ensemble.permits)(positions.reach, positions.displacement)


def _variances(ensemble: Ensemble, record: Record) -> np.ndarray:
    """Return each leaf's mean square of δ, never zero."""
    squares = record.leaf_squares.mean(axis=(0, 1)) / _leaf_sizes(ensemble)
    return np.maximum(squares, 1e-12 * squares.max() + 1e-300)


def _leaf_sizes(ensemble: Ensemble) -> np.ndarray:
    return np.array([max(x.size, 1) for x in jax.tree.leaves(ensemble.frame.anchor)], np.float64)


def _stretchings(ensemble: Ensemble, record: Record, x: float, beta: float) -> np.ndarray:
    """Return B = δ·∇U − D of each visit and chain."""
    return beta * record.virial + np.exp(x) * record.square + record.pulled - tree.size(ensemble.frame.anchor)


def _joined(records: list[Record]) -> Record:
    return Record(*(np.concatenate(parts) for parts in zip(*records, strict=True)))


def _lags(ensemble: Ensemble, record: Record, x: float, beta: float) -> bool:
    stretching = _stretchings(ensemble, record, x, beta).ravel()
    return bool(np.mean(stretching) > _LAG * np.std(stretching) / np.sqrt(len(stretching)))


def _rate(records: list[Record], xs: list[float], as_one: bool) -> tuple[float, np.ndarray]:
    """Return the standard deviation of the last record's work per unit of x at the best stretch, and the leaves'."""
    slopes = [0.5 * np.exp(x) * record.square for record, x in zip(records, xs, strict=True)]
    shares = best_shares(slopes, [record.stretchings for record in records], as_one=as_one)
    work = slopes[-1] - 0.5 * np.nan_to_num(records[-1].stretchings) @ shares
    return float(np.std(work, ddof=1)), shares


def _smooth_steps(steps: np.ndarray) -> np.ndarray:
    """Return the steps, freed of the noise with which they were tuned, and a little shorter."""
    logs = np.log(steps)
    near = [logs[max(i - 2, 0) : i + 3] for i in range(len(logs))]
    return np.asarray(_CAREFUL * np.exp([min(np.mean(part), logs[i]) for i, part in enumerate(near)]))


def _survey(flight: _Flight, stops: list[_Stop], beta: float, natural: float) -> Survey:
    ensemble, anchor_cost = flight.ensemble, flight.anchor_cost
    small = ensemble.dimension < _CHEAP
    confined = np.array([max(beta * (float(np.mean(stop.record.cost)) - anchor_cost), 0.0) for stop in stops])
    return Survey(
        x=np.array([stop.x for stop in stops]),
        slope=[0.5 * np.exp(stop.x) * stop.record.square for stop in stops],
        stretching=[np.nan_to_num(stop.record.stretchings) for stop in stops],
        leaf_variance=np.stack([stop.variance for stop in stops]),
        leaf_sizes=_leaf_sizes(ensemble),
        power=float(flight.metric.power),
        step_size=_smooth_steps(np.array([stop.gait.step for stop in stops])),
        spread=np.array([flight.spread(stop.gait, c) for stop, c in zip(stops, confined, strict=True)]),
        room=[float(ensemble.cutoff) - stop.record.reach for stop in stops],
        rises=[np.nan_to_num(stop.record.rises) for stop in stops],
        confined=confined,
        as_one=flight.as_one,
        inside=np.array([float(np.mean(stop.record.inside)) if small else 1.0 for stop in stops]),
        beta=beta,
        natural_beta=natural,
        anchor_cost=anchor_cost,
        least_spread=_FEW_SPREAD if ensemble.dimension < _FEW else _CHEAP_SPREAD if small else 0.0,
        ends_flat=ensemble.frame.stiffness == 0.0,
    )
