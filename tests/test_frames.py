"""Whitened coordinates: the density they claim, normalisers against quadrature, draws against their laws, supports.

Mutations these catch: σ² for σ, a pull of the wrong sign, the unit's log counted once for a leaf instead of once for a
coordinate, the half in b²/2a, the walls of another leaf, a truncated normal clipped instead of drawn, √a for a.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import integrate, stats

from volumejax import tree
from volumejax.frames import frame_of
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox

PARAMS = {"w": jnp.linspace(-0.9, 0.8, 6).reshape(2, 3), "b": jnp.array([0.5, -0.25, 0.0]), "s": jnp.array(0.3)}
WIDTHS = {"w": jnp.linspace(0.2, 1.7, 6).reshape(2, 3), "b": jnp.array([3.0, 0.05, 0.5]), "s": 0.4}
OFFSET = {"w": jnp.full((2, 3), 0.1), "b": jnp.array([0.0, -0.2, 0.7]), "s": -0.6}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
D = tree.size(PARAMS)
GAUSSIANS = {
    "scalar": Gaussian(0.5),
    "per leaf": Gaussian({"w": 0.5, "b": 2.0, "s": 0.1}),
    "per parameter": Gaussian(WIDTHS),
    "around the anchor": Gaussian(WIDTHS, PARAMS),
    "around a tree": Gaussian(0.7, OFFSET),
}
BOXES = {
    "box": UniformBox(-1.0, 1.5),
    "box per leaf": UniformBox({"w": -1.0, "b": -0.5, "s": 0.25}, jax.tree.map(lambda x: x + 0.125, PARAMS)),
    "box with the anchor in a corner": UniformBox(PARAMS, jax.tree.map(lambda x: x + 0.5, PARAMS)),
}
BALLS = {"ball": UniformBall(3.0), "ball around a tree": UniformBall(2.5, OFFSET)}
PRIORS = {**GAUSSIANS, **BOXES, **BALLS, "lebesgue": Lebesgue()}


def number(x):
    with jax.enable_x64(True):
        return jnp.float64(x)


def scaled(factor, values):
    return jax.tree.map(lambda x: factor * x, values)


def flat(values, like=PARAMS):
    """All coordinates of a tree whose leaves may be scalars, float64."""
    parts = jax.tree.map(lambda v, x: np.broadcast_to(np.asarray(v, np.float64), x.shape).ravel(), values, like)
    return np.concatenate(jax.tree.leaves(parts))


def claimed_density(frame, displacement):
    """Of δ: offset − ½ stiffness|δ|² − b·δ, in NumPy."""
    d = flat(displacement)
    b = np.zeros(len(d)) if frame.pull is None else flat(frame.pull)
    return float(frame.offset) - 0.5 * frame.stiffness * d @ d - b @ d


def true_density(prior, frame, displacement):
    """Of the parameters there, times the volume of a unit of δ."""
    return float(prior.log_density(frame.params(displacement))) + float(np.sum(np.log(flat(frame.scale))))


@pytest.mark.parametrize("name", PRIORS)
def test_the_prior_is_the_quadratic_that_the_frame_claims(name):
    prior, frame = PRIORS[name], frame_of(PRIORS[name], PARAMS)
    checked = 0
    for seed in range(6):
        d = scaled(0.1, tree.normal_like(jax.random.key(seed), PARAMS))
        # Upwards where the anchor lies in the lower corner.
        d = jax.tree.map(jnp.abs, d) if "corner" in name else d
        if not np.isfinite(float(prior.log_density(frame.params(d)))):
            assert not frame.supports(d)
            continue
        assert frame.supports(d)
        checked += 1
        # The parameters are rounded to float32, in units of the narrowest prior.
        assert abs(true_density(prior, frame, d) - claimed_density(frame, d)) < 2e-4
    assert checked >= 2


@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussian_coordinates_are_whitened(name):
    frame = frame_of(GAUSSIANS[name], PARAMS)
    assert frame.stiffness == 1.0
    np.testing.assert_allclose(
        flat(frame.scale), flat(tree.broadcast_to(GAUSSIANS[name].sigma, PARAMS, "sigma")), rtol=1e-7
    )
    d = tree.normal_like(jax.random.key(0), PARAMS)
    np.testing.assert_allclose(float(frame.pulled(d)), flat(frame.pull) @ flat(d), rtol=1e-12, atol=1e-12)
    assert frame.pulled(d).dtype == jnp.float64


def test_flat_priors_are_measured_in_the_anchors_rms_or_their_own_width():
    rms = np.sqrt(np.mean(flat(PARAMS) ** 2))
    for prior in (BOXES["box"], BALLS["ball"], Lebesgue()):
        frame = frame_of(prior, PARAMS)
        np.testing.assert_allclose(flat(frame.scale), rms, rtol=1e-6)
        assert frame.stiffness == 0.0 and frame.pull is None
        assert float(frame.pulled(PARAMS)) == 0.0
    widths = flat(frame_of(UniformBox({"w": -1.0, "b": -3.0, "s": -1.0}, 1.0), ZEROS).scale)
    np.testing.assert_allclose(widths, (7 * 2.0 + 3 * 4.0) / D / np.sqrt(12), rtol=1e-6)
    np.testing.assert_allclose(flat(frame_of(UniformBall(3.0), ZEROS).scale), 3.0 / np.sqrt(D), rtol=1e-6)
    np.testing.assert_allclose(flat(frame_of(Lebesgue(), ZEROS).scale), 1.0)


def test_the_dtype_of_the_anchor_is_kept():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    frame = frame_of(Gaussian(1.0), params)
    moved = frame.params(tree.normal_like(jax.random.key(0), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((frame.scale, frame.pull))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("sigma", "mean"), [(0.1, None), (0.0362, None), (0.3, 0.1)])
def test_the_whole_prior_has_mass_one_in_many_dimensions(sigma, mean):
    """Mutation: σ or the pull exact in the density and rounded in the frame, 0.01 to 0.05 nats in these cases."""
    params = jnp.full(1_000_000, 0.05)
    frame = frame_of(Gaussian(sigma, None if mean is None else jnp.full(1_000_000, mean)), params)
    with jax.enable_x64(True):
        assert abs(float(frame.log_reference(jnp.float64(1.0)) + frame.offset)) < 1e-6


@pytest.mark.parametrize("precision", [1.0, 2e4])
@pytest.mark.parametrize("name", ["per parameter", "around a tree", "box per leaf", "box with the anchor in a corner"])
def test_the_reference_integrates_to_its_normaliser(name, precision):
    frame = frame_of(PRIORS[name], PARAMS)
    b = np.zeros(D) if frame.pull is None else flat(frame.pull)
    low, high = (
        (np.full(D, -np.inf), np.full(D, np.inf))
        if frame.walls is None
        else (flat(frame.walls.low), flat(frame.walls.high))
    )
    total = 0.0
    for i in range(D):
        mode, width = -b[i] / precision, 1 / np.sqrt(precision)
        top = 0.5 * b[i] ** 2 / precision
        density = lambda d, b=b[i], top=top: np.exp(-0.5 * precision * d * d - b * d - top)
        ends = max(low[i], mode - 12 * width), min(high[i], mode + 12 * width)
        total += top + np.log(integrate.quad(density, *ends, epsabs=0.0, epsrel=1e-11, limit=200)[0])
    assert abs(float(frame.log_reference(number(precision))) - total) < 1e-8 * max(1.0, abs(total))


def test_a_corner_halves_each_direction():
    free, corner = (frame_of(prior, PARAMS) for prior in (Lebesgue(), BOXES["box with the anchor in a corner"]))
    drop = float(corner.log_reference(number(1e4))) - float(free.log_reference(number(1e4)))
    assert abs(drop + D * np.log(2.0)) < 1e-9


def test_a_ball_and_a_flat_measure_take_the_whole_gaussian():
    for prior in (Lebesgue(), UniformBall(2.5, OFFSET)):
        value = float(frame_of(prior, PARAMS).log_reference(number(3.0)))
        assert np.isclose(value, 0.5 * D * np.log(2 * np.pi / 3.0), rtol=1e-14)


@pytest.mark.parametrize("name", ["around a tree", "lebesgue", "box per leaf", "box with the anchor in a corner"])
def test_draws_follow_the_reference(name):
    """Mean and variance in each coordinate, over three seeds; walls within about a standard deviation."""
    frame, precision, count = frame_of(PRIORS[name], PARAMS), 4.0, 4000
    b = np.zeros(D) if frame.pull is None else flat(frame.pull)
    sd = 1 / np.sqrt(precision)
    if frame.walls is None:
        law = stats.norm(-b / precision, sd)
    else:
        law = stats.truncnorm(flat(frame.walls.low) / sd, flat(frame.walls.high) / sd, scale=sd)
    a = number(precision)
    sample = jax.jit(
        jax.vmap(lambda key: jnp.concatenate([x.ravel() for x in jax.tree.leaves(frame.draw_reference(key, a))]))
    )
    for seed in range(3):
        draws = np.asarray(sample(jax.random.split(jax.random.key(seed), count)), np.float64)
        assert np.all(np.abs(draws.mean(0) - law.mean()) <= 4 * law.std() / np.sqrt(count))
        fourth = np.mean((draws - draws.mean(0)) ** 4, axis=0)
        error = np.sqrt((fourth - law.var() ** 2) / count)
        assert np.all(np.abs(draws.var(0) - law.var()) <= 4 * error) and np.all(error < 0.05 * law.var())
        # Coordinates are independent, those of different leaves too.
        correlation = np.corrcoef(draws.T) - np.eye(D)
        assert np.max(np.abs(correlation)) < 5 / np.sqrt(count)


@pytest.mark.parametrize("name", ["box per leaf", "box with the anchor in a corner"])
def test_draws_stay_between_the_walls(name):
    frame = frame_of(BOXES[name], PARAMS)
    draw = jax.jit(jax.vmap(frame.draw_reference, (0, None)))
    keys = jax.random.split(jax.random.key(0), 500)
    for precision in (0.01, 4.0, 1e4):
        drawn = draw(keys, number(precision))
        assert np.all(jax.vmap(frame.supports)(drawn))
        assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", [*BOXES, *BALLS])
def test_the_support_is_that_of_the_prior(name):
    prior, frame = PRIORS[name], frame_of(PRIORS[name], PARAMS)
    answers = []
    for seed in range(12):
        d = scaled(3.0 ** (seed % 4 - 2), tree.normal_like(jax.random.key(seed), PARAMS))
        d = jax.tree.map(jnp.abs, d) if "corner" in name else d
        inside = bool(frame.supports(d))
        assert inside == np.isfinite(float(prior.log_density(frame.params(d))))
        answers.append(inside)
    assert {True, False} == set(answers)
    assert frame.supports(ZEROS)


def test_each_leaf_can_leave_the_box_alone():
    frame = frame_of(BOXES["box"], PARAMS)
    for name in PARAMS:
        for side, within in ((1.0, 0.999), (-1.0, 0.999)):
            wall = (frame.walls.high if side > 0 else frame.walls.low)[name]
            assert frame.supports({**ZEROS, name: within * wall})
            assert not frame.supports({**ZEROS, name: 1.001 * wall})


@pytest.mark.parametrize("prior", [GAUSSIANS["around a tree"], Lebesgue()], ids=["gaussian", "lebesgue"])
def test_unbounded_priors_support_every_point(prior):
    frame = frame_of(prior, PARAMS)
    assert frame.supports(jax.tree.map(lambda x: x + 1e6, PARAMS))


# Few shapes in many orders: each new one is compiled.
SHAPES = st.lists(st.sampled_from([(), (3,), (2, 1, 2)]), min_size=1, max_size=4)


@hypothesis.settings(max_examples=5)
@hypothesis.given(SHAPES, st.sampled_from(["gaussian", "box", "ball", "lebesgue"]), st.floats(0.2, 5.0))
def test_trees_of_any_shape(shapes, kind, width):
    params = [
        jnp.asarray(0.1 * np.cos(np.arange(i, i + np.prod(s))).reshape(s), jnp.float32) for i, s in enumerate(shapes)
    ]
    size = tree.size(params)
    prior = {
        "gaussian": Gaussian(width),
        "box": UniformBox(-width - 0.5, width),
        "ball": UniformBall(width + np.sqrt(size)),
        "lebesgue": Lebesgue(),
    }[kind]
    frame = frame_of(prior, params)
    d = jax.tree.map(lambda z: 0.01 * z, tree.normal_like(jax.random.key(size), params))
    x = flat(d, params)
    b = np.zeros(size) if frame.pull is None else flat(frame.pull, params)
    claimed = float(frame.offset) - 0.5 * frame.stiffness * x @ x - b @ x
    true = float(prior.log_density(frame.params(d))) + float(np.sum(np.log(flat(frame.scale, params))))
    hypothesis.assume(np.isfinite(true))
    assert abs(true - claimed) < 1e-4
    assert jax.tree.map(jnp.shape, frame.params(d)) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, frame.draw_reference(jax.random.key(0), number(3.0))) == jax.tree.map(
        jnp.shape, params
    )


def test_an_unknown_prior():
    with pytest.raises(ValueError, match=r"no whitened coordinates are known for a prior of type Mixture; use vj"):

        class Mixture:
            def log_density(self, _):
                return jnp.zeros(())

        frame_of(Mixture(), PARAMS)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_a_point_may_be_taken_as_far_as_the_support_goes(prior, seed):
    frame = frame_of(prior, PARAMS)
    point = tree.normal_like(jax.random.key(seed), PARAMS)
    furthest = float(frame.exit(point))
    assert np.isinf(float(frame.exit(ZEROS)))
    if frame.walls is None and frame.ball is None:
        assert np.isinf(furthest)
        return
    at = lambda share: bool(frame.supports(jax.tree.map(lambda d: jnp.float32(share * furthest) * d, point)))
    # From a corner nearly all ways lead out.
    assert at(0.9999) and (furthest == 0.0 or not at(1.0001))
