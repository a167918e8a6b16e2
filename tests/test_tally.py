"""From records to sums, on ladders whose works are planted.

Mutations these catch: works of neighbours paired off by one, the sign of a free energy, a pass that was not asked for
counted, the heating pass's own look at the reference, energies not counted from the anchor, the last rung's step
counted among the weights.
"""

import dataclasses

import numpy as np
import pytest

from volumejax.annealing import Record
from volumejax.chains import MOST_SEPARATION
from volumejax.ensemble import FIELDS
from volumejax.ladder import Temperatures
from volumejax.sample_rays import SampleRays
from volumejax.tally import COOLING, HEATING, PARTS, Tally

CHAINS, LEVELS, JOINT = 8, 4, 2
BETAS = np.array([80.0, 40.0, 20.0, 10.0, 5.0])
KAPPA_STEPS = np.array([2.0, -0.5, 3.25])
"""ΔF from each rung of the κ ladder to the next."""
BETA_STEPS = np.array([-1.5, -1.25, -1.0, -0.75])
REFERENCE, ANCHOR_COST = -7.0, 0.02
CUTOFFS = np.array([0.1, 0.3, 2.0])
EVERYONE = np.arange(CHAINS)


def record(rungs, steps, costs, noise=0.0):
    """Visits whose works are constant but for noise that differs from chain to chain."""
    rows = len(rungs)
    down, up = np.append(steps, 0.0), np.insert(-steps, 0, 0.0)
    wobble = noise * np.linspace(-1.0, 1.0, CHAINS)
    plain = {name: np.ones((rows, CHAINS)) for name in Record._fields}
    plain |= {
        "cost": costs,
        "reach": costs + 0.05,
        "leaf_squares": np.ones((rows, CHAINS, 1)),
        "stretchings": np.ones((rows, CHAINS, FIELDS)),
        "rises": np.ones((rows, CHAINS, FIELDS)),
        "permitted": np.ones((rows, CHAINS), bool),
        "work_down": down[rungs][:, None] + wobble,
        "work_up": up[rungs][:, None] - wobble,
    }
    return Record(**plain)


def costs_at(rungs, seed):
    return ANCHOR_COST + np.random.default_rng(seed).gamma(3.0, 1.0, (len(rungs), CHAINS)) / BETAS[rungs][:, None]


@pytest.fixture
def make_tally(make_rungs):
    return lambda: Tally(
        make_rungs(np.array([9.0, 9.0, 3.0, 1.0]), np.array([0.0, 20.0, 20.0, 20.0])),
        Temperatures(make_rungs(np.ones(5), BETAS), JOINT, 4), REFERENCE, CHAINS, ANCHOR_COST,
    )  # fmt: skip


def enter_kappa(tally, which, noise=0.0):
    rungs = list(range(LEVELS)) if which == COOLING else list(range(LEVELS - 1, 0, -1))
    tally.add_kappa(which, rungs, record(rungs, KAPPA_STEPS, np.full((len(rungs), CHAINS), 0.1), noise))


def enter_temperature(tally, which, rungs, seed, *, weighs=False):
    costs = costs_at(rungs, seed)
    tally.add_temperature(which, rungs, record(rungs, BETA_STEPS, costs), weighs=weighs)
    return costs


@pytest.fixture
def whole(make_tally):
    """Both passes over all rungs, and the costs of each."""
    tally = make_tally()
    for which in (COOLING, HEATING):
        enter_kappa(tally, which)
    costs = {which: enter_temperature(tally, which, [0, 1, 2, 3, 4], which) for which in (COOLING, HEATING)}
    return tally, costs


def mass_by_hand(costs, betas, log_z, cutoff):
    """Every rung's samples, one row each."""
    weights = 1 / np.sum(costs.shape[1] * np.exp(-betas * costs[..., None] - log_z), axis=-1)
    return np.log(np.sum(weights[costs + 0.05 <= cutoff]))


