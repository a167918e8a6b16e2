"""Priors: the line against the density it claims, exits by bisection, draws against their laws, densities that
integrate to one.

Mutations these catch: sigma² for sigma, the mean dropped or of the wrong sign, a slope without the anchor's distance,
the far wall or the far side of the sphere taken for the near one, u for u^(1/D) in the ball, one key for all leaves of
the box.
"""

import decimal

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from volumejax import tree
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox

PARAMS = {"w": jnp.linspace(-0.9, 0.8, 6).reshape(2, 3), "b": jnp.array([0.5, -0.25, 0.0]), "s": jnp.array(0.3)}
WIDTHS = {"w": jnp.linspace(0.2, 1.7, 6).reshape(2, 3), "b": jnp.array([3.0, 0.01, 0.5]), "s": 0.4}
OFFSET = {"w": jnp.full((2, 3), 0.1), "b": jnp.array([0.0, -0.2, 0.7]), "s": -0.6}
GAUSSIANS = {
    "scalar": Gaussian(0.5),
    "per leaf": Gaussian({"w": 0.5, "b": 2.0, "s": 0.1}),
    "per parameter": Gaussian(WIDTHS),
    "around the anchor": Gaussian(WIDTHS, PARAMS),
    "around a tree": Gaussian(0.7, OFFSET),
}
BOUNDED = {
    "box": UniformBox(-1.0, 1.5),
    "box per leaf": UniformBox({"w": -1.0, "b": -0.5, "s": 0.25}, jax.tree.map(lambda x: x + 0.125, PARAMS)),
    "ball": UniformBall(3.0),
    "ball around a tree": UniformBall(2.5, OFFSET),
}
PRIORS = {**GAUSSIANS, **BOUNDED, "lebesgue": Lebesgue()}
DIRECTIONS = [tree.normal_like(jax.random.key(i), PARAMS) for i in range(3)]
DIRECTIONS[2] = {**DIRECTIONS[2], "b": jnp.zeros(3)}


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@eqx.filter_jit
def densities(prior, params, direction, distances):
    wide = lambda x: x.astype(jnp.float64)
    point = lambda s: jax.tree.map(lambda x, y: wide(x) + s * wide(y), params, direction)
    return jax.vmap(lambda s: prior.log_density(point(s)))(distances)


def density_along(prior, params, direction, distances):
    """log π(params + s·direction) at up to six float64 distances, straight from `log_density`."""
    padded = np.zeros(6)
    padded[: len(distances)] = distances
    with jax.enable_x64(True):
        return np.asarray(densities(prior, params, direction, jnp.asarray(padded)))[: len(distances)]


LINE = eqx.filter_jit(lambda prior, params, direction: prior.line(params, direction))


def line_of(prior, params, direction):
    line = LINE(prior, params, direction)
    assert all(leaf.dtype == jnp.float64 and leaf.shape == () for leaf in jax.tree.leaves(line))
    return jax.tree.map(float, line)


@pytest.mark.parametrize("name", PRIORS)
def test_the_line_is_the_density(name):
    prior = PRIORS[name]
    for direction in DIRECTIONS[:: len(DIRECTIONS) - 1]:
        line = line_of(prior, PARAMS, direction)
        end = min(line.exit, 7.0)
        s = end * np.array([0.0, 0.01, 0.1, 0.3, 0.7, 1 - 1e-9])
        claimed = line.log_density + line.slope * s - 0.5 * line.curvature * s**2
        np.testing.assert_allclose(density_along(prior, PARAMS, direction, s), claimed, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", PRIORS)
def test_curvature_and_anchor_term_agree_with_precision_and_density(name):
    prior, direction = PRIORS[name], DIRECTIONS[0]
    line = line_of(prior, PARAMS, direction)
    precision = prior.precision(PARAMS)
    assert jax.tree.map(jnp.shape, precision) == jax.tree.map(jnp.shape, PARAMS)
    square = sum(
        np.sum(np.asarray(p) * np.asarray(y, np.float64) ** 2)
        for p, y in zip(*map(jax.tree.leaves, (precision, direction)), strict=False)
    )
    assert np.isclose(line.curvature, square, rtol=1e-6, atol=0)
    if name in GAUSSIANS:
        centre = jax.tree.map(lambda d, x: x - jnp.asarray(d, x.dtype), prior.displacement(PARAMS), PARAMS)
        drop = float(prior.log_density(PARAMS)) - float(prior.log_density(centre))
        assert np.isclose(float(prior.anchor_term(PARAMS)), drop, rtol=1e-6, atol=1e-6)
    else:
        assert float(prior.anchor_term(PARAMS)) == 0.0


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=["0", "1", "partly zero"])
def test_exits_are_where_bisection_finds_them(name, direction):
    prior = BOUNDED[name]
    inside = lambda s: np.isfinite(density_along(prior, PARAMS, direction, [s])[0])
    low, high = 0.0, 1e3
    assert inside(low) and not inside(high)
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if inside(middle) else (low, middle)
    assert np.isclose(line_of(prior, PARAMS, direction).exit, low, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [*GAUSSIANS, "lebesgue"])
