"""Chains on their way: a leg is taken from end to end whatever the calls, and passes do not wait for each other.

Mutations these catch: the next call beginning where the one before began, a visit left out or entered twice between two
calls, the next leg beginning in the middle, gradients of what was only asked for counted, one pass held back until
another has ended.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax import passes as module
from volumejax.annealing import MOST_VISITS, begin, pad
from volumejax.ensemble import FIELDS, Rung, ensemble_of
from volumejax.frames import frame_of
from volumejax.metric import plain_metric
from volumejax.parallel import Launcher
from volumejax.passes import Leg, Pass, stages, walk
from volumejax.priors import Gaussian

PARAMS, CHAINS, LEVELS = jnp.array([0.5, -0.25]), 3, 4


@pytest.fixture(scope="module")
def make_pass():
    """A pass down a ladder and back, what it enters, and how it was cut."""
    ensemble = ensemble_of(lambda w: jnp.sum(jnp.square(w - PARAMS)), frame_of(Gaussian(1.0), PARAMS), cutoff=1.0)
    rungs = Rung(
        precision=np.exp(np.linspace(3.0, 1.0, LEVELS)), beta=np.full(LEVELS, 5.0), masses=np.ones((LEVELS, 1)),
        step_size=np.full(LEVELS, 0.3), spread=np.zeros(LEVELS), num_steps=np.array([0, 3, 4, 5], np.int32),
        num_moves=np.array([0, 1, 2, 1], np.int32), stretch=np.zeros((LEVELS, FIELDS)),
    )  # fmt: skip
    table = pad(rungs)
    with jax.enable_x64(True):
        start = begin(ensemble, jax.random.key(1), jnp.float64(np.exp(3.0)), jnp.arange(CHAINS, dtype=jnp.int32), None)

    def make(stage="cooling"):
        entered = []

        def enter(rungs, record):
            entered.append((rungs, record))

        legs = [
            Leg(stage, ensemble, table, [0, 1, 2, 3, 3, 3], 0, enter),
            Leg("back", ensemble, table, [3, 2, 1, 1], 1, enter),
        ]
        metric = plain_metric(PARAMS, turns=True)
        return Pass(Launcher(None), metric, jax.random.key(2), None, start, legs), entered, rungs

    return make


def test_a_pass_visits_every_rung_of_its_legs_once(make_pass):
    one, entered, rungs = make_pass()
    planned, start = one.gradients, one.positions
    assert not one.ended and one.spent == 0
    seen = list(walk([one]))
    assert all(each is one for each in seen) and one.ended
    assert [rung for visited, _ in entered for rung in visited] == [0, 1, 2, 3, 3, 3, 2, 1]
    assert planned == one.spent == int(np.sum(rungs.gradients[[0, 1, 2, 3, 3, 3, 2, 1]]))
    assert one.gradients == 0 and not np.array_equal(one.positions.cost, start.cost)


@pytest.mark.parametrize("count", [1, 3, MOST_VISITS])
def test_the_cut_into_calls_changes_nothing(make_pass, monkeypatch, count):
    reference, whole, _ = make_pass()
    list(walk([reference]))
    monkeypatch.setattr(module, "_FIRST_COUNT", count)
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    other, parts, _ = make_pass()
    calls = len(list(walk([other])))
    assert (calls == 8) == (count == 1)
    for name in ("cost", "square", "work_down", "work_up"):
        one, two = (np.concatenate([getattr(record, name) for _, record in part]) for part in (whole, parts))
        assert np.array_equal(one, two, equal_nan=True), name
    assert np.array_equal(reference.positions.displacement, other.positions.displacement)


@pytest.mark.parametrize("count", [1, MOST_VISITS])
def test_the_climb_begins_where_the_chains_went_aside(make_pass, monkeypatch, count):
    """Two legs aside, then one that goes on from before them. Mutations: from their end, from the first of them."""
    monkeypatch.setattr(module, "_FIRST_COUNT", count)
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    straight, plain, _ = make_pass()
    list(walk([straight]))
    other, entered, _ = make_pass()
    down, back = other.legs
    other.legs = [down, back._replace(aside=True, tag=5), back._replace(aside=True, tag=6), back]
    list(walk([other]))

    def of(records, name, cut):
        return np.concatenate([getattr(record, name) for _, record in records])[cut]

    assert np.array_equal(of(entered, "cost", slice(-3, None)), of(plain, "cost", slice(-3, None)))
    assert not np.array_equal(of(entered, "cost", slice(5, 8)), of(entered, "cost", slice(8, 11)))
    assert np.array_equal(other.positions.displacement, straight.positions.displacement)


def test_what_is_only_asked_for_does_not_count_yet(make_pass):
    one, entered, _ = make_pass()
    start = one.positions
    one.set_out()
    assert one.spent == 0 and not entered and one.positions is start
    enter = one.arrive()
    assert not entered
    enter()
    assert len(entered) == 1 and one.positions is not start and not one.leg_ended


class Told(Pass):
    """A pass that ends its calls when told to."""

    arrived = False

    def __init__(self, name, calls):
        self.name, self.left, self.log = name, calls, []

    @property
    def ended(self):
        return self.left == 0

    def set_out(self):
        self.log.append("out")

    def arrive(self):
        assert self.arrived
        self.left, self.arrived = self.left - 1, False
        return lambda: self.log.append("in")


def test_who_has_got_on_does_not_wait_for_the_other(monkeypatch):
    slow, fast = Told("slow", 1), Told("fast", 3)

    def sleep(_):
        # Nobody has got on: the fast one does, and once it has ended the slow one.
        (slow if fast.ended else fast).arrived = True

    monkeypatch.setattr(module.time, "sleep", sleep)
    slow_alone = iter(walk([slow, fast]))
    order = [next(slow_alone).name for _ in range(3)]
    slow.arrived = True
    order += [each.name for each in slow_alone]
    assert order == ["fast", "fast", "fast", "slow"]
    # The next call is asked for before anybody looks at what the last one saw.
    assert slow.log == ["out", "in"] and fast.log == ["out", "out", "in", "out", "in", "in"]


def test_stages_are_named_once(make_pass):
    (one, _, _), (other, _, _), (third, _, _) = make_pass(), make_pass(), make_pass("heating")
    assert stages([one, other]) == "cooling" and stages([one, third]) == "cooling and heating"
    list(walk([third]))
    assert stages([one, third]) == "cooling" and stages([third]) == "back"