def energies_by_hand(costs, betas, log_z):
    """λ̂ and heat capacity of the reach, which is the cost and 0.05 more, from the samples of all rungs."""
    weights = 1 / np.sum(costs.shape[1] * np.exp(-betas * costs[..., None] - log_z), axis=-1)
    rise = costs + 0.05 - ANCHOR_COST
    shares = weights * np.exp(-betas[:, None, None] * rise)
    shares /= shares.sum(axis=(1, 2), keepdims=True)
    means = np.sum(shares * rise, axis=(1, 2))
    squares = np.sum(shares * rise**2, axis=(1, 2))
    return betas * means, betas**2 * (squares - means**2)


LOG_Z = REFERENCE - np.sum(KAPPA_STEPS) + np.array([-2.75, -1.25, 0.0, 1.0, 1.75])


def test_sums_by_hand(whole):
    tally, costs = whole
    both = np.concatenate([costs[COOLING], costs[HEATING]], axis=1)
    sums = tally.sums(CUTOFFS, 0.5, chains=EVERYONE)
    np.testing.assert_allclose(sums.kappa_differences, KAPPA_STEPS, atol=1e-9)
    np.testing.assert_allclose(sums.beta_differences, BETA_STEPS, atol=1e-9)
    assert abs(sums.log_mass - mass_by_hand(both, BETAS, LOG_Z, 0.5)) < 1e-9
    np.testing.assert_allclose(sums.curve, [mass_by_hand(both, BETAS, LOG_Z, c) for c in CUTOFFS], atol=1e-9)
    energies, heat_capacities = energies_by_hand(both, BETAS, LOG_Z)
    np.testing.assert_allclose(sums.energies, energies, rtol=1e-9)
    np.testing.assert_allclose(sums.heat_capacities, heat_capacities, rtol=1e-9)


@pytest.mark.parametrize("which", [COOLING, HEATING])
def test_one_pass_alone(whole, which):
    tally, costs = whole
    sums = tally.sums(CUTOFFS, 0.5, chains=EVERYONE, passes=(which,))
    np.testing.assert_allclose(sums.energies, energies_by_hand(costs[which], BETAS, LOG_Z)[0], rtol=1e-9)
    np.testing.assert_allclose(sums.kappa_differences, KAPPA_STEPS, atol=1e-9)


def test_some_chains_alone(whole):
    tally, costs = whole
    kept = np.array([0, 3, 4])
    both = np.concatenate([costs[COOLING][:, kept], costs[HEATING][:, kept]], axis=1)
    sums = tally.sums(CUTOFFS, 0.5, chains=kept)
    np.testing.assert_allclose(sums.energies, energies_by_hand(both, BETAS, LOG_Z)[0], rtol=1e-9)


def test_the_sign_of_the_tether_and_of_the_temperature(whole):
    """Each ΔF takes its nats from the mass. Mutation: a sum with the other sign moves the mass by twice its size."""
    tally, _ = whole
    before = tally.sums(CUTOFFS, 0.5, chains=EVERYONE).log_mass
    tally.kappa_seen["work_down"][:, 1] += 0.4
    tally.kappa_seen["work_up"][:, 2] -= 0.4
    assert np.isclose(tally.sums(CUTOFFS, 0.5, chains=EVERYONE).log_mass, before - 0.4, atol=1e-9)


def test_a_pass_without_the_colder_rungs_spoils_nothing(make_tally):
    tally = make_tally()
    enter_kappa(tally, COOLING)
    enter_kappa(tally, HEATING)
    rungs = [4, 3, 2]
    enter_temperature(tally, HEATING, rungs, 5)
    costs = costs_at(rungs, 5)[::-1]
    sums = tally.sums(CUTOFFS, 0.5, chains=EVERYONE, passes=(HEATING,))
    log_z = REFERENCE - np.sum(KAPPA_STEPS) + np.array([0.0, 1.0, 1.75])
    assert abs(sums.log_mass - mass_by_hand(costs, BETAS[2:], log_z, 0.5)) < 1e-9
    assert np.all(np.isnan(sums.energies[:2])) and np.all(np.isfinite(sums.energies[2:]))
    # The other pass sees to the colder rungs where both are asked for.
    enter_temperature(tally, COOLING, [0, 1, 2, 3, 4], 6)
    together = tally.sums(CUTOFFS, 0.5, chains=EVERYONE)
    assert np.all(np.isfinite(together.energies)) and np.all(np.isfinite(together.curve))
    np.testing.assert_allclose(together.beta_differences, BETA_STEPS, atol=1e-9)