def test_what_is_unbounded_has_no_exit(name):
    assert line_of(PRIORS[name], PARAMS, DIRECTIONS[0]).exit == np.inf
    assert PRIORS[name].proper == (name != "lebesgue")


def test_exit_next_to_the_wall():
    edge = {"x": jnp.array([1.0 - 2.0**-24, 0.0])}
    outwards, inwards = {"x": jnp.array([1.0, 0.0])}, {"x": jnp.array([-2.0, 0.0])}
    for prior in (UniformBall(1.0), UniformBox(-1.0, 1.0)):
        assert np.isclose(line_of(prior, edge, outwards).exit, 2.0**-24, rtol=1e-14, atol=0)
        assert np.isclose(line_of(prior, edge, inwards).exit, 1.0 - 2.0**-25, rtol=1e-15, atol=0)
        assert line_of(prior, {"x": jnp.array([1.0, 0.0])}, outwards).exit == 0.0


def test_exit_next_to_the_sphere_does_not_cancel():
    """Mutation: (√(b² + ac) − b)/a loses seven digits here."""
    first = 2458 / 2**12  # few digits, so that the squares are exact in float64
    x, y = np.float32([first, np.floor(np.sqrt(1 - first**2) * 2**24) / 2**24]), np.float32([0.7, 0.3])
    u, v = ([decimal.Decimal(float(component)) for component in vector] for vector in (x, y))
    a, b, c = v[0] ** 2 + v[1] ** 2, u[0] * v[0] + u[1] * v[1], u[0] ** 2 + u[1] ** 2 - 1
    truth = float(((b * b - a * c).sqrt() - b) / a)
    assert 0 < truth < 1e-6
    assert np.isclose(line_of(UniformBall(1.0), x, y).exit, truth, rtol=1e-14, atol=0)


FOUR = hnp.arrays(np.float32, 4, elements=st.floats(-0.875, 0.875, width=32))
BOX, BALL = UniformBox(-1.0, 1.25), UniformBall(2.0)


@hypothesis.given(FOUR, FOUR)
def test_the_exit_lies_on_the_boundary(x, y):
    hypothesis.assume(np.abs(y).max() > 1e-3)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    box, ball = (line_of(prior, x, y).exit for prior in (BOX, BALL))
    at = wide_x + box * wide_y
    assert np.isclose(max((at - 1.25).max(), (-1.0 - at).max()), 0.0, atol=1e-14 * (1 + box))
    assert np.isclose(np.sum((wide_x + ball * wide_y) ** 2), 4.0, rtol=1e-13)
    assert box > 0.0 and ball > 0.0


@hypothesis.given(
    FOUR, FOUR, FOUR, hnp.arrays(np.float32, 4, elements=st.floats(2.0**-7, 8.0, width=32)), st.floats(0.0, 5.0)
)
def test_gaussian_lines_agree_with_scipy(x, y, mean, sigma, s):
    line = line_of(Gaussian(sigma, mean), x, y)
    claimed = line.log_density + line.slope * s - 0.5 * line.curvature * s * s
    x, y, mean, sigma = (v.astype(np.float64) for v in (x, y, mean, sigma))
    scale = 1.0 + np.sum(((np.abs(x) + s * np.abs(y) + np.abs(mean)) / sigma) ** 2)
    assert abs(claimed - stats.norm(mean, sigma).logpdf(x + s * y).sum()) <= 1e-14 * scale


LIKE = {"a": jnp.zeros(2), "b": jnp.zeros(())}
CENTRE = {"a": jnp.array([1.0, -2.0]), "b": 0.5}
DRAWS = 20_000


SAMPLE = eqx.filter_jit(lambda prior, keys: jax.vmap(lambda key: prior.sample(key, LIKE))(keys))


def draws_of(prior, seed):
    draws = SAMPLE(prior, jax.random.split(jax.random.key(seed), DRAWS))
    return np.concatenate([np.reshape(leaf, (DRAWS, -1)) for leaf in jax.tree.leaves(draws)], axis=1).astype(np.float64)


