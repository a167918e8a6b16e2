r"""Adjusted chains let go from the anchor: a discarded pilot that sets step and metric, then draws.

The chains start from a Gaussian so tight around the anchor that they do not feel the cost, and are let go in steps.
Each step offers the stretch that free directions want, so that chains come out of a singular minimum into the valleys
that meet there, in the proportions of the target. Where valleys lose touch with each other on the way, a chain carries
the weight that its own valley has kept,

.. math:: \log w = \int \tfrac12 \mathbb{E}\left[ a|\delta|^2 \right] d\log(1/a) ,

and one whose weight is as good as zero is replaced by a copy of another. What the pilot has seen is thrown away.

Reference: Neal, Statistics and Computing 11, 125 (2001), for the weights; here integrated over the draws of each visit.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from numpy.typing import NDArray

from volumejax import tree
from volumejax.annealing import begin, slopes
from volumejax.ensemble import FIELDS, Ensemble, Position, Rung, ensemble_of
from volumejax.frames import Frame
from volumejax.kernels import hmc
from volumejax.metric import Metric, fit_metric, plain_metric

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
_LOST, _SURE = 5.0, 2.5
"""Nats below the mean weight at which a chain is given up, and that many deviations of most chains' log weights: what
is noise may be large, and says nothing about the valleys."""


class Pilot(NamedTuple):
    """What the pilot leaves behind."""

    ensemble: Ensemble
    metric: Metric
    positions: Position
    rung: Rung
    step_size: float
    gradients: int


class _Draws(NamedTuple):
    """What the trajectories of one visit came to; axes [moves, chains]."""

    cost: Float[Array, "moves chains"]
    acceptance: Float[Array, "moves chains"]
    """Metropolis probability."""
    square: Float[Array, "moves chains"]
    """a|δ|²."""
    virial: Float[Array, "moves chains"]
    """βδ·∇C + b·δ, which with it makes D on average."""


@eqx.filter_jit
def _visit(
    ensemble: Ensemble,
    metric: Metric,
    key: Key[Array, ""],
    positions: Position,
    rung: Rung,
    num_steps: Int[Array, "moves"],
) -> tuple[Position, _Draws]:
    """Move all chains."""
    chains = jnp.arange(positions.cost.shape[0], dtype=jnp.int32)
    _, step = hmc(ensemble, rung, metric)

    def move(positions: Position, m: Array) -> tuple[Position, _Draws]:
        def one(index: Array, position: Position) -> tuple[Position, _Draws]:
            pace = jnp.where(m % _CYCLE == _CYCLE - 1, jnp.float32(_SLOW), jnp.float32(1.0))
            position, info = step(jax.random.fold_in(jax.random.fold_in(key, index), m), position, num_steps[m], pace)
            d = position.displacement
            with jax.enable_x64(True):
                square = rung.precision * tree.dot(d, d)
                virial = rung.beta * jnp.sum(position.virials[0]) + ensemble.frame.pulled(d)
            return position, _Draws(position.cost, info.acceptance, jnp.asarray(square), jnp.asarray(virial))

        return jax.vmap(one)(chains, positions)

    return jax.lax.scan(move, positions, jnp.arange(_MOVES))


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
            image, work = ensemble.carry(position, metric, gains, None, (here, beta), (there, beta))
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
    ensemble = ensemble_of(cost, frame)
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
            journey.cull()
            journey.refit()
    journey.cull()
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
        here, steps = _drawn(key, block, num_steps)
        positions, draws = _visit(pilot.ensemble, pilot.metric, here, positions, pilot.rung, steps)
        blocks.append((np.asarray(draws.cost, np.float64), np.asarray(draws.acceptance)))
    costs, acceptance = (np.concatenate(parts)[:num_draws] for parts in zip(*blocks, strict=True))
    return costs.T, _judged(acceptance)


class _Journey:
    """The state of the pilot: where the chains stand, at which precision, and how they move."""

    def __init__(self, ensemble: Ensemble, key: Key[Array, ""], beta: float, num_steps: int) -> None:
        self.ensemble, self.key, self.beta, self.num_steps = ensemble, key, beta, num_steps
        self.moves = jax.random.fold_in(key, 1)
        self.turns = ensemble.frame.walls is None
        self.metric = plain_metric(ensemble.frame.anchor, turns=self.turns)
        self.log_step, self.visits, self.gradients = math.log(0.1), 0, 0
        self.seen: list[tuple[list[NDArray], NDArray]] = []
        self.fall = 0.0

    def start(self, precision: float, num_chains: int) -> None:
        """Draw the chains where they do not yet feel the cost."""
        key = jax.random.fold_in(self.key, 0)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), self.ensemble.frame.anchor)
        lowest = float(self.ensemble.value(zero))
        while True:
            with jax.enable_x64(True):
                a = jnp.float64(precision)
            positions = begin(self.ensemble, key, a, jnp.arange(num_chains, dtype=jnp.int32), None)
            felt = self.beta * (float(np.mean(np.asarray(positions.cost))) - lowest)
            inside = jax.vmap(self.ensemble.frame.supports)(positions.displacement).all()
            if (inside and felt <= _TIGHT * self.ensemble.dimension) or precision > _TIGHTEST:
                break
            precision *= 4.0
        self.positions, self.precision = positions, precision
        self.log_weights = np.zeros(num_chains)
        self._look()

    def go(self, precision: float) -> None:
        """Let go to a lower precision."""
        with jax.enable_x64(True):
            levels = jax.device_put([np.asarray(x, np.float64) for x in (self.precision, precision, self.beta)])
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2), self.visits)
        self.positions = _stretch(self.ensemble, self.metric, key, self.positions, *levels)
        self.fall = math.log(self.precision / precision)
        self.precision = precision

    def visit(self) -> None:
        """Move, weigh the way there, and tune the step by what was accepted."""
        self.visits += 1
        key, steps = _drawn(self.moves, self.visits, self.num_steps)
        self.positions, draws = _visit(self.ensemble, self.metric, key, self.positions, self.rung(), steps)
        self.gradients += int(np.sum(steps)) + _MOVES
        self.log_step += _GAIN * (_judged(np.asarray(draws.acceptance)) - _TARGET)
        self.log_weights += 0.5 * self.fall * _mean_square(draws, self.ensemble.dimension)
        self.fall = 0.0
        self._look()

    def refit(self) -> None:
        """Fit the metric to the slopes of the last visits."""
        found = [np.concatenate(parts) for parts in zip(*(s for s, _ in self.seen), strict=True)]
        betas = np.full(len(found[0]), self.beta)
        self.metric = fit_metric(found, betas, max(self.precision, 1e-30), turns=self.turns)

    def cull(self) -> None:
        """Put copies in the place of chains that stand where next to nothing of the target is."""
        lost = _lost(self.log_weights)
        if not lost.any():
            return
        key = jax.random.fold_in(jax.random.fold_in(self.key, 3), self.visits)
        heirs = np.asarray(jax.random.choice(key, np.flatnonzero(~lost), (len(lost),)))
        source = np.where(lost, heirs, np.arange(len(lost)))
        self.positions = jax.tree.map(lambda x: x[source], self.positions)
        self.log_weights = self.log_weights[source]
        self.seen = [([s[source] for s in found], squares[source]) for found, squares in self.seen]

    def rung(self) -> Rung:
        """Return the target and the moves as data of the compiled program."""
        stiffness = 1.0 / np.maximum(np.mean(self.seen[-1][1], axis=0), 1e-30)
        rung = Rung(
            precision=np.asarray(self.precision, np.float64),
            beta=np.asarray(self.beta, np.float64),
            masses=stiffness,
            step_size=np.asarray(math.exp(self.log_step)),
            spread=np.asarray(_SPREAD),
            num_steps=np.asarray(self.num_steps, np.int32),
            num_moves=np.asarray(1, np.int32),
            stretch=np.zeros(FIELDS * len(stiffness)),
        )
        with jax.enable_x64(True):
            return jax.device_put(rung)

    def _look(self) -> None:
        found = [np.asarray(s) for s in slopes(self.ensemble, self.positions, 1)]
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(self.positions.displacement)]
        squares = np.stack([np.mean(np.square(x.reshape(len(x), -1)), axis=1) for x in leaves], axis=1)
        self.seen.append((found, squares))
        del self.seen[:-_KEPT]


def _mean_square(draws: _Draws, dimension: int) -> Float[NDArray, "chains"]:
    """Return a E|δ|² for each chain, from the draws of |δ|² and what the virial identity makes of the others."""
    square, virial = np.asarray(draws.square, np.float64), np.asarray(draws.virial, np.float64)
    with np.errstate(invalid="ignore"):
        excess = square + virial - dimension
    if not np.all(np.isfinite(excess)):
        return np.mean(square, axis=0)
    inner, own = excess - excess.mean(axis=0), square - square.mean(axis=0)
    scale = float(np.sum(inner * inner))
    share = float(np.sum(inner * own)) / scale if scale > 0.0 else 0.0
    return np.mean(square - share * excess, axis=0)


def _lost(log_weights: Float[NDArray, "chains"]) -> Bool[NDArray, "chains"]:
    """Return which chains have next to no weight against most, beyond what the scatter of most explains."""
    below = np.median(log_weights) - log_weights
    noise = 1.4826 * float(np.median(np.abs(below)))
    return below > max(_LOST, _SURE * noise)


def _judged(acceptance: NDArray) -> float:
    """Return the mean acceptance of the trajectories with full steps, from [moves, chains]."""
    return float(np.mean(acceptance[np.arange(len(acceptance)) % _CYCLE < _CYCLE - 1]))


@jax.jit
def _drawn(key: Key[Array, ""], index: Any, mean: Any) -> tuple[Key[Array, ""], Int[Array, "moves"]]:
    """Return a visit's key, and its trajectories' numbers of steps, the same for all chains.

    They lie between half and one and a half of the mean.
    """
    here = jax.random.fold_in(key, index)
    shares = jax.random.uniform(jax.random.fold_in(here, 2**31 - 1), (_MOVES,))
    return here, jnp.maximum(jnp.round((0.5 + shares) * mean), 1).astype(jnp.int32)