def test_the_reference_belongs_to_both_passes(make_tally):
    """The heating pass never sees rung 0, yet its sum needs the first difference."""
    tally = make_tally()
    enter_kappa(tally, COOLING, noise=0.2)
    enter_kappa(tally, HEATING, noise=0.2)
    enter_temperature(tally, HEATING, [4, 3, 2], 5)
    assert np.all(np.isnan(tally.kappa_seen["work_down"][HEATING, 0]))
    sums = tally.sums(CUTOFFS, 0.5, chains=EVERYONE, passes=(HEATING,))
    np.testing.assert_allclose(sums.kappa_differences, KAPPA_STEPS, atol=0.1)
    assert np.isfinite(sums.log_mass)


def test_the_bound_weights_of_chains_on_their_way(make_tally):
    tally = make_tally()
    tally.add_kappa(COOLING, [0, 1], record([0, 1], KAPPA_STEPS, np.zeros((2, CHAINS)), 0.3))
    costs, wobble = np.linspace(0.0, 0.4, CHAINS), 2 * 0.3 * np.linspace(-1, 1, CHAINS)
    expected = REFERENCE - np.sum(KAPPA_STEPS[:2]) - wobble + 20.0 * costs
    np.testing.assert_allclose(tally.bound_weights(costs), expected, rtol=1e-12)


def test_on_the_way_to_the_natural_temperature_the_final_factor_is_that_of_where_the_chains_stand(make_tally):
    """Mutation: the κ ladder's β, under which such weights are those of more than the mass."""
    tally = make_tally()
    enter_kappa(tally, COOLING)
    enter_temperature(tally, COOLING, [2, 3], 1, weighs=True)
    costs = np.linspace(0.0, 0.4, CHAINS)
    expected = REFERENCE - np.sum(KAPPA_STEPS) - np.sum(BETA_STEPS[2:]) + BETAS[4] * costs
    np.testing.assert_allclose(tally.bound_weights(costs), expected, rtol=1e-12)


def test_the_bound_weights_of_finished_chains_average_the_final_factor(make_tally):
    tally = make_tally()
    enter_kappa(tally, COOLING)
    enter_kappa(tally, HEATING, noise=5.0)  # not part of the weights
    costs = enter_temperature(tally, COOLING, [2, 3, 4, 4, 4], 1, weighs=True)
    enter_temperature(tally, COOLING, [4, 3, 2, 1, 0], 2)
    start = REFERENCE - np.sum(KAPPA_STEPS) - np.sum(BETA_STEPS[2:])
    expected = start + np.log(np.mean(np.exp(5.0 * costs[2:]), axis=0))
    np.testing.assert_allclose(tally.bound_weights(np.full(CHAINS, np.nan)), expected, rtol=1e-12)


def test_a_miss_takes_the_weight_of_its_chain_for_good(make_tally):
    tally = make_tally()
    seen = record([0, 1, 2], KAPPA_STEPS, np.zeros((3, CHAINS)))
    seen.work_down[1, 5] = np.inf
    tally.add_kappa(COOLING, [0, 1, 2], seen)
    weights = tally.bound_weights(np.zeros(CHAINS))
    assert weights[5] == -np.inf and np.all(np.isfinite(np.delete(weights, 5)))


