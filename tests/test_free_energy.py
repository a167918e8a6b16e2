"""Bennett's ratio, overlaps and reweighted masses, on works and samples whose free energies are known.

Mutations these catch: a forgotten log(n_F/n_B), works of one side with the wrong sign, misses dropped instead of
counted, NaN counted as a miss, reweighting without the counts, cumulation in the order of costs instead of reaches,
masses that hang on the one sample nearest to the cutoff.
"""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special, stats

from volumejax.free_energy import acceptance_ratio, log_mixture, log_total_mass, overlap


def ratio(forward, backward):
    """Of one pair."""
    return acceptance_ratio(forward[None], backward[None])[0]


def crooks(rng, difference, sd, forward, backward):
    """Gaussian works that satisfy Crooks: dissipation sd²/2 both ways."""
    return (
        rng.normal(difference + 0.5 * sd**2, sd, (64, forward)),
        rng.normal(-difference + 0.5 * sd**2, sd, (64, backward)),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("forward", "backward"), [(200, 200), (400, 50)])
@pytest.mark.parametrize("difference", [-7.3, 0.0, 250.0])
def test_gaussian_works_give_their_difference(seed, forward, backward, difference):
    """Mutation: without log(n_F/n_B) the unequal case is off by tens of standard errors."""
    works = crooks(np.random.default_rng(seed), difference, 1.5, forward, backward)
    estimates = acceptance_ratio(*works)
    error = estimates.std(ddof=1) / 8
    assert estimates.shape == (64,)
    assert abs(estimates.mean() - difference) <= 4 * error
    assert error <= 0.03


@hypothesis.given(st.floats(-1e4, 1e4), st.integers(1, 9), st.integers(1, 9))
def test_constant_works_are_exact(work, forward, backward):
    estimate = ratio(np.full(forward, work), np.full(backward, -work))
    assert abs(float(estimate) - work) <= 1e-8 * (1.0 + abs(work))


@hypothesis.given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8))
def test_swapping_the_sides_changes_the_sign(seed, forward, backward):
    rng = np.random.default_rng(seed)
    f, b = rng.normal(3.0, 2.0, forward), rng.normal(-1.0, 2.0, backward)
    np.testing.assert_allclose(ratio(f, b), -ratio(b, f), atol=1e-9)


@hypothesis.given(st.integers(0, 10**6), st.floats(-500, 500))
def test_a_common_shift_of_the_works_shifts_the_difference(seed, shift):
    rng = np.random.default_rng(seed)
    f, b = rng.normal(3.0, 2.0, 7), rng.normal(-1.0, 2.0, 5)
    np.testing.assert_allclose(ratio(f + shift, b - shift), ratio(f, b) + shift, atol=1e-9)


