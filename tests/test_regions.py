"""Membership: the star sees walls between the anchor and a point, the connected region those on a trajectory.

Mutations these catch: only the end point looked at, one jitter for all strata, NaN taken for inside, comparison in
float32.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from volumejax.regions import Connected, Star

ANCHOR = {"x": jnp.zeros(2), "y": jnp.zeros(())}
FRACTIONS = jax.jit(Star(32).fractions)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def at(x):
    return {"x": jnp.array([x, 0.0], jnp.float32), "y": jnp.zeros(())}


def barrier(params):
    """1 for x between 0.4 and 0.6, else 0."""
    x = params["x"][0]
    return jnp.where((x > 0.4) & (x < 0.6), 1.0, 0.0)


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_one_point_in_every_stratum(seed):
    points = np.asarray(FRACTIONS(jax.random.key(seed)))
    assert points.dtype == np.float64 and points.shape == (32,)
    assert np.floor(points * 32).tolist() == list(range(32))
    assert len(np.unique(np.round(points * 32 % 1, 6))) > 16


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_points_are_uniform(seed):
    """Mutation: strata without jitter, or jitter of half their width."""
    points = jax.jit(jax.vmap(Star(4).fractions))(jax.random.split(jax.random.key(seed), 5000))
    inside = np.asarray(points) * 4 % 1
    error = np.sqrt(1 / 12 / 5000)
    assert error < 0.005 and np.all(np.abs(inside.mean(0) - 0.5) <= 4 * error)
    assert np.all(np.abs(inside.var(0) - 1 / 12) <= 4 * np.sqrt(1 / 180 / 5000))


def test_the_star_ends_at_a_barrier_and_does_not_begin_again_behind_it():
    member = jax.jit(lambda params: Star(32).contains(jax.random.key(0), barrier, ANCHOR, params, 0.5))
    assert [bool(member(at(x))) for x in (0.0, 0.3, 0.5, 0.8, 1.5, -5.0)] == [True, True, False, False, False, True]


def test_a_barrier_thinner_than_the_checks_is_found_in_proportion_to_its_width():
    """32 points over a segment of length 1, and a wall of width 1/64: half of all looks hit it."""
    wall = lambda params: jnp.where(jnp.abs(params["x"][0] - 0.507) < 1 / 128, 1.0, 0.0)
    looks = jax.vmap(lambda key: Star(32).contains(key, wall, ANCHOR, at(1.0), 0.5))
    missed = np.mean(np.asarray(jax.jit(looks)(jax.random.split(jax.random.key(0), 2000))))
    # The wall covers 3 % of stratum 15 and 47 % of stratum 16.
    low, high = (0.507 - 1 / 128) * 32, (0.507 + 1 / 128) * 32
    expected = (1 - (16 - low)) * (1 - (high - 16))
    assert abs(missed - expected) <= 4 * np.sqrt(0.25 / 2000)


def test_the_end_itself_is_checked():
    edge = lambda params: params["x"][0]
    assert Star(1).contains(jax.random.key(0), edge, ANCHOR, at(0.5), 0.5)
    assert not Star(1).contains(jax.random.key(0), edge, ANCHOR, at(0.5), 0.4999)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_outside(bad):
    assert not Connected().contains(jnp.array([0.0, bad]), 1.0)
    cost = lambda params: jnp.where(params["x"][0] > 0.9, bad, 0.0)
    assert not Star(8).contains(jax.random.key(0), cost, ANCHOR, at(1.0), 1.0)


def test_a_trajectory_is_inside_if_all_its_points_are():
    costs = jnp.array([0.0, 0.5, 0.25])
    assert Connected().contains(costs, 0.5)
    assert not Connected().contains(costs, 0.4999)
    assert Connected().contains(-costs, 0.1)


def test_costs_are_compared_with_the_cutoff_in_float64():
    """0.1 in float32 lies above 0.1, as rays have it."""
    assert not Connected().contains(jnp.array([0.1], jnp.float32), 0.1)
    assert Connected().contains(jnp.array([0.1], jnp.float32), jnp.float32(0.1))
    assert Connected().contains(jnp.array([0.5], jnp.bfloat16), 0.5)


def test_names_and_misuse():
    assert (Star().name, Connected().name) == ("star", "connected")
    with pytest.raises(ValueError, match="Star num_checks must be at least 1, got 0"):
        Star(0)
