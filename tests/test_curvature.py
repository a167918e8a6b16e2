"""GGN against two independent float64 truths: the Hessian of the KL, and an explicit product of Jacobians.

Products, probes and eigenpairs against the same matrices.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from volumejax.behaviours import kl_to_anchor
from volumejax.curvature import dense_ggn, diagonal_ggn, ggn_product, sampled_diagonal_ggn
from volumejax.eigenpairs import top_eigenpairs
from volumejax.hessian import dense_hessian, diagonal_hessian, hessian_product

CASES = {"one position": (7,), "sequences": (4, 3)}


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["w"] + params["b"].reshape((1,) * (inputs.ndim - 1) + (-1,)))
    return hidden @ params["v"]


def problem(case):
    """Return parameters, inputs and mask as float64 NumPy arrays."""
    rng = np.random.default_rng(0)
    shape = CASES[case]
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=(4, 3))}
    mask = rng.random(shape) < 0.7
    mask[(0,) * len(shape)] = True
    return params, rng.normal(size=(*shape, 3)), mask


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def hessian_truth(params, inputs, mask):
    """The Hessian of the textbook KL, in float64."""
    with jax.enable_x64(True):
        vector, unravel = ravel_pytree(jax.tree.map(jnp.asarray, params))
        log_p0 = jax.nn.log_softmax(network(params, jnp.asarray(inputs)))

        def kl(flat):
            log_p = jax.nn.log_softmax(network(unravel(flat), jnp.asarray(inputs)))
            return jnp.mean(jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)[mask])

        return np.asarray(jax.jit(jax.hessian(kl))(vector))


def jacobian_truth(params, inputs, mask):
    """The mean of Jᵀ (diag p − p pᵀ) J, one position at a time, in float64."""
    with jax.enable_x64(True):
        vector, unravel = ravel_pytree(jax.tree.map(jnp.asarray, params))
        logits = np.asarray(network(params, jnp.asarray(inputs)))[mask]
        jacobian = jax.jit(jax.jacfwd(lambda flat: network(unravel(flat), jnp.asarray(inputs))))(vector)[mask]
    total = np.zeros((vector.size, vector.size))
    for z, jac in zip(logits, np.asarray(jacobian), strict=True):
        p = np.exp(z) / np.exp(z).sum()
        total += jac.T @ (np.diag(p) - np.outer(p, p)) @ jac
    return total / len(logits)


@pytest.mark.parametrize(
    ("case", "masked", "batch_sizes"),
    [("one position", False, (3, 100)), ("one position", True, (1, 7)), ("sequences", True, (3, None))],
)
def test_dense_and_diagonal_equal_both_truths(case, masked, batch_sizes):
    params, inputs, mask = problem(case)
    everything = mask if masked else np.ones_like(mask)
    truth = hessian_truth(params, inputs, everything)
    np.testing.assert_allclose(jacobian_truth(params, inputs, everything), truth, atol=1e-12)
    options = {"mask": mask} if masked else {}
    tolerance = 1e-6 * truth.max()
    for batch_size in batch_sizes:
        arguments = network, single(params), single(inputs)
        dense = dense_ggn(*arguments, batch_size=batch_size, **options)
        np.testing.assert_allclose(dense, truth, atol=tolerance)
        assert dense.dtype == jnp.float32 and np.array_equal(dense, dense.T)
        diagonal = diagonal_ggn(*arguments, batch_size=batch_size, **options)
        np.testing.assert_allclose(ravel_pytree(diagonal)[0], np.diag(truth), atol=tolerance)
        assert jax.tree.map(jnp.shape, diagonal) == jax.tree.map(jnp.shape, params)


def test_the_library_cost_has_this_hessian():
    params, inputs, mask = problem("sequences")
    vector, unravel = ravel_pytree(single(params))
    cost = kl_to_anchor(network, single(params), single(inputs), mask=mask)
    hessian = jax.jit(jax.hessian(lambda flat: cost(unravel(flat))))(vector)
    np.testing.assert_allclose(hessian, jacobian_truth(params, inputs, mask), atol=2e-6)


def test_products_equal_the_matrix():
    params, inputs, mask = problem("sequences")
    truth = hessian_truth(params, inputs, mask)
    vector = jax.tree.map(lambda x: np.random.default_rng(1).normal(size=x.shape), params)
    expected = truth @ ravel_pytree(vector)[0]
    cost = kl_to_anchor(network, single(params), single(inputs), mask=mask, batch_size=3)
    products = [ggn_product(network, single(params), single(inputs), mask=mask, batch_size=b) for b in (1, 3, None)]
    for product in (*products, hessian_product(cost, single(params))):
        out = product(single(vector))
        assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, params)
        np.testing.assert_allclose(ravel_pytree(out)[0], expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sampled_diagonal_is_unbiased(seed):
    """Against the exact diagonal, pooled over entries; the batch size does not change the draws."""
    params, inputs, mask = problem("sequences")
    truth = np.diag(hessian_truth(params, inputs, mask))
    arguments = jax.random.key(seed), network, single(params), single(inputs)
    found = sampled_diagonal_ggn(*arguments, num_probes=256, mask=mask, batch_size=3)
    value, error = (np.asarray(ravel_pytree(part)[0], np.float64) for part in (found.value, found.std_error))
    assert np.all(value >= 0.0) and np.all(error < 0.2 * truth.max())
    score = (value - truth)[error > 0] / error[error > 0]
    assert np.abs(score).max() < 5.0 and 0.3 < np.sqrt(np.mean(score**2)) < 2.0
    again = sampled_diagonal_ggn(*arguments, num_probes=256, mask=mask, batch_size=None)
    np.testing.assert_allclose(ravel_pytree(again.value)[0], value, rtol=1e-4, atol=1e-7)


def coupled(w):
    """A cost with an indefinite Hessian, another one at every point."""
    return jnp.sum(w["x"] ** 3) + w["x"][0] * w["y"][1] * 2.0 + jnp.sum(jnp.cos(w["y"])) + jnp.prod(w["x"])


POINT = {"x": np.array([0.5, -1.0, 2.0]), "y": np.array([0.3, 1.1])}


def test_the_hessian_of_any_cost():
    """Against NumPy's second differences in float64, by another road than JAX's."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, POINT))
        step, eye = 1e-4, np.eye(flat.size)

        def at(shift):
            return float(coupled(unravel(flat + jnp.asarray(shift))))

        truth = [
            [(at(step * (a + b)) - at(step * (a - b)) - at(step * (b - a)) + at(-step * (a + b))) / (4 * step**2)
             for a in eye] for b in eye
        ]  # fmt: skip
    for batch_size in (2, 64):
        matrix = dense_hessian(coupled, single(POINT), batch_size=batch_size)
        np.testing.assert_allclose(matrix, truth, atol=2e-5)
        assert matrix.dtype == jnp.float32 and np.array_equal(matrix, matrix.T)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_hutchinson_diagonal_of_any_cost(seed):
    """Mutation: ε·Hε without ε, whose mean is zero."""
    truth = np.diag(dense_hessian(coupled, single(POINT)))
    found = diagonal_hessian(jax.random.key(seed), coupled, single(POINT), num_probes=400)
    value, error = ravel_pytree(found.value)[0], ravel_pytree(found.std_error)[0]
    assert np.all(error < 0.3) and np.all(np.abs(value - truth) <= 4 * error + 1e-5)
    assert np.any(truth < 0.0)


