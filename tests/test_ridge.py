"""The ridge over costs that are given, against NumPy.

Mutations these catch: a sharpness that is not over the room, a ridge not brought to the guide's height, sums not
brought to a new height, a guide's place counted, the guide's share taken for the ridge's, NaN of a ridge that has no
share let through.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

from volumejax.ridge import EYES, Climb, held, places_of, ridge_of

HEIGHTS = st.lists(st.floats(0.0, 2.0, width=32), min_size=1, max_size=9)


@given(HEIGHTS)
def test_a_ridge_is_the_largest_cost_but_for_its_sharpness(heights):
    """Of those that it sees: where segments are checked in three times as many places, each third."""
    ridge = ridge_of(0.5, 1.25, 3 * len(heights), -(-len(heights) // EYES), asks_rays=False)
    assert ridge.eyes.count >= len(heights)
    costs, eyes = np.full(3 * len(heights), 9.0, np.float32), list(ridge.eyes.listed)
    costs[eyes] = np.resize(heights, len(eyes))
    seen = costs[eyes]
    with jax.enable_x64(True):
        found = float(ridge(jnp.asarray(costs)))
    np.testing.assert_allclose(found, logsumexp(48.0 * seen.astype(np.float64)) / 48.0 / 1.25, rtol=1e-12)
    assert max(seen) / 1.25 <= found + 1e-9
    assert found <= (max(seen) + np.log(len(seen)) / 48.0) / 1.25 + 1e-9


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_climb_ends_at_the_ridge_and_its_derivative(order):
    """Whatever the order, and whatever the guide has seen between."""
    heights = np.array([0.2, 0.5, 0.45])
    ridge = ridge_of(2.4, 1.25, 3, 1, asks_rays=False)
    with jax.enable_x64(True):
        slopes = jax.grad(lambda c: ridge(c))(jnp.asarray(heights))
        climb = Climb.begun(jnp.zeros(3, jnp.float32))
        for i in order:
            for is_eye in (False, True):
                unit = jnp.zeros(3, jnp.float32).at[i].set(1.0)
                climb = climb.seeing(ridge, jnp.float64(heights[i] + (not is_eye)), unit, jnp.asarray(is_eye))
        value, slope = climb.ended(ridge)
        np.testing.assert_allclose(float(value), float(ridge(jnp.asarray(heights))), rtol=1e-12)
    np.testing.assert_allclose(slope, slopes, rtol=1e-6)
    np.testing.assert_allclose(np.sum(slope), 0.8, rtol=1e-6)
    assert slope[1] > slope[2] > slope[0] > 0.0 and float(climb.top) == 0.5


@given(st.lists(st.floats(0.0, 1.0, width=32), max_size=3))
def test_a_list_of_places_has_one_shape(numbers):
    places = places_of(numbers, 3)
    assert places.listed == tuple(np.asarray(numbers, np.float32).tolist()) and places.values.shape == (3,)
    assert np.sum(places.counts) == len(numbers) and not np.any(places.counts[len(numbers) :])


@pytest.mark.parametrize("share, expected", [(0.0, 2.0), (0.25, 3.0), (1.0, 6.0)])
def test_a_share_takes_that_much_of_the_guide(share, expected):
    assert float(held(jnp.float32(2.0), jnp.float32(6.0), jnp.float32(share))) == expected


def test_without_a_share_nobody_has_to_have_looked_at_the_ridge():
    assert float(held(jnp.float32(2.0), jnp.float32(np.nan), jnp.float32(0.0))) == 2.0
    assert held(2.0, None, jnp.float32(1.0)) == held(2.0, jnp.float32(6.0), None) == 2.0
