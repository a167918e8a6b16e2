"""The pilot: a coarse run down to the prior and back, thrown away once it has set the ladder, β and the step sizes."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from volumejax.annealing import Record
from volumejax.ensemble import CHEAP, Ensemble, Position, with_bulges
from volumejax.flight import POOLED, Flight, Gait, Stop, joined, leaf_sizes, stretchings, variances, work_scatter
from volumejax.ladder import Survey
from volumejax.metric import Metric
from volumejax.parallel import Launcher

__all__ = ["Pilot", "fly"]

_LEAST_CHAINS = 4
"""Its measurements are moments between chains."""
_WORK = 3.0
"""Standard deviation of the work between two stops, in nats."""
_RAISES = 8
"""Times that β is raised at one stop, at most, where the wall is felt."""
_HASTE = 3.0
"""By how much a small budget may stretch that."""
_CAREFUL = 0.95
"""Share of the tuned step that is taken."""
_MARGIN = 3.5
"""By how many standard deviations the mean energy of the κ ladder lies below the cutoff."""
_LEAST_MARGIN = 3.0
"""And by how many nats at least: with few confined directions the energy has an exponential tail."""
_FULL, _LEAST_WIDTH = 0.9, 0.05
"""Share of the room that the cost may be seen to fill at the next stop of the way down, unless the step is shorter."""
_LAGGING, _SETTLED_LAGGING = 0.25, 0.85
"""And by which share of itself at least, where nearly all directions are free: with what chains lag behind in these
their cost swings by a part of itself, and not of its root. The second for the β of the κ ladder, once chains have
settled; but for stars whose segments scatter."""
_SCATTERED = 7.0
"""Natural β times what segments scatter by against the guide, in nats, from which on the ridge has a long way to go,
and a longer one from a higher β: at σ = RMS the digits network has 4 to 5, at the paper's σ 10 to 20."""
_DOWN, _THERE = 0.25, 0.3
"""Shares of the budget for the way down and for the stay at its end; the rest is for the way up."""
_LEAST_SETTLING, _MOST_SETTLING = 12, 64
"""Visits at the end of the way down, in which β and the metric settle."""
_LATE = 2.0
"""By how much that may take more gradients than it should where chains still move outwards."""
_LEAST_VISITS, _MOST_VISITS, _LAG, _SCATTER = 4, 24, 1.5, 2.0
"""Visits to each stop on the way up, the standard errors of B from which on chains count as lagging behind, and by how
much more than those of a Gaussian settled ones may scatter."""
_HURRY = 4.0
"""By how much a budget that is twice overspent may thin these out, in visits and, together, in the number of stops."""
_RECENT = 12
"""Visits on the way down whose slopes make the metric."""
_CHEAP_SPREAD = 1.0
"""E-folds over which the ladder's steps are spread at least, where dimensions are few."""
_FEW, _FEW_SPREAD = 100, 2.5
"""The same where there are fewer still, and arms are narrower against the rest."""
_INFINITE = (
    "the region looks unbounded and the prior is improper, so the mass is infinite; use a proper prior such as "
    "vj.Gaussian, vj.UniformBox or vj.UniformBall"
)
_ENDLESS = -40.0
"""log a at which a tether that still holds back chains holds them e²⁰ times as far out as the parameters are large."""
_FAR = 32.0
"""log |δ|² at which they are e¹⁶ times as far out, and steps that fit confined directions too short for the rest."""
_UNBOUNDED, _WINDOW = 1.25, 20
"""A region without an end lets |δ|² grow by this factor in so many visits, time after time."""
_AGAIN = 2_000_000
"""Folded into the key where the chains go down a second time, and twice that for a third."""


class Pilot(NamedTuple):
    """What the pilot leaves behind."""

    ensemble: Ensemble
    """As it was given, but for where the star's guide looks."""
    survey: Survey
    metric: Metric
    ends: Position
    """Where as many chains as the run has stood at the end of the way down: starts for the heating pass, independent of
    the run itself."""
    gradients: int