def test_the_largest_eigenpairs():
    params, inputs, mask = problem("one position")
    truth = hessian_truth(params, inputs, mask)
    values, vectors = np.linalg.eigh(truth)
    product = ggn_product(network, single(params), single(inputs), mask=mask)
    pairs = top_eigenpairs(jax.random.key(0), product, single(params), rank=4)
    np.testing.assert_allclose(pairs.values, values[::-1][:4], rtol=1e-5, atol=1e-6 * values.max())
    assert jax.tree.map(lambda u: u.shape[1:], pairs.vectors) == jax.tree.map(jnp.shape, params)
    rows = jax.vmap(lambda u: ravel_pytree(u)[0])(pairs.vectors)
    np.testing.assert_allclose(np.abs(np.sum(rows * vectors[:, ::-1][:, :4].T, axis=1)), 1.0, atol=1e-4)
    assert np.all(pairs.residuals < 1e-5 * values.max())


@pytest.mark.parametrize("true_rank", [0, 2])
def test_eigenpairs_beyond_the_rank_are_zero(true_rank):
    """Lanczos exhausts its space and must not take rounding for a direction: it then finds ghosts, or NaN."""
    h = jnp.zeros(12).at[:true_rank].set(jnp.array([3.0, 2.0])[:true_rank])
    pairs = top_eigenpairs(jax.random.key(0), lambda v: h * v, h, rank=5)
    np.testing.assert_allclose(pairs.values, [*[3.0, 2.0][:true_rank], *[0.0] * (5 - true_rank)], atol=1e-5)
    length = np.linalg.norm(pairs.vectors, axis=1)
    assert np.all((np.abs(length - 1.0) < 1e-5) | (length == 0.0)) and np.all(pairs.residuals < 1e-5)


