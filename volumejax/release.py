"""Adjusted chains let go from the anchor: a discarded pilot that sets step and metric, then draws.

The chains start from a Gaussian so tight around the anchor that they do not feel the cost, and are let go in steps.
Each step offers the stretch that free directions want, so that chains come out of a singular minimum into the valleys
that meet there, in the proportions of the target. What the pilot has seen is thrown away.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree
from numpy.typing import NDArray

from volumejax.ensemble import Ensemble, Position, Rung
from volumejax.frames import Frame
from volumejax.kernels import hmc
from volumejax.metric import Metric, fit_metric, plain_metric
from volumejax.regions import Connected

__all__ = ["Pilot", "release", "sample"]

_TARGET = 0.8
"""Acceptance that the step size is tuned to."""
_RATIO = 1.19
"""By how much the precision falls from one visit to the next. A faster release is a quench: at 2 the chains of a deep
product were caught in strata of the wrong weight, 4 % off, with an R-hat of 1.01."""
_MOVES = 8
"""Trajectories of a visit."""
_SPREAD = 1.5
"""Steps are drawn log-uniformly over so many e-folds below the tuned one: where valleys of different width meet in a
singular minimum, no one step fits them all."""
_CYCLE, _SLOW = 4, 0.05
"""Every so many trajectories one takes this share of the step: without it a chain in a place much narrower than most is
stuck there."""
_SETTLE = (4, 6, 8, 10)
"""Visits of the windows at the end, after each of which but the last the metric is fitted anew."""
_REFIT = 16
"""Visits between two fits on the way."""
_TIGHT = 0.5
"""Mean of βC per dimension, at the start, below which the cost is not felt."""
_TIGHTEST = 1e30
"""Where the search for that start ends, for costs that are NaN or walls that are met however near the anchor."""
_FREE = 1e-12
"""Precision at which a flat target is let go altogether, relative to the start."""
_GAIN = 0.7
"""Change of the log step for an acceptance that is off by one."""
_KEPT = 4
"""Slopes of the last visits that make the metric."""


class Pilot(NamedTuple):
    """What the pilot leaves behind."""

    ensemble: Ensemble
    metric: Metric
    positions: Position
    rung: Rung
    step_size: float
    gradients: int


@eqx.filter_jit
def _visit(
    ensemble: Ensemble,
    metric: Metric,
    key: Key[Array, ""],
    positions: Position,
    rung: Rung,
    num_steps: Int[Array, "moves"],
) -> tuple[Position, Float[Array, "moves chains"], Float[Array, "moves chains"]]:
    """Move all chains; return the cost after each trajectory and its Metropolis probability."""
    chains = jnp.arange(positions.cost.shape[0], dtype=jnp.int32)
    _, step = hmc(ensemble, rung, metric)

    def move(positions: Position, m: Array) -> tuple[Position, tuple[Array, Array]]:
        def one(index: Array, position: Position) -> tuple[Position, Array]:
            pace = jnp.where(m % _CYCLE == _CYCLE - 1, jnp.float32(_SLOW), jnp.float32(1.0))
            position, info = step(jax.random.fold_in(jax.random.fold_in(key, index), m), position, num_steps[m], pace)
            return position, info.acceptance

        positions, acceptance = jax.vmap(one)(chains, positions)
        return positions, (positions.cost, acceptance)

    positions, (costs, acceptance) = jax.lax.scan(move, positions, jnp.arange(_MOVES))
    return positions, costs, acceptance


@eqx.filter_jit
def _look(
    ensemble: Ensemble, positions: Position
) -> tuple[list[Float[Array, "chains ..."]], Float[Array, "chains leaves"]]:
    """Return gradients of C and the mean squares of the leaves, in whitened coordinates."""
    slopes = jax.lax.map(lambda d: jax.tree.leaves(ensemble.value_and_slope(d)[1]), positions.displacement)
    squares = [jnp.mean(jnp.square(x.reshape(len(x), -1)), axis=1) for x in jax.tree.leaves(positions.displacement)]
    return slopes, jnp.stack(squares, axis=1)


@eqx.filter_jit
def _begin(ensemble: Ensemble, key: Key[Array, ""], precision: Float[Array, ""], num_chains: int) -> Position:
    def one(index: Array) -> Position:
        displacement = ensemble.frame.draw_reference(jax.random.fold_in(key, index), precision)
        with jax.enable_x64(True):
            cost = jnp.where(ensemble.frame.supports(displacement), ensemble.value(displacement), jnp.inf)
            return Position(displacement, cost, cost, ensemble.no_virials)

    return jax.vmap(one)(jnp.arange(num_chains, dtype=jnp.int32))


@eqx.filter_jit
def _stretch(
    ensemble: Ensemble, metric: Metric, key: Key[Array, ""], positions: Position, here: Array, there: Array, beta: Array
) -> Position:
    """Offer each chain the image that a free direction would have at the next precision, by Metropolis."""
    chance = jax.random.uniform(key, positions.cost.shape)

    def one(position: Position, u: Array) -> Position:
        with jax.enable_x64(True):
            gain = jnp.expm1(0.5 * jnp.log(here / jnp.maximum(there, 1e-300))).astype(jnp.float32)
            gains = jax.tree.map(lambda x: jnp.full(x.shape, gain), position.displacement)
            image, work = ensemble.carry(position, metric, gains, (here, beta), (there, beta))
            taken = jnp.log(u.astype(jnp.float64)) < -work
            return jax.tree.map(lambda x, y: jnp.where(taken, x, y), image, position)

    return jax.vmap(one)(positions, chance)


def release(
    key: Key[Array, ""],
    cost: Callable[[PyTree], Float[Array, ""]],
    frame: Frame,
    *,
    beta: float,
    precision: float,
    num_chains: int,
    num_steps: int,
) -> Pilot:
    """Let chains go from the anchor to the target exp(−βC − ½a|δ|² − b·δ), and tune the moves on the way.

    Args:
        key: threefry.
        cost: params -> scalar nats.
        frame: whitened coordinates, in which the prior is.
        beta: β.
        precision: a at the end; 0 for a target that is flat but for the cost.
        num_chains: chains.
        num_steps: mean leapfrog steps of a trajectory.
    """
    with jax.enable_x64(True):
        ensemble = Ensemble(
            cost=cost,
            frame=frame,
            cutoff=jnp.asarray(jnp.inf, jnp.float64),
            region=Connected(),
            callers_x64=bool(jax.config.read("jax_enable_x64")),
        )
    journey = _Journey(ensemble, key, beta, num_steps)
    journey.start(max(precision, 1.0), num_chains)
    begun = journey.precision
    last = precision if precision > 0.0 else _FREE * begun
    count = 0
    while journey.precision > last * (1.0 + 1e-9):
        journey.go(max(journey.precision / _RATIO, last))
        journey.visit()
        count += 1
        if count % _REFIT == 0:
            journey.refit()
    if precision == 0.0:
        journey.precision = 0.0
    for window, visits in enumerate(_SETTLE):
        for _ in range(visits):
            journey.visit()
        if window < len(_SETTLE) - 1:
            journey.refit()
    return Pilot(
        ensemble,
        journey.metric,
        journey.positions,
        journey.rung(),
        float(math.exp(journey.log_step)),
        journey.gradients,
    )


def sample(
    pilot: Pilot, key: Key[Array, ""], num_draws: int, num_steps: int
) -> tuple[Float[NDArray, "chains draws"], float]:
    """Return the cost at each draw, and the mean Metropolis probability; nothing is tuned any more."""
    positions, blocks = pilot.positions, []
    for block in range(-(-num_draws // _MOVES)):
        here = jax.random.fold_in(key, block)
        steps = jnp.asarray(_lengths(here, _MOVES, num_steps))
        positions, costs, acceptance = _visit(pilot.ensemble, pilot.metric, here, positions, pilot.rung, steps)
        blocks.append((np.asarray(costs, np.float64), np.asarray(acceptance)))
    costs, acceptance = (np.concatenate(parts)[:num_draws] for parts in zip(*blocks, strict=True))
    return costs.T, _judged(acceptance)


class _Journey:
    """The state of the pilot: where the chains stand, at which precision, and how they move."""

    def __init__(self, ensemble: Ensemble, key: Key[Array, ""], beta: float, num_steps: int) -> None:
        self.ensemble, self.key, self.beta, self.num_steps = ensemble, key, beta, num_steps
        self.turns = ensemble.frame.walls is None
        self.metric = plain_metric(ensemble.frame.anchor, turns=self.turns)
        self.log_step, self.visits, self.gradients = math.log(0.1), 0, 0
        self.seen: list[tuple[list[NDArray], NDArray]] = []

    def start(self, precision: float, num_chains: int) -> None:
        """Draw the chains where they do not yet feel the cost."""
        key = jax.random.fold_in(self.key, 0)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), self.ensemble.frame.anchor)
        lowest = float(self.ensemble.value(zero))
        while True:
            with jax.enable_x64(True):
                a = jnp.float64(precision)
            positions = _begin(self.ensemble, key, a, num_chains)
            felt = self.beta * (float(np.mean(np.asarray(positions.cost))) - lowest)
            if felt <= _TIGHT * self.ensemble.dimension or precision > _TIGHTEST:
                break
            precision *= 4.0
        self.positions, self.precision = positions, precision
        self._look()

    def go(self, precision: float) -> None:
        """Let go to a lower precision."""
        with jax.enable_x64(True):
            here, there, beta = (jnp.float64(x) for x in (self.precision, precision, self.beta))
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2), self.visits)
        self.positions = _stretch(self.ensemble, self.metric, key, self.positions, here, there, beta)
        self.precision = precision

    def visit(self) -> None:
        """Move, and tune the step by what was accepted."""
        self.visits += 1
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), self.visits)
        steps = _lengths(key, _MOVES, self.num_steps)
        self.positions, _, acceptance = _visit(
            self.ensemble, self.metric, key, self.positions, self.rung(), jnp.asarray(steps)
        )
        self.gradients += int(np.sum(steps)) + _MOVES
        self.log_step += _GAIN * (_judged(np.asarray(acceptance)) - _TARGET)
        self._look()

    def refit(self) -> None:
        """Fit the metric to the slopes of the last visits."""
        slopes = [np.concatenate(parts) for parts in zip(*(s for s, _ in self.seen), strict=True)]
        samples = len(slopes[0])
        self.metric = fit_metric(slopes, np.full(samples, self.beta), max(self.precision, 1e-30), turns=self.turns)

    def rung(self) -> Rung:
        """Return the target and the moves as data of the compiled program."""
        stiffness = 1.0 / np.maximum(np.mean(self.seen[-1][1], axis=0), 1e-30)
        with jax.enable_x64(True):
            return Rung(
                precision=jnp.float64(self.precision),
                beta=jnp.float64(self.beta),
                masses=jnp.asarray(stiffness, jnp.float64),
                step_size=jnp.float64(math.exp(self.log_step)),
                spread=jnp.float64(_SPREAD),
                num_steps=jnp.int32(self.num_steps),
                num_moves=jnp.int32(1),
                stretch=jnp.zeros(2 * len(stiffness), jnp.float64),
            )

    def _look(self) -> None:
        slopes, squares = _look(self.ensemble, self.positions)
        self.seen.append(([np.asarray(s) for s in slopes], np.asarray(squares, np.float64)))
        del self.seen[:-_KEPT]


def _judged(acceptance: NDArray) -> float:
    """Return the mean acceptance of the trajectories with full steps, from [moves, chains]."""
    return float(np.mean(acceptance[np.arange(len(acceptance)) % _CYCLE < _CYCLE - 1]))


def _lengths(key: Key[Array, ""], count: int, mean: int) -> Int[NDArray, "moves"]:
    """Draw the trajectories' numbers of steps between half and one and a half of the mean, the same for all chains."""
    shares = np.asarray(jax.random.uniform(jax.random.fold_in(key, 2**31 - 1), (count,)))
    return np.maximum(np.round((0.5 + shares) * mean), 1).astype(np.int32)