def test_overlaps_of_constant_works_are_one_and_fall_with_misses(whole):
    tally, _ = whole
    np.testing.assert_allclose(tally.overlaps(KAPPA_STEPS), 1.0, atol=1e-12)
    tally.kappa_seen["work_down"][:, 1] = np.inf
    np.testing.assert_allclose(tally.overlaps(KAPPA_STEPS), [1.0, 0.5, 1.0], atol=1e-12)


def test_chains_in_separate_parts_are_told_from_chains_that_mix(make_tally):
    """Half of the chains hold a leaf thirty times wider, all along. Mutation: the mean over chains not taken out."""
    rng = np.random.default_rng(4)
    for apart, low, high in ((False, 0.9, 1.6), (True, 5.0, 100.0)):
        tally = make_tally()
        rungs = list(range(LEVELS)) * 10
        for k, rung in enumerate(rungs):
            seen = record([rung], KAPPA_STEPS, np.full((1, CHAINS), 0.1))
            squares = np.exp(0.3 * rng.normal(size=(1, CHAINS, 1)) - 0.2 * k)
            if apart:
                squares[:, ::2] *= 30.0
            # As if each visit were to a rung of its own.
            tally.squares[COOLING][k + 1] = seen._replace(leaf_squares=squares).leaf_squares[0]
        assert low < tally.separation() < high
    assert np.isnan(make_tally().separation())


@pytest.fixture
def single_chains(make_rungs):
    """Make a tally of single chains from what each pass says of its leaves' log squares at x = 0, 1, …, and noise."""

    def make(cooling, heating, size):
        rng = np.random.default_rng(4)
        tally = Tally(
            make_rungs(np.full(size, 3.0), np.full(size, 20.0)),
            Temperatures(make_rungs(np.ones(5), BETAS), JOINT, 4), REFERENCE, 1, ANCHOR_COST,
        )  # fmt: skip
        for which, logs in ((COOLING, cooling), (HEATING, heating)):
            assert np.isnan(tally.separation())
            for rung in range(1, size):
                tally.squares[which][rung] = np.exp(logs(rung) + 0.3 * rng.normal(size=(1, 2)))
        return tally

    return make


@pytest.mark.parametrize(
    ("late", "apart", "meet"),
    [
        ((0, 0), 1.0, True), ((0, 0), 30.0, False), ((3, 3), 1.0, True), ((3, 3), 30.0, False), ((4, 4), 1.0, True),
        ((5, 5), 1.0, False), ((-3, -3), 1.0, False), ((3, 0), 1.0, False),
    ],
)  # fmt: skip
def test_single_chains_are_compared_with_that_of_the_other_pass_less_what_both_lag(single_chains, late, apart, meet):
    """Two leaves that fall along the ladder, and lag by as many of its 41 rungs as `late` says of both passes together.

    One rung too far, to the wrong side, or of one leaf only is no lag. Mutations: rungs shifted the other way, a limit
    of another size.
    """
    fall = np.array([-2.0, 1.5])
    tally = single_chains(
        lambda rung: fall * rung, lambda rung: fall * (rung + np.array(late)) + np.log(apart), size=41
    )
    assert 0.9 < tally.separation() < 1.6 if meet else tally.separation() > MOST_SEPARATION
    # A rung that says nothing is left out.
    tally.squares[HEATING][38][:] = np.nan
    assert 0.9 < tally.separation() < 1.6 if meet else tally.separation() > MOST_SEPARATION


def test_arms_that_open_late_are_no_lag(single_chains):
    """Between 120 and 70 rungs before the end, where 70 are a tenth of the ladder, over which the leaves move by 2."""

    def arm(rung):
        return np.array([-1.2, 1.2]) * np.interp(rung - 701, [-120, -70], [0.0, 1.0])

    tally = single_chains(lambda rung: 2.0 / 70 * rung + arm(rung), lambda rung: 2.0 / 70 * rung - arm(rung), size=701)
    assert tally.separation() > MOST_SEPARATION