def test_eigenpairs_need_matfree(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree.decomp", None)
    with pytest.raises(ImportError, match=r"pip install 'volumejax\[curvature\]'"):
        top_eigenpairs(jax.random.key(0), lambda v: v, jnp.ones(3), rank=1)


def test_misuse_of_probes_and_products():
    key, big = jax.random.key(0), jnp.zeros((20_001,))
    with pytest.raises(ValueError, match="use diagonal_hessian or top_eigenpairs"):
        dense_hessian(lambda w: jnp.sum(w**2), big)
    for call in (
        lambda: diagonal_hessian(key, lambda w: jnp.sum(w**2), jnp.ones(2), num_probes=1),
        lambda: sampled_diagonal_ggn(key, network, *map(single, problem("sequences")[:2]), num_probes=1),
    ):
        with pytest.raises(ValueError, match="num_probes must be at least 2, got 1"):
            call()
    for rank, number in ((0, None), (4, None), (2, 1), (2, 4)):
        with pytest.raises(ValueError, match=r"(rank|num_products) must lie between"):
            top_eigenpairs(key, lambda v: v, jnp.ones(3), rank=rank, num_products=number)
    with pytest.raises(ValueError, match="params has dtype int32"):
        hessian_product(jnp.sum, jnp.arange(2))


def test_masked_logits_may_be_nan():
    params, inputs, mask = problem("one position")
    poisoned = np.where(mask[:, None], inputs, 1e30)

    def poisonous(p, x):
        return network(p, x) + jnp.where(x[:, :1] > 1e29, jnp.nan, 0.0)

    clean = dense_ggn(network, single(params), single(inputs), mask=mask)
    masked = dense_ggn(poisonous, single(params), single(poisoned), mask=mask)
    np.testing.assert_allclose(masked, clean, atol=1e-7)


def test_low_precision_parameters_give_float32_curvature():
    params, inputs, _ = problem("one position")
    half = {**single(params), "w": jnp.asarray(params["w"], jnp.bfloat16)}
    dense = dense_ggn(network, half, single(inputs))
    diagonal = diagonal_ggn(network, half, single(inputs))
    assert dense.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(diagonal))
    np.testing.assert_allclose(jnp.diag(dense), ravel_pytree(diagonal)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense, dense_ggn(network, single(params), single(inputs)), atol=0.03)


def test_misuse_is_a_value_error_with_a_remedy():
    big = jnp.zeros((20_001,))
    with pytest.raises(ValueError, match=r"20,001 parameters .* 1\.6 GB; use diagonal_ggn"):
        dense_ggn(lambda w, x: x * w[:2].reshape(1, 2), big, jnp.ones((3, 1)))
    for ggn in (dense_ggn, diagonal_ggn):
        with pytest.raises(ValueError, match="batch_size must"):
            ggn(network, *map(single, problem("one position")[:2]), batch_size=0)
        with pytest.raises(ValueError, match="mask must have the shape"):
            ggn(network, *map(single, problem("sequences")[:2]), mask=np.ones(4, bool))
        with pytest.raises(ValueError, match="params has dtype int32"):
            ggn(lambda w, x: x * w.reshape(1, 2), jnp.arange(2), jnp.ones((3, 1)))
