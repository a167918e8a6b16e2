"""The ensemble's energy, slope, membership and maps, against autodiff and NumPy.

Mutations these catch: a slope without the unit of δ, the old precision in the new energy, a stretch squared twice or
not at all, the log of the map's volume of the wrong sign, b·δ left out of the work, an image judged by its own cost
where the star asks for the segment, NaN taken for inside, float64 left on while the user's cost runs.
"""

import dataclasses

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax import tree
from volumejax.ensemble import Ensemble, Position, with_bulges
from volumejax.frames import frame_of
from volumejax.metric import fit_metric, plain_metric
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox
from volumejax.regions import Connected, Star

PARAMS = {"w": jnp.array([0.5, -0.25, 0.75]), "b": jnp.array([0.1, 0.2])}
WIDTHS = {"w": jnp.array([0.5, 2.0, 0.1]), "b": 0.3}
D = 5


def cost(params):
    away = jax.tree.map(jnp.subtract, params, PARAMS)
    w, b = away["w"], away["b"]
    return 0.5 * jnp.sum(jnp.array([1.0, 3.0, 20.0]) * w**2) + jnp.sum(b**4) + w[0] * b[1] ** 2


def barrier(params):
    """1 nat high half way to the point (1, 0), next to nothing elsewhere."""
    return 0.01 * jnp.sum(params**2) + jnp.exp(-200.0 * jnp.sum((params - jnp.array([0.5, 0.0])) ** 2))


def number(x):
    with jax.enable_x64(True):
        return jnp.float64(x)


def ensemble_of(cost, prior, params, cutoff, region=Connected()):  # noqa: B008 - frozen and stateless
    ensemble = Ensemble(cost, frame_of(prior, params), number(cutoff), region, False)
    return with_bulges(ensemble, [0.7]) if isinstance(region, Star) else ensemble


def position_at(ensemble, displacement):
    value = ensemble.value(displacement)
    return Position(displacement, value, ensemble.reach(displacement, value), ensemble.no_virials)


@pytest.fixture(scope="module")
def gaussian():
    return ensemble_of(cost, Gaussian(WIDTHS, {"w": 0.0, "b": 0.1}), PARAMS, 50.0)


@pytest.fixture(scope="module")
def displacement():
    return tree.normal_like(jax.random.key(3), PARAMS)


@eqx.filter_jit
def carry(ensemble, position, log_stretch, *where):
    """Along the map that stretches all coordinates alike."""
    gain = jnp.expm1(log_stretch).astype(jnp.float32)
    gains = jax.tree.map(lambda x: jnp.full(x.shape, gain), position.displacement)
    return ensemble.carry(position, plain_metric(position.displacement, turns=True), gains, None, *where)


def test_the_slope_is_the_gradient_in_whitened_coordinates(gaussian, displacement):
    (value, *_), slope = gaussian.slope(displacement, jnp.float32(0.0))
    composed = lambda d: cost(gaussian.frame.params(d))
    expected = jax.grad(composed)(displacement)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), slope, expected)
    assert {x.dtype for x in jax.tree.leaves(slope)} == {jnp.dtype("float32")}
    assert value.dtype == jnp.float64 and float(value) == float(gaussian.value(displacement))
    assert gaussian.dimension == D


def test_the_cost_runs_in_the_callers_precision():
    seen = []

    def spy(params):
        seen.append((jax.config.jax_enable_x64, params["w"].dtype))
        return cost(params)

    ensemble = ensemble_of(spy, Gaussian(1.0), PARAMS, 1.0)
    with jax.enable_x64(True):
        ensemble.value(PARAMS)
        ensemble.slope(PARAMS, jnp.float32(0.0))
    assert set(seen) == {(False, jnp.dtype("float32"))}


def test_the_potential_by_hand(gaussian, displacement):
    d = np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(displacement)])
    b = np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(gaussian.frame.pull)])
    value = float(gaussian.value(displacement))
    expected = 7.0 * value + 0.5 * 3.0 * d @ d + b @ d
    actual = gaussian.potential(position_at(gaussian, displacement), number(3.0), number(7.0))
    assert actual.dtype == jnp.float64 and np.isclose(float(actual), expected, rtol=1e-12)