def test_what_leaves_move_by_at_the_end_alone_is_no_lag(single_chains):
    """They move faster and faster, and differ by as much all along. Mutation: only the end compared."""

    def move(rung):
        return 4.0 * (rung / 701) ** 8 * np.ones(2)

    tally = single_chains(move, lambda rung: move(rung) + 3.5, size=701)
    assert tally.separation() > MOST_SEPARATION


def test_a_pass_lost_at_one_gap_is_compared_at_the_others(whole):
    """With the step that both passes say. Mutations: the steps of the whole everywhere, any number of gaps mended."""
    tally, _ = whole
    both = tally.sums(CUTOFFS, 0.3, chains=EVERYONE)
    cooling = tally.log_mass(0.3, chains=EVERYONE, passes=(COOLING,), near=both)
    tally.kappa_seen["work_down"][COOLING, 1] = np.inf
    both = tally.sums(CUTOFFS, 0.3, chains=EVERYONE)
    assert np.isfinite(both.log_mass)
    mended = tally.log_mass(0.3, chains=EVERYONE, passes=(COOLING,), near=both)
    # Half of the works down were lost, which the other pass knows of.
    assert mended == pytest.approx(cooling - (both.kappa_differences[1] - KAPPA_STEPS[1]), abs=1e-9)
    assert not np.isfinite(tally.log_mass(0.3, chains=EVERYONE, passes=(COOLING,)))
    tally.kappa_seen["work_down"][COOLING, 2] = np.inf
    both = tally.sums(CUTOFFS, 0.3, chains=EVERYONE)
    assert not np.isfinite(tally.log_mass(0.3, chains=EVERYONE, passes=(COOLING,), near=both))


def test_stretches_are_cut_in_time_at_each_temperature(make_tally):
    """The cooling pass goes before the heating pass, whichever was entered first; ΔF is that of all visits.

    Mutations: records in the order of their entry, a sample in no stretch or in two, ΔF of the samples left, all visits
    of a pass in one stretch.
    """
    tally = make_tally()
    for which in (COOLING, HEATING):
        enter_kappa(tally, which)
    heating = enter_temperature(tally, HEATING, [4, 4, 4, 3, 2], 1)
    cooling = enter_temperature(tally, COOLING, [2, 3, 4, 4, 4], 2)
    costs = [[cooling[0], heating[4]], [cooling[1], heating[3]], [*cooling[2:], *heating[:3]]]
    whole = tally.sums(CUTOFFS, 0.3, chains=EVERYONE)
    log_z = REFERENCE - KAPPA_STEPS.sum() - np.concatenate([[0.0], np.cumsum(BETA_STEPS[JOINT:])])
    # Visits in the middle of the first and of the second half, each rung's a stretch later than the one before.
    stretches = [[(1 + 2) % 6, (4 + 2) % 6], [(1 + 3) % 6, (4 + 3) % 6], [(i + 4) % 6 for i in range(6)]]
    assert PARTS == 6
    for part in range(PARTS):
        left = tally.sums(CUTOFFS, 0.3, chains=EVERYONE, near=whole, without=part)
        np.testing.assert_allclose(left.beta_differences[JOINT:], whole.beta_differences[JOINT:])
        kept = [[x for x, at in zip(*of, strict=True) if at != part] for of in zip(costs, stretches, strict=True)]
        counts = np.array([CHAINS * len(x) for x in kept])
        together = np.concatenate([x for of in kept for x in of])
        density = np.sum(counts * np.exp(-BETAS[JOINT:] * together[:, None] - log_z), axis=1)
        expected = np.log(np.sum((together + 0.05 <= 2.0) / density))
        np.testing.assert_allclose(left.curve[-1], expected, rtol=1e-9)


