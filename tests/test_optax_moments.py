"""Adam's second moments read from optax states, against the recursion re-run in NumPy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from volumejax.optax_moments import second_moments

PARAMS = {"layers": [{"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}], "scale": jnp.ones(())}


def gradients(seed, steps):
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS) for _ in range(steps)]


def train(optimizer, grads):
    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def recursion(grads, b2, transform=lambda g: g):
    """nu ← b2·nu + (1 − b2)·g², corrected by 1 − b2^t, in float64."""
    nu = jax.tree.map(lambda p: np.zeros(p.shape), PARAMS)
    for grad in grads:
        square = jax.tree.map(lambda g: transform(np.asarray(g, np.float64)) ** 2, grad)
        nu = jax.tree.map(lambda n, s: b2 * n + (1 - b2) * s, nu, square)
    return jax.tree.map(lambda n: n / (1 - b2 ** len(grads)), nu)


def assert_close(moments, truth):
    assert jax.tree.structure(moments) == jax.tree.structure(PARAMS)
    jax.tree.map(lambda m, t: np.testing.assert_allclose(m, t, rtol=2e-5), moments, truth)


OPTIMIZERS = {
    "adam": (optax.adam(1e-2), None, lambda g: g),
    "adam with schedule": (optax.adam(optax.cosine_decay_schedule(1e-2, 20)), None, lambda g: g),
    "adamw": (optax.adamw(1e-2, b2=0.95), 0.95, lambda g: g),
    "clipped": (optax.chain(optax.clip(0.5), optax.adam(1e-2)), None, lambda g: np.clip(g, -0.5, 0.5)),
    "hyperparameters": (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), None, lambda g: g),
    "accumulated": (optax.MultiSteps(optax.adam(1e-2), 1).gradient_transformation(), None, lambda g: g),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 30])
def test_moments_equal_the_recursion(name, steps):
    optimizer, b2, transform = OPTIMIZERS[name]
    grads = gradients(0, steps)
    params, state = train(optimizer, grads)
    assert_close(second_moments(state, params, b2=b2), recursion(grads, b2 or 0.999, transform))


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), steps=st.integers(1, 5), b2=st.sampled_from([0.0, 0.5, 0.99, 0.9999]))
def test_bias_correction_for_any_decay_rate(seed, steps, b2):
    grads = gradients(seed, steps)
    params, state = train(optax.adam(1e-2, b2=b2), grads)
    assert_close(second_moments(state, params, b2=b2), recursion(grads, b2))


def test_works_under_jit_and_gives_nan_there_before_the_first_update():
    grads = gradients(1, 3)
    params, state = train(optax.adam(1e-2), grads)
    assert_close(jax.jit(second_moments)(state, params), recursion(grads, 0.999))
    untrained = jax.jit(second_moments)(optax.adam(1e-2).init(PARAMS), PARAMS)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(untrained))


def test_leaves_are_matched_by_path_not_by_position():
    grads = gradients(2, 4)
    _, state = train(optax.adam(1e-2), grads)
    as_tuple = {**PARAMS, "layers": tuple(PARAMS["layers"])}
    moments = second_moments(state, as_tuple)
    assert isinstance(moments["layers"], tuple)
    np.testing.assert_allclose(moments["layers"][0]["w"], recursion(grads, 0.999)["layers"][0]["w"], rtol=2e-5)


def trained(optimizer):
    return train(optimizer, gradients(3, 1))[1]


MISUSES = {
    "no Adam": (
        lambda: second_moments(trained(optax.sgd(0.1)), PARAMS),
        "no optax.ScaleByAdamState; .* diagonal_ggn",
    ),
    "two Adams": (
        lambda: second_moments(trained(optax.chain(optax.scale_by_adam(), optax.adam(0.1))), PARAMS),
        "holds 2 Adam states",
    ),
    "count 0": (
        lambda: second_moments(optax.adam(0.1).init(PARAMS), PARAMS),
        "count 0: it holds no moments yet",
    ),
    "missing leaf": (
        lambda: second_moments(trained(optax.adam(0.1)), {**PARAMS, "extra": jnp.ones(2)}),
        r"parameters without moments \['extra'\]",
    ),
    "masked leaf": (
        lambda: second_moments(
            trained(optax.masked(optax.adam(0.1), {"layers": [{"w": True, "b": False}], "scale": True})),
            PARAMS,
        ),
        r"parameters without moments \['layers/0/b'\]",
    ),
    "other shape": (
        lambda: second_moments(trained(optax.adam(0.1)), {**PARAMS, "scale": jnp.ones(2)}),
        r"'scale' has shape \(\) and the parameter has \(2,\)",
    ),
    "b2 of 1": (lambda: second_moments(trained(optax.adam(0.1)), PARAMS, b2=1.0), r"b2 must be in \[0, 1\)"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_a_value_error_with_a_remedy(case):
    call, message = MISUSES[case]
    with pytest.raises(ValueError, match=message):
        call()
