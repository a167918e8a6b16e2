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
    """Chains come from an ensemble whose ridge has no height, and go back to it; they need not move."""
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
    again = back.record()
    assert np.isnan(again.ray_end).all() and again.ray_costs.shape == log.ray_costs[:1].shape
    np.testing.assert_allclose(again.work_down[0], 0.0, atol=1e-12)


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
    moved = ~np.isclose(np.sum(flat(down.displacement) ** 2, axis=1), log.square[0], rtol=1e-6)
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


def test_each_chain_changes_its_leaves_scales_by_draws_of_its_own():
    """Trajectories stand still. Mutations: the visit's key for all chains, the move's own left out, one leaf alone."""
    with jax.enable_x64(True):
        frame = frame_of(Gaussian(0.7), PARAMS)
        ensemble = Ensemble(lambda p: 0.0 * jnp.sum(p["w"]), frame, jnp.float64(1e6), Connected(), False)
        precision = jnp.float64(1.0)
    rungs = dataclasses.replace(ladder(), precision=np.ones(LEVELS), step_size=np.full(LEVELS, 1e-9))
    start = begin(ensemble, jax.random.key(4), precision, jnp.arange(60, dtype=jnp.int32), None)

    def scales(positions):
        d = positions.displacement
        first = [np.ravel(PARAMS[name])[0] + 0.7 * np.asarray(d[name]).reshape(60, -1)[:, 0] for name in PARAMS]
        return [np.log(np.abs(x)) for x in first]

    found = []
    for moves in (1, 2):
        table = pad(dataclasses.replace(rungs, num_moves=np.full(LEVELS, moves, np.int32)))
        sent = set_out(ensemble, plain_metric(PARAMS, turns=True), jax.random.key(0), start, table, [2, 2], 0, None)
        changes = [after - before for before, after in zip(scales(start), scales(sent.ends), strict=True)]
        np.testing.assert_allclose(changes[0], -changes[1], atol=1e-4)
        found.append(np.round(changes[0], 3))
    moved = found[0] != 0.0
    assert 0.3 < moved.mean() < 1.0 and len(np.unique(found[0][moved])) > 0.8 * moved.sum()
    assert np.mean(found[1] != found[0]) > 0.3 and np.mean(found[1] == 2.0 * found[0]) < 0.8


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


BALL, PRECISIONS, DRAWS = 0.5, np.array([6.0, 2.0]), 6000
"""The cost is half the square of the distance: a unit ball, under a flat prior and two tethers."""


def in_ball(precision, seed):
    """Exact draws from exp(-(precision + 1) r^2/2) in the unit ball, and the log of its integral."""
    r = np.linspace(0.0, 1.0, 20_001)
    middle = 0.5 * (r[1:] + r[:-1])
    shell = 4.0 * np.pi * middle**2 * np.exp(-0.5 * (precision + 1.0) * middle**2) / 20_000
    rng = np.random.default_rng(seed)
    ways = rng.normal(size=(DRAWS, 3))
    radii = np.interp(rng.uniform(size=DRAWS), np.append(0.0, np.cumsum(shell) / np.sum(shell)), r)
    return radii[:, None] * ways / np.linalg.norm(ways, axis=1, keepdims=True), np.log(np.sum(shell))


def stepped(draws, route, region, share):
    """Take chains that stand at `draws` a step along `route`, by `share` of the map that free ones would want."""
    anchor = {"w": jnp.zeros(3)}
    ensemble = ensemble_of(
        lambda p: 0.5 * jnp.sum(p["w"] ** 2), frame_of(Gaussian(1.0), anchor), cutoff=BALL, region=region
    )
    ones, half = np.ones(2), 0.5 * np.log(PRECISIONS[0] / PRECISIONS[1])
    rungs = Rung(
        precision=PRECISIONS, beta=ones, masses=np.ones((2, 1)), step_size=ones, spread=0.0 * ones,
        num_steps=np.ones(2, np.int32), num_moves=np.zeros(2, np.int32),
        stretch=np.outer([share * half, 0.0], np.eye(FIELDS)[0]),
    )  # fmt: skip
    start = jax.vmap(ensemble.position)({"w": jnp.asarray(draws, jnp.float32)})
    sent = set_out(ensemble, plain_metric(anchor, turns=True), jax.random.key(5), start, pad(rungs), route, 0, None)
    return np.asarray(sent.ends.displacement["w"], np.float64), sent.record()


