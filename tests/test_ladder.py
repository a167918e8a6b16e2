"""Ladders from surveys whose work, steps and energies are planted.

Mutations these catch: rungs in the order of rising precision, a cost felt by the reference, density ∝ V instead of its
root, gradients counted without the first of each trajectory, a stretch beyond the last rung, masses for variances, the
joint rung off by one, rungs set apart where moves are many, a memory that is not used, drift taken for scatter, shares
of one leaf given to another, chance taken for a difference between leaves, a map through the wall, a map behind it
where chains press on it, scatter that chains bring with them taken for that of the place.
"""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from volumejax.ensemble import FIELDS
from volumejax.ladder import (
    WANTED,
    Friction,
    Survey,
    Temperatures,
    best_share,
    kappa_ladder,
    temperature_ladder,
    trajectory_length,
)
from volumejax.metric import UNKNOWN
from volumejax.tally import Tally

STOPS, TABLE, LEAVES = 41, 64, 2
MOST_STEPS = 400


def survey_of(spread_of_slope, *, covariance=0.0, bottom=0.0, step_size=0.3, confined=20.0, ends_flat=False):
    """From x = 8 down to `bottom`; X has the given standard deviation at each stop, B unit variance; one visit.

    Half of B is each leaf's, and no coordinate is softer than another.
    """
    x = np.linspace(8.0, bottom, STOPS)
    # Two columns of zero mean, unit variance and no correlation.
    angles = 2 * np.pi * (np.arange(TABLE) + 0.5) / TABLE
    first, second = (np.sqrt(2 - 2 / TABLE) * f(angles)[None] for f in (np.cos, np.sin))
    deviation = np.broadcast_to(np.asarray(spread_of_slope, float), x.shape)
    stretching = covariance * first + np.sqrt(1 - covariance**2) * second
    return Survey(
        x=x,
        slope=[100.0 + d * first for d in deviation],
        stretching=[leafwise(stretching) for _ in x],
        leaf_variance=np.stack([np.exp(-x), 0.01 * np.exp(-x)], axis=1),
        leaf_sizes=np.array([30.0, 10.0]),
        unevenness=UNKNOWN,
        step_size=np.full(STOPS, step_size),
        spread=np.full(STOPS, 0.4),
        room=[np.full((1, TABLE), 1.0) for _ in x],
        rises=[np.full((1, TABLE, FIELDS * LEAVES), 0.1) for _ in x],
        confined=np.full(STOPS, confined),
        lags=np.full(STOPS - 1, np.inf),
        shares=None,
        walled=True,
        inside=np.ones(STOPS),
        beta=500.0,
        natural_beta=200.0,
        unseen=0.0,
        bulge=1.0,
        least_spread=0.0,
        ends_flat=ends_flat,
    )


def leafwise(stretching):
    """Nothing slides."""
    stretches = np.repeat(stretching[..., None] / LEAVES, 2 * LEAVES, axis=-1)
    return np.concatenate([stretches, np.zeros_like(stretches)], axis=-1)


def kappa(survey, budget=40_000.0, escort=0.9, most_steps=MOST_STEPS):
    return kappa_ladder(survey, budget=budget, most_steps=most_steps, escort=escort)


def gradients(rungs):
    return float(np.sum(rungs.num_moves * (rungs.num_steps + 1.0)))


def density(rungs, high, low):
    """Rungs, times moves, per unit of x between two values of x."""
    x = np.log(rungs.precision[1:])
    return np.sum(np.where((x < high) & (x >= low), rungs.num_moves[1:], 0)) / (high - low)


def widest(rungs):
    return np.max(-np.diff(np.log(rungs.precision[1:])))