@pytest.mark.parametrize("log_stretch", [0.2, -0.3, 0.0])
def test_the_work_is_the_change_of_energy_less_the_volume(gaussian, displacement, log_stretch):
    here, there = (number(5.0), number(0.4)), (number(3.5), number(0.6))
    start = position_at(gaussian, displacement)
    image, work = carry(gaussian, start, number(log_stretch), here, there)
    factor = np.float64(np.float32(np.exp(log_stretch)))
    expected = (
        float(gaussian.potential(position_at(gaussian, image.displacement), *there))
        - float(gaussian.potential(start, *here))
        - D * np.log(factor)
    )
    assert abs(float(work) - expected) < 1e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, factor * y, rtol=1e-6), image.displacement, displacement)
    assert np.isclose(float(image.cost), float(gaussian.value(image.displacement)), rtol=1e-6)


def test_the_way_back_costs_the_opposite(gaussian, displacement):
    here, there = (number(5.0), number(0.4)), (number(3.5), number(0.6))
    image, work = carry(gaussian, position_at(gaussian, displacement), number(0.25), here, there)
    back, undone = carry(gaussian, image, number(-0.25), there, here)
    assert abs(float(work) + float(undone)) < 1e-4 and abs(float(work)) > 0.1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back.displacement, displacement)


def test_the_map_of_a_turned_metric_changes_volume_as_its_work_says(displacement):
    """Against the determinant of the map by autodiff, each coordinate of the turned frame having its own factor."""
    ensemble = ensemble_of(cost, Gaussian(WIDTHS), PARAMS, 1e6)
    draw = np.random.default_rng(0).normal
    slopes = [(np.asarray(x) * draw(size=(60, *x.shape))).astype(np.float32) for x in jax.tree.leaves(PARAMS)]
    metric = fit_metric(slopes, np.ones(60), 1.0, turns=True)
    gains = jax.tree.map(lambda x: jnp.linspace(-0.2, 0.3, x.size).reshape(x.shape), PARAMS)
    shift = jax.tree.map(lambda g: 0.1 + 0.5 * g, gains)
    same = (number(2.0), number(0.7))
    start = position_at(ensemble, displacement)
    image, work = eqx.filter_jit(lambda p: ensemble.carry(p, metric, gains, shift, same, same))(start)
    vector, unravel = jax.flatten_util.ravel_pytree(displacement)

    def mapped(v):
        moved = ensemble.carry(position_at(ensemble, unravel(v)), metric, gains, shift, same, same)[0].displacement
        return jax.flatten_util.ravel_pytree(moved)[0]

    log_volume = np.linalg.slogdet(np.asarray(jax.jacfwd(mapped)(vector), np.float64))[1]
    energy = float(ensemble.potential(position_at(ensemble, image.displacement), *same)) - float(
        ensemble.potential(start, *same)
    )
    assert abs(float(work) - (energy - log_volume)) < 1e-5 and abs(log_volume) > 0.1


def test_softness_has_mean_one_in_each_leaf_and_is_one_for_the_star():
    masses = {"w": jnp.array([1.0, 2.0, 4.0]), "b": jnp.array([3.0, 3.0])}
    soft = ensemble_of(cost, Gaussian(1.0), PARAMS, 1.0).softness(masses)
    np.testing.assert_allclose(soft["w"], np.array([4.0, 2.0, 1.0]) * 3.0 / 7.0, rtol=1e-6)
    np.testing.assert_allclose(soft["b"], 1.0)
    star = ensemble_of(cost, Gaussian(1.0), PARAMS, 1.0, Star()).softness(masses)
    assert all(np.all(np.asarray(x) == 1.0) for x in jax.tree.leaves(star))


def test_an_image_beyond_the_cutoff_has_no_weight(displacement):
    start = float(ensemble_of(cost, Gaussian(1.0), PARAMS, 1.0).value(displacement))
    ensemble = ensemble_of(cost, Gaussian(1.0), PARAMS, 1.2 * start)
    position, same = position_at(ensemble, displacement), (number(1.0), number(1.0))
    assert np.isfinite(float(carry(ensemble, position, number(0.01), same, same)[1]))
    image, work = carry(ensemble, position, number(0.5), same, same)
    assert float(work) == np.inf and float(image.cost) > 1.2 * start


