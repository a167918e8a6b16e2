"""tails against mpmath, SciPy's quadrature, closed forms, and one method against the other."""

import functools

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf, gammaincc
from scipy.stats import ncx2

from volumejax.tails import (
    chi_square_contour,
    chi_square_series,
    log_gamma_p,
    log_total,
    stage_survival,
    weighted_chi_square,
    weighted_log_gamma,
)


@pytest.mark.parametrize("a", [0.5, 1.0, 5.0, 1205.0])
@pytest.mark.parametrize("ratio", [1e-200, 1e-8, 0.3, 0.999, 1.0, 1.001, 2.0, 30.0])
def test_log_gamma_p_matches_mpmath(a, ratio):
    x = a * ratio
    with mpmath.workdps(40):
        if ratio <= 1.0:
            log_first = a * mpmath.log(x) - x - mpmath.loggamma(a + 1)
            expected = float(log_first + mpmath.log(mpmath.hyp1f1(1, a + 1, x)))
        else:
            expected = float(mpmath.log1p(-mpmath.gammainc(a, x, regularized=True)))
    assert abs(float(log_gamma_p(a, x)) - expected) <= 1e-15 * (10.0 + 2.0 * a * (1.0 + abs(np.log(x))))


def test_log_gamma_p_at_its_ends():
    assert np.array_equal(log_gamma_p(2.0, np.array([0.0, np.inf])), [-np.inf, 0.0])
    assert np.isclose(float(log_gamma_p(2.0, 60.0)), -gammaincc(2.0, 60.0), rtol=1e-12, atol=0.0)


def test_log_total_of_zeros():
    assert log_total(np.array([-np.inf, 3.0])) == 3.0


_rule = functools.cache(np.polynomial.legendre.leggauss)


def _noncentral_quadrature(lam, delta, x):
    """Pr(λ₁χ²₁(δ₁²) + λ₂χ²₁(δ₂²) ≤ x) over the two normals, by Gauss-Legendre in the angle φ of the disc."""
    nodes, weights = _rule(120)
    phi, weight = 0.5 * np.pi * nodes, 0.5 * np.pi * weights
    first = np.sqrt(x / lam[0]) * np.sin(phi)
    edge = np.sqrt(x / lam[1]) * np.cos(phi)
    density = np.exp(-0.5 * (first - np.sqrt(delta[0])) ** 2) / np.sqrt(2.0 * np.pi)
    shift = np.sqrt(delta[1])
    inner = 0.5 * (erf((edge - shift) / np.sqrt(2.0)) + erf((edge + shift) / np.sqrt(2.0)))
    return np.log(weight @ (density * inner * np.sqrt(x / lam[0]) * np.cos(phi)))


@pytest.mark.parametrize("method", [chi_square_series, chi_square_contour])
@pytest.mark.parametrize("lam", [(1.0, 1.0), (1.0, 0.2), (0.05, 3.0)])
@pytest.mark.parametrize("delta", [(0.0, 0.0), (0.3, 2.0), (9.0, 0.0)])
@pytest.mark.parametrize("x", [1e-3, 0.5, 10.0])
def test_noncentral_against_quadrature(method, lam, delta, x):
    assert abs(method(lam, delta, x).log_mass - _noncentral_quadrature(lam, delta, x)) <= 1e-11


@pytest.mark.parametrize("n, delta", [(3, 2.0), (10, 0.5), (50, 20.0)])
def test_equal_weights_against_scipy(n, delta):
    weights, noncentrality = np.full(n, 0.7), np.full(n, delta / n)
    x = np.array([0.3, 1.0, 1.5]) * 0.7 * (n + delta)
    expected = ncx2.logcdf(x / 0.7, n, delta)
    assert np.allclose([weighted_chi_square(weights, noncentrality, t).log_mass for t in x], expected, rtol=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.0, 3.0), st.floats(0.0, 50.0), st.floats(-12.0, 0.5), st.integers(0, 999))
def test_series_and_contour_agree(n, spread, delta, log_ratio, seed):
    rng = np.random.default_rng(seed)
    weights, noncentrality = np.exp(spread * rng.normal(size=n)), delta * rng.random(n)
    x = float(np.sum(weights * (1.0 + noncentrality)) * np.exp(log_ratio))
    series = chi_square_series(weights, noncentrality, x, max_terms=2000)
    contour = chi_square_contour(weights, noncentrality, x)
    if series is not None:
        assert abs(series.log_mass - contour.log_mass) <= 1e-11 * (1.0 + abs(series.log_mass))
        assert abs(series.slope - contour.slope) <= 1e-10 * (1.0 + series.slope)


