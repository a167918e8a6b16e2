"""The ridge over costs that are given, against NumPy.

Mutations these catch: a sharpness that is not over the room, a ridge not brought to the guide's height, a slope of
another function, the guide's share taken for the ridge's, NaN of a ridge that has no share let through.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

from volumejax.ridge import Ridge, held, ridge_above

HEIGHTS = st.lists(st.floats(0.0, 2.0, width=32), min_size=1, max_size=9)


def ridge_of(share, sharpness):
    with jax.enable_x64(True):
        return Ridge(jnp.float64(share), jnp.float64(sharpness))


@given(HEIGHTS)
def test_a_ridge_is_the_largest_cost_but_for_its_sharpness(heights):
    costs, ridge = np.array(heights, np.float32), ridge_above(0.5, 1.25)
    with jax.enable_x64(True):
        found = float(ridge(jnp.asarray(costs)))
    np.testing.assert_allclose(found, logsumexp(48.0 * costs.astype(np.float64)) / 48.0 / 1.25, rtol=1e-12)
    assert max(heights) / 1.25 <= found + 1e-9
    assert found <= (max(heights) + np.log(len(heights)) / 48.0) / 1.25 + 1e-9


def test_the_slope_is_the_derivative_by_each_cost():
    costs, ridge = np.array([0.2, 0.5, 0.45]), ridge_of(0.8, 10.0)
    with jax.enable_x64(True):
        found = np.asarray(ridge.slope(jnp.asarray(costs)))
        np.testing.assert_allclose(found, jax.grad(ridge)(jnp.asarray(costs)), rtol=1e-12)
    np.testing.assert_allclose(np.sum(found), 0.8, rtol=1e-12)
    assert found[1] > found[2] > found[0] > 0.0


@pytest.mark.parametrize("share, expected", [(0.0, 2.0), (0.25, 3.0), (1.0, 6.0)])
def test_a_share_takes_that_much_of_the_guide(share, expected):
    assert float(held(jnp.float32(2.0), jnp.float32(6.0), jnp.float32(share))) == expected


def test_without_a_share_nobody_has_to_have_looked_at_the_ridge():
    assert float(held(jnp.float32(2.0), jnp.float32(np.nan), jnp.float32(0.0))) == 2.0
    assert held(2.0, None, jnp.float32(1.0)) == held(2.0, jnp.float32(6.0), None) == 2.0