CLIFF = np.where(np.arange(STOPS) < STOPS // 2, 30.0, 1e-3)
"""Spreads of a work that ends between two stops."""


def test_many_moves_on_a_rung_set_no_rungs_further_apart():
    rungs = kappa(survey_of(spread_of_slope=CLIFF), budget=4e6)
    assert rungs.num_moves.max() > 5 and rungs.num_moves[1:].min() >= 1
    assert widest(rungs) <= 0.71


def test_a_ladder_made_for_friction_spends_gradients_in_proportion_to_it():
    """Where trajectories are long as where they are short; only the works still set rungs together."""
    steps = np.where(np.arange(STOPS) < STOPS // 2, 0.3, 0.03)
    survey = dataclasses.replace(survey_of(0.1), step_size=steps)
    friction = Friction(np.array([8.0, 5.1, 4.9, 0.0]), np.array([30.0, 30.0, 10.0, 10.0]))
    rungs = kappa_ladder(survey, budget=1e6, most_steps=MOST_STEPS, escort=0.9, friction=friction)
    x, spent = np.log(rungs.precision[1:]), np.asarray(rungs.gradients[1:])

    def rate(high, low):
        return np.sum(spent[(x < high) & (x >= low)]) / (high - low)

    assert spent.sum() == pytest.approx(1e6, rel=0.1)
    assert rate(7.5, 5.5) / rate(4.8, 4.2) == pytest.approx(3.0, rel=0.1)
    assert rate(3.5, 0.5) / rate(4.8, 4.2) == pytest.approx(1.0, rel=0.1)
    np.testing.assert_allclose(friction.at(np.array([6.0, 2.0])), [30.0, 10.0])


def test_steps_follow_how_often_trajectories_are_accepted():
    """As often as wanted changes nothing. Mutations: Φ(−s/2) for twice it, s ∝ step, longer where many are refused."""
    survey = survey_of(1.0)
    same = survey.restepped(survey.x, np.full(STOPS, WANTED))
    np.testing.assert_allclose(same.step_size, survey.step_size)
    # Three quarters are accepted at s = 0.637; here s is what a step 1.2 times as short leaves of that.
    longer = survey.restepped(survey.x, np.full(STOPS, 2.0 * stats.norm.sf(0.5 * 0.637 / 1.2**2)))
    np.testing.assert_allclose(longer.step_size, 1.2 * survey.step_size, rtol=0.01)
    extremes = survey.restepped(np.array([8.0, 4.1, 3.9, 0.0]), np.array([1.0, 1.0, 0.0, 0.0]))
    np.testing.assert_allclose(extremes.step_size[[0, -1]] / survey.step_size[[0, -1]], [1.25, 1 / 1.25])


def test_a_whole_ladder_keeps_its_trajectories_where_the_budget_does_not_do():
    survey = survey_of(50.0)
    short, whole = (
        kappa_ladder(survey, budget=10.0, most_steps=MOST_STEPS, escort=0.9, whole=whole) for whole in (False, True)
    )
    rich = kappa(survey, budget=1e6)
    assert np.all(short.num_steps[1:] < rich.num_steps[1:].min())
    assert set(whole.num_steps[1:]) <= set(rich.num_steps[1:])
    assert 10.0 < whole.gradients.sum() < rich.gradients.sum()


def of_chains(survey, count):
    columns = {name: [v[:, :count] for v in getattr(survey, name)] for name in ("slope", "stretching", "room", "rises")}
    return dataclasses.replace(survey, **columns)


@pytest.mark.parametrize(
    ("chains", "step_size", "moves"), [(4, 0.06, 1), (8, 0.06, 2), (64, 0.06, 10), (4, 2.5, 8), (64, 2.5, 10)]
)
def test_few_chains_with_long_trajectories_take_more_rungs_rather_than_more_moves(chains, step_size, moves):
    """Of 4,000 moves in all: 16,000 works or 400 rungs, and as much on each rung as makes the looks cheap."""
    survey = of_chains(survey_of(8.0, step_size=step_size), chains)
    trial = kappa(survey, budget=1e5)
    rungs = kappa(survey, budget=4000.0 * trial.gradients.sum() / trial.num_moves.sum())
    assert np.median(rungs.num_moves) == pytest.approx(moves, abs=0.05 * moves)
    assert rungs.num_moves.sum() == pytest.approx(4000, rel=0.02)


def test_a_work_that_ends_between_two_stops_is_feared_up_to_the_second():
    survey = survey_of(spread_of_slope=CLIFF, confined=1e6)
    survey = dataclasses.replace(survey, x=5.0 * survey.x)
    high, low = survey.x[STOPS // 2 - 1], survey.x[STOPS // 2]
    rungs = np.log(kappa(survey, budget=1.0).precision)
    # A quarter of the variance is left at the second stop: 15 to 7.5 rungs per unit of x.
    assert np.sum((rungs < high) & (rungs >= low)) >= 7.5 * (high - low)


def few_visits(seed, mean):
    """B of two visits of four chains to each stop, as the pilot of a dear problem leaves them."""
    rng = np.random.default_rng(seed)
    return [leafwise(np.sqrt(200.0) * rng.normal(size=(2, 4)) + mean) for _ in range(STOPS)]


@pytest.mark.parametrize("seed", range(3))
def test_a_share_that_explains_all_is_that_of_its_own_stop_even_from_few_visits(seed):
    """Works of a quadratic: X is p(x) B / 2 and nothing else, and p changes within a few stops."""
    survey = survey_of(8.0)
    survey = dataclasses.replace(survey, x=3.0 * survey.x - 8.0)
    share = 1.0 / (1.0 + np.exp(-survey.x))
    stretching = few_visits(seed, 0.0)
    slope = [500.0 + 0.5 * p * b[..., :LEAVES].sum(axis=-1) for p, b in zip(share, stretching, strict=True)]
    room, rises = ([v * np.ones((2, 4, *extra)) for _ in share] for v, extra in ((1.0, ()), (0.0, (FIELDS * LEAVES,))))
    few = dataclasses.replace(survey, slope=slope, stretching=stretching, room=room, rises=rises)
    rungs = kappa(few, escort=1.0)
    x = np.log(rungs.precision[1:])
    found = 2.0 * rungs.stretch[1:-1, :LEAVES] / (x[:-1] - x[1:])[:, None]
    # At the upper end of each step; neighbouring stops differ by up to 0.15.
    assert np.max(-np.diff(share)) > 0.14
    np.testing.assert_allclose(found, np.repeat(1.0 / (1.0 + np.exp(-x[:-1, None])), LEAVES, axis=1), atol=2e-3)


def test_few_visits_that_seem_to_flow_through_a_wall_do_not_stop_the_maps():
    """Of eight works without a mean some lie three of their own standard errors below zero, by chance."""
    weakened = 0
    for seed in range(20):
        survey = dataclasses.replace(
            survey_of(0.1), slope=[100.0 + 0.5 * b[..., :LEAVES].sum(axis=-1) for b in few_visits(seed, 0.0)],
            stretching=few_visits(seed, 0.0), room=[np.ones((2, 4))] * STOPS,
            rises=[np.zeros((2, 4, FIELDS * LEAVES))] * STOPS,
        )  # fmt: skip
        rungs = kappa(survey, escort=1.0)
        x = np.log(rungs.precision[1:])
        weakened += np.sum(2.0 * rungs.stretch[1:-1, 0] / (x[:-1] - x[1:]) < 0.5)
    assert weakened == 0
    flowing = dataclasses.replace(
        survey, slope=[100.0 + 0.5 * b[..., :LEAVES].sum(axis=-1) for b in few_visits(0, -300.0)],
        stretching=few_visits(0, -300.0),
    )  # fmt: skip
    assert np.mean(kappa(flowing, escort=1.0).stretch[1:-1, 0]) < 1e-3
    # Where there is no wall but the cost's, chains that lag behind look just so.
    assert np.mean(kappa(dataclasses.replace(flowing, walled=False), escort=1.0).stretch[1:-1, 0]) > 5e-3


def test_trajectories_lengthen_as_the_cost_confines_and_less_where_masses_are_more_alike():
    lengths = trajectory_length(np.array([0.0, 50.0, 100.0]), 100.0, 0.25) / (0.5 * np.pi)
    np.testing.assert_allclose(lengths, [1.0, 1.0 + 2.5 / 16.0, 3.5])
    half = trajectory_length(np.array([0.0, 100.0]), 100.0, 0.75) / (0.5 * np.pi)
    np.testing.assert_allclose(half, [1.0, 1.75])


@pytest.mark.parametrize("unevenness", [0.0, -0.01])
def test_trajectories_stay_short_where_the_curvature_is_the_same_everywhere(unevenness):
    lengths = trajectory_length(np.array([0.0, 50.0, 100.0]), 100.0, unevenness)
    np.testing.assert_allclose(lengths, 0.5 * np.pi)


def test_the_ladder_goes_from_the_reference_down_to_the_prior():
    rungs = kappa(survey_of(8.0))
    assert rungs.precision[0] == rungs.precision[1] and np.isclose(rungs.precision[1], np.exp(8.0))
    assert np.all(np.diff(rungs.precision[1:]) < 0.0) and np.isclose(rungs.precision[-1], 1.0)
    assert rungs.beta[0] == 0.0 and np.all(rungs.beta[1:] == 500.0)
    assert rungs.num_moves[0] == 0 and np.all(rungs.num_moves[1:] >= 1)
    assert np.all(rungs.stretch[0] == 0.0) and np.all(rungs.stretch[-1] == 0.0)
    count = len(rungs.precision)
    assert rungs.masses.shape == (count, 2) and rungs.num_steps.dtype == np.int32
    assert rungs.ridge is None and all(len(part) == count for name, part in vars(rungs).items() if name != "ridge")


@pytest.mark.parametrize("covariance", [0.0, 0.5])
@pytest.mark.parametrize("budget", [5_000.0, 10_000.0, 60_000.0])
def test_the_budget_is_spent(budget, covariance):
    assert 0.75 * budget <= gradients(kappa(survey_of(8.0, covariance=covariance), budget)) <= 1.25 * budget


def test_a_small_budget_does_not_tear_the_ladder():
    """Neighbours stay close enough for their works, whatever that costs."""
    rungs = kappa(survey_of(8.0), budget=10.0)
    gaps = -np.diff(np.log(rungs.precision[1:]))
    assert np.max(gaps) * 8.0 < 4.0
    wide = kappa(survey_of(1e-2), budget=10.0)
    assert np.max(-np.diff(np.log(wide.precision[1:]))) < 1.0


def test_rungs_are_dense_where_the_work_varies():
    """Four times the standard deviation takes four times the rungs. Mutation: density ∝ V takes sixteen."""
    deviation = np.where(np.linspace(8.0, 0.0, STOPS) > 4.0, 2.0, 8.0)
    rungs = kappa(survey_of(deviation), budget=30_000.0)
    assert 3.4 < density(rungs, 3.0, 1.0) / density(rungs, 7.0, 5.0) < 4.6


def test_rungs_are_sparse_where_moves_are_dear():
    """Four times the steps take half as many rungs."""
    step_size = np.where(np.linspace(8.0, 0.0, STOPS) > 4.0, 0.2, 0.05)
    survey = dataclasses.replace(survey_of(8.0), step_size=step_size)
    rungs = kappa(survey, budget=200_000.0)
    high, low = (rungs.num_steps[np.argmin(np.abs(np.log(rungs.precision) - x))] for x in (6.0, 2.0))
    assert 3.6 < low / high < 4.4
    assert 0.42 < density(rungs, 3.0, 1.0) / density(rungs, 7.0, 5.0) < 0.58


def with_stop(survey, index, slope):
    """The survey with other slopes at one stop, and B of no use there."""
    slopes, stretchings = list(survey.slope), list(survey.stretching)
    slopes[index], stretchings[index] = slope, leafwise(np.zeros_like(slope))
    rooms, rises = list(survey.room), list(survey.rises)
    rooms[index], rises[index] = np.ones_like(slope), leafwise(np.zeros_like(slope))
    return dataclasses.replace(survey, slope=slopes, stretching=stretchings, room=rooms, rises=rises)


def test_rungs_are_dense_where_chains_remember():
    """At the last stop, which speaks for itself: with a memory of nine visits scatter counts 1 + 3·8 = 25 times."""
    chains, visits = np.random.default_rng(0).normal(size=(2, 400, TABLE))
    slow = [chains[0]]
    for fresh in chains[1:]:
        slow.append(0.8 * slow[-1] + 0.6 * fresh)
    quick, slow = (100.0 + 8.0 * v for v in (visits, np.stack(slow)))
    survey = survey_of(8.0)
    narrow = [kappa(with_stop(survey, -1, slope), budget=100_000.0) for slope in (quick, slow)]
    gaps = [-np.diff(np.log(rungs.precision))[-1] / rungs.num_moves[-1] for rungs in narrow]
    assert 4.0 < gaps[0] / gaps[1] < 6.0


def test_a_drift_of_all_chains_is_no_scatter():
    survey = survey_of(8.0)
    drift = np.linspace(0.0, 1000.0, 8)[:, None]
    still = np.broadcast_to(survey.slope[0], (8, TABLE))
    both = [kappa(with_stop(survey, -1, slope)) for slope in (still, still + drift)]
    np.testing.assert_allclose(both[0].precision, both[1].precision)


def test_scatter_beyond_what_chains_had_to_settle_is_not_that_of_the_place():
    """A variance of 64 per unit of x, of which the steps to the upper stops tell 4: half their density by the root."""
    survey = survey_of(8.0)
    lags = np.where(np.arange(STOPS - 1) < STOPS // 2, 4.0, np.inf)
    rungs = kappa(dataclasses.replace(survey, lags=lags), budget=30_000.0)
    assert 3.4 < density(rungs, 3.0, 1.0) / density(rungs, 7.0, 5.0) < 4.6
    most = kappa(dataclasses.replace(survey, lags=np.full(STOPS - 1, 100.0)))
    np.testing.assert_array_equal(most.precision, kappa(survey).precision)


def test_bends_are_taken_to_be_slow_where_dimensions_are_many():
    """Works of one visit do not tell their memory; rungs then lie as close as eight visits of it ask for."""
    confined = np.linspace(0.0, 50.0, STOPS)
    bent = dataclasses.replace(survey_of(8.0), confined=confined, shares=np.zeros((STOPS, FIELDS * LEAVES)))
    x = [np.log(kappa(dataclasses.replace(bent, unevenness=u), budget=100_000.0).precision) for u in (0.0, 0.3)]
    even, uneven = (np.mean(values < 2.0) for values in x)
    assert uneven > 1.3 * even


def total_stretch(rungs):
    """Of each leaf, since in the survey all coordinates are of the same softness."""
    return rungs.stretch[:, :LEAVES] + rungs.stretch[:, LEAVES : 2 * LEAVES]


@pytest.mark.parametrize(("covariance", "escort", "share"), [(0.3, 1.0, 0.6), (0.3, 0.25, 0.15), (0.3, 0.0, 0.0)])
def test_the_stretch_is_the_best_one_times_the_escort(covariance, escort, share):
    """X with deviation 1 and B with 1: the variance X − ½pB is least at p = 2·cov."""
    rungs = kappa(survey_of(1.0, covariance=covariance), escort=escort)
    gaps = -np.diff(np.log(rungs.precision[1:]))
    np.testing.assert_allclose(total_stretch(rungs)[1:-1], 0.5 * share * np.repeat(gaps[:, None], 2, 1), atol=1e-12)


@pytest.mark.parametrize("escort", [1.0, 0.25])
def test_shares_that_are_given_are_taken_times_the_escort(escort):
    given = np.array([0.6, 0.2, 0.1, -0.1, 1.0, 0.4, -0.3, 0.0])
    survey = dataclasses.replace(survey_of(1.0, covariance=0.3), shares=np.tile(given, (STOPS, 1)))
    rungs = kappa(survey, escort=escort)
    gaps = -np.diff(np.log(rungs.precision[1:]))
    np.testing.assert_allclose(rungs.stretch[1:-1], 0.5 * escort * gaps[:, None] * given, atol=1e-12)


def test_one_share_takes_the_works_of_all_leaves():
    """X = ½ 0.7 (B₀ + B₁) and noise; softness and slides have no part in it, and chains that are not known none."""
    numbers = 10.0 * np.random.default_rng(0).normal(size=(40, 8, 3))
    b = np.concatenate([scale * numbers[..., :2] for scale in (1.0, 7.0, 5.0, 3.0)], axis=-1)
    x = 0.35 * numbers[..., :2].sum(axis=-1) + 0.1 * numbers[..., 2]
    assert abs(best_share([x], [b]) - 0.7) < 0.01
    x[3, 2], b[7, 1] = np.nan, np.nan
    assert abs(best_share([x], [b]) - 0.7) < 0.01
    assert best_share([-x], [b]) == 0.0 and best_share([3.0 * x], [b]) == 1.0 and best_share([x], [0.0 * b]) == 0.0


def test_a_stretch_that_does_harm_is_not_taken():
    rungs = kappa(survey_of(1.0, covariance=-0.5), escort=0.0)
    assert np.all(rungs.stretch == 0.0)
    together = kappa(survey_of(1.0, covariance=-0.5))
    assert np.all(together.stretch == 0.0)


def test_nothing_is_stretched_through_the_wall():
    """A map over 0.1 in x must not take chains out; else it stretches by a part only, in the end not at all."""
    survey = survey_of(1.0, covariance=0.3)
    # 0.6 of a free direction's stretch over 0.1 raises the cost by ½ · 0.1 · 0.6 · (0.1 + 0.1) = 0.006.
    free, narrow, shut = (
        kappa(dataclasses.replace(survey, room=[np.full((1, TABLE), room)] * STOPS), escort=1.0)
        for room in (0.007, 0.004, 0.0003)
    )
    assert np.all(shut.stretch == 0.0)
    gaps = [-np.diff(np.log(rungs.precision[1:])) for rungs in (free, narrow)]
    np.testing.assert_allclose(free.stretch[1:-1, 0], 0.3 * gaps[0], rtol=1e-6)
    np.testing.assert_allclose(narrow.stretch[1:-1, 0], 0.5 * 0.3 * gaps[1], rtol=1e-6)


def test_nothing_is_stretched_where_chains_press_on_the_wall():
    """Below the natural β and within √λ nats of the wall, whatever the few chains' slopes say of the rise."""
    survey = survey_of(1.0, covariance=0.3, confined=49.0)
    survey = dataclasses.replace(survey, rises=[np.full((1, TABLE, FIELDS * LEAVES), -0.1)] * STOPS)
    pressed, clear, colder = (
        kappa(dataclasses.replace(survey, natural_beta=natural, room=[np.full((1, TABLE), nats / survey.beta)] * STOPS))
        for natural, nats in ((600.0, 6.0), (600.0, 8.0), (400.0, 6.0))
    )
    assert np.all(pressed.stretch == 0.0)
    assert all(np.all(total_stretch(rungs)[1:-1] > 0.0) for rungs in (clear, colder))


def test_masses_are_one_over_the_variances():
    rungs = kappa(survey_of(4.0))
    np.testing.assert_allclose(rungs.masses[:, 0], rungs.precision, rtol=1e-6)
    np.testing.assert_allclose(rungs.masses[:, 1], 100.0 * rungs.precision, rtol=1e-6)


def test_steps_stay_within_their_bounds():
    rungs = kappa(survey_of(4.0, step_size=1e-4), most_steps=17)
    assert rungs.num_steps.max() == 17
    assert kappa(survey_of(4.0, step_size=50.0)).num_steps.min() == 2


def test_nothing_is_stretched_where_trajectories_end_outside():
    survey = survey_of(1.0, covariance=0.3)
    free, crowded = (kappa(dataclasses.replace(survey, inside=np.full(STOPS, share))) for share in (0.98, 0.85))
    assert np.all(total_stretch(free)[1:-1] > 0.0) and np.all(crowded.stretch == 0.0)


def test_a_flat_prior_ends_without_a_tether():
    bound, flat = (kappa(survey_of(4.0, bottom=-2.0, ends_flat=flat)) for flat in (False, True))
    assert len(flat.precision) == len(bound.precision) + 1
    assert flat.precision[-1] == 0.0 and np.all(np.diff(flat.precision[1:]) < 0.0)
    np.testing.assert_allclose(flat.precision[:-1], bound.precision)
    assert np.all(flat.stretch[-2:] == 0.0)
    for name in ("masses", "step_size", "num_steps", "num_moves", "beta"):
        np.testing.assert_allclose(getattr(flat, name)[-1], getattr(flat, name)[-2])


def temperatures(survey, decades=2.0, budget=4000.0):
    return temperature_ladder(survey, decades=decades, most_steps=MOST_STEPS, budget=budget)


def test_where_it_is_colder_than_the_ladder_moves_go_on_with_the_budget():
    """Mutations: eight at most everywhere, or everywhere more."""
    for budget, cold, warm in ((1.0, 1, 1), (20_000.0, 64, 8)):
        rungs, joint, _ = temperatures(survey_of(4.0), budget=budget)
        assert np.all(rungs.num_moves[:joint] == cold) and np.all(rungs.num_moves[joint:] == warm)
    rungs, joint, _ = temperatures(survey_of(4.0), budget=2_000.0)
    assert 8 < rungs.num_moves[0] < 64


@pytest.mark.parametrize("decades", [2.0, 0.5])
def test_temperatures_run_from_cold_to_natural_through_the_joint(decades):
    rungs, joint, natural = temperatures(survey_of(4.0), decades)
    np.testing.assert_allclose(rungs.beta[[0, joint, -1]], [500.0 * 10**decades, 500.0, 200.0])
    assert natural == len(rungs.beta) - 1
    assert np.all(np.diff(rungs.beta) < 0.0) and 0 < joint < len(rungs.beta) - 1
    assert np.all(rungs.precision == 1.0) and np.all(rungs.stretch == 0.0)
    assert np.all(rungs.num_moves >= 1) and rungs.num_steps.dtype == np.int32
    assert np.all(np.diff(rungs.step_size) == 0.0)


def test_temperatures_of_no_curve_begin_at_the_joint():
    rungs, joint, natural = temperatures(survey_of(4.0), 0.0)
    assert joint == 0 and natural == len(rungs.beta) - 1 >= 1
    np.testing.assert_allclose(rungs.beta[[0, -1]], [500.0, 200.0])


def test_the_ridge_rises_where_segments_scatter_against_the_guide():
    """At the joint's β, by 0.75 nats of that scatter, on longer trajectories; then some come beyond the natural one."""
    survey = survey_of(4.0, confined=400.0)
    usual, joint, last = temperatures(survey)
    rungs, same_joint, natural = temperatures(dataclasses.replace(survey, unseen=12.0))
    rises, below = 16, int(np.ceil(2.0 * np.log(500.0 / usual.beta[-1]) * 20.0 / 1.5))
    assert 2 * (last - joint) - 2 < below
    assert same_joint == joint and natural == joint + rises + below and len(rungs.beta) == natural + 5
    np.testing.assert_allclose(rungs.beta[: joint + 1], usual.beta[: joint + 1])
    np.testing.assert_allclose(rungs.beta[joint + 1 : joint + 1 + rises], 500.0)
    np.testing.assert_allclose(np.ptp(np.diff(np.log(rungs.beta[joint + rises : natural + 1]))), 0.0, atol=1e-9)
    assert rungs.beta[natural] == pytest.approx(usual.beta[-1])
    np.testing.assert_allclose(np.diff(rungs.beta[natural:]), -0.0375 * usual.beta[-1])
    np.testing.assert_allclose(rungs.ridge[joint : joint + 1 + rises], np.linspace(0.0, 1.0, rises + 1))
    assert not rungs.ridge[:joint].any() and np.all(rungs.ridge[joint + rises :] == 1.0)
    assert 2 * rungs.num_steps[0] < rungs.num_steps[joint + 1] <= 3 * rungs.num_steps[-1] == 3 * rungs.num_steps[0]
    assert usual.ridge is None
    # As the tally sees them, each β once; and none so warm that β would turn negative.
    spent = Tally(rungs, Temperatures(rungs, joint, natural), 0.0, 1, 0.0)
    assert spent.shown.sum() == joint + 1 + below
    for few in (0.25, 4.0, 9.0):
        warm = temperatures(dataclasses.replace(survey_of(4.0, confined=few), unseen=12.0))
        assert np.all(warm.rungs.beta[warm.natural :] > 0.5 * warm.rungs.beta[warm.natural] - 1e-9)
    assert len(temperatures(dataclasses.replace(survey, unseen=3.5))[0].beta) == len(usual.beta)
    assert temperatures(dataclasses.replace(survey, unseen=4.5)).rises


@pytest.mark.parametrize("confined", [20.0, 2000.0])
def test_neighbouring_temperatures_overlap(confined):
    """√λ times the gap in log β is the distance of the energies in standard deviations."""
    rungs, *_ = temperatures(survey_of(4.0, confined=confined))
    distance = -np.diff(np.log(rungs.beta)) * np.sqrt(confined)
    assert np.all(distance < 2.5) and np.max(distance) > 0.5


def test_temperatures_of_a_flat_prior_have_no_tether():
    rungs, *_ = temperatures(survey_of(4.0, bottom=-2.0, ends_flat=True))
    assert np.all(rungs.precision == 0.0)