def test_an_image_beyond_the_box_has_no_weight():
    ensemble = ensemble_of(cost, UniformBox(-2.0, 2.0), PARAMS, 1e6)
    high = ensemble.frame.walls.high
    near = jax.tree.map(jnp.zeros_like, PARAMS)
    near["b"] = 0.9 * high["b"]
    position, same = position_at(ensemble, near), (number(1.0), number(1.0))
    assert np.isfinite(float(carry(ensemble, position, number(np.log(1.1)), same, same)[1]))
    assert float(carry(ensemble, position, number(np.log(1.2)), same, same)[1]) == np.inf


def test_the_star_sees_a_barrier_on_the_way_and_the_connected_region_does_not():
    point, anchor = jnp.array([1.0, 0.0]), jnp.zeros(2)
    aside = jnp.array([0.0, 1.0])
    star, connected = (ensemble_of(barrier, Gaussian(1.0), anchor, 0.5, region) for region in (Star(8), Connected()))
    for ensemble, blocked in ((star, True), (connected, False)):
        beyond, free = position_at(ensemble, point), position_at(ensemble, aside)
        guide = np.mean([float(barrier(t * point)) for t in ensemble.guides])
        assert np.isclose(float(beyond.cost), guide, rtol=1e-4)
        assert np.isclose(float(beyond.reach), 1.0025 if blocked else 0.01, rtol=1e-4)
        assert bool(ensemble.permits(beyond.reach, point)) is not blocked
        assert np.isclose(float(free.reach), 0.01, rtol=1e-4) and ensemble.permits(free.reach, aside)
    # From half of the way an image lands behind the barrier.
    same, start = (number(1.0), number(1.0)), jnp.array([0.3, 0.0])
    works = [float(carry(e, position_at(e, start), number(np.log(3.0)), same, same)[1]) for e in (star, connected)]
    assert works[0] == np.inf and np.isfinite(works[1])


def test_the_guide_of_the_star_is_the_mean_cost_at_two_points():
    steep = lambda x: jnp.sum(x**4)
    star, connected = (
        ensemble_of(steep, Gaussian(2.0), jnp.zeros(2), 0.5, region) for region in (Star(8), Connected())
    )
    point = jnp.array([1.0, -0.5])
    ratio = 0.5 * (1.0 + 0.7**4)
    ((value, *_), slope), ((own, *_), own_slope) = (e.slope(point, jnp.float32(0.0)) for e in (star, connected))
    assert np.isclose(float(star.value(point)), float(value), rtol=1e-6)
    assert np.isclose(float(value), ratio * float(own), rtol=1e-6)
    np.testing.assert_allclose(slope, ratio * own_slope, rtol=1e-6)
    assert np.isclose(float(connected.value(point)), float(own), rtol=1e-6)


def ridged(checks=16, share=0.5, sharpness=3.0):
    """A star whose cost has a hump on the way along the first axis, and the NumPy twin of its ridge."""
    hump = lambda x: jnp.sum(x**2) + 2.0 * jnp.exp(-8.0 * jnp.sum((x - jnp.array([0.4, 0.0])) ** 2))
    star = ensemble_of(hump, Gaussian(1.0), jnp.zeros(2), 50.0, Star(checks))
    ridge = dataclasses.replace(star.ridge, share=number(share), sharpness=number(sharpness))
    star = dataclasses.replace(star, ridge=ridge)

    def by_hand(point):
        costs = np.array([float(hump(t * point)) for t in star.eyes], np.float64)
        return share / sharpness * np.log(np.sum(np.exp(sharpness * costs))), np.max(costs)

    return star, by_hand


