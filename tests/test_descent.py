import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from volumejax.descent import mean_cost, next_beta, share_done, share_inside, useful_levels

COSTS = st.lists(st.floats(0.0, 1e6), min_size=2, max_size=40).map(np.array)


@settings(deadline=None)
@given(COSTS, st.floats(0.0, 1e4), st.floats(0.01, 0.5))
@example(np.array([2.0, 347455.0, 301652.5]), 4096.0, 0.015625)
def test_weights_to_the_next_level_are_as_uneven_as_allowed(cost, beta, most):
    there = next_beta(beta, cost, np.zeros(len(cost)), most, 1.0)
    assert there > beta or np.ptp(cost) * (there - beta) <= 1e-6
    weight = np.exp(-(there - beta) * (cost - cost.min()))
    unevenness = np.mean(weight**2) / np.mean(weight) ** 2 - 1.0
    assert unevenness <= most * (1.0 + 1e-6)


def test_infinite_costs_do_not_stop_the_descent():
    cost = np.array([np.inf, 1.0, 2.0, 3.0])
    found = next_beta(0.0, cost, np.zeros(4), 0.1, 1.0)
    assert found == pytest.approx(next_beta(0.0, cost[1:], np.zeros(3), 0.1, 1.0))
    assert mean_cost(cost, np.array([-np.inf, 0.0, 0.0, 0.0])) == 2.0


def test_equal_costs_double_the_temperature():
    assert next_beta(3.0, np.ones(5), np.zeros(5), 0.1, 1.0) == 6.0
    assert next_beta(0.0, np.ones(5), np.zeros(5), 0.1, 0.5) == 2.0


def test_the_levels_that_tell_a_cutoff_are_those_near_its_own_temperature():
    # C ~ Gamma(3, 1/(1 + b)): three square directions under a prior of the same kind.
    rng = np.random.default_rng(0)
    betas = np.concatenate([[0.0], np.geomspace(0.1, 1e4, 60)])
    seen = [(rng.gamma(3.0, 1.0 / (1.0 + b), 20_000), np.zeros(20_000)) for b in betas]
    useful = useful_levels(betas, seen, np.array([1e-3, 10.0]), 0.03)
    assert useful[1, 0], "nearly all of the prior passes"
    chosen = betas[useful[0]]
    assert 1.0 / 1e-3 < chosen.min() * 3 and chosen.max() <= 1e4
    assert not useful[0, 0]


def test_shares():
    cost, log_weight = np.array([1.0, 2.0, 3.0]), np.log([0.5, 0.25, 0.25])
    assert share_inside(cost, log_weight, 2.0) == pytest.approx(0.75)
    assert share_done(10.0, 10.0, 0.1) == 0.0 and share_done(10.0, 0.1, 0.1) == 1.0
    assert share_done(10.0, 1.0, 0.1) == pytest.approx(0.5)
    assert share_done(0.05, 0.05, 0.1) == 1.0
