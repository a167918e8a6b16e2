"""Functions with data are taken by JAX's transformations as other functions are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax import reference
from volumejax.functions import jit_ahead

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


class TestJitAhead:
    """Mutations: the call waits, numbers or functions are traced, another function's program is taken."""

    def test_a_call_returns_before_its_work_is_done(self):
        @jit_ahead
        def turn(x, by, count):
            return jax.lax.fori_loop(0, count, lambda _, y: by @ y, x)

        # What hardly needs a multiplication a CPU does at once.
        vector, by = jnp.arange(256.0), jnp.roll(jnp.eye(256), 1, axis=0)
        jax.block_until_ready(turn(vector, by, jnp.int32(1)))
        ahead = turn(vector, by, jnp.int32(256 * 200 + 3))
        assert not ahead.is_ready()
        np.testing.assert_array_equal(ahead, np.roll(np.arange(256.0), 3))

    def test_arrays_are_traced_and_all_else_is_static(self):
        traces = []

        @jit_ahead
        def weigh(function, scale, inputs, power):
            traces.append(power)
            assert isinstance(power, int) and isinstance(inputs, jax.core.Tracer)
            return {"sum": scale * jnp.sum(function(inputs) ** power)}

        for inputs in (np.ones(3, np.float32), jnp.full(3, 2.0, jnp.float32)):
            for function, factor in ((jnp.negative, -1.0), (jnp.positive, 1.0)):
                found = weigh(function, jnp.float32(2.0), inputs, 3)
                np.testing.assert_allclose(found["sum"], 2.0 * factor * np.sum(np.asarray(inputs) ** 3))
        assert len(traces) == 2
        weigh(jnp.negative, jnp.float32(1.0), jnp.ones(3), 2)
        assert traces[-1] == 2 and weigh.__name__ == "weigh"