def assert_independent(unit, law):
    """Each column follows the law (Kolmogorov-Smirnov at one in a thousand), and no two are correlated."""
    for column in unit.T:
        assert stats.kstest(column, law).statistic <= 1.95 / np.sqrt(DRAWS)
    correlation = np.corrcoef(unit.T) - np.eye(unit.shape[1])
    assert np.abs(correlation).max() <= 4 / np.sqrt(DRAWS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gaussian_draws(seed):
    x = draws_of(Gaussian({"a": 0.25, "b": jnp.array(3.0)}, CENTRE), seed)
    assert_independent((x - [1.0, -2.0, 0.5]) / [0.25, 0.25, 3.0], "norm")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_box_draws(seed):
    x = draws_of(UniformBox({"a": jnp.array([-1.0, 0.0]), "b": -3.0}, 4.0), seed)
    assert_independent((x - [-1.0, 0.0, -3.0]) / [5.0, 4.0, 7.0], "uniform")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ball_draws(seed):
    """|x|^D is uniform, and in three dimensions so is each coordinate of the direction (Archimedes)."""
    x = draws_of(UniformBall(2.0, CENTRE), seed) - [1.0, -2.0, 0.5]
    radius = np.linalg.norm(x, axis=1)
    columns = np.column_stack([(radius / 2.0) ** 3, (1.0 + x / radius[:, None]) / 2.0])
    assert_independent(columns, "uniform")


WIDEST = ["around a tree", "box per leaf", "ball around a tree"]


@pytest.mark.parametrize("name", WIDEST)
def test_draws_are_inside_and_keep_the_dtype(name):
    prior = PRIORS[name]
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for like in (PARAMS, halves):
        draw = prior.sample(jax.random.key(0), like)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), draw) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    assert np.isfinite(float(prior.log_density(prior.sample(jax.random.key(1), PARAMS))))


@pytest.mark.parametrize("name", WIDEST)
def test_half_precision_parameters_lose_nothing_more(name):
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), halves)
    line, same = (line_of(PRIORS[name], params, DIRECTIONS[0]) for params in (halves, single))
    assert jax.tree.leaves(line) == jax.tree.leaves(same)


def integral(prior, points, cell):
    """∑ π(x)·cell over float64 points of shape (n, d)."""
    with jax.enable_x64(True):
        return float(jnp.sum(jnp.exp(jax.jit(jax.vmap(prior.log_density))(jnp.asarray(points)))) * cell)


def midpoints(*spans, count):
    axes = [low + (high - low) * (np.arange(count) + 0.5) / count for low, high in spans]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)
    return points, np.prod([(high - low) / count for low, high in spans])


@pytest.mark.parametrize(
    ("prior", "spans", "count", "tolerance"),
    [
        (Gaussian(0.5, jnp.array([1.0])), [(-5.0, 7.0)], 400, 1e-12),
        (UniformBox(-1.0, 2.0), [(-2.0, 3.0)], 400, 1e-12),
        (UniformBall(1.5), [(-2.0, 2.0)], 400, 1e-12),
        (Gaussian(jnp.array([0.5, 2.0]), jnp.array([1.0, -3.0])), [(-4.0, 6.0), (-21.0, 15.0)], 200, 1e-12),
        (Gaussian(0.5), [(-6.0, 6.0), (-6.0, 6.0)], 200, 1e-12),
        (UniformBox(-1.0, 1.0), [(-2.0, 2.0), (-2.0, 2.0)], 200, 1e-12),
        (UniformBox(jnp.array([-1.0, 0.0]), jnp.array([1.0, 3.0])), [(-2.0, 2.0), (-1.0, 4.0)], 200, 1e-12),
        (UniformBall(1.5, jnp.array([0.5, 0.25])), [(-2.0, 3.0), (-2.0, 3.0)], 1000, 1e-3),
    ],
    ids=["gaussian 1", "box 1", "ball 1", "gaussian 2", "scalar gaussian 2", "scalar box 2", "box 2", "ball 2"],
)
def test_densities_integrate_to_one(prior, spans, count, tolerance):
    """The midpoint rule is exact for steps between cells, and exponentially good for Gaussians."""
    assert abs(integral(prior, *midpoints(*spans, count=count)) - 1.0) < tolerance


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(-1.0), "Gaussian sigma must be positive everywhere, got -1.0"),
        (lambda: Gaussian(0.0), "Gaussian sigma must be positive"),
        (
            lambda: Gaussian({"w": 1.0, "b": jnp.array([1.0, -1.0, 1.0]), "s": 1.0}),
            r"Gaussian sigma\['b'\] must be positive",
        ),
        (lambda: Gaussian(jnp.nan), "Gaussian sigma must be finite"),
        (lambda: Gaussian(jnp.inf), "Gaussian sigma must be finite"),
        (lambda: Gaussian(1.0, {"w": jnp.full((2, 3), jnp.nan)}), r"Gaussian mean\['w'\] must be finite"),
        (lambda: UniformBall(-2.0), "UniformBall radius must be positive"),
        (lambda: UniformBall(jnp.inf), "UniformBall radius must be finite"),
        (lambda: UniformBall(1.0, jnp.array([jnp.inf])), "UniformBall center must be finite"),
    ],
)
def test_impossible_priors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (Gaussian(jnp.ones(3)), "Gaussian sigma is a pytree of another structure"),
        (Gaussian({"w": jnp.ones((3, 2)), "b": 1.0, "s": 1.0}), r"Gaussian sigma\['w'\] has shape \(3, 2\)"),
        (Gaussian(1.0, {"w": 0.0, "b": jnp.zeros(4), "s": 0.0}), r"Gaussian mean\['b'\] has shape \(4,\)"),
        (UniformBox(2.0, -2.0), r"UniformBox low\['b'\] is not below high\['b'\]"),
        (UniformBox(-jnp.inf, 2.0), r"UniformBox low\['b'\] must be finite"),
        (UniformBox(-2.0, jnp.nan), r"UniformBox high\['b'\] must be finite"),
        (UniformBox(-0.5, 2.0), r"the anchor\['w'\] lies outside the UniformBox; widen"),
        (UniformBox(-2.0, {"w": jnp.ones(3), "b": 1.0, "s": 1.0}), r"UniformBox high\['w'\] has shape \(3,\)"),
        (UniformBall(1.0), "the anchor lies outside the UniformBall; enlarge"),
        (UniformBall(9.0, {"w": jnp.zeros(6), "b": 0.0, "s": 0.0}), r"UniformBall center\['w'\] has shape \(6,\)"),
    ],
)
def test_priors_that_do_not_fit_the_parameters(prior, message):
    with pytest.raises(ValueError, match=message):
        prior.check(PARAMS)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_that_fit_pass(name):
    PRIORS[name].check(PARAMS)


