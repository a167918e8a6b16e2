"""Journeys along a ladder: what does not depend on how they are cut, and what the records say.

Mutations these catch: keys that count visits from the start of a call, a chain's key by its place in the batch, an
image outside taken, a step onto the wrong neighbour, the work of the way back looked up at the rung itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.annealing import MOST_VISITS, TABLE, Record, begin, pad, set_out, slopes
from volumejax.ensemble import FIELDS, Ensemble, Rung, ensemble_of, with_ridge
from volumejax.frames import frame_of
from volumejax.metric import plain_metric
from volumejax.priors import Gaussian
from volumejax.regions import Connected, Star

PARAMS = {"w": jnp.array([0.5, -0.25]), "b": jnp.float32(0.1)}
CHAINS, LEVELS = 6, 8
HALF_WAY = np.array([0.0, *np.full(LEVELS - 2, 0.12), 0.0])


def cost(params):
    away = jax.tree.map(jnp.subtract, params, PARAMS)
    return 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * away["w"] ** 2) + 2.0 * away["b"] ** 4


def ladder():
    with jax.enable_x64(True):
        precision = jnp.exp(jnp.clip(3.0 - 0.5 * (jnp.arange(LEVELS, dtype=jnp.float64) - 1.0), 0.0, 3.0))
        ones = jnp.ones(LEVELS, jnp.float64)
        rungs = Rung(
            precision=precision, beta=2.0 * ones.at[0].set(0.0), masses=jnp.stack([precision, precision], axis=1),
            step_size=0.4 * ones, spread=0.2 * ones, num_steps=jnp.full(LEVELS, 3, jnp.int32),
            num_moves=jnp.full(LEVELS, 2, jnp.int32).at[0].set(0),
            stretch=np.outer(HALF_WAY, [1.0, 1.0] + 2 * (FIELDS - 1) * [0.0]),
        )  # fmt: skip
    return jax.tree.map(np.asarray, rungs)


@pytest.fixture(scope="module")
def journey():
    """The ensemble, a table and starts, and a way to send them along a route."""
    with jax.enable_x64(True):
        ensemble = Ensemble(cost, frame_of(Gaussian(0.7), PARAMS), jnp.float64(0.35), Connected(), False)
        precision = jnp.float64(np.exp(3.0))
    table, metric = pad(ladder()), plain_metric(PARAMS, turns=True)
    start = begin(ensemble, jax.random.key(1), precision, jnp.arange(CHAINS, dtype=jnp.int32), None)

    def send(route, *, positions=start, first=0, batch_size=None, seed=2):
        sent = set_out(ensemble, metric, jax.random.key(seed), positions, table, route, first, batch_size)
        return sent.ends, sent.record()

    return ensemble, start, send


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def flat(values):
    """All coordinates of each chain, float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(values)], axis=1)


ROUTE = [0, 1, 2, 3, 3, 2, 1]


def test_a_journey_does_not_depend_on_how_it_is_cut(journey):
    _, _, send = journey
    whole_end, whole = send(ROUTE)
    middle, one = send(ROUTE[:3])
    end, two = send(ROUTE[2:], positions=middle, first=2)
    assert same(end, whole_end)
    assert same(Record(*(np.concatenate(pair) for pair in zip(one, two, strict=True))), whole)
    # Not because nothing is drawn: another first visit is another journey.
    assert not same(send(ROUTE[2:], positions=middle, first=3)[0], whole_end)


