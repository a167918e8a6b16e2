"""The reference problems: cost, prior, anchor and exact answer must describe the same region."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from volumejax import exact, reference

_PROBLEMS = [
    lambda: reference.quadratic(np.array([2.0, 0.5, 0.0]), cutoff=0.3, sigma=0.8, minimum=0.4),
    lambda: reference.ellipsoid(np.array([2.0, 0.5, 1.0]), cutoff=0.3),
    lambda: reference.normal_crossing((1, 2), cutoff=1e-2),
    lambda: reference.normal_crossing((1,), cutoff=1e-2, gaussian=True),
    lambda: reference.rank_one(3, 5, cutoff=1e-2),
    lambda: reference.tanh_neuron(3, 5, cutoff=1e-2),
    lambda: reference.shell(4, cutoff=1e-2),
    lambda: reference.shell(4, cutoff=1e-2, gaussian=True),
]


@pytest.mark.parametrize("make", _PROBLEMS)
def test_anchor_fits_prior_and_cost(make):
    problem = make()
    problem.prior.check(problem.params)
    assert float(problem.cost(problem.params)) == 0.0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(problem.params))
    assert problem.star_log_mass <= problem.log_mass
    gradient = jax.grad(problem.cost)(problem.params)
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("make", _PROBLEMS)
def test_curvature_is_the_diagonal_of_the_hessian(make):
    """Mutation caught: the shell's curvature without its factor of 8, or on the wrong axis."""
    problem = make()
    flat, unravel = ravel_pytree(problem.params)
    hessian = jax.hessian(lambda w: problem.cost(unravel(w)))(flat)
    if problem.curvature is None:
        assert np.array_equal(hessian, np.zeros_like(hessian))
    else:
        assert np.allclose(np.diag(hessian), ravel_pytree(problem.curvature)[0])


@pytest.mark.parametrize("make", _PROBLEMS)
def test_slope_tends_to_the_learning_coefficient(make):
    problem = make()
    assert 0.2 < problem.slope / problem.learning_coefficient < 1.1


def test_costs_are_the_formulas():
    a, b = np.array([0.5, -1.0], np.float32), np.array([0.3, 0.2, -0.7], np.float32)
    params = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    square = float(a @ a)
    gain = float(exact.tanh_gain(np.sqrt(b.astype(float) @ b)))
    assert np.isclose(reference.rank_one(2, 3, cutoff=1.0).cost(params), square * (b @ b), rtol=1e-6)
    assert np.isclose(reference.tanh_neuron(3, 2, cutoff=1.0).cost(params), square * gain, rtol=1e-6)
    crossing = reference.normal_crossing((1, 2, 1), cutoff=1.0).cost(params["b"])
    assert np.isclose(crossing, b[0] ** 2 * b[1] ** 4 * b[2] ** 2, rtol=1e-6)
    quadratic = reference.quadratic([1.0, 2.0, 3.0], cutoff=1.0, minimum=[0.1, 0.2, 0.3]).cost(params["b"])
    assert np.isclose(quadratic, 0.5 * np.sum([1.0, 2.0, 3.0] * (b - [0.1, 0.2, 0.3]) ** 2), rtol=1e-6)
    assert np.isclose(reference.shell(3, cutoff=1.0).cost(params["b"]), (b @ b - 1.0) ** 2, rtol=1e-6)


@pytest.mark.parametrize("make", _PROBLEMS)
def test_costs_compile_and_batch(make):
    problem = make()
    batch = jax.tree.map(lambda x: jnp.stack([x, x + 0.1, x + 0.5]), problem.params)
    values = eqx.filter_jit(eqx.filter_vmap(problem.cost))(batch)
    assert values.shape == (3,) and values.dtype == jnp.float32
    singly = [problem.cost(jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    assert np.allclose(values, singly, rtol=1e-5, atol=1e-6)


def test_large_problems_are_summed_in_float64():
    """10⁶ unit curvatures: the float64 cost of a step of 1e-4 is right to 1e-7, the step's own rounding."""
    problem = reference.quadratic(np.ones(10**6), cutoff=25.0)
    cost = eqx.filter_jit(problem.cost)(problem.params + 1e-4)
    assert cost.dtype == jnp.float64
    assert abs(float(cost) / (0.5 * 10**6 * float(np.float32(1e-4)) ** 2) - 1.0) <= 1e-12
    assert abs(problem.log_mass - -4451776.256) <= 2e-3


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.float64, 1e-13)])
def test_tanh_gain_of_square(dtype, tolerance):
    with jax.enable_x64(True):
        square = jnp.asarray(np.append(np.geomspace(1e-12, 1e6, 2000), [1.0, 1e-5]), dtype)
        value, slope = jax.vmap(jax.value_and_grad(reference.tanh_gain_of_square))(square)
        exactly = exact.tanh_gain(np.sqrt(np.asarray(square, np.float64)))
        assert value.dtype == slope.dtype == dtype
        assert np.max(np.abs(np.asarray(value, np.float64) / exactly - 1.0)) <= tolerance
        assert np.all(np.asarray(slope) > 0) and np.all(np.asarray(slope) <= 1.0 + 1e-6)