def test_a_standstill_is_the_longest_unbroken_stretch(make_tally):
    """Mutations: stretches added up over breaks or passes, the worst chain for the mean, the reference counted."""
    for refused, share in (
        ([], 0.0),
        ([(COOLING, 1, 3), (COOLING, 2, 3)], 2 / 3),
        ([(COOLING, 1, 3), (COOLING, 3, 3)], 1 / 3),
        ([(COOLING, 1, 3), (COOLING, 2, 4)], 2 / 3),
        ([(COOLING, 1, 3), (HEATING, 2, 3)], 1 / 3),
        ([(COOLING, 0, 3), (COOLING, 1, 3)], 1 / 3),
        ([(HEATING, 3, 0), (HEATING, 2, 0), (HEATING, 1, 0)], 1.0),
        ([(HEATING, slice(1, None), slice(0, 4))], 4.0),
    ):
        tally = make_tally()
        assert tally.standstill() == 0.0
        enter_kappa(tally, COOLING)
        enter_kappa(tally, HEATING)
        for place in refused:
            tally.kappa_seen["acceptance"][place] = 0.0
        np.testing.assert_allclose(tally.standstill(), share / CHAINS)


SHARES = np.array([0.0, 0.0, 0.0, 0.5, 1.0])


@pytest.fixture
def ridged(make_rungs):
    """The rungs after the joint are at its β, and the ridge rises there."""

    def made(rays=None):
        rungs = dataclasses.replace(make_rungs(np.ones(5), np.append(BETAS[:3], BETAS[[2, 2]])), ridge=SHARES)
        return Tally(
            make_rungs(np.array([9.0, 9.0, 3.0, 1.0]), np.array([0.0, 20.0, 20.0, 20.0])),
            Temperatures(rungs, JOINT, 3), REFERENCE, CHAINS, ANCHOR_COST, rays,
        )  # fmt: skip

    return made


def test_blocked_are_visits_where_the_ridge_rises_that_refused_all(ridged, make_tally):
    """Mutations: the joint's own visits counted, those behind the wall, the mean acceptance of all for each one's."""
    tally = ridged()
    assert np.isnan(tally.blocked())
    enter_temperature(tally, COOLING, [2, 3, 3, 4], 0)
    assert tally.blocked() == 0.0
    for row, (_, _, seen) in enumerate(tally.temperature_seen):
        seen["acceptance"][: row + 3] = 0.01
    assert tally.blocked() == (4 + 5) / (2 * CHAINS)
    plain = make_tally()
    enter_temperature(plain, COOLING, [2, 3, 4], 0)
    assert np.isnan(plain.blocked())


def test_a_ridge_counts_in_the_mixture_with_its_share(ridged):
    """Against the sum over samples by hand; and the bound has the ridge of where the chains stand."""
    tally, rng = ridged(), np.random.default_rng(0)
    enter_kappa(tally, COOLING)
    visited = [2, 3, 4, 4]
    costs, ridges = costs_at(visited, 1), rng.gamma(3.0, 0.05, (4, CHAINS))
    seen = record(visited, BETA_STEPS, costs)._replace(ridge=ridges)
    tally.add_temperature(COOLING, visited, seen, weighs=True)
    log_z = LOG_Z[2:]
    held = (1.0 - SHARES[2:, None, None]) * costs + SHARES[2:, None, None] * ridges
    weights = 1.0 / np.einsum("k,krc->rc", np.array([8.0, 8.0, 16.0]) * np.exp(-log_z), np.exp(-20.0 * held))
    expected = np.log(np.sum(weights[costs + 0.05 <= 0.3]))
    np.testing.assert_allclose(tally.log_mass(0.3, chains=EVERYONE, passes=(COOLING,)), expected, rtol=1e-9)
    final = np.log(np.mean(np.exp(20.0 * ridges[2:]), axis=0))
    start = REFERENCE - np.sum(KAPPA_STEPS) - np.sum(BETA_STEPS[2:])
    np.testing.assert_allclose(tally.bound_weights(np.full(CHAINS, np.nan)), start + final, rtol=1e-9)
    np.testing.assert_array_equal(tally.held(costs[0], ridges[0]), ridges[0])


class PlantedRays(SampleRays):
    """J and I by formulas of what chains stand for, in place of what is found along their rays."""

    def __init__(self):
        pass

    def integrals(self, ends, costs, squares, pulled):
        lost = ends > 1.4
        return np.where(lost, -np.inf, ends * squares), np.outer(costs.sum(axis=1) * pulled, [3.0, 4.0, 5.0])


