"""Diagnostics against SciPy, ArviZ and brute force. Mutations: tail of n instead of n/5, no shrinkage, Markov without
its log(1/p), groups that are not split, variances with n for n − 1."""

import math
import warnings

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp
from scipy import stats

from volumejax import diagnostics
from volumejax.diagnostics import chain_mean, pareto_k_limit, split_r_hat


def on_host(function):
    """Results are float64 scalars, which jax.numpy would round outside enable_x64."""
    compiled = jax.jit(function)

    def call(log_weights):
        with jax.enable_x64(True):
            return float(compiled(np.asarray(log_weights, np.float64)))

    return call


certified_lower = on_host(diagnostics.certified_lower)
effective_sample_size = on_host(diagnostics.effective_sample_size)
log_mean_error = on_host(diagnostics.log_mean_error)
pareto_k = on_host(diagnostics.pareto_k)


def heavy(k, n, seed):
    """Log weights whose tail has shape k."""
    return np.log(stats.genpareto(k).rvs(n, random_state=seed) + 1.0)


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize("n", [100, 1000, 20_000])
def test_pareto_k_agrees_with_arviz(k, n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from arviz_stats.base import array_stats
    x = heavy(k, n, seed=1)
    _, theirs = array_stats.psislw(-x, axis=0)  # of a log likelihood, hence the sign
    assert abs(float(pareto_k(x)) - float(theirs)) < 0.02


@pytest.mark.parametrize("k", [0.2, 0.8])
def test_pareto_k_agrees_with_scipys_maximum_likelihood(k):
    errors = []
    for seed in range(3):
        x = heavy(k, 20_000, seed)
        tail = math.ceil(3 * math.sqrt(x.size))
        w = np.sort(np.exp(x - x.max()))
        excess = w[-tail:] - w[-tail - 1]
        fitted, _, _ = stats.genpareto.fit(excess / excess.mean(), floc=0)
        errors.append(float(pareto_k(x)) - fitted)
    assert np.abs(errors).max() < 0.06


def test_pareto_k_at_both_ends():
    assert pareto_k(np.full(1000, -5e5)) == -np.inf
    assert pareto_k(np.zeros(24)) == np.inf
    assert np.isfinite(pareto_k(heavy(0.3, 25, 0)))
    assert pareto_k(np.linspace(-1e6, 0.0, 1000)) == np.inf  # the tail threshold underflows
    assert pareto_k(np.full(100, -np.inf)) == np.inf
    assert pareto_k(np.repeat([-np.inf, 0.0], 50)) == -np.inf  # half the rays see nothing, the others the same
    assert pareto_k(np.append(np.zeros(99), np.nan)) == np.inf
    assert pareto_k(np.append(np.zeros(99), np.inf)) == np.inf


def test_the_limit_on_k():
    assert pareto_k_limit(10**6) == 0.7
    assert np.isclose(pareto_k_limit(100), 0.5)
    assert pareto_k_limit(1) == -np.inf


def test_effective_sample_size():
    assert np.isclose(effective_sample_size(np.full(40, 3e5)), 40)
    assert np.isclose(effective_sample_size(np.r_[0.0, np.full(9, -np.inf)]), 1)
    assert effective_sample_size(np.full(4, -np.inf)) == 0.0


def test_error_of_the_log_mean_is_that_of_repetition():
    rng = np.random.default_rng(0)
    x = rng.normal(-1e6, 0.7, (2000, 400))
    log_means = np.log(np.mean(np.exp(x + 1e6), axis=1))
    claimed = np.mean([log_mean_error(row) for row in x[:100]])
    assert abs(claimed / log_means.std() - 1) < 0.1
    assert log_mean_error(np.array([1.0])) == np.inf
    assert log_mean_error(np.full(9, -np.inf)) == np.inf


@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
def test_the_certified_bound_holds_and_is_not_idle(spread):
    # Log-normal weights: E w = exp(spread²/2).
    rng = np.random.default_rng(2)
    bounds = np.array([float(certified_lower(rng.normal(0, spread, 300))) for _ in range(400)])
    truth = spread**2 / 2
    assert np.mean(bounds > truth) <= 0.05
    assert np.median(bounds) >= -0.05  # never worse than the mean log weight, bar its own penalty


def test_the_certified_bound_by_hand():
    x = np.log([1.0, 2.0, 3.0, 4.0])
    penalty = math.log(3 / 0.05)
    by_hand = max(
        np.log(2.5) - penalty,
        np.mean(np.log([1.5, 3.5])) - penalty / 2,
        np.mean(x) - penalty / 4,
    )
    assert np.isclose(certified_lower(x), by_hand)


@hypothesis.given(
    hnp.arrays(
        np.float64, hnp.array_shapes(max_dims=1, max_side=60), elements=hnp.from_dtype(np.dtype(float), allow_nan=False)
    )
)
def test_diagnostics_take_any_weights(x):
    hypothesis.assume(not np.any(np.isposinf(x)))
    assert effective_sample_size(x) >= 0.0
    assert effective_sample_size(x) <= x.size * (1 + 1e-12)
    assert not np.isnan(pareto_k(x))
    assert certified_lower(x) <= np.max(x) + 1e-9 * max(1.0, abs(np.max(x)))
    assert not np.isnan(log_mean_error(x))


def test_split_r_hat_by_hand():
    """Halves (0, 2), (4, 6), (1, 1), (3, 5): means 1, 5, 1, 4 and variances 2, 2, 0, 2."""
    groups = np.array([[0.0, 2.0, 4.0, 6.0], [1.0, 1.0, 3.0, 5.0]])
    between, within = np.var([1.0, 5.0, 1.0, 4.0], ddof=1), 1.5
    assert math.isclose(split_r_hat(groups), math.sqrt(0.5 + between / within), rel_tol=1e-12)
    # The middle of an odd number of draws belongs to neither half.
    assert split_r_hat(np.insert(groups, 2, 1e6, axis=1)) == split_r_hat(groups)


@pytest.mark.parametrize("draws", [4, 7, 60])
def test_split_r_hat_agrees_with_arviz(draws):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from arviz_stats.base import array_stats
    groups = np.random.default_rng(draws).normal(size=(5, draws)) + np.arange(5.0)[:, None] / 3
    theirs = array_stats.rhat(groups, chain_axis=0, draw_axis=1, method="split")
    assert np.isclose(split_r_hat(groups), theirs, rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_split_r_hat_tells_groups_apart_and_drifts_too(seed):
    same = np.random.default_rng(seed).normal(size=(2, 400))
    assert abs(split_r_hat(same) - 1.0) < 0.02
    assert split_r_hat(same + np.array([[0.0], [4.0]])) > 1.5
    assert split_r_hat(same + np.linspace(-4.0, 4.0, 400)) > 1.5


def test_split_r_hat_at_both_ends():
    assert np.isnan(split_r_hat(np.zeros((2, 3))))
    assert split_r_hat(np.zeros((2, 8))) == 1.0
    assert split_r_hat(np.repeat([[0.0], [1.0]], 8, axis=1)) == np.inf
    assert np.isnan(split_r_hat(np.full((2, 8), np.nan)))


@pytest.mark.parametrize("memory", [0.0, 0.9, -0.5])
def test_the_mean_of_chains_has_an_honest_error(memory):
    """Autoregressive chains whose mean is zero. Mutation caught: an error as if draws were independent."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(200, 8, 500)) * np.sqrt(1.0 - memory**2)
    draws = np.empty_like(noise)
    draws[..., 0] = generator.normal(size=(200, 8))
    for i in range(1, 500):
        draws[..., i] = memory * draws[..., i - 1] + noise[..., i]
    answers = [chain_mean(x) for x in draws]
    scores = [answer.mean / answer.std_error for answer in answers]
    assert 0.8 <= np.sqrt(np.mean(np.square(scores))) <= 1.25
    independent = 4000.0 * (1.0 - memory) / (1.0 + memory)
    assert 0.7 <= np.median([answer.ess for answer in answers]) / independent <= 1.2
    assert max(answer.r_hat for answer in answers) < 1.2


def test_chains_that_never_meet_have_the_error_of_their_scatter():
    draws = np.random.default_rng(0).normal(size=(4, 1000)) * 0.01 + np.arange(4.0)[:, None]
    answer = chain_mean(draws)
    assert 0.99 <= answer.std_error / (np.std(np.arange(4.0), ddof=1) / 2.0) <= 1.5
    assert answer.r_hat > 10.0 and answer.ess < 5.0
    assert chain_mean(np.full((2, 10), 3.0)).std_error == 0.0
    assert chain_mean(np.array([[1.0, np.nan, 2.0, 3.0]])).std_error == np.inf
