"""Direction proposals: draws with the covariance asked for, and the density that belongs to exactly those draws.

Mutations these catch: diag(L) z for L z (the rotation forgotten), Lᵀ z for L z, the mean dropped from the draw or from
the density, its sign, ½ log det without the leaf's size, white y solved for again from the rounded y.
"""

import functools

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree
from scipy import stats

from volumejax import tree
from volumejax.logmath import log_sphere_area
from volumejax.low_rank import LowRank, LowRankPrecision
from volumejax.proposals import Dense, Diagonal, Isotropic
from volumejax.radial import radial

PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.zeros(2)}
MEAN = {"a": jnp.array([0.4, -0.3, 0.0]), "b": jnp.array([0.2, 0.5])}
FLAT_MEAN = np.array([0.4, -0.3, 0.0, 0.2, 0.5])
D = 5


def rotated(spectrum, seed=0):
    """A covariance with these eigenvalues along random axes."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))
    return (q * spectrum) @ q.T


COVARIANCE = rotated([3.0, 1.5, 1.0, 0.6, 0.3])
FACTOR = np.linalg.cholesky(COVARIANCE)
# The third factor repeats the first: factors need not be independent.
ROWS = np.array([[0.5, -0.2, 0.1, 0.3, 0.0], [0.0, 0.4, -0.6, 0.1, 0.2], [0.5, -0.2, 0.1, 0.3, 0.0]])
FACTORS = {"a": jnp.asarray(ROWS[:, :3], jnp.float32), "b": jnp.asarray(ROWS[:, 3:], jnp.float32)}
CASES = {
    "isotropic": (Isotropic(), np.zeros(D), np.eye(D)),
    "scalar": (Diagonal(0.5), np.zeros(D), 0.25 * np.eye(D)),
    "scalar leaves": (
        Diagonal({"a": 1.5, "b": jnp.array([0.8, 1.2])}),
        np.zeros(D),
        np.diag([2.25, 2.25, 2.25, 0.64, 1.44]),
    ),
    "scalar leaves with mean": (
        Diagonal({"a": 1.5, "b": 0.8}, MEAN),
        FLAT_MEAN,
        np.diag([2.25, 2.25, 2.25, 0.64, 0.64]),
    ),
    "dense": (Dense(FACTOR), np.zeros(D), COVARIANCE),
    "dense with mean": (Dense(jnp.asarray(FACTOR, jnp.float32), MEAN), FLAT_MEAN, COVARIANCE),
    "low rank": (LowRank(0.5, FACTORS), np.zeros(D), 0.25 * np.eye(D) + ROWS.T @ ROWS),
    "low rank with mean": (
        LowRank({"a": 0.5, "b": jnp.array([0.8, 1.2])}, FACTORS, MEAN),
        FLAT_MEAN,
        np.diag([0.25, 0.25, 0.25, 0.64, 1.44]) + ROWS.T @ ROWS,
    ),
    "low rank precision": (LowRankPrecision(1.5, FACTORS), np.zeros(D), np.linalg.inv(1.5 * np.eye(D) + ROWS.T @ ROWS)),
    "low rank precision with mean": (
        LowRankPrecision({"a": 1.5, "b": jnp.array([0.8, 1.2])}, FACTORS, MEAN),
        FLAT_MEAN,
        np.linalg.inv(np.diag([1.5, 1.5, 1.5, 0.8, 1.2]) + ROWS.T @ ROWS),
    ),
}
DRAWS = 8_000


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@eqx.filter_jit
def draw_many(proposal, keys):
    """Draws as an array, their lines, and the log density of their unit directions on the sphere."""

    def one(key):
        draw = proposal.draw(key, PARAMS)
        with jax.enable_x64(True):
            length = 0.5 * jnp.log(tree.dot(draw.direction, draw.direction))
            on_sphere = draw.log_density + radial(D, draw.curvature, draw.slope, jnp.inf) + D * length
        return ravel_pytree(draw.direction)[0], (draw.log_density, draw.slope, draw.curvature), on_sphere

    return jax.vmap(one)(keys)


@functools.cache
def draws_of(name, seed):
    y, line, on_sphere = draw_many(CASES[name][0], jax.random.split(jax.random.key(seed), DRAWS))
    return np.asarray(y, np.float64), [np.asarray(part) for part in line], np.asarray(on_sphere)


@pytest.mark.parametrize("name", CASES)
def test_the_density_along_the_line(name):
    _, mean, covariance = CASES[name]
    y, (log_density, slope, curvature), _ = draws_of(name, 0)
    law = stats.multivariate_normal(mean, covariance)
    for s in (0.0, 0.3, 1.0, 2.5):
        claimed = (log_density + slope * s - 0.5 * curvature * s * s)[:200]
        np.testing.assert_allclose(claimed, law.logpdf(s * y[:200]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_have_the_mean_and_covariance(name, seed):
    _, mean, covariance = CASES[name]
    y, _, _ = draws_of(name, seed)
    variance = np.diag(covariance)
    error = np.sqrt(variance / DRAWS)
    assert error.max() < 0.025 and np.all(np.abs(y.mean(0) - mean) <= 4 * error)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / DRAWS)
    assert error.max() < 0.05 and np.all(np.abs(np.cov(y.T) - covariance) <= 4 * error)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_density_on_the_sphere_is_that_of_the_draws(name, seed):
    """∫ q(u) du = 1 over isotropic directions, taken from the draws themselves: E_q[1/(area·q(u))] = 1."""
    _, _, on_sphere = draws_of(name, seed)
    weight = np.exp(-on_sphere - float(log_sphere_area(D)))
    error = weight.std() / np.sqrt(DRAWS)
    assert error < 0.04
    assert abs(weight.mean() - 1.0) <= 4 * error + 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_isotropic_directions_hit_the_density_of_other_proposals(seed):
    """The same from outside: the mean over isotropic directions of a density given by SciPy and `radial` is 1."""
    _, mean, covariance = CASES["dense with mean"]
    u, _, _ = draws_of("isotropic", seed)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    precision = np.linalg.inv(covariance)
    curvature, slope = np.einsum("ni,ij,nj->n", u, precision, u), u @ precision @ mean
    constant = stats.multivariate_normal(mean, covariance).logpdf(np.zeros(D))
    with jax.enable_x64(True):
        density = np.exp(constant + np.asarray(radial(D, curvature, slope, jnp.inf)) + float(log_sphere_area(D)))
    error = density.std() / np.sqrt(DRAWS)
    assert error < 0.04 and abs(density.mean() - 1.0) <= 4 * error


@pytest.mark.parametrize("proposal", [Isotropic(), Diagonal(0.1)], ids=["isotropic", "scalar"])
def test_equal_scales_give_the_uniform_density_at_a_million_parameters(proposal):
    like = {"x": jnp.zeros(10**6)}
    draw = jax.jit(lambda key: proposal.draw(key, like))(jax.random.key(0))
    size = like["x"].size
    with jax.enable_x64(True):
        length = 0.5 * jnp.log(tree.dot(draw.direction, draw.direction))
        total = (
            draw.log_density + radial(size, draw.curvature, draw.slope, jnp.inf) + size * length + log_sphere_area(size)
        )
    assert abs(float(total)) < 1e-6


FOUR = hnp.arrays(np.float32, 4, elements=st.floats(-4.0, 4.0, width=32))
SCALES = hnp.arrays(np.float32, 4, elements=st.floats(2.0**-7, 8.0, width=32))
DRAW_FOUR = jax.jit(lambda key, scale, mean: Diagonal(scale, mean).draw(key, jnp.zeros(4)))


@hypothesis.given(SCALES, FOUR, st.integers(0, 2**32 - 1), st.floats(0.0, 5.0))
def test_any_diagonal_agrees_with_scipy(scale, mean, seed, s):
    draw = DRAW_FOUR(jax.random.key(seed), scale, mean)
    y, scale, mean = (np.asarray(v, np.float64) for v in (draw.direction, scale, mean))
    claimed = float(draw.log_density) + float(draw.slope) * s - 0.5 * float(draw.curvature) * s * s
    size = 1.0 + np.sum(((np.abs(mean) + s * np.abs(y)) / scale) ** 2)
    assert abs(claimed - stats.norm(mean, scale).logpdf(s * y).sum()) <= 1e-13 * size


def test_ill_conditioned_factors_keep_the_density_of_their_draws():
    """At s = 1 the density is that of z itself, whatever Σ amplifies. Mutation: L⁻¹y from the rounded y is off by 10
    %."""
    covariance = rotated(np.logspace(-6, 6, D), seed=3)
    factor = np.linalg.cholesky(covariance)
    proposal, key = Dense(factor, MEAN), jax.random.key(5)
    draw, z = proposal.draw(key, PARAMS), np.asarray(ravel_pytree(tree.normal_like(key, PARAMS))[0], np.float64)
    claimed = float(draw.log_density) + float(draw.slope) - 0.5 * float(draw.curvature)
    white_mean = np.abs(np.asarray(proposal.white_mean, np.float64)).max()
    truth = -0.5 * z @ z - np.log(np.diag(factor)).sum() - 0.5 * D * np.log(2 * np.pi)
    assert abs(claimed - truth) <= 1e-5 + 1e-14 * white_mean**2


def test_half_precision_parameters_get_single_precision_directions():
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    low_rank = LowRank(halves["a"][0], jax.tree.map(lambda f: f.astype(jnp.bfloat16), FACTORS), halves)
    for proposal in (Isotropic(), Diagonal(halves["a"][0], halves), Dense(FACTOR, halves), low_rank):
        draw = proposal.draw(jax.random.key(0), halves)
        assert {leaf.dtype for leaf in jax.tree.leaves(draw.direction)} == {jnp.dtype("float32")}
        assert all(leaf.dtype == jnp.float64 for leaf in (draw.log_density, draw.slope, draw.curvature))


def test_factors_from_numpy_are_taken_in_single_precision():
    for factor in (FACTOR, FACTOR.astype(np.float32), np.eye(D, dtype=int)):
        assert Dense(factor).cholesky.dtype == jnp.float32


def test_a_factor_may_be_made_or_used_inside_a_transformation():
    @jax.jit
    def draw(scale):
        with pytest.raises(ValueError, match="lower triangular"):
            Dense(FACTOR.T)
        concrete, traced = Dense(FACTOR, MEAN), Dense(scale * jnp.asarray(FACTOR, jnp.float32), MEAN)
        return [proposal.draw(jax.random.key(0), PARAMS) for proposal in (concrete, traced)]

    concrete, traced = draw(jnp.float32(1.0))
    for a, b in zip(*map(jax.tree.leaves, (concrete, traced)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(jnp.ones((5, 4))), r"Dense cholesky must be a square matrix, got shape \(5, 4\)"),
        (lambda: Dense(jnp.ones(5)), "Dense cholesky must be a square matrix"),
        (lambda: Dense(jnp.zeros((5, 5))), "lower triangular with a positive diagonal; pass numpy.linalg.cholesky"),
        (lambda: Dense(FACTOR.T), "lower triangular"),
        (lambda: Dense(COVARIANCE), "lower triangular"),
        (lambda: Dense(np.full((5, 5), np.nan)), "positive diagonal"),
        (lambda: Dense(FACTOR, {"a": jnp.zeros(3)}), "Dense mean has 3 numbers, the cholesky factor 5 rows"),
        (lambda: Dense(np.eye(4)).check(PARAMS), "Dense cholesky is 4 × 4, but there are 5 parameters"),
        (lambda: Dense(FACTOR, jnp.zeros(5)).check(PARAMS), "Dense mean is a pytree of another structure"),
        (lambda: Diagonal(-1.0).check(PARAMS), r"Diagonal scale\['a'\] must be positive and finite"),
        (
            lambda: Diagonal({"a": 1.0, "b": jnp.array([1.0, 0.0])}).check(PARAMS),
            r"Diagonal scale\['b'\] must be positive",
        ),
        (lambda: Diagonal(jnp.inf).check(PARAMS), "must be positive and finite"),
        (lambda: Diagonal(jnp.nan).check(PARAMS), "must be positive and finite"),
        (lambda: Diagonal(jnp.ones(5)).check(PARAMS), "Diagonal scale is a pytree of another structure"),
        (lambda: Diagonal({"a": jnp.ones(2), "b": 1.0}).check(PARAMS), r"Diagonal scale\['a'\] has shape \(2,\)"),
        (lambda: Diagonal(1.0, {"a": 0.0, "b": jnp.ones(3)}).check(PARAMS), r"Diagonal mean\['b'\] has shape \(3,\)"),
    ],
)
def test_proposals_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(-0.5, FACTORS).check(PARAMS), r"LowRank scale\['a'\] must be positive and finite"),
        (lambda: LowRankPrecision(0.0, FACTORS).check(PARAMS), r"LowRankPrecision scale\['a'\] must be positive"),
        (lambda: LowRank(1.0, {"a": jnp.ones((2, 3)), "b": jnp.ones((1, 2))}), r"leaves of shape \(rank, \*leaf shape"),
        (lambda: LowRank(1.0, jnp.ones(())), r"leaves of shape \(rank, \*leaf shape\), got shapes \[\(\)\]"),
        (lambda: LowRank(1.0, jnp.zeros((0, 3))), "stack the factors along a new first axis"),
        (lambda: LowRank(1.0, jnp.ones((2, 5))).check(PARAMS), "LowRank factors are a pytree of another structure"),
        (
            lambda: LowRank(1.0, {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}).check(PARAMS),
            r"LowRank factors\['a'\] have shape \(2, 2\), the parameter there has shape \(3,\)",
        ),
        (
            lambda: LowRankPrecision(1.0, jax.tree.map(lambda f: f * jnp.nan, FACTORS)).check(PARAMS),
            "LowRankPrecision factors must be finite",
        ),
        (lambda: LowRank({"a": 1.0}, FACTORS), "LowRank scale is a pytree of another structure"),
        (lambda: LowRank(1.0, FACTORS, jnp.zeros(5)), "LowRank mean is a pytree of another structure"),
    ],
)
def test_low_rank_proposals_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", CASES)
def test_proposals_that_fit_pass(name):
    CASES[name][0].check(PARAMS)