def fly(
    ensemble: Ensemble,
    key: Key[Array, ""],
    *,
    chains: int,
    budget: float,
    anchor_cost: float,
    beta_factor: float,
    batch_size: int | None,
    launchers: Sequence[Launcher],
    on_progress: Callable[[float], None],
) -> Pilot:
    """Run the pilot: down to the prior's own stiffness, there until β and the metric have settled, and back up.

    Of `chains`, or where these are few of several groups of as many, so that the run itself takes the same program.
    A star's chains go down again if their segments bulge where the guide does not look: with a guide that looks between
    the two places, and if that will not do with one that looks at both.

    Raises:
        ValueError: an improper prior over an unbounded region.
    """
    groups, furthest = -(-_LEAST_CHAINS // chains), 0.0

    def progress(share: float) -> None:
        nonlocal furthest
        furthest = max(furthest, share)
        on_progress(furthest)

    def descend(ensemble: Ensemble, key: Array, spent: int) -> tuple[Flight, list[Stop]]:
        flight = Flight(ensemble, key, chains, anchor_cost, batch_size, launchers, groups=groups)
        flight.gradients = spent
        # At a β below the natural one steps down would be short; it is set where the chains settle.
        factor = beta_factor if ensemble.dimension < CHEAP else max(beta_factor, 1.0)
        return flight, _descend(flight, factor, _DOWN * budget, progress)

    def settle(flight: Flight, scouts: list[Stop]) -> tuple[float, float, Stop]:
        return _settle_beta(flight, scouts[-1], beta_factor, (_DOWN + _THERE) * budget)

    flight, scouts = descend(ensemble, key, 0)
    guides = ensemble.bulges.listed
    bulge = flight.bulging(guides)
    places = guides if bulge is None else (*guides, bulge)
    if bulge is not None:
        # A place between the two often does for both.
        ensemble = with_bulges(ensemble, [statistics.harmonic_mean(places)])
        flight, scouts = descend(ensemble, jax.random.fold_in(key, _AGAIN), flight.gradients)
    beta, natural, settled = settle(flight, scouts)
    if bulge is not None and flight.bulging(ensemble.guides) is not None:
        # A gradient of the guide costs more from now on.
        dearer = (1 + len(places)) / len(ensemble.guides)
        ensemble = with_bulges(ensemble, places)
        spent = round(flight.gradients / dearer)
        budget = budget / dearer + spent
        flight, scouts = descend(ensemble, jax.random.fold_in(key, 2 * _AGAIN), spent)
        beta, natural, settled = settle(flight, scouts)
    if ensemble.frame.improper:
        _require_bounded(flight, settled, beta)
    ends, flight.last = flight.positions, flight.confined(beta, settled.record)
    progress(_DOWN + _THERE)
    top = flight.reference_precision(beta)
    flight.positions = ends
    # What is left for the way up may not do for all that one would like to know.
    hurry = float(np.clip(0.5 * flight.gradients / ((_DOWN + _THERE) * budget), 1.0, _HURRY))
    stops = _ascend(flight, _plan(scouts, top, hurry), beta, settled, hurry, progress)
    return Pilot(ensemble, _survey(flight, stops, beta, natural), flight.metric, ends[0], flight.gradients)


def _plan(scouts: list[Stop], top: float, hurry: float) -> list[float]:
    """Return where the way up stops, rising: close together where the cost confines, far apart above."""
    rough, fine = 0.5 * np.sqrt(hurry), 0.2 * np.sqrt(hurry)
    bottom, felt = scouts[-1].x, [stop.x for stop in scouts if stop.confined > 5.0]
    bend = min(max(felt), top) if felt else bottom
    wide = np.linspace(top, bend, max(int(np.ceil((top - bend) / rough)), 1) + 1)
    # Closest at the end, where the region may bend.
    close = bottom + (bend - bottom) * np.linspace(1.0, 0.0, max(int(np.ceil((bend - bottom) / fine)), 1) + 1) ** 2
    return sorted({round(float(x), 9) for x in (*wide, *close)})


def _ascend(
    flight: Flight, plan: list[float], beta: float, settled: Stop, hurry: float,
    on_progress: Callable[[float], None],
) -> list[Stop]:  # fmt: skip
    """Go back up, with a few visits to each stop, and return the stops in the order of falling x."""
    ensemble, latest = flight.ensemble, settled
    least, most = (max(round(visits / hurry), 2) for visits in (_LEAST_VISITS, _MOST_VISITS))
    stops = [settled]
    for i, x in enumerate(plan[1:], start=1):
        rise = x - latest.x
        flight.pending = flight.pending - 0.5 * latest.shares * rise
        variance = latest.variance * np.exp(-rise)
        confined = flight.confined(beta, latest.record)
        gait, records, steps = latest.gait, [], []
        # B has no mean where the chains have settled, or a negative one behind a wall; they lag while it is positive.
        while len(records) < least or (
            len(records) < most and _certainty(flight, joined(records[-least:]), x, beta) > _LAG
        ):
            records.append(flight.visit(x, beta, gait, variance, confined))
            gait = gait.adapted(records[-1], flight.stuck)
            steps.append(gait.step)
        record = joined(records[-least:])
        gait = dataclasses.replace(gait, step=float(np.exp(np.mean(np.log(steps[-least:])))))
        variance = variances(ensemble, record)
        shares = flight.shares([(x, record)], beta, variance)
        latest = Stop(x, beta, gait, variance, record, shares, lag=_settled_by(records, x) / rise)
        stops.append(latest)
        share = _DOWN + _THERE
        on_progress(share + (1.0 - share) * (i + 1) / len(plan))
    return stops[::-1]


def _settled_by(records: list[Record], x: float) -> float:
    """Return by how much X fell after the first visit to a stop, at most: with two standard errors."""
    slopes = np.array([0.5 * np.exp(x) * record.square[-1] for record in records])
    falls = slopes[0] - np.mean(slopes[len(slopes) // 2 :], axis=0)
    return max(float(np.mean(falls)), 0.0) + 2.0 * float(np.std(falls, ddof=1)) / float(np.sqrt(len(falls)))


def _target(flight: Flight, energy: float, bulge: float, factor: float, *, settled: Record | None = None) -> float:
    """Return the β at which an energy λ and its swings, `bulge` times as high on the segment, stay below the wall.

    Of the κ ladder where the record of settled chains is given.
    """
    dimension = flight.ensemble.dimension
    free = max(1.0 - 2.0 * energy / dimension, 0.0) if dimension >= CHEAP else 0.0
    high = settled is not None and bulge * energy / flight.room * flight.unseen(settled) < _SCATTERED
    lagging = _SETTLED_LAGGING if high else _LAGGING
    margin = max(_MARGIN * np.sqrt(energy) + _LEAST_MARGIN, lagging * free * energy)
    return factor * bulge * (energy + margin) / flight.room


def _descend(flight: Flight, factor: float, budget: float, on_progress: Callable[[float], None]) -> list[Stop]:
    """Go down to the prior's own stiffness in steps that the works allow, raising β as more and more is confined."""
    ensemble = flight.ensemble
    stiff = ensemble.frame.stiffness > 0.0
    beta = _target(flight, 0.1, 1.0, factor)
    x = flight.reference_precision(beta)
    gait, variance = Gait(0.5), np.full(len(jax.tree.leaves(ensemble.frame.anchor)), np.exp(-x))
    stops: list[Stop] = []
    while True:
        confined = 0.0 if not stops else flight.confined(beta, stops[-1].record)
        gait, record = flight.settle_gait(x, beta, gait, variance, confined, most=2 if stops else 5)
        for _ in range(_RAISES):
            wanted = _target(flight, flight.expected(record, x, beta), flight.bulge(record), factor)
            if wanted < 1.05 * beta:
                break
            # The chains stand at the wall, and λ grows with β: go ahead of it.
            beta = min(1.1 * wanted, 4.0 * beta)
            flight.follow(x, beta, variance)
            gait, record = flight.settle_gait(x, beta, gait, variance, confined, most=1)
        flight.learn(x, beta, keep=_RECENT)
        variance = variances(ensemble, record)
        seen = [*((stop.x, stop.record) for stop in stops[1 - POOLED :]), (x, record)]
        shares = flight.shares(seen, beta, variance)
        stops.append(Stop(x, beta, gait, variance, record, shares, flight.expected(record, x, beta)))
        on_progress(_DOWN * min(1.0, flight.gradients / budget))
        if x < _ENDLESS or (not stiff and np.log(np.mean(record.square[-1])) > _FAR):
            raise ValueError(_INFINITE)
        if (stiff and x <= 0.0) or (not stiff and np.mean(0.5 * np.exp(x) * record.square[-1]) < 0.02):
            return stops
        width = float(np.clip(_WORK / max(work_scatter(record, x, shares), 1e-9), 0.02, 0.5))
        if stiff:
            # A small budget makes the steps longer, but not so long that the wall comes before β can rise.
            left = max(budget - flight.gradients, 1.0)
            width = max(width, min(x * flight.last_cost / left, _HASTE * width, 0.5))
        # The next stop confines more. Where the cost does not feel β yet it may grow fast.
        growth = flight.growth(beta, record, shares)
        if growth > 0.0:
            filled = (float(np.nanmean(record.reach[-1])) - flight.floor) / flight.room
            width = min(width, max(np.log(_FULL / max(filled, 1e-9)) / growth, _LEAST_WIDTH))
        rise = max(1.2 * np.exp(width), np.exp(growth * width))
        beta = max(beta, _target(flight, rise * stops[-1].confined, flight.bulge(record), factor))
        following = max(x - width, 0.0) if stiff else x - width
        flight.pending = 0.5 * shares * (x - following)
        flight.follow(x, beta, variance)
        variance = variance * np.exp(min(0.5 * (x - following), 0.2))
        x = following


def _require_bounded(flight: Flight, stop: Stop, beta: float) -> None:
    """Let the chains go, and raise a ValueError if nothing holds them."""
    variance, gait, squares = stop.variance, stop.gait, [float(np.mean(stop.record.square[-1]))]
    for _ in range(3 * _WINDOW):
        gait, record = flight.settle_gait(-np.inf, beta, gait, variance, 1e9, most=1)
        variance = variances(flight.ensemble, record)
        squares.append(float(np.mean(record.square[-1])))
        earlier, latest = np.mean(squares[: len(squares) // 2]), np.mean(squares[-len(squares) // 4 :])
        if len(squares) >= _WINDOW and latest < _UNBOUNDED * earlier:
            return
    raise ValueError(_INFINITE)


def _settle_beta(flight: Flight, stop: Stop, factor: float, until: float) -> tuple[float, float, Stop]:
    """Return β of the κ ladder, the natural β and the last stop as the chains see it once they have settled there.

    λ hardly depends on β. Changes of β are cut into small ones, and the chains are carried along:
    trajectories after a sudden one would swing through the wall.

    Args:
        flight: with its chains at the end of the descent.
        stop: where that ended.
        factor: multiplies β.
        until: gradients spent in all when to stop.
    """
    beta, gait, variance = stop.beta, stop.gait, stop.variance
    energies: list[float] = []
    records: list[Record] = []
    large = flight.ensemble.dimension >= CHEAP

    def goes_on() -> bool:
        visits = len(records)
        if visits < _LEAST_SETTLING or (visits < _MOST_SETTLING and flight.gradients < until):
            return True
        if not large:
            return visits < _MOST_SETTLING and flight.pressed(records[-1], stop.x, beta)
        # B is negative while they move outwards.
        behind = _certainty(flight, joined(records[-_LEAST_SETTLING // 2 :]), stop.x, beta) < -_LAG
        return behind and visits < _LATE * _MOST_SETTLING and flight.gradients < _LATE * until

    while goes_on():
        gait, record = flight.settle_gait(stop.x, beta, gait, variance, 1e9, most=1)
        records.append(record)
        flight.learn(stop.x, beta, keep=_MOST_SETTLING, settled=large)
        variance = variances(flight.ensemble, record)
        energies.append(max(flight.expected(record, stop.x, beta), 0.1))
        energy = float(np.mean(energies[-_LEAST_SETTLING // 2 :]))
        latest = joined(records[-_LEAST_SETTLING // 2 :])
        wanted = _target(flight, energy, flight.bulge(record), factor, settled=latest)
        beta *= float(np.exp(np.clip(np.log(wanted / beta), -0.15, 0.15)))
        flight.follow(stop.x, beta, variance)
    record = joined(records[-len(records) // 2 :])
    natural = flight.bulge(record) * float(np.mean(energies[-_LEAST_SETTLING // 2 :])) / flight.room
    shares = flight.shares([(stop.x, record)], beta, variance)
    return beta, natural, Stop(stop.x, beta, gait, variance, record, shares)


def _certainty(flight: Flight, record: Record, x: float, beta: float) -> float:
    """Return the mean of B in its standard errors; one chain far behind would pass for a wide scatter of few.

    In few dimensions B is no Gaussian's.
    """
    stretching = stretchings(flight.ensemble, record, x, beta).ravel()
    scatter = float(np.std(stretching))
    if flight.ensemble.dimension >= CHEAP:
        scatter = min(scatter, _SCATTER * flight.gaussian_scatter(x))
    return float(np.mean(stretching)) * float(np.sqrt(len(stretching))) / max(scatter, 1e-30)


def _smooth_steps(steps: np.ndarray) -> np.ndarray:
    """Return the steps, freed of the noise with which they were tuned, and a little shorter."""
    logs = np.log(steps)
    near = [logs[max(i - 2, 0) : i + 3] for i in range(len(logs))]
    return np.asarray(_CAREFUL * np.exp([min(np.mean(part), logs[i]) for i, part in enumerate(near)]))


def _survey(flight: Flight, stops: list[Stop], beta: float, natural: float) -> Survey:
    ensemble = flight.ensemble
    small = ensemble.dimension < CHEAP
    confined = np.array([max(beta * (float(np.mean(stop.record.cost)) - flight.floor), 0.0) for stop in stops])
    return Survey(
        x=np.array([stop.x for stop in stops]),
        slope=[0.5 * np.exp(stop.x) * stop.record.square for stop in stops],
        stretching=[np.nan_to_num(stop.record.stretchings) for stop in stops],
        leaf_variance=np.stack([stop.variance for stop in stops]),
        leaf_sizes=leaf_sizes(ensemble),
        unevenness=float(flight.metric.unevenness),
        step_size=_smooth_steps(np.array([stop.gait.step for stop in stops])),
        spread=np.array([flight.spread(stop.gait, c) for stop, c in zip(stops, confined, strict=True)]),
        room=[flight.cutoff - stop.record.reach for stop in stops],
        rises=[np.nan_to_num(stop.record.rises) for stop in stops],
        confined=confined,
        # Chains in different arms scatter for good, and do not settle.
        lags=np.array([np.inf if flight.as_one else stop.lag for stop in stops[:-1]]),
        shares=None if flight.as_one else np.stack([stop.shares for stop in stops]),
        walled=flight.walled,
        inside=np.array([float(np.mean(stop.record.inside)) if small else 1.0 for stop in stops]),
        beta=beta,
        natural_beta=natural,
        unseen=beta * flight.unseen(stops[-1].record),
        bulge=flight.bulge(stops[-1].record),
        least_spread=_FEW_SPREAD if ensemble.dimension < _FEW else _CHEAP_SPREAD if small else 0.0,
        ends_flat=ensemble.frame.stiffness == 0.0,
    )