def test_the_estimate_solves_bennetts_equation():
    rng = np.random.default_rng(0)
    f, b = rng.normal(4.0, 3.0, 30), rng.normal(1.0, 3.0, 12)
    d = float(ratio(f, b)) - np.log(30 / 12)
    assert np.isclose(np.sum(1 / (1 + np.exp(f - d))), np.sum(1 / (1 + np.exp(b + d))), rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_misses_are_those_of_hard_walls(seed):
    """Uniform on [0, 1] and on [0, 0.3]: points of the first that miss the second, none of the second."""
    rng = np.random.default_rng(seed)
    forward = np.where(rng.random((64, 300)) <= 0.3, 0.0, np.inf)
    estimates = acceptance_ratio(forward, np.zeros((64, 100)))
    error = estimates.std(ddof=1) / 8
    assert abs(estimates.mean() + np.log(0.3)) <= 4 * error + 0.002 and error < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_misses_on_both_sides_are_those_of_hard_walls(seed):
    """Uniform on [0, 1] and on [0.4, 1.6], whose lengths are as 1 to 1.2; half of one lies in the other."""
    rng = np.random.default_rng(seed)
    forward = np.where(rng.random((64, 200)) >= 0.4, 0.0, np.inf)
    backward = np.where(0.4 + 1.2 * rng.random((64, 500)) <= 1.0, 0.0, np.inf)
    estimates = acceptance_ratio(forward, backward)
    error = estimates.std(ddof=1) / 8
    assert abs(estimates.mean() + np.log(1.2)) <= 4 * error + 0.002 and error < 0.02


def test_absent_works_are_as_if_dropped():
    rng = np.random.default_rng(1)
    f, b = rng.normal(2.0, 1.0, 9), rng.normal(-1.0, 1.0, 6)
    padded = ratio(np.r_[np.nan, f[:4], np.nan, f[4:]], np.r_[b, np.full(5, np.nan)])
    assert abs(float(padded) - float(ratio(f, b))) < 1e-12
    missed = ratio(np.r_[np.inf, f], b)
    assert abs(float(missed) - float(ratio(f, b))) > 0.01


def test_many_pairs_at_once_are_those_alone():
    rng = np.random.default_rng(2)
    f, b = rng.normal(size=(2, 3, 5)) + 4.0, rng.normal(size=(2, 3, 7)) - 3.0
    together = acceptance_ratio(f, b)
    alone = [[float(ratio(f[i, j], b[i, j])) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_sides_without_a_finite_work():
    nothing, misses, works = np.full(3, np.nan), np.full(3, np.inf), np.zeros(3)
    assert ratio(misses, works) == np.inf
    assert ratio(works, misses) == -np.inf
    assert np.isnan(ratio(misses, misses)) and np.isnan(ratio(nothing, nothing))


def test_overlap_is_the_swap_rate():
    assert overlap(np.zeros((2, 5)), np.zeros((2, 4)), np.zeros(2)).tolist() == [1.0, 1.0]
    # A constant work is a perfect map, whatever its size.
    assert np.isclose(overlap(np.full((1, 5), 3.0), np.full((1, 5), -3.0), np.array([3.0])), 1.0)
    by_hand = 0.5 * (np.mean([1.0, np.exp(-1.0), 0.0]) + np.mean([np.exp(-2.5), 1.0]))
    forward, backward = np.array([[0.0, 1.5, np.inf, np.nan]]), np.array([[2.0, -4.0]])
    assert np.isclose(overlap(forward, backward, np.array([0.5])), by_hand)


@pytest.mark.parametrize("sd", [0.5, 2.0, 4.0])
def test_overlap_of_gaussian_works(sd):
    """E min(1, e^{ΔF − W}) = 2 Φ(−sd/2) each way."""
    works = crooks(np.random.default_rng(3), 9.0, sd, 2000, 2000)
    np.testing.assert_allclose(overlap(*works, np.full(64, 9.0)).mean(), 2 * stats.norm.cdf(-0.5 * sd), rtol=0.02)


@hypothesis.given(st.integers(0, 10**6), st.floats(-30, 30), st.floats(0.0, 50.0))
def test_overlap_lies_between_zero_and_one(seed, difference, sd):
    rng = np.random.default_rng(seed)
    value = overlap(rng.normal(0, sd, (3, 9)), rng.normal(0, sd, (3, 4)), np.full(3, difference))
    assert np.all((value >= 0.0) & (value <= 1.0))


D, BETAS = 6, np.array([300.0, 60.0, 12.0, 2.0, 0.0])
CUTOFFS = np.array([0.01, 0.05, 0.3, 2.0, 8.0])


def tempered(rng, counts):
    """Half squares of normals under e^{−βC}, and the normalisers (1 + β)^{−D/2}."""
    costs = [0.5 * rng.chisquare(D, n) / (1.0 + beta) for n, beta in zip(counts, BETAS, strict=True)]
    return np.concatenate(costs), -0.5 * D * np.log1p(BETAS)


@pytest.mark.parametrize("seed", range(3))
def test_masses_of_a_known_density_of_states(seed):
    """P(C ≤ ε) of χ²/2 over three decades. Mutation: weights without N_k fail by log ratios of the counts."""
    rng, counts = np.random.default_rng(seed), np.array([400, 100, 200, 800, 50])
    estimates = []
    for _ in range(16):
        costs, log_z = tempered(rng, counts)
        estimates.append(log_total_mass(costs, costs, BETAS, counts.astype(float), log_z, CUTOFFS))
    error = np.std(estimates, axis=0, ddof=1) / 4
    assert np.all(np.abs(np.mean(estimates, axis=0) - stats.chi2.logcdf(2 * CUTOFFS, D)) <= 4 * error)
    assert np.all(error < 0.06)


def test_the_reach_decides_and_the_cost_weighs():
    rng, counts = np.random.default_rng(5), np.array([100, 100, 100, 100, 100.0])
    costs, log_z = tempered(rng, counts.astype(int))
    # Any order of the samples, and a reach that is worse than the cost.
    reaches = costs * (1.0 + rng.random(len(costs)))
    log_density = np.log(np.sum(counts * np.exp(-BETAS * costs[:, None] - log_z), axis=1))
    by_hand = [np.log(np.sum(np.exp(-log_density[reaches <= cutoff]))) for cutoff in CUTOFFS]
    np.testing.assert_allclose(log_total_mass(costs, reaches, BETAS, counts, log_z, CUTOFFS), by_hand, rtol=1e-12)


def test_rungs_without_samples_or_normaliser_do_not_count():
    rng, counts = np.random.default_rng(6), np.array([50, 50, 50, 50, 50])
    costs, log_z = tempered(rng, counts)
    whole = log_total_mass(costs, costs, BETAS, counts.astype(float), log_z, CUTOFFS)
    more = (np.append(BETAS, [7.0, 9.0]), np.append(counts, [0.0, 0.0]), np.append(log_z, [-3.0, np.nan]))
    np.testing.assert_allclose(log_total_mass(costs, costs, *more, CUTOFFS), whole, rtol=1e-12)


def test_a_cutoff_below_every_sample_has_no_mass():
    costs = np.array([0.2, 0.1])
    masses = log_total_mass(costs, costs, np.zeros(1), np.array([2.0]), np.zeros(1), np.array([0.05, 0.1, 1.0]))
    np.testing.assert_allclose(masses, [-np.inf, np.log(0.5), 0.0], atol=1e-12)


def test_no_sample_at_all_has_no_mass_either():
    """As where maps lose the one chain that a group of a jackknife has."""
    nothing = np.zeros(0)
    mass = log_total_mass(nothing, nothing, np.array([2.0, 1.0]), np.zeros(2), np.zeros(2), np.array([0.5, 1.0]))
    np.testing.assert_array_equal(mass, -np.inf)


def test_a_guess_changes_nothing_but_the_work():
    """Close by, far off, and where a pair has no estimate."""
    works = crooks(np.random.default_rng(7), 3.0, 1.5, 60, 40)
    plain = acceptance_ratio(*works)
    for guess in (plain + 1.0, plain - 1.9, plain + 80.0, np.where(np.arange(64) == 5, np.nan, plain)):
        np.testing.assert_allclose(acceptance_ratio(*works, guess), plain, atol=1e-6)


def test_a_mass_without_a_normaliser_is_not_known():
    unknown = log_total_mass(
        np.array([0.1]), np.array([0.1]), np.ones(1), np.ones(1), np.array([np.inf]), np.array([0.5])
    )
    assert np.isnan(unknown).all()


@pytest.mark.parametrize("confined", [100.0, 2000.0, 5e5])
def test_the_mass_does_not_hang_on_the_sample_nearest_to_the_cutoff(confined):
    """The energy is Gamma-distributed behind the wall; 48 visits of four chains, as few as a run has."""
    rng, betas = np.random.default_rng(3), np.array([confined])
    inside = stats.gamma.cdf(confined, confined)
    exact = confined * np.log(1.0) - np.log(confined)
    log_z = np.atleast_1d(special.gammaln(confined) - confined * np.log(confined) + np.log(inside))
    errors = []
    for _ in range(40):
        costs = stats.gamma.ppf(inside * rng.uniform(size=192), confined) / confined
        mass = log_total_mass(costs, costs, betas, np.array([192.0]), log_z, np.ones(1))[0]
        errors.append(mass - exact)
    assert np.std(errors) < 0.3
    assert abs(np.mean(errors)) < 0.15


def test_costs_of_two_guides_count_with_a_beta_each():
    """Where the second has none they are the first alone."""
    rng = np.random.default_rng(0)
    costs, betas, counts, log_z = (
        rng.gamma(3.0, size=(7, 2)),
        rng.gamma(2.0, size=(3, 2)),
        np.array([2.0, 0, 5]),
        rng.normal(size=3),
    )
    densities = counts * np.exp(-np.einsum("sg,kg->sk", costs, betas) - log_z)
    np.testing.assert_allclose(log_mixture(costs, betas, counts, log_z), np.log(densities.sum(1)), rtol=1e-12)
    betas[:, 1] = 0.0
    np.testing.assert_allclose(
        log_mixture(costs, betas, counts, log_z), log_mixture(costs[:, 0], betas[:, 0], counts, log_z), rtol=1e-12
    )