def test_rays_count_in_place_of_samples(ridged):
    """At the run's own cutoff: against the sum over rays by hand, with a chain that was not permitted and lost rays.

    Nothing colder than the joint counts, whatever its Z. Mutations: a lost ray that is not counted among the samples,
    the last rung's I for the first in the bound, samples for rays.
    """
    rng = np.random.default_rng(0)
    visited = [2, 3, 4, 4]
    ends, squares, pulled, rays = rng.uniform(0.5, 1.5, (4, 4, CHAINS))
    assert 0 < np.sum(ends > 1.4) < 8
    permitted = np.ones((4, CHAINS), bool)
    permitted[1, 2] = False
    plain = record(visited, BETA_STEPS, costs_at(visited, 1))
    seen = plain._replace(ray_end=ends, square=squares, pulled=pulled, ray_costs=rays[..., None], permitted=permitted)
    counts = np.array([8.0, 7.0, 16.0])
    mixture = np.sum(counts * np.exp(-LOG_Z[2:] + (pulled * rays)[..., None] * np.array([3.0, 4.0, 5.0])), axis=-1)
    weights = (np.where(ends > 1.4, 0.0, np.exp(ends * squares)) / mixture)[permitted]
    for colder in (None, 0.0, 1e3):
        tally = ridged(PlantedRays())
        enter_kappa(tally, COOLING)
        tally.add_temperature(COOLING, visited, seen, weighs=True)
        if colder is not None:
            cold = record([1, 0, 1], BETA_STEPS + colder, costs_at([1, 0, 1], 2))._replace(
                ray_costs=np.ones((3, CHAINS, 1))
            )
            tally.add_temperature(COOLING, [1, 0, 1], cold, weighs=False)
        mass = tally.log_mass(0.3, chains=EVERYONE, passes=(COOLING,))
        np.testing.assert_allclose(mass, np.log(np.sum(weights)), rtol=1e-9)
        sums = tally.sums(np.array([0.1, 0.3]), 0.3, chains=EVERYONE, passes=(COOLING,))
        np.testing.assert_allclose([sums.curve[1], sums.log_mass], mass, rtol=1e-9)
        assert sums.leading == pytest.approx(weights.max() / weights.sum())
        final = np.log(np.mean(np.where(ends > 1.4, 0.0, np.exp(ends * squares - 5.0 * pulled * rays))[2:], axis=0))
        start = REFERENCE - np.sum(KAPPA_STEPS) - np.sum(BETA_STEPS[2:])
        np.testing.assert_allclose(tally.bound_weights(np.full(CHAINS, np.nan)), start + final, rtol=1e-9)


def test_each_temperature_is_shown_once_and_none_behind_the_wall(ridged, make_tally):
    np.testing.assert_array_equal(ridged().shown, [True, True, True, False, False])
    tally = make_tally()
    tally.natural = 3
    np.testing.assert_array_equal(tally.shown, [True, True, True, True, False])


@pytest.mark.parametrize(("centre", "expected"), [(1.0, 0.0), (0.9, 0.0), (0.7, 3.8), (0.2, 12.5)])
def test_a_shortfall_is_how_far_the_costs_end_below_the_cutoff(make_tally, make_rungs, centre, expected):
    """Three nats are bridged by weights; costs evenly spread over a fifth of the cutoff, at β = 50 in the end."""
    tally = make_tally()
    tally.temperature = make_rungs(np.ones(2), np.array([100.0, 50.0]))
    costs = np.linspace(centre - 0.1, centre + 0.1, 10 * CHAINS).reshape(10, CHAINS)
    tally.temperature_seen = [(COOLING, rung, {"reach": row - rung + 1.0}) for row in costs for rung in (0, 1)]
    np.testing.assert_allclose(tally.shortfall(1.0), expected, atol=0.2)


