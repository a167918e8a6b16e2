"""Friction from planted works, and a ladder that is made for it.

Mutations these catch: the two passes exchanged, works for half their differences, gradients that do not count, the step
from the reference counted, a chain that is lost counted, stretches by rungs in place of gradients, a ladder in
proportion to the square of the rate or of rungs that cost more, a run that does not listen.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import volumejax as vj
from volumejax import reference, tether
from volumejax.ensemble import Rung
from volumejax.friction import Trial, friction_of
from volumejax.ladder import Friction
from volumejax.tally import COOLING, HEATING

LEVELS, GAIN = 242, -3.0


@pytest.fixture
def rungs(make_rungs):
    """From x = 6 to 0; below x = 2 trajectories are four times as long, so that most gradients go there."""
    x = np.append(6.0, np.linspace(6.0, 0.0, LEVELS - 1))
    made = make_rungs(np.exp(x), np.ones(LEVELS))
    return dataclasses.replace(made, num_steps=np.where(x < 2.0, 199, 49), spread=np.zeros(LEVELS))


def works_of(lost, *, chains=3):
    """Each step of Z gains as much; cooling chains lag by `lost`, shape (LEVELS - 1,), and heating ones likewise."""
    rng = np.random.default_rng(0)
    down, up = np.full((2, 2, LEVELS, chains), np.nan)
    for which, sign in ((COOLING, 1.0), (HEATING, -1.0)):
        fresh = rng.normal(size=(LEVELS - 1, chains))
        # What is fresh is lost on the way and gained back.
        down[which, :-1] = -GAIN + sign * lost[:, None] + fresh
        up[which, 1:] = GAIN - sign * lost[:, None] + fresh
    return down, up


def planted(rungs, lost):
    return friction_of(rungs, *works_of(lost))


def by_hand(rungs, lost):
    """One stretch after the other, of gaps that begin with the one after the reference."""
    x, spent = np.log(rungs.precision), np.asarray(rungs.gradients, float)
    cuts, so_far = [1], 0.0
    for gap, cost in enumerate(spent[1:-1], start=1):
        so_far += cost
        if so_far >= len(cuts) * spent[1:-1].sum() / 24:
            cuts.append(gap + 1)
    return [np.sqrt((lost[i:j].sum() + 1.0) * spent[i:j].sum()) / (x[i] - x[j]) for i, j in itertools.pairwise(cuts)]


def test_friction_is_the_root_of_what_stretches_lose_times_their_gradients(rungs):
    lost = np.concatenate([[1e3], np.full(120, 0.05), np.linspace(1.0, 30.0, 120)])
    found = planted(rungs, lost)
    assert np.all(np.diff(found.x) < 0.0) and 0.0 < found.x[-1] < found.x[0] < 6.0
    np.testing.assert_allclose(found.rate, by_hand(rungs, lost), rtol=1e-6)


def test_what_chance_gains_on_a_stretch_is_no_friction(rungs):
    nothing = planted(rungs, np.zeros(LEVELS - 1))
    np.testing.assert_allclose(planted(rungs, np.full(LEVELS - 1, -5.0)).rate, nothing.rate, rtol=1e-6)


def test_a_lost_chain_has_no_say_and_a_flat_end_none_either(rungs):
    lost = np.linspace(1.0, 30.0, LEVELS - 1)
    down, up = works_of(lost)
    # One chain is taken outside on its way down, and all that come up were drawn there.
    down[COOLING, 100:, 0] = np.inf
    down[HEATING, 30:33] = up[HEATING, 30:33] = np.nan
    found, whole = friction_of(rungs, down, up), planted(rungs, lost)
    assert np.sum(~np.isclose(found.rate, whole.rate)) == 1
    flat = dataclasses.replace(rungs, precision=np.append(rungs.precision[:-1], 0.0))
    np.testing.assert_array_less(0.0, friction_of(flat, down, up).rate)
    assert friction_of(flat, down, up).x[-1] > 0.0


def test_the_run_of_a_large_problem_asks_for_friction_and_goes_by_it(monkeypatch):
    """Planted friction between x = 2 and 3 draws the gradients there. Small problems do not ask."""
    x = np.array([9.0, 3.1, 3.0, 2.0, 1.9, 0.0])
    looks: list[Rung] = []

    def look(*args):
        looks.append(args[3])
        return Trial(Friction(x, np.array([1.0, 1.0, 1e3, 1e3, 1.0, 1.0])), np.full(6, 0.75))

    monkeypatch.setattr(tether, "try_ladder", look)

    def share_of(dimension):
        problem = reference.quadratic(np.ones(dimension), cutoff=0.5)
        question = (jax.random.key(0), problem.cost, problem.params, problem.prior)
        estimate = vj.tether_volume(*question, cutoff=0.5, effort=0.3, decades=0.0)
        level = np.log(estimate.trace.precision[1:])
        assert abs(estimate.log_mass - problem.log_mass) < 4.0 * estimate.std_error
        return np.mean((level < 3.0) & (level > 2.0))

    assert share_of(400) < 0.3 and not looks
    assert share_of(1000) > 0.5 and len(looks) == 1
    assert len(looks[0].precision) > 2


def test_a_trial_sees_friction_and_acceptance_of_every_part():
    """Both passes over a ladder of a quadratic, on one launcher; each has been everywhere."""
    problem = reference.quadratic(np.ones(1000), cutoff=0.5)
    seen = []
    inner = tether.try_ladder

    def look(*args):
        trial = inner(*args)
        seen.append((args[3], trial))
        return trial

    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tether, "try_ladder", look)
        vj.tether_volume(
            jax.random.key(0), problem.cost, problem.params, problem.prior, cutoff=0.5, effort=0.3, decades=0.0,
            on_progress=lambda stage, share: told.append((stage, share)),
        )  # fmt: skip
    ((kappa, trial),) = seen
    x = np.log(kappa.precision[1:])
    assert np.all(np.isfinite(trial.friction.rate)) and np.all(trial.friction.rate > 0.0)
    assert x[-1] < trial.friction.x[-1] < trial.friction.x[0] < x[0]
    assert np.all((trial.acceptance > 0.3) & (trial.acceptance < 1.0))
    shares = [share for stage, share in told if stage == "trying the ladder"]
    assert shares == sorted(shares) and shares[-1] == 1.0
