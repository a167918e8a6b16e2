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
from volumejax import friction, reference, tether
from volumejax.friction import Trial, friction_of
from volumejax.ladder import Friction, kappa_ladder
from volumejax.parallel import Launcher
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


QUADRATIC = reference.quadratic(np.ones(1000), cutoff=0.5)


def run_of(problem, **options):
    question = (jax.random.key(0), problem.cost, problem.params, problem.prior)
    return vj.tether_volume(*question, cutoff=0.5, decades=0.0, **options)


def test_the_run_of_a_large_problem_asks_for_friction_and_goes_by_it(monkeypatch):
    """Planted friction between x = 2 and 3 draws the gradients there; where few are refused steps become longer.

    Small problems do not ask, nor where the rungs alone cost too much. Mutations: the trial's draws those of the run,
    its gradients free, counted once or not at all.
    """
    x, looks, ladders, spent = np.array([9.0, 3.1, 3.0, 2.0, 1.9, 0.0]), [], [], 4_000

    def look(*args):
        looks.append(args)
        return Trial(Friction(x, np.array([1.0, 1.0, 1e3, 1e3, 1.0, 1.0])), np.full(6, 0.99), spent)

    def make(survey, **options):
        ladders.append((survey, options, kappa_ladder(survey, **options)))
        return ladders[-1][-1]

    monkeypatch.setattr(tether, "try_ladder", look)
    monkeypatch.setattr(tether, "kappa_ladder", make)
    run_of(reference.quadratic(np.ones(400), cutoff=0.5), effort=0.3)
    run_of(QUADRATIC, effort=1e-3)
    assert not looks
    ladders.clear()
    estimate = run_of(QUADRATIC, effort=0.3)
    assert abs(estimate.log_mass - QUADRATIC.log_mass) < 4.0 * estimate.std_error
    level = np.log(estimate.trace.precision[1:])
    assert np.mean((level < 3.0) & (level > 2.0)) > 0.5
    (tried, _, trial), (survey, options, ladder) = ladders
    assert len(looks) == 1 and looks[0][3] is trial
    np.testing.assert_allclose(survey.step_size, 1.25 * tried.step_size)
    usual = 0.38 * 120_000 * 0.3 * 4.0
    assert options["budget"] == pytest.approx(usual - spent / 2)
    assert not np.array_equal(*(jax.random.key_data(key) for key in (looks[0][2], jax.random.key(0))))
    assert estimate.trace.gradients > spent + 2 * ladder.gradients[1:].sum()


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_trial_sees_friction_and_acceptance_of_every_part(monkeypatch, lanes):
    """Of a quadratic, on one launcher and on two. Mutations: a pass that is not entered or not waited for."""
    seen, told, inner = [], [], tether.try_ladder

    def look(*args):
        args = (*args[:6], (*args[6], Launcher(None))[:lanes], args[7])
        seen.append((args[3], inner(*args)))
        return seen[-1][1]

    monkeypatch.setattr(tether, "try_ladder", look)
    run_of(QUADRATIC, effort=0.3, on_progress=lambda stage, share: told.append((stage, share)))
    ((kappa, trial),) = seen
    x = np.log(kappa.precision[1:])
    assert np.all(np.isfinite(trial.friction.rate)) and np.all(trial.friction.rate > 0.0)
    assert x[-1] < trial.friction.x[-1] < trial.friction.x[0] < x[0]
    assert np.all((trial.acceptance > 0.3) & (trial.acceptance < 1.0))
    assert 2.15 < trial.gradients / kappa.gradients[1:].sum() < 2.3
    shares = [share for stage, share in told if stage == "trying the ladder"]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_the_way_down_of_a_hurried_trial_gains_less_than_its_way_up(monkeypatch):
    """Nine nats in all, for curvatures over six decades. Mutations: the passes exchanged, or one taken for both."""
    seen = []

    def look(kappa, down, up):
        seen.append(np.sum(np.mean(0.5 * (up[:, 2:] - down[:, 1:-1]), axis=2), axis=1))
        return friction_of(kappa, down, up)

    monkeypatch.setattr(friction, "friction_of", look)
    run_of(reference.quadratic(np.logspace(-3, 3, 1000), cutoff=0.5), effort=0.02)
    ((down, up),) = seen
    assert 3.0 < 0.5 * (up - down) < 30.0
