"""Two quick passes over a ladder, to see where chains lag behind and how they move: what the run's own is made for.

On the way down a chain's works are too high by what it lags behind, and on the way up too low. That a pilot of a few
visits to each stop cannot tell: it sees neither a memory that is longer than its visits, nor one that is shorter. And
its few trajectories at a stop leave the steps there to chance.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from numpy.typing import NDArray

from volumejax.annealing import Record, begin, laid_out_like, pad
from volumejax.ensemble import Ensemble, Position, Rung
from volumejax.ladder import WANTED, Friction
from volumejax.metric import Metric
from volumejax.parallel import Launcher
from volumejax.passes import Leg, Pass, rounds, walk

__all__ = ["Trial", "friction_of", "try_ladder"]

_STRETCHES = 24
"""Of the ladder, with as many gradients each."""
_CHANCE = 1.0
"""Nats that a stretch may lose besides, since so much of it would be chance."""
_SETTLED = 0.2
"""Of the gradients of a pass, those for which the second stays at the end before it goes up: the pilot's chains lag as
the first pass does, and would hide what it lags by."""
_COOL, _HEAT, _START, _STAY = range(4)
Vector = NDArray[np.float64]


class Trial(NamedTuple):
    """What two quick passes said."""

    friction: Friction
    acceptance: Vector
    """Mean Metropolis probability of the long trajectories around the friction's x, shape (points,)."""
    gradients: int
    """Of each chain, in both passes."""


def try_ladder(
    ensemble: Ensemble, metric: Metric, key: Key[Array, ""], kappa: Rung, ends: Position, batch_size: int | None,
    launchers: Sequence[Launcher], on_progress: Callable[[float], None],
) -> Trial:  # fmt: skip
    """Go down a ladder from exact draws and up from `ends`, and return what was seen.

    Args:
        ensemble: the target.
        metric: of the moves.
        key: of draws and moves.
        kappa: a ladder of few gradients.
        ends: where as many chains as the run has stand at the end of the tether.
        batch_size: chains at once.
        launchers: of both passes, or of each its own.
        on_progress: called with the share that is done.
    """
    levels, chains = len(kappa.precision), len(ends.cost)
    works, acceptance = np.full((2, 2, levels, chains), np.nan), np.full((2, levels, chains), np.nan)

    def enter(which: int) -> Callable[[list[int], Record], None]:
        def entered(rungs: list[int], record: Record) -> None:
            works[which][:, rungs] = np.where(record.permitted, (record.work_down, record.work_up), np.nan)
            acceptance[which, rungs] = record.acceptance

        return entered

    with jax.enable_x64(True):
        first = jnp.float64(kappa.precision[0])
    draws, indices = jax.random.fold_in(key, _START), jnp.arange(chains, dtype=jnp.int32)
    starts = [begin(ensemble, draws, first, indices, launcher.mesh) for launcher in launchers]
    table, bottom = pad(kappa), levels - 1
    stay = max(round(_SETTLED * float(np.sum(kappa.gradients) / kappa.gradients[bottom])), 1)
    down = [Leg("", ensemble, table, [*range(levels), bottom], _COOL, enter(0))]
    back = [
        Leg("", ensemble, table, [bottom] * (stay + 1), _STAY, lambda *_: None),
        Leg("", ensemble, table, [*range(bottom, 0, -1), 1], _HEAT, enter(1)),
    ]
    cooling = Pass(launchers[0], metric, key, batch_size, starts[0], down)
    heating = Pass(launchers[-1], metric, key, batch_size, laid_out_like(ends, starts[-1]), back)
    total = cooling.gradients + heating.gradients
    for passes in rounds(cooling, heating):
        for _ in walk(passes):
            on_progress((cooling.spent + heating.spent) / total)
    friction = friction_of(kappa, works[:, 0], works[:, 1])
    # Of the rungs halfway to the neighbouring points on each side.
    x = np.log(np.maximum(kappa.precision[1:], 1e-300))
    nearest = np.argmin(np.abs(x[:, None] - friction.x), axis=1)
    near = [acceptance[:, 1:][:, nearest == point] for point in range(len(friction.x))]
    known = [part[np.isfinite(part)] for part in near]
    return Trial(friction, np.array([np.mean(part) if part.size else WANTED for part in known]), total)


def friction_of(kappa: Rung, down: Vector, up: Vector) -> Friction:
    """Return the friction from the works of both passes, shape (2, rungs, chains), NaN where nobody was.

    Each step of a pass has two works, the one down and the one back up from where the chain then was. Half of their
    difference is what Z gains there, too little on the way down by what is lost and too much on the way up.
    """
    # Flat priors have a rung without a tether at the end.
    levels = np.count_nonzero(kappa.precision > 0.0)
    with np.errstate(invalid="ignore"):
        gains = 0.5 * (up[:, 2:levels] - down[:, 1 : levels - 1])
    known = np.isfinite(gains)
    means = np.sum(np.where(known, gains, 0.0), axis=2) / np.maximum(np.sum(known, axis=2), 1)
    # Where a pass lost its chains nothing is known.
    lost = np.where(known.any(axis=2).all(axis=0), 0.5 * (means[1] - means[0]), 0.0)
    spent, x = np.asarray(kappa.gradients[1 : levels - 1], np.float64), np.log(kappa.precision[1:levels])
    so_far = np.append(0.0, np.cumsum(spent))
    ends = np.unique(np.searchsorted(so_far, so_far[-1] * np.linspace(0.0, 1.0, _STRETCHES + 1)))
    lost, spent = np.add.reduceat(np.stack([lost, spent]), ends[:-1], axis=1)
    low, high = x[ends[1:]], x[ends[:-1]]
    return Friction(0.5 * (low + high), np.sqrt((np.maximum(lost, 0.0) + _CHANCE) * spent) / (high - low))