@pytest.mark.slow
def test_a_journey_does_not_depend_on_the_batch(journey):
    _, _, send = journey
    whole_end, whole = send(ROUTE)
    end, log = send(ROUTE, batch_size=4)
    for x, y in zip(*map(jax.tree.leaves, ((end, log), (whole_end, whole))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert np.array_equal(log.inside, whole.inside) and np.array_equal(log.bounces, whole.bounces)


def test_chains_are_independent_of_each_other(journey):
    """A chain's journey is that of its number, whoever comes along."""
    _, start, send = journey
    end, _ = send(ROUTE)
    others = jax.tree.map(lambda x: x.at[1:].set(0.5 * x[1:]) if x.dtype == jnp.float32 else x, start)
    other_end, _ = send(ROUTE, positions=others)
    first = lambda position: jax.tree.map(lambda x: np.asarray(x)[0], position)
    assert same(first(end), first(other_end))
    assert not same(end, other_end)
    assert not same(end, send(ROUTE, seed=3)[0])


def test_records_are_of_the_rungs_visited(journey):
    ensemble, start, send = journey
    _, log = send(ROUTE)
    assert log.cost.shape == (len(ROUTE) - 1, CHAINS) and log.leaf_squares.shape == (len(ROUTE) - 1, CHAINS, 2)
    assert all(part.dtype == (bool if name == "permitted" else np.float64) for name, part in log._asdict().items())
    assert log.permitted.all()
    np.testing.assert_allclose(log.leaf_squares.sum(-1), log.square, rtol=1e-12)
    assert np.all(log.cost <= 0.35) and np.all(log.reach == log.cost)
    assert not log.non_finite.any() and np.all((log.acceptance >= 0) & (log.acceptance <= 1))
    # Rung 0 moves nothing: the first record is of the start itself.
    np.testing.assert_allclose(log.cost[0], start.cost, rtol=1e-12)
    assert not log.acceptance[0].any() and np.all(log.acceptance[1:].mean(1) > 0.2)
    pulled = np.sum(flat(start.displacement) * flat(jax.tree.map(lambda b: b[None], ensemble.frame.pull)), axis=1)
    np.testing.assert_allclose(log.pulled[0], pulled, rtol=1e-10)


def test_the_ridge_and_the_ray_are_known_where_the_ensemble_has_one(journey):
    """Chains come from an ensemble without a ridge, and go back to it; they need not move."""
    plain, start, send = journey
    usual = send(ROUTE)[1]
    assert np.isnan(usual.ridge).all() and np.isnan(usual.ray_end).all() and np.isnan(usual.ray_costs).all()
    anchor = jnp.zeros(3)
    plain = ensemble_of(lambda x: jnp.sum(x**2), frame_of(Gaussian(1.0), anchor), cutoff=50.0, region=Star(8))
    star = with_ridge(plain, 0.0, 1.5)
    rungs = dataclasses.replace(
        jax.tree.map(lambda x: x[:3], ladder()),
        precision=np.ones(3),
        num_moves=np.zeros(3, np.int32),
        beta=np.full(3, 4.0),
        masses=np.ones((3, 1)),
        stretch=np.zeros((3, FIELDS)),
        ridge=np.array([0.0, 0.25, 1.0]),
    )
    key, metric = jax.random.key(5), plain_metric(anchor, turns=True)
    with jax.enable_x64(True):
        start = begin(plain, key, jnp.float64(3.0), jnp.arange(CHAINS, dtype=jnp.int32), None)
    for batch_size in (None, 2):
        sent = set_out(star, metric, key, start, pad(rungs), [0, 1, 2, 2], 0, batch_size)
        log = sent.record()
        ends = jax.vmap(star.position)(sent.ends.displacement)
        np.testing.assert_allclose(log.ridge, np.repeat(np.asarray(ends.ridge)[None], 3, axis=0), rtol=1e-6)
        rise = 4.0 * (log.ridge - log.cost)
        np.testing.assert_allclose(log.work_down[:2], [0.25 * rise[0], 0.75 * rise[1]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log.work_up[1:], [-0.25 * rise[1], -0.75 * rise[2]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log.ray_costs[..., -1], log.ray_end**2 * log.square, rtol=1e-5)
        np.testing.assert_allclose(log.ray_costs[..., -1], 50.0, rtol=1e-5)
    back = set_out(plain, metric, key, sent.ends, pad(dataclasses.replace(rungs, ridge=None)), [0, 1], 0, None)
    assert back.ends.ridge is None and np.isnan(back.record().ridge).all()


def test_works_by_hand(journey):
    """A step without a stretch from the reference: the cost is switched on."""
    _, start, send = journey
    _, log = send([0, 0])
    np.testing.assert_allclose(log.work_down[0], 2.0 * np.asarray(start.cost), rtol=1e-12)
    rungs = ladder()
    _, log = send([1, 1])
    here, there = rungs.precision[1:3]
    factor = np.exp(HALF_WAY[1])
    image_energy = 0.5 * (there * factor**2 - here) * log.square[0] + (factor - 1.0) * log.pulled[0]
    rest = log.work_down[0] - image_energy + 3 * HALF_WAY[1]
    kept = np.isfinite(rest)
    assert kept.sum() >= 3
    # What is left is the change of the cost, which is between quadratic and quartic.
    ratio = 1.0 + rest[kept] / (2.0 * log.cost[0][kept])
    assert np.all((ratio > factor**2 * (1 - 1e-5)) & (ratio < factor**4 * (1 + 1e-5)))
    # The way back to the reference only takes the cost away: no stretch lies there, and the precision is the same.
    np.testing.assert_allclose(log.work_up[0], -2.0 * log.cost[0], rtol=1e-12)


def test_a_step_on_stretches_and_a_step_back_shrinks(journey):
    ensemble, start, send = journey
    down, log = send([2, 3])
    back, again = send([3, 2], positions=down, first=5)
    d = lambda p: np.asarray(p.displacement["w"])
    moved = np.isfinite(log.work_down[0])
    assert moved.sum() >= 3 and np.all(d(down)[moved] != d(start)[moved])
    # A visit moves first and then looks, so that its record is of where the step set out.
    factor = np.exp(np.float32(HALF_WAY[2]))
    value = jax.vmap(lambda x: ensemble.value(x))(down.displacement)
    np.testing.assert_allclose(np.asarray(down.cost), np.asarray(value), rtol=1e-6)
    squares = np.sum(flat(down.displacement) ** 2, axis=1)
    np.testing.assert_allclose(squares[moved], factor**2 * log.square[0][moved], rtol=1e-5)
    squares = np.sum(flat(back.displacement) ** 2, axis=1)
    np.testing.assert_allclose(squares, again.square[0] / factor**2, rtol=1e-5)


def sliding(slide, freely=0.0, *, cost=lambda p: 0.0 * jnp.sum(p["w"])):
    """Records on the way down and up again between two rungs where nothing moves but by the maps, and where it ends."""
    with jax.enable_x64(True):
        ensemble = Ensemble(cost, frame_of(Gaussian(0.7), PARAMS), jnp.float64(1e6), Connected(), False)
    rungs = ladder()
    half = 0.5 * np.log(rungs.precision[2] / rungs.precision[3])
    rungs = dataclasses.replace(
        rungs,
        num_moves=np.zeros(LEVELS, np.int32),
        stretch=half * np.tile(np.repeat([1.0, 0.0, slide, freely], 2), (LEVELS, 1)),
    )
    with jax.enable_x64(True):
        precision = jnp.float64(rungs.precision[2])
    start = begin(ensemble, jax.random.key(4), precision, jnp.arange(40, dtype=jnp.int32), None)
    sent = set_out(
        ensemble, plain_metric(PARAMS, turns=True), jax.random.key(0), start, pad(rungs), [2, 3, 2, 2], 0, None
    )
    return start, sent.ends, sent.record()


@pytest.mark.usefixtures("few_slide")
def test_free_chains_that_slide_along_the_pull_do_the_same_work_everywhere():
    """The Gaussian about −b/a goes over into that about −b/a', which a stretch about the anchor alone misses."""
    _, _, log = sliding(1.0)
    _, _, freely = sliding(0.0, 1.0)
    _, _, still = sliding(0.0)
    assert np.std(log.work_down[0]) < 1e-5 and np.std(freely.work_down[0]) < 1e-5 and np.std(still.work_down[0]) > 0.05


@pytest.mark.usefixtures("few_slide")
def test_a_chain_that_slides_back_is_where_it_was():
    bowl = lambda p: jnp.sum(p["w"] ** 2) + p["b"] ** 2
    start, end, log = sliding(0.8, 0.5, cost=bowl)
    np.testing.assert_allclose(log.work_up[1], -log.work_down[0], atol=1e-4)
    for x, y in zip(jax.tree.leaves(end.displacement), jax.tree.leaves(start.displacement), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    np.testing.assert_allclose(log.cost[2], log.cost[0], rtol=1e-5)
    assert np.min(np.abs(log.cost[1] / log.cost[0] - 1.0)) > 1e-4


def test_a_chain_whose_image_is_outside_stays_inside(journey):
    """At the last rungs the wall is near: the work is infinite there, and the chain remains."""
    _, _, send = journey
    positions, log = send([0, 1, 2, 3, 4, 5, 6, 7])
    misses = 0
    for first in range(7, 47, 4):
        route = [7, 6, 5, 6, 7]
        positions, log = send(route, positions=positions, first=first)
        misses += np.sum(np.isposinf(log.work_down[2:]))
        assert np.all(np.asarray(positions.cost) <= 0.35) and np.all(log.cost <= 0.35)
    assert misses > 0


@pytest.mark.parametrize("batch_size", [None, 4])
def test_slopes_are_gradients_in_whitened_coordinates(journey, batch_size):
    ensemble, start, _ = journey
    found = dict(zip(sorted(PARAMS), slopes(ensemble, start, batch_size), strict=True))
    for i in range(CHAINS):
        d = {name: np.asarray(value)[i] for name, value in start.displacement.items()}
        np.testing.assert_allclose(found["w"][i], [0.49 * d["w"][0], 4 * 0.49 * d["w"][1]], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found["b"][i], 8.0 * 0.7**4 * d["b"] ** 3, rtol=1e-3, atol=1e-7)


def test_starts_are_drawn_by_number(journey):
    ensemble, start, _ = journey
    with jax.enable_x64(True):
        precision = jnp.float64(np.exp(3.0))
    others = begin(ensemble, jax.random.key(1), precision, jnp.arange(2, 2 + CHAINS, dtype=jnp.int32), None)
    assert np.array_equal(others.displacement["w"][:-2], start.displacement["w"][2:])
    expected = ensemble.frame.draw_reference(jax.random.fold_in(jax.random.key(1), 3), precision)
    np.testing.assert_allclose(start.displacement["w"][3], expected["w"], rtol=1e-6)
    assert np.all(np.isnan(start.virials))


def test_tables_are_filled_up_with_the_last_rung():
    rungs = ladder()
    table = pad(rungs)
    assert table.precision.shape == (TABLE,) and table.masses.shape == (TABLE, 2)
    assert table.precision.dtype == jnp.float64 and table.num_steps.dtype == jnp.int32
    np.testing.assert_array_equal(table.precision[:LEVELS], rungs.precision)
    assert np.all(np.asarray(table.precision)[LEVELS:] == rungs.precision[-1])
    longer = pad(jax.tree.map(lambda x: np.repeat(x, TABLE // LEVELS, axis=0), rungs))
    assert len(longer.precision) > TABLE


@pytest.mark.parametrize("visits", [0, MOST_VISITS + 1])
def test_routes_that_are_too_short_or_too_long(journey, visits):
    _, _, send = journey
    with pytest.raises(ValueError, match=f"between 1 and {MOST_VISITS} visits, got {visits}"):
        send([0] * (visits + 1))
