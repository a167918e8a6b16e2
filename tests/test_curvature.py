"""GGN against two independent float64 truths: the Hessian of the KL, and an explicit product of Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from volumejax.behaviours import kl_to_anchor
from volumejax.curvature import dense_ggn, diagonal_ggn

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