@pytest.mark.parametrize(
    ("apart", "expected"), [(0.0, 1 / 39), (0.2, np.exp(4.0) / (np.exp(4.0) + 38)), (-0.2, 1 / 38)]
)
def test_one_sample_leads_where_its_guide_is_far_above_the_others(make_tally, apart, expected):
    """One temperature, β = 20, 40 samples of which one is outside: weights e^{βC} within."""
    tally = make_tally()
    costs = np.full((5, CHAINS), 0.1)
    reaches = costs + 0.05
    costs[2, 3], reaches[4, 1] = 0.1 + apart, 9.0
    visits = Record(**{**record([JOINT] * 5, np.zeros(4), costs)._asdict(), "reach": reaches})
    enter_kappa(tally, COOLING)
    tally.add_temperature(COOLING, [JOINT] * 5, visits, weighs=False)
    found = tally.sums(CUTOFFS, 2.0, chains=EVERYONE, passes=(COOLING,)).leading
    # What is less likely by 4 nats has the share of one in 38 and a bit.
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_where_the_cost_is_all_that_the_region_looks_at_no_sample_leads(make_tally):
    tally = make_tally()
    costs = np.full((5, CHAINS), 0.1)
    visits = Record(**{**record([JOINT] * 5, np.zeros(4), costs)._asdict(), "reach": costs})
    enter_kappa(tally, COOLING)
    tally.add_temperature(COOLING, [JOINT] * 5, visits, weighs=False)
    assert np.isnan(tally.sums(CUTOFFS, 2.0, chains=EVERYONE, passes=(COOLING,)).leading)


def test_a_weight_that_is_lost_stays_lost(make_tally):
    """A chain drawn outside may have an infinite cost and an image inside: no work of −∞ brings it back."""
    tally = make_tally()
    seen = record(list(range(LEVELS)), KAPPA_STEPS, np.full((LEVELS, CHAINS), 0.1))
    seen.work_down[0, 0], seen.work_down[1, 0], seen.work_down[2, 0] = np.inf, -np.inf, np.nan
    tally.add_kappa(COOLING, list(range(LEVELS)), seen)
    assert np.isneginf(tally.log_weights[0]) and np.all(np.isfinite(tally.log_weights[1:]))


def test_where_every_chain_is_lost_the_bound_is_that_of_the_tether_they_came_by(make_tally):
    """All images of the last but one rung lie outside; until then each chain's weight is known exactly."""
    tally = make_tally()
    rungs = list(range(LEVELS))
    seen = record(rungs, KAPPA_STEPS, np.full((LEVELS, CHAINS), 0.1))
    seen.work_down[2] = np.inf
    tally.add_kappa(COOLING, rungs, seen)
    lost = tally.bound_weights(np.full(CHAINS, 0.1))
    assert np.all(np.isneginf(lost))
    # Of two rungs on the way, by β C = 2 nats each, with a share of 5 %.
    ways = REFERENCE + 2.0 - np.array([KAPPA_STEPS[0], KAPPA_STEPS[0] + KAPPA_STEPS[1]])
    np.testing.assert_allclose(tally.hedged(lost), np.log(0.05) + np.log(np.mean(np.exp(ways))))
    kept = np.full(CHAINS, 30.0)
    np.testing.assert_allclose(tally.hedged(kept), 30.0 + np.log(0.95), atol=1e-6)


def test_a_chain_drawn_outside_says_nothing_on_its_way(make_tally):
    tally = make_tally()
    rungs = list(range(LEVELS))
    seen = record(rungs, KAPPA_STEPS, np.full((LEVELS, CHAINS), 0.1))
    seen.permitted[:, 0], seen.cost[:, 0], seen.work_down[:, 0] = False, np.inf, np.inf
    tally.add_kappa(COOLING, rungs, seen)
    hedged = tally.hedged(tally.bound_weights(np.full(CHAINS, 0.1)))
    assert np.isneginf(hedged[0]) and np.all(np.isfinite(hedged[1:]))