def test_tanh_gain_is_smooth_at_zero_and_where_its_branches_meet():
    assert float(jax.grad(reference.tanh_gain_of_square)(0.0)) == 1.0
    with jax.enable_x64(True):
        for join in (1e-5, 1.0):
            sides = jnp.asarray([join * (1.0 - 1e-9), join * (1.0 + 1e-9)])
            slopes = jax.vmap(jax.grad(reference.tanh_gain_of_square))(sides)
            assert abs(float(slopes[1] / slopes[0]) - 1.0) <= 1e-8


def _log_fraction(key, problem, num_draws):
    """Log of the fraction of prior draws in the region, and its standard error."""
    keys = jax.random.split(key, num_draws)

    def inside(key):
        return problem.cost(problem.prior.sample(key, problem.params)) <= problem.cutoff

    hits = int(jnp.sum(eqx.filter_jit(eqx.filter_vmap(inside))(keys)))
    fraction = hits / num_draws
    return np.log(fraction), np.sqrt((1.0 - fraction) / hits)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "make, num_draws, cap",
    [
        (lambda: reference.normal_crossing((1, 1), cutoff=1e-2), 2**16, 0.01),
        (lambda: reference.normal_crossing((1, 2), cutoff=1e-2), 2**16, 0.01),
        (lambda: reference.normal_crossing((1, 1), cutoff=1e-2, gaussian=True), 2**16, 0.01),
        (lambda: reference.rank_one(3, 5, cutoff=1e-2), 2**19, 0.2),
        (lambda: reference.tanh_neuron(1, 1, cutoff=1e-2), 2**16, 0.01),
        (lambda: reference.tanh_neuron(4, 2, cutoff=1e-1), 2**16, 0.05),
        (lambda: reference.quadratic([1.0, 0.3, 0.0], cutoff=0.1, sigma=0.8, minimum=0.5), 2**16, 0.02),
    ],
)
def test_prior_draws_find_the_exact_mass(make, num_draws, cap, seed):
    """Mutations caught: the tanh neuron's leaves swapped, the quadratic without its ½ or its minimum."""
    problem = make()
    estimate, std_error = _log_fraction(jax.random.key(seed), problem, num_draws)
    assert std_error <= cap
    assert abs(estimate - problem.log_mass) <= 4.0 * std_error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shell_and_star_by_sampling_a_box(seed):
    """Draws from a box; a point is seen if the cost stays below the cutoff on its segment to the anchor.

    Mutation caught: calling every point of the shell visible.
    """
    problem = reference.shell(3, cutoff=1e-2)
    num_draws, half_width = 2**17, 1.05
    draws = jax.random.uniform(jax.random.key(seed), (num_draws, 3), minval=-half_width, maxval=half_width)
    t = jnp.linspace(0.0, 1.0, 65)

    def largest(w):
        return jnp.max(jax.vmap(lambda t: problem.cost(problem.params + t * (w - problem.params)))(t))

    inside = np.asarray(jax.vmap(problem.cost)(draws)) <= problem.cutoff
    seen = np.asarray(jax.jit(jax.vmap(largest))(draws)) <= problem.cutoff
    for hits, truth, cap in ((inside, problem.log_mass, 0.01), (seen, problem.star_log_mass, 0.04)):
        std_error = np.sqrt((1.0 - hits.mean()) / hits.sum())
        assert std_error <= cap
        assert abs(np.log(hits.mean()) + 3.0 * np.log(2.0 * half_width) - truth) <= 4.0 * std_error


def test_normal_crossing_needs_integers():
    with pytest.raises(ValueError, match="round them"):
        reference.normal_crossing((0.5, 1), cutoff=0.1)


@pytest.mark.parametrize("widths, rank", [([5, 3, 5], 0), ([5, 3, 4], 2), ([3, 4, 5, 3], 3)])
def test_deep_linear_is_the_mean_square_error_over_the_ball(widths, rank):
    """Mutations caught: the covariance 1/(d+2) as 1/d, a transposed product, the sum over outputs for their mean."""
    problem = reference.deep_linear(widths, rank, scale=0.7)
    assert float(problem.cost(problem.params)) == 0.0
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), problem.params)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200_000, widths[0]))
    x *= (generator.uniform(size=(len(x), 1)) ** (1.0 / widths[0])) / np.linalg.norm(x, axis=1, keepdims=True)
    outputs = [x, x]
    for name in problem.params:
        outputs = [y @ np.asarray(w[name]).T for y, w in zip(outputs, (params, problem.params), strict=True)]
    errors = np.mean((outputs[0] - outputs[1]) ** 2, axis=1)
    std_error = np.std(errors) / np.sqrt(len(errors))
    assert std_error <= 0.01 * np.mean(errors)
    assert abs(float(problem.cost(params)) - np.mean(errors)) <= 4.0 * std_error
    product = x
    for name in problem.params:
        product = product @ np.asarray(problem.params[name]).T
    assert np.linalg.matrix_rank(product, tol=1e-3) == rank


def test_deep_linear_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="smallest width"):
        reference.deep_linear([3, 2, 3], 3)
    with pytest.raises(ValueError, match="scale must be positive"):
        reference.deep_linear([3, 2, 3], 1, scale=0.0)
