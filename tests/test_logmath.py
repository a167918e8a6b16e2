"""logmath against closed forms, SciPy, and the identities that the functions must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln

from volumejax.logmath import log_ball_volume, log_mean_exp, log_sphere_area, log_sub_exp

_quick = settings(max_examples=25, deadline=None)
_logs = st.floats(-1e4, 1e4)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("dimension", [1, 2, 3, 10, 1000, 10**6, 10**9, 10**12])
@pytest.mark.parametrize("log_radius", [-3.0, 0.0, 2.0])
def test_ball_volume_matches_scipy(dimension, log_radius):
    half = 0.5 * dimension
    expected = half * np.log(np.pi) - gammaln(half + 1.0) + dimension * log_radius
    scale = half * np.log(half + 2.0) + dimension * abs(log_radius)
    assert abs(float(log_ball_volume(dimension, log_radius)) - expected) <= 1e-15 * (10.0 + 4.0 * scale)


def test_ball_volume_in_low_dimension():
    assert np.allclose(np.exp([log_ball_volume(d) for d in range(4)]), [1.0, 2.0, np.pi, 4.0 * np.pi / 3.0])
    assert np.allclose(np.exp([log_sphere_area(d) for d in (1, 2, 3)]), [2.0, 2.0 * np.pi, 4.0 * np.pi])


def test_ball_volume_of_a_point():
    assert float(log_ball_volume(3, -jnp.inf)) == -np.inf
    assert float(log_ball_volume(0, -jnp.inf)) == 0.0


@_quick
@given(st.integers(1, 10**6))
def test_volume_recurrence_and_area(dimension):
    """V_{D+2} = 2π V_D / (D+2), and the area is D V_D."""
    volume, bigger = float(log_ball_volume(dimension)), float(log_ball_volume(dimension + 2))
    tolerance = 1e-14 * (1.0 + abs(volume))
    assert abs(bigger - volume - np.log(2.0 * np.pi / (dimension + 2))) <= tolerance
    assert abs(float(log_sphere_area(dimension)) - volume - np.log(dimension)) <= tolerance


@_quick
@given(_logs, st.floats(1e-12, 100.0))
def test_sub_exp_undoes_logaddexp(b, gap):
    """e^a = (e^a − e^b) + e^b, without loss however close the two are."""
    a = b + gap
    difference = float(log_sub_exp(a, b))
    assert abs(difference - b - np.log(np.expm1(a - b))) <= 4e-16 * (abs(a) + 10.0)
    assert abs(np.logaddexp(difference, b) - a) <= 1e-15 * (abs(a) + 10.0)


def test_sub_exp_at_its_ends():
    inf = jnp.inf
    larger = jnp.array([1.0, 1.0, -inf, inf, inf, 0.0])
    smaller = jnp.array([1.0, -inf, -inf, 1.0, -inf, 1.0])
    assert np.array_equal(log_sub_exp(larger, smaller), [-inf, 1.0, -inf, inf, inf, np.nan], equal_nan=True)


@pytest.mark.parametrize("gap", [1e-6, 0.1, 0.693, 0.694, 3.0, 50.0])
def test_sub_exp_gradient(gap):
    grads = jax.grad(log_sub_exp, argnums=(0, 1))(gap, 0.0)
    assert np.allclose(grads, [-1.0 / np.expm1(-gap), -1.0 / np.expm1(gap)], rtol=1e-12)


def test_sub_exp_gradient_is_finite_where_nothing_is_subtracted():
    assert float(jax.grad(log_sub_exp)(2.0, -jnp.inf)) == 1.0


@_quick
@given(st.lists(_logs, min_size=1, max_size=20), _logs)
def test_mean_exp_is_a_mean(logs, shift):
    """Between the smallest and the largest, and equivariant under shifts."""
    mean = float(log_mean_exp(jnp.array(logs)))
    slack = 1e-15 * (10.0 + max(abs(x) for x in logs))
    assert min(logs) - slack <= mean <= max(logs) + slack
    moved = float(log_mean_exp(jnp.array(logs) + shift))
    assert abs(moved - mean - shift) <= 1e-15 * (10.0 + abs(shift) + 2.0 * max(abs(x) for x in logs))


def test_mean_exp_axis_and_zeros():
    x = jnp.log(jnp.array([[1.0, 3.0], [0.0, 0.0]]))
    assert np.allclose(log_mean_exp(x, 1), [np.log(2.0), -np.inf])
    assert np.allclose(log_mean_exp(x, 0), np.log([0.5, 1.5]))
    assert np.isclose(float(log_mean_exp(x)), 0.0)
    assert np.isnan(float(log_mean_exp(jnp.array([0.0, jnp.nan]))))


def test_mean_exp_of_nothing():
    with pytest.raises(ValueError, match="pass at least one"):
        log_mean_exp(jnp.zeros((3, 0)), 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_follows_the_argument(dtype):
    x = jnp.array([1.0, 0.5], dtype)
    assert log_mean_exp(x).dtype == log_sub_exp(x, x - 1).dtype == log_ball_volume(3, x).dtype == dtype
    assert jax.jit(log_sub_exp)(x, x - 1).dtype == dtype


def test_without_x64_everything_is_float32():
    with jax.enable_x64(False):
        assert log_ball_volume(10**12).dtype == log_sphere_area(5).dtype == jnp.float32
        assert abs(float(log_ball_volume(100)) - -91.6) < 0.01 * 91.6