@pytest.mark.parametrize("region", [Connected(), Star(num_checks=4)])
def test_works_at_the_wall_tell_the_ratio_of_the_masses(region):
    """A third of the chains stand where the map leads outside: those that stay share their place with images."""
    (down, whole), (up, part) = in_ball(PRECISIONS[0], 0), in_ball(PRECISIONS[1], 1)
    for works, answer in (
        (stepped(down, [0, 1], region, 1.0)[1].work_down[0], part - whole),
        (stepped(up, [1, 0], region, 1.0)[1].work_up[0], whole - part),
    ):
        ratios = np.exp(-works)
        assert abs(np.mean(ratios) - np.exp(answer)) < 4.0 * np.std(ratios) / np.sqrt(DRAWS)
        assert np.all(np.isfinite(works))


def test_chains_next_to_the_wall_stay_where_they_are():
    """On the way down all those whose image is outside; on the way up half of the outermost, as a coin decides."""
    (down, _), (up, _) = in_ball(PRECISIONS[0], 0), in_ball(PRECISIONS[1], 1)
    factor = np.sqrt(PRECISIONS[0] / PRECISIONS[1])
    end, log = stepped(down, [0, 1], Connected(), 1.0)
    length = np.linalg.norm(down, axis=1)
    outside = factor * length > 1.0
    assert 0.2 < np.mean(outside) < 0.5
    np.testing.assert_allclose(end, np.where(outside, 1.0, factor)[:, None] * down, rtol=1e-5)
    assert np.linalg.norm(end, axis=1).max() <= 1.0
    stays = 0.5 * (PRECISIONS[1] - PRECISIONS[0]) * length**2 + np.log(2.0)
    np.testing.assert_allclose(log.work_down[0, outside], stays[outside], rtol=1e-5, atol=1e-6)
    end, log = stepped(up, [1, 0], Connected(), 1.0)
    length = np.linalg.norm(up, axis=1)
    outermost, stayed = factor * length > 1.0, np.linalg.norm(end - up, axis=1) < 1e-5 * length
    assert not np.any(stayed & ~outermost) and abs(np.mean(stayed[outermost]) - 0.5) < 0.04
    np.testing.assert_allclose(end, np.where(stayed, 1.0, 1.0 / factor)[:, None] * up, rtol=1e-5)
    # The two works of an image are one, but for a chain that may have stayed.
    there, ahead = stepped(down[~outside], [0, 1], Connected(), 1.0)
    _, back = stepped(there, [1, 0], Connected(), 1.0)
    came = np.abs(back.work_up[0] + ahead.work_down[0]) < 1e-3
    assert np.all(came | (factor * np.linalg.norm(there, axis=1) > 1.0)) and np.mean(came) > 0.6


def test_chains_that_go_up_and_down_next_to_the_wall_stay_inside(journey):
    """At the last rungs the wall is near: no work is infinite there, and no chain leaves."""
    _, _, send = journey
    positions, _ = send([0, 1, 2, 3, 4, 5, 6, 7])
    for first in range(7, 47, 4):
        positions, log = send([7, 6, 5, 6, 7], positions=positions, first=first)
        assert np.all(np.isfinite(log.work_down[2:]))
        assert np.all(np.asarray(positions.cost) <= 0.35) and np.all(log.cost <= 0.35)


def test_a_chain_that_is_outside_has_no_weight_unless_it_comes_in():
    far = 1.5 * np.eye(3)
    _, log = stepped(far, [0, 1], Connected(), 0.0)
    assert np.all(np.isposinf(log.work_down)) and not log.permitted.any()


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