@pytest.mark.parametrize("checks, eyes", [(32, 8), (16, 8), (10, 8), (4, 4), (1, 1)])
def test_the_ridge_is_a_smooth_maximum_over_some_of_the_checked_points(checks, eyes):
    star, by_hand = ridged(checks)
    assert len(star.eyes) == eyes and star.eyes[-1] == 1.0
    assert np.all(np.diff([0.0, *star.eyes]) <= 1.0 / eyes + 1.0 / checks)
    point = jnp.array([1.1, -0.3])
    seen, slope = star.slope(point, jnp.float32(0.0), number(1.0))
    np.testing.assert_allclose([float(seen.ridge), float(seen.top)], by_hand(point), rtol=1e-6)
    step = 1e-2 * jnp.array([0.6, 0.8])
    rise = by_hand(point + step)[0] - by_hand(point - step)[0]
    np.testing.assert_allclose(rise, 2.0 * float(slope @ step), rtol=2e-3)
    # And what a look at the whole segment says of it.
    np.testing.assert_allclose(float(star.position(point).ridge), float(seen.ridge), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_ridge_takes_its_share_of_the_slope(share):
    star, by_hand = ridged()
    point = jnp.array([1.1, -0.3])
    (_, whole), (_, steep) = (star.slope(point, jnp.float32(0.0), number(s)) for s in (0.0, 1.0))
    seen, slope = eqx.filter_jit(lambda s: star.slope(point, jnp.float32(0.0), s))(number(share))
    np.testing.assert_allclose(slope, (1.0 - share) * whole + share * steep, rtol=1e-6)
    guide = np.mean([float(star.cost(t * point)) for t in star.guides])
    ridge, top = by_hand(point) if share else (np.nan, guide)
    np.testing.assert_allclose([seen.cost, seen.top, seen.ridge], [guide, top, ridge], rtol=1e-6)


def test_the_work_of_a_ridge_that_rises():
    """Where nothing moves it is βs' (ridge − guide) less the same for s; a map leaves the ridge unknown."""
    star, by_hand = ridged()
    point, state = jnp.array([0.9, 0.2]), (number(1.0), number(4.0))
    start = star.position(point)
    image, work = carry(star, start, number(0.0), state, state, (number(0.25), number(0.75)))
    expected = 4.0 * 0.5 * (by_hand(point)[0] - float(start.cost))
    np.testing.assert_allclose(float(work), expected, rtol=1e-5)
    assert float(image.ridge) == float(start.ridge) and abs(expected) > 0.1
    moved, _ = carry(star, start, number(0.1), state, state, (number(0.0), number(0.0)))
    assert np.isnan(float(moved.ridge))
    np.testing.assert_allclose(float(star.looked(moved).ridge), by_hand(moved.displacement)[0], rtol=1e-6)


def test_the_reach_includes_the_point_itself():
    steep = ensemble_of(lambda x: jnp.sum(x**4), Gaussian(1.0), jnp.zeros(2), 0.5, Star(4))
    point = jnp.array([1.0, 0.0])
    assert float(position_at(steep, point).reach) == 1.0
    alone = ensemble_of(lambda x: jnp.sum(x**4), Gaussian(1.0), jnp.zeros(2), 0.5, Star(1))
    assert float(position_at(alone, point).reach) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_outside(bad):
    broken = lambda x: jnp.where(jnp.abs(jnp.sum(x) - 0.5) < 0.2, bad, 0.0 * jnp.sum(x))
    star, connected = (
        ensemble_of(broken, Gaussian(1.0), jnp.zeros(1), 0.5, region) for region in (Star(8), Connected())
    )
    here = jnp.array([0.5])
    assert not connected.permits(connected.value(here), here)
    assert connected.permits(number(0.5), here) and not connected.permits(number(0.5001), here)
    if not bad < 0:  # The largest cost on a segment does not see what is below all others.
        assert float(position_at(star, jnp.array([1.0])).reach) == np.inf
    assert float(position_at(connected, here).reach) == (np.inf if np.isnan(bad) else bad)


@pytest.mark.parametrize(
    ("prior", "leaves", "size", "may"),
    [
        (Gaussian(1.0), 2, 20, True), (Gaussian(1.0), 1, 20, False), (Gaussian(1.0), 2, 1000, False),
        (UniformBox(-2.0, 2.0), 2, 20, True), (UniformBall(9.0), 3, 20, True), (Lebesgue(), 2, 20, False),
    ],
)  # fmt: skip
def test_leaves_change_their_scales_where_there_are_several_of_a_few_numbers_that_a_prior_holds(
    prior, leaves, size, may
):
    params = {str(i): jnp.full(size // leaves + (i < size % leaves), 0.1) for i in range(leaves)}
    ensemble = Ensemble(lambda w: jnp.sum(w["0"] ** 2), frame_of(prior, params), number(1.0), Connected(), False)
    assert ensemble.dimension == size and ensemble.rescales == may
