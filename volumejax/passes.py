"""A pass: chains on their way along one ladder after another, in calls of a few seconds each.

Passes that have devices of their own go side by side: calls are only asked for, and the host waits for whichever ends
first.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from volumejax.annealing import MOST_VISITS, Journey, Record, set_out
from volumejax.ensemble import Ensemble, Position, Rung
from volumejax.metric import Metric
from volumejax.parallel import Launcher

__all__ = ["Leg", "Pass", "rounds", "stages", "walk"]

_SECONDS = 2.0
"""Aimed at for a call."""
_FIRST_COUNT = 2
"""Visits of the first, of which nobody knows yet how long they take."""
_NAP = 0.005
"""Seconds between two looks at which of several passes has got on."""


class Leg(NamedTuple):
    """A route over one ladder, and where its records go."""

    stage: str
    ensemble: Ensemble
    """With whatever ridge, the chains are looked at anew where the table gives it a share."""
    table: Rung
    route: list[int]
    tag: int
    """Folded into the run's key."""
    enter: Callable[[list[int], Record], None]
    aside: bool = False
    """Whether the next leg that is not begins where the chains stood before it."""

    @property
    def visits(self) -> int:
        """Rungs visited; on the last of the route the chains only arrive."""
        return len(self.route) - 1

    @property
    def gradients(self) -> int:
        """Gradients of each chain."""
        return _gradients(self.table, self.route[:-1])


class Pass:
    """The chains of one pass, and how far they are."""

    def __init__(
        self, launcher: Launcher, metric: Metric, key: Key[Array, ""], batch_size: int | None,
        origin: Position, legs: Sequence[Leg],
    ) -> None:  # fmt: skip
        """Begin at `origin`, with nothing asked for; the cut into calls does not change the result."""
        self.launcher, self.metric, self.key, self.batch_size = launcher, metric, key, batch_size
        self.positions, self.legs = origin, list(legs)
        """Where the chains stood when the latest record was entered, and the legs before them."""
        self.spent, self.stage = 0, self.legs[0].stage
        """Gradients of each chain so far."""
        self._done, self._count, self._began = 0, _FIRST_COUNT, 0.0
        self._journey: Future[Journey] | None = None
        self._left: Position | None = None
        """Where the chains stood before they went aside."""

    @property
    def ended(self) -> bool:
        """Whether there is no leg left."""
        return not self.legs

    @property
    def leg_ended(self) -> bool:
        """Whether the latest record was the last of its leg."""
        return self._done == 0

    @property
    def gradients(self) -> int:
        """Gradients of each chain that the legs left will take."""
        return sum(leg.gradients for leg in self.legs)

    @property
    def arrived(self) -> bool:
        """Whether the call asked for has ended."""
        return self._journey is not None and self._journey.done() and self._journey.result().arrived

    def set_out(self) -> None:
        """Ask for the next call, and do not wait for it."""
        leg, self._began = self.legs[0], time.perf_counter()
        if self._done == 0 and leg.aside and self._left is None:
            self._left = self.positions
        elif not leg.aside and self._left is not None:
            self.positions, self._left = self._left, None
        route = leg.route[self._done : self._done + self._count + 1]
        key = jax.random.fold_in(self.key, leg.tag)
        self._journey = self.launcher.launch(
            set_out, leg.ensemble, self.metric, key, self.positions, leg.table, route, self._done, self.batch_size
        )

    def arrive(self) -> Callable[[], None]:
        """Wait for the call, and return what enters that which was seen: the next call may set out before."""
        assert self._journey is not None
        leg, journey = self.legs[0], self._journey.result()
        seen, record = leg.route[self._done : self._done + journey.count], journey.record()
        self.positions, self._journey, self.stage = journey.ends, None, leg.stage
        self._done += journey.count
        self.spent += _gradients(leg.table, seen)
        per_visit = (time.perf_counter() - self._began) / journey.count
        self._count = int(np.clip(_SECONDS / max(per_visit, 1e-9), 1, MOST_VISITS))
        if self._done == leg.visits:
            self.legs, self._done, self._count = self.legs[1:], 0, _FIRST_COUNT
        return lambda: leg.enter(seen, record)


def walk(passes: Sequence[Pass]) -> Iterator[Pass]:
    """Take passes to their ends, all at once, and yield each whenever it has got on."""
    moving = list(passes)
    for each in moving:
        each.set_out()
    while moving:
        first = next((each for each in moving if each.arrived), None)
        if first is None and len(moving) > 1:
            time.sleep(_NAP)
            continue
        first = first or moving[0]
        enter = first.arrive()
        if first.ended:
            moving.remove(first)
        else:
            # Before anybody looks at what was seen, so that its devices have something to do.
            first.set_out()
        enter()
        yield first


def rounds(first: Pass, second: Pass) -> list[list[Pass]]:
    """Return which passes go at once: both where each has its launcher, else one after the other."""
    return [[first, second]] if first.launcher is not second.launcher else [[first], [second]]


def _gradients(table: Rung, rungs: list[int]) -> int:
    return int(np.sum(table.gradients[rungs]))


def stages(passes: Sequence[Pass]) -> str:
    """Return what those that have not ended are at, for people."""
    return " and ".join(dict.fromkeys(each.stage for each in passes if not each.ended)) or passes[-1].stage
