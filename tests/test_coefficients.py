"""Exact learning coefficients: the published rows, one formula against the other, and the limits they must have."""

import itertools

import numpy as np
import pytest

from volumejax import coefficients

_ROWS = [
    ([5, 3, 5], 0, 6.5, 2),
    ([5, 3, 5], 1, 8.0, 1),
    ([5, 3, 5], 2, 9.5, 2),
    ([5, 3, 5], 3, 10.5, 1),
    ([5, 4, 5], 0, 8.0, 1),
    ([5, 4, 5], 4, 12.0, 1),
    ([4, 3, 8], 0, 6.0, 1),
    ([4, 3, 8], 3, 13.5, 1),
    ([8, 3, 4], 0, 6.0, 1),
    ([8, 3, 4], 3, 13.5, 1),
    ([3, 3, 3, 3], 0, 3.0, 1),
    ([3, 3, 3, 3], 3, 4.5, 1),
    ([4, 4, 4, 4, 4], 0, 5.0, 1),
    ([10, 10, 10], 5, 47.0, 2),
    ([20, 10, 20, 10, 20], 3, 80.0, 1),
]
_H = np.array([10.0, 1.0, 0.1, 0.01, 0.0])


@pytest.mark.parametrize("widths, rank, value, multiplicity", _ROWS)
def test_published_rows(widths, rank, value, multiplicity):
    assert coefficients.deep_linear(widths, rank) == (value, multiplicity)
    if len(widths) == 3:
        assert coefficients.reduced_rank(*widths, rank) == (value, multiplicity)


def test_two_theorems_agree():
    """Mutations caught: the wrong number of competing layers, a sign in either formula, m off by one."""
    count = 0
    for widths in itertools.product(range(1, 7), repeat=3):
        for rank in range(min(widths) + 1):
            assert coefficients.deep_linear(widths, rank) == coefficients.reduced_rank(*widths, rank)
            count += 1
    assert count == 657


def test_without_hidden_layers_or_excess_it_is_half_the_dimension():
    assert coefficients.deep_linear([4, 7], 0) == (14.0, 1)
    assert coefficients.deep_linear([4, 7], 3) == (14.0, 1)
    assert coefficients.deep_linear([3, 3, 3, 3], 3) == (4.5, 1)
    # A wide hidden layer is no bottleneck.
    assert coefficients.reduced_rank(4, 100, 7, 2) == (14.0, 1)


def test_scalar_products_are_normal_crossings():
    """Π wᵢ of L scalars: λ = ½ and m = L."""
    for layers in range(1, 6):
        assert coefficients.deep_linear([1] * (layers + 1), 0) == (0.5, layers)


def test_order_of_the_widths_counts_only_at_the_ends():
    assert coefficients.deep_linear([6, 3, 5, 4, 7], 2) == coefficients.deep_linear([6, 4, 3, 5, 7], 2)
    assert coefficients.deep_linear([6, 3, 7], 0) == coefficients.deep_linear([3, 6, 7], 0)


@pytest.mark.parametrize("gamma, value", [(0.0, 2.0), (1.0, 1.699095), (10.0, 1.245050)])
def test_published_localised_quadratics(gamma, value):
    assert abs(coefficients.localised_quadratic(_H, beta=100.0, gamma=gamma) - value) <= 1e-6


def test_published_langevin_quadratic():
    assert abs(coefficients.langevin_quadratic(_H, beta=100.0, gamma=1.0, step=1e-4) - 1.713307) <= 1e-6


def test_langevin_is_the_stationary_state_of_its_recursion():
    """Iterate the variances of x ← (1 − e a/2)x + √e ξ to their fixed point."""
    beta, gamma, step = 100.0, 1.0, 1e-3
    a = beta * _H + gamma
    variance = np.zeros_like(a)
    for _ in range(100_000):
        variance = (1.0 - 0.5 * step * a) ** 2 * variance + step
    expected = 0.5 * np.sum(beta * _H * variance)
    assert abs(coefficients.langevin_quadratic(_H, beta=beta, gamma=gamma, step=step) - expected) <= 1e-9


def test_a_short_step_has_no_bias():
    exact = coefficients.localised_quadratic(_H, beta=100.0, gamma=1.0)
    assert abs(coefficients.langevin_quadratic(_H, beta=100.0, gamma=1.0, step=1e-12) - exact) <= 1e-9


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: coefficients.deep_linear([3], 0), "at least two"),
        (lambda: coefficients.deep_linear([3, 0, 3], 0), "positive numbers"),
        (lambda: coefficients.deep_linear([3, 2, 3], 3), "smallest width, 2"),
        (lambda: coefficients.reduced_rank(3, 2, 3, -1), "rank must lie"),
        (lambda: coefficients.localised_quadratic([0.0], beta=1.0, gamma=0.0), "not all zero"),
        (lambda: coefficients.localised_quadratic([1.0], beta=0.0, gamma=0.0), "beta must be positive"),
        (lambda: coefficients.langevin_quadratic([1.0], beta=1.0, gamma=0.0, step=4.0), "shorten it"),
    ],
)
def test_misuse_names_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
