"""Functions with data are taken by JAX's transformations as other functions are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax import reference

PARAMS = jnp.arange(6.0).reshape(3, 2)
INPUTS = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def network(params, inputs):
    return inputs @ params


FUNCTIONS = {
    "behaviour": vj.kl_to_anchor(network, PARAMS, INPUTS),
    "reference cost": reference.quadratic(np.ones(6), cutoff=0.1).cost,
    "GGN product": vj.ggn_product(network, PARAMS, INPUTS),
    "Hessian product": vj.hessian_product(vj.loss(network, INPUTS, jnp.array([0, 1, 0, 1])), PARAMS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, jax.jvp, jax.vmap], ids=lambda f: f.__name__)
def test_transformations_take_them(name, transform):
    function, at = FUNCTIONS[name], PARAMS.ravel() if name == "reference cost" else PARAMS
    expected = function(0.5 * at)
    if transform is jax.jvp:
        found = jax.jvp(function, (0.5 * at,), (at,))[0]
    elif transform is jax.vmap:
        found = jax.vmap(function)(0.5 * at[None])[0]
    else:
        found = transform(function)(0.5 * at)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_jitted_probe_gives_what_it_gives():
    prior, key = vj.Gaussian(1.0), jax.random.key(0)
    probe = vj.VolumeProbe(
        lambda params, data: vj.kl_to_anchor(network, params, data), prior, cutoff=1e-2, every=1, num_rays=8,
        proposal=vj.Diagonal(jnp.ones_like(PARAMS), jnp.zeros_like(PARAMS)),
    )  # fmt: skip
    plain, jitted = probe(key, 0, PARAMS, INPUTS), jax.jit(probe)(key, 0, PARAMS, INPUTS)
    assert plain.keys() == jitted.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(jitted[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_equals_itself_alone(name):
    function = FUNCTIONS[name]
    again = jax.tree.map(lambda x: x, function)
    assert function in {function} and again not in {function}