@pytest.mark.parametrize("num_small, small", [(300, 0.01), (10_000, 0.01), (3000, 0.3)])
@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.01, 1.1])
def test_one_large_weight_among_many_small(num_small, small, ratio):
    """The hard case for a bent path: one near branch point, and a bulk that is almost Gaussian.

    Mutation caught: keeping the bend where the integrand rises along the path.
    """
    x = ratio * num_small * small
    z, weight = _panels(np.sqrt(x))
    log_terms = -0.5 * z**2 + 0.5 * np.log(2.0 / np.pi) + np.log(weight)
    expected = log_total(log_terms + log_gamma_p(0.5 * num_small, 0.5 * (x - z**2) / small))
    weights = np.append(np.full(num_small, small), 1.0)
    assert abs(chi_square_contour(weights, np.zeros_like(weights), x).log_mass - expected) <= 2e-11


def _panels(stop, num_panels=200):
    nodes, weights = _rule(20)
    half = 0.5 * stop / num_panels
    centres = half * (2.0 * np.arange(num_panels) + 1.0)
    return (centres[:, None] + half * nodes).ravel(), np.tile(half * weights, num_panels)


def test_very_unequal_weights_take_the_contour():
    """18 decades of weights: the series gives up, and the contour agrees with its own differences."""
    weights, zeros = np.logspace(-12, 6, 300), np.zeros(300)
    assert chi_square_series(weights, zeros, 1.0) is None
    below, here, above = (weighted_chi_square(weights, zeros, float(np.exp(t))) for t in (-1e-4, 0.0, 1e-4))
    assert abs((above.log_mass - below.log_mass) / 2e-4 - here.slope) <= 1e-7 * here.slope


def test_a_hundred_thousand_distinct_weights():
    """Jitter of 1e-7 in equal weights moves the log mass by less than 1e-7·√n: the blocks of nodes add up."""
    n = 100_000
    weights = 1.0 + 1e-7 * np.random.default_rng(0).normal(size=n)
    expected = float(log_gamma_p(0.5 * n, 25.0))
    assert abs(chi_square_contour(weights, np.zeros(n), 50.0).log_mass - expected) <= 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 1_000_000])
def test_contour_in_any_dimension(n):
    weights, zeros = np.ones(n), np.zeros(n)
    for x in (1e-100, 1e-3, 1.0, 50.0):
        answer = chi_square_contour(weights, zeros, x)
        expected = float(log_gamma_p(0.5 * n, 0.5 * x))
        assert abs(answer.log_mass - expected) <= 1e-12 + 1e-14 * abs(expected)


def test_tails_are_scale_free():
    weights, delta = np.array([1.0, 0.3, 4.0]), np.array([0.0, 1.0, 2.0])
    one, other = chi_square_contour(weights, delta, 0.1), chi_square_contour(1e150 * weights, delta, 1e149)
    assert np.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("shape, power", [(0.5, 1.0), (0.5, 3.0), (4.0, 0.5)])
@pytest.mark.parametrize("log_x", [-600.0, -7.0, 0.0, 3.0])
def test_one_log_gamma(shape, power, log_x):
    expected = float(log_gamma_p(shape, 0.5 * np.exp(log_x / power)))
    assert abs(weighted_log_gamma([shape], [power], log_x).log_mass - expected) <= 1e-13 * (10.0 + abs(expected))


@pytest.mark.parametrize("elapsed", [0.0, 1.0, 30.0, 690.0])
def test_stages_with_closed_forms(elapsed):
    t = elapsed
    assert abs(stage_survival([0.5], t).log_mass + 0.5 * t) <= 1e-12
    erlang = -2.0 * t + np.log(1.0 + 2.0 * t + 2.0 * t**2)
    assert abs(stage_survival([2.0, 2.0, 2.0], t).log_mass - erlang) <= 1e-10
    two = -0.25 * t + np.log(2.0 - np.exp(-0.25 * t))
    assert abs(stage_survival([0.5, 0.25], t).log_mass - two) <= 1e-12
    assert abs(stage_survival([0.5], t).slope - 0.5) <= 1e-12