def test_parameters_clipped_to_the_box_are_inside():
    """0.3 in float32 lies above 0.3."""
    prior, clipped = UniformBox(-0.3, 0.3), {"x": jnp.array([0.3, -0.3, 0.1])}
    prior.check(clipped)
    assert np.isclose(float(prior.log_density(clipped)), -3 * np.log(0.6))
    assert line_of(prior, clipped, {"x": jnp.array([1.0, 0.0, 0.0])}).exit == 0.0


def test_traced_priors_are_not_inspected():
    density = jax.jit(lambda sigma, mean: Gaussian(sigma, mean).log_density(jnp.zeros(3)))
    assert np.isclose(float(density(2.0, jnp.ones(3))), stats.norm(1.0, 2.0).logpdf(0.0) * 3)
    assert np.isnan(float(density(-2.0, jnp.ones(3))))

    @jax.jit
    def check(low):
        UniformBox(low, 1.0).check(jnp.zeros(3))
        return UniformBox(low, 1.0).line(jnp.zeros(3), -jnp.ones(3)).exit

    assert float(check(-0.5)) == 0.5


def test_what_is_concrete_is_inspected_inside_a_transformation_too():
    @jax.jit
    def check(x):
        UniformBox(-0.3, 0.3).check(np.float32([0.3, 0.0]))
        with pytest.raises(ValueError, match="outside the UniformBox"):
            UniformBox(-0.3, 0.3).check(np.float32([0.4]))
        UniformBall(1.0).check(x)
        return x

    check(jnp.zeros(2))


def test_bounds_are_trees_like_the_parameters():
    low, high = BOUNDED["box"].bounds(PARAMS)
    assert jax.tree.structure(low) == jax.tree.structure(high) == jax.tree.structure(PARAMS)
    assert set(jax.tree.leaves(low)) == {-1.0} and set(jax.tree.leaves(high)) == {1.5}
    low, high = BOUNDED["box per leaf"].bounds(PARAMS)
    assert low == {"w": -1.0, "b": -0.5, "s": 0.25}
    jax.tree.map(lambda b, x: np.testing.assert_array_equal(b, x + 0.125), high, PARAMS)


def test_the_offset_points_from_the_centre_to_the_anchor():
    for prior, centre in (
        (BOUNDED["ball"], jax.tree.map(jnp.zeros_like, PARAMS)),
        (BOUNDED["ball around a tree"], OFFSET),
    ):
        offset = prior.offset(PARAMS)
        assert {x.dtype for x in jax.tree.leaves(offset)} == {jnp.dtype("float64")}
        for d, x, c in zip(*map(jax.tree.leaves, (offset, PARAMS, centre)), strict=True):
            np.testing.assert_allclose(np.asarray(d), np.asarray(x, np.float64) - np.asarray(c, np.float64), atol=1e-15)
