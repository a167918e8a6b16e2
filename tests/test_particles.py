"""Particles drawn, weighed and drawn anew, one part at a time; `test_temper` has the whole.

Mutations these catch: draws not in proportion to the weights, a particle of weight zero drawn, islands that share
draws, a weight lost or counted twice where particles are drawn anew, squares averaged over the wrong axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volumejax import particles
from volumejax.annealing import pad
from volumejax.ensemble import Ensemble
from volumejax.frames import frame_of
from volumejax.metric import plain_metric
from volumejax.particles import Ladder, descend, mean_squares, populate
from volumejax.priors import Gaussian
from volumejax.regions import Connected

LIKE = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
ISLANDS = jnp.arange(3, dtype=jnp.int32)


def cost(params):
    return 0.5 * (jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2))


@pytest.fixture(scope="module")
def ensemble():
    with jax.enable_x64(True):
        frame, infinity = frame_of(Gaussian(1.0), LIKE), jnp.asarray(jnp.inf, jnp.float64)
        return Ensemble(cost=cost, frame=frame, cutoff=infinity, region=Connected(), callers_x64=False)


@pytest.fixture(scope="module")
def swarm(ensemble):
    return populate(ensemble, jax.random.key(0), ISLANDS, 64, 64, None)


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.floats(-30.0, 700.0), st.just(-np.inf)), min_size=2, max_size=50),
    st.floats(0.0, 1.0, exclude_max=True, width=32),
)
def test_draws_are_in_proportion_to_the_weights(log_weight, lot):
    x = np.array(log_weight)
    with jax.enable_x64(True):
        drawn = np.asarray(particles._systematic(jnp.asarray(x), jnp.float32(lot)))
    found = np.bincount(drawn, minlength=len(x))
    if not np.any(np.isfinite(x)):
        assert np.array_equal(drawn, np.arange(len(x))), "an island that has died out keeps its particles"
        return
    weight = np.exp(x - np.max(x))
    expected = len(x) * weight / weight.sum()
    assert np.all(np.abs(found - expected) < 1.0 + 1e-6)
    assert not np.any(found[weight == 0.0])


def test_islands_and_batches(ensemble, swarm):
    """A particle depends on its island's number and its own alone."""
    alone = populate(ensemble, jax.random.key(0), ISLANDS[1:2], 64, 16, None)
    for all_of_them, one in zip(jax.tree.leaves(swarm), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(all_of_them[1], one[0])
    w = np.asarray(swarm.position.displacement["w"]).reshape(3, -1)
    assert np.all(np.abs(np.corrcoef(w) - np.eye(3)) < 4 / np.sqrt(w.shape[1]))


def test_mean_squares(swarm):
    squares = mean_squares(swarm)
    assert squares.dtype == np.float64
    for at, leaf in enumerate(jax.tree.leaves(swarm.position.displacement)):
        expected = np.mean(np.asarray(leaf, np.float64) ** 2, axis=tuple(range(1, leaf.ndim)))
        np.testing.assert_allclose(squares[:, at], expected, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 30.0])
def test_what_a_draw_puts_aside_is_what_it_takes(ensemble, swarm, beta):
    """Σ of the weights is the same before and after, whether the particles are drawn anew (β = 30) or not."""
    ladder = pad(Ladder(np.array([0.0, beta]), np.array([0.1, 0.1]), np.ones((2, 2))))
    spans = (jnp.int32(1), jnp.int32(1), jnp.int32(2))
    metric = plain_metric(LIKE, turns=True)
    moved, visit = descend(ensemble, metric, jax.random.key(1), swarm, ladder, *spans, ISLANDS, 64, None)
    before = np.log(np.mean(np.exp(-beta * np.asarray(swarm.position.cost)), axis=1))
    after = np.asarray(moved.log_norm) + np.log(np.mean(np.exp(np.asarray(moved.log_weight)), axis=1))
    np.testing.assert_allclose(after, before, rtol=1e-9)
    assert np.all((np.asarray(visit.ess)[0] < 0.5) == (beta == 30.0))
    assert np.all((np.asarray(moved.log_norm) == 0.0) == (beta == 0.1))
    assert np.all(np.asarray(visit.acceptance)[0] > 0.5)
    gone = jax.tree.map(lambda x, y: np.mean(np.asarray(x) == np.asarray(y)), moved.position, swarm.position)
    assert gone.displacement["w"] < 0.5, "they move"
