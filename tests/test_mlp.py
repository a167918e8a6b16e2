"""The MLP against its formula in NumPy, its initialisation, and the stability of its function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from volumejax import tree
from volumejax.models.mlp import MLP, mlp_apply, mlp_params


def test_forward_pass_is_affine_and_tanh_gelu():
    params = mlp_params((3, 5, 4, 2), jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    expected = x.astype(np.float64)
    for i in range(3):
        layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["layers"][i])
        expected = expected @ layer["kernel"] + layer["bias"]
        if i < 2:
            inner = np.sqrt(2 / np.pi) * (expected + 0.044715 * expected**3)
            expected = 0.5 * expected * (1 + np.tanh(inner))
    logits = mlp_apply((3, 5, 4, 2))(params, jnp.asarray(x))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_weights_and_biases_start_with_variance_one_over_fan_in(seed):
    layers = mlp_params((100, 400, 300), jax.random.key(seed))["layers"]
    for fan_in, layer in zip((100, 400), (layers[0], layers[1]), strict=True):
        for leaf in (layer["kernel"], layer["bias"]):
            scaled = np.sqrt(fan_in) * np.asarray(leaf).ravel()
            assert abs(np.mean(scaled)) < 4 / np.sqrt(scaled.size)
            assert abs(np.mean(scaled**2) - 1) < 4 * np.sqrt(2 / scaled.size)
            assert scaled.size < 10_000 or np.max(np.abs(scaled)) > 3.0


def test_parameters_are_plain_nested_dictionaries_of_float32():
    params = mlp_params((64, 64, 10), jax.random.key(0))
    assert tree.size(params) == 4810
    assert type(params) is dict and type(params["layers"]) is dict and type(params["layers"][0]) is dict
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_equal_widths_share_one_function_and_the_module_agrees_with_it():
    assert mlp_apply((3, 4, 2)) is mlp_apply((3, 4, 2)) and mlp_apply((3, 4, 2)) is not mlp_apply((3, 5, 2))
    model = MLP((3, 4, 2), rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    x = jnp.ones((5, 3))
    np.testing.assert_array_equal(mlp_apply((3, 4, 2))(params, x), model(x))


def test_too_few_widths():
    with pytest.raises(ValueError, match="features must hold"):
        MLP((3,), rngs=nnx.Rngs(0))
