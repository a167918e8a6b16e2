"""What works answer to maps: against covariances of exact draws, and the shares that follow from it.

Mutations these catch: a field's own derivative left out or the prior's pull, a toll or β counted twice, cost and tether
interchanged, leaves that answer for each other lost, shares of what no chain can tell, slides where none are wanted.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.ensemble import FIELDS, Ensemble
from volumejax.frames import frame_of
from volumejax.metric import plain_metric
from volumejax.priors import Gaussian
from volumejax.regions import Connected
from volumejax.response import flat_shares, respond

PRECISION, BETA, DRAWS = 2.0, 3.0, 20_000
SIZES = (6, 14)


class Coupled(eqx.Module):
    """½ (Σ h δ² + (r·δ)²) about the anchor."""

    anchor: jax.Array
    curvature: jax.Array
    direction: jax.Array

    def __call__(self, params):
        d = jnp.concatenate([params["a"], params["b"]]) - self.anchor
        return 0.5 * jnp.sum(self.curvature * d**2) + 0.5 * (self.direction @ d) ** 2


def split(flat):
    return {"a": flat[..., : SIZES[0]], "b": flat[..., SIZES[0] :]}


def question(curvature, direction):
    rng = np.random.default_rng(3)
    anchor = rng.normal(size=sum(SIZES)).astype(np.float32)
    cost = Coupled(*(jnp.asarray(x, jnp.float32) for x in (anchor, curvature, direction)))
    params = jax.tree.map(jnp.asarray, split(anchor))
    with jax.enable_x64(True):
        ensemble = Ensemble(cost, frame_of(Gaussian(1.0), params), jnp.float64(1e9), Connected(), False)
    metric = plain_metric(params, turns=True)
    leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(split(np.asarray(curvature)))]
    return ensemble, eqx.tree_at(lambda m: m.curvature, metric, leaves)


def answers(ensemble, metric, places):
    numbers = [jnp.asarray(x, jnp.float32) for x in ([1.0, 1.0], PRECISION, BETA)]
    positions = jax.vmap(ensemble.position)(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), split(places)))
    return jax.tree.map(np.asarray, respond(ensemble, metric, positions, *numbers, 500))


def drawn(ensemble, curvature, direction):
    """Exact draws of δ, and X, βE and the B of each field, computed here."""
    whole = PRECISION * np.eye(len(curvature)) + BETA * (np.diag(curvature) + np.outer(direction, direction))
    pull = np.concatenate([np.asarray(b) for b in jax.tree.leaves(ensemble.frame.pull)]).astype(float)
    factor = np.linalg.cholesky(np.linalg.inv(whole))
    d = np.random.default_rng(0).normal(size=(DRAWS, len(curvature))) @ factor.T - np.linalg.solve(whole, pull)
    force = d @ whole + pull
    means = PRECISION + 0.1 + BETA * curvature
    shares = PRECISION / (PRECISION + BETA * curvature)
    soft = np.concatenate([(1 / m) / np.mean(1 / m) for m in np.split(means, SIZES[:1])])
    fields = (d, soft * d, *(np.broadcast_to(-pull * w / PRECISION, d.shape) for w in (shares**2, 1.0)))
    parts = [
        np.sum(part, axis=1) - divergence
        for field, divergences in zip(fields, (np.ones_like(soft), soft, 0.0 * soft, 0.0 * soft), strict=True)
        for part, divergence in zip(
            np.split(field * force, SIZES[:1], axis=1),
            (np.sum(x) for x in np.split(divergences, SIZES[:1])),
            strict=True,
        )
    ]
    energy = 0.5 * BETA * (d**2 @ curvature + (d @ direction) ** 2)
    return d, np.stack(parts, axis=1), 0.5 * PRECISION * np.sum(d**2, axis=1), energy


@pytest.mark.usefixtures("few_slide")
def test_responses_are_the_covariances_of_the_works():
    rng = np.random.default_rng(1)
    curvature, direction = rng.uniform(0.0, 4.0, sum(SIZES)), 0.4 * rng.normal(size=sum(SIZES))
    ensemble, metric = question(curvature, direction)
    d, b, x, energy = drawn(ensemble, curvature, direction)
    found = answers(ensemble, metric, d[:2000])

    def check(values, first, second):
        products = (first - first.mean(axis=0)) * (second - second.mean(axis=0))
        mean, error = products.mean(axis=0), products.std(axis=0) / np.sqrt(DRAWS)
        spread = values.std(axis=0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(axis=0) - mean) < 4.5 * np.hypot(error, spread) + 1e-4 * np.abs(mean))

    for j in range(b.shape[1]):
        check(found.gram[:, j], b[:, j : j + 1], b)
    check(found.tether, b, x[:, None])
    check(found.cost, b, energy[:, None])


@pytest.mark.usefixtures("few_slide")
def test_the_shares_of_a_quadratic():
    """Leaves of curvatures 0 and 2: the free one is stretched and slides as a whole, the other by a/(a + βh)."""
    curvature = np.repeat([0.0, 2.0], SIZES)
    ensemble, metric = question(curvature, np.zeros(sum(SIZES)))
    found = answers(ensemble, metric, drawn(ensemble, curvature, np.zeros(sum(SIZES)))[0][:400])
    stiff = PRECISION / (PRECISION + 2.0 * BETA)
    shares = flat_shares(found.gram, found.tether).reshape(FIELDS, 2)
    np.testing.assert_allclose(shares[0] + shares[1], [1.0, stiff], atol=0.03)
    # The mean −b/(a + βh) moves back by bw²/a per unit of log a, of which the stretch does a half.
    np.testing.assert_allclose(shares[2] + np.array([1.0, stiff**-2]) * shares[3], [1.0, 1.0], atol=0.1)
    of_cost = flat_shares(found.gram, found.cost, slides=False).reshape(FIELDS, 2)
    np.testing.assert_allclose(of_cost[0] + of_cost[1], [0.0, 1.0 - stiff], atol=0.1)
    assert np.all(of_cost[2:] == 0.0)


def test_leaves_part_as_far_as_they_are_told_apart():
    """½ Σ p B of a covariance that is given is found again, but for what it does not tell."""
    rng = np.random.default_rng(0)
    count = 2 * FIELDS
    factor = np.diag([100.0, 3.0, 80.0, 2.0, 10.0, 1.0, 5.0, 4.0]) @ (
        np.eye(count) + 0.2 * rng.normal(size=(count, count))
    )
    gram, wanted = factor @ factor.T, np.array([1.2, -0.4, 0.1, 0.5, 1.0, 3.0, 0.3, -0.2])
    np.testing.assert_allclose(flat_shares(gram[None], gram[None] @ wanted / 2.0), wanted, atol=0.05)
    # Softness that is the same everywhere makes two fields one, and rounding must not make much of it.
    same = np.kron(np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.1, 0.1], [0.0, 0.0, 0.1, 0.1]]),
                   np.diag([100.0, 50.0]))  # fmt: skip
    blurred = same + 1e-4 * np.sqrt(np.outer(np.diag(same), np.diag(same))) * rng.normal(size=same.shape)
    slope = same @ np.repeat([0.6, 0.0, 1.0, 0.0], 2) / 2.0
    shares = flat_shares(blurred[None], slope[None]).reshape(FIELDS, 2)
    np.testing.assert_allclose(shares[0] + shares[1], [0.6, 0.6], atol=0.01)
    np.testing.assert_allclose(shares[2] + shares[3], [1.0, 1.0], atol=0.01)
    assert np.all(np.abs(shares) < 1.5)


def test_leaves_do_not_part_by_chance():
    """Four chains that differ as much as they will say nothing of any single leaf; the shares of all are left."""
    apart, naive = [], []
    for seed in range(40):
        noise = 0.3 * np.random.default_rng(seed).normal(size=(4, 2 * FIELDS))
        gram = np.diag(np.repeat([10.0, 10.0, 10.0, 10.0], 2))
        slopes = np.repeat([3.0, 0.0, 5.0, 0.0], 2) + 10.0 * noise
        shares = flat_shares(np.tile(gram, (4, 1, 1)), slopes).reshape(FIELDS, 2)
        apart.append(abs(shares[0, 0] - shares[0, 1]))
        naive.append(0.2 * abs(np.diff(slopes.mean(axis=0)[:2])[0]))
    assert np.mean(apart) < 0.5 * np.mean(naive)


def test_what_no_chain_knows_stays_where_it_is():
    gram, slope = np.diag(np.repeat([4.0, 4.0, 1.0, 0.0], 2)), np.repeat([1.0, 1.0, 0.5, 0.0], 2)
    grams, slopes = np.tile(gram, (3, 1, 1)), np.tile(slope, (3, 1))
    whole = flat_shares(grams, slopes)
    assert np.all(np.isfinite(whole)) and whole[0] > 0.0 and np.all(whole[6:] == 0.0)
    grams[1, 2, 2], slopes[2, 0] = np.nan, np.inf
    np.testing.assert_allclose(flat_shares(grams, slopes), flat_shares(gram[None], slope[None]))
    assert np.all(flat_shares(np.full((2, 8, 8), np.nan), np.full((2, 8), np.nan)) == 0.0)
