"""Moments read from optax states, against the recursion of each optimizer re-run in NumPy on recorded gradients."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from volumejax.optax_moments import first_moments, second_moments

PARAMS = {
    "layers": [{"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}],
    "conv": jnp.full((4, 2, 3), 0.5),
    "scale": jnp.ones(()),
}
STEPS = 7


def gradients(seed, steps, params=PARAMS):
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(steps)]


def train(optimizer, grads, params=PARAMS):
    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def recursion(grads, leaf_recursion):
    """The recursion of every leaf, in float64, on its own gradients."""
    return jax.tree.map(lambda *leaf: leaf_recursion([np.asarray(g, np.float64) for g in leaf]), *grads)


def mean_square(b2, *, corrected=True, initial=0.0, transform=lambda g: g):
    """nu ← b2·nu + (1 − b2)·g², over 1 − b2^t where corrected."""

    def leaf(grads):
        nu = np.full(grads[0].shape, initial)
        for g in grads:
            nu = b2 * nu + (1 - b2) * transform(g) ** 2
        return nu / (1 - b2 ** len(grads)) if corrected else nu

    return leaf


def mean(b1):
    def leaf(grads):
        mu = np.zeros(grads[0].shape)
        for g in grads:
            mu = b1 * mu + (1 - b1) * g
        return mu / (1 - b1 ** len(grads))

    return leaf


def yogi(grads, b2=0.999):
    nu = np.full(grads[0].shape, 1e-6)
    for g in grads:
        nu = nu - (1 - b2) * np.sign(nu - g**2) * g**2
    return nu / (1 - b2 ** len(grads))


def belief(grads, b1=0.9, b2=0.999):
    mu, nu = np.zeros(grads[0].shape), np.zeros(grads[0].shape)
    for g in grads:
        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (g - mu) ** 2 + 1e-16
    return nu / (1 - b2 ** len(grads))


def acprop(grads, b1=0.9, b2=0.999):
    """As `belief`, about the mean before the step."""
    mu, nu = np.zeros(grads[0].shape), np.zeros(grads[0].shape)
    for g in grads:
        nu = b2 * nu + (1 - b2) * (g - mu) ** 2 + 1e-16
        mu = b1 * mu + (1 - b1) * g
    return nu / (1 - b2 ** len(grads))


def novograd(grads, b2=0.25):
    norm = np.sum(grads[0] ** 2)
    for g in grads[1:]:
        norm = b2 * norm + (1 - b2) * np.sum(g**2)
    return np.full(grads[0].shape, norm / grads[0].size)


def adafactor(grads):
    """Means over the longest axis and over the second longest, each decayed by 1 − t^−0.8."""
    shape = grads[0].shape
    if len(shape) < 2:
        nu = 0.0
        for t, g in enumerate(grads, start=1):
            nu = (1 - t**-0.8) * nu + t**-0.8 * g**2
        return nu
    short, long = np.argsort(shape)[-2:]
    rows, columns = 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        rows = (1 - t**-0.8) * rows + t**-0.8 * np.mean(g**2, axis=long, keepdims=True)
        columns = (1 - t**-0.8) * columns + t**-0.8 * np.mean(g**2, axis=short, keepdims=True)
    return rows * columns / np.mean(rows, axis=short, keepdims=True)


def in_pairs(leaf_recursion):
    """Of the means of two gradients each; one left over waits for its pair."""
    return lambda grads: leaf_recursion([(a + b) / 2 for a, b in zip(grads[::2], grads[1::2], strict=False)])


ADAM = mean_square(0.999)
OPTIMIZERS = {
    "adam": (optax.adam(1e-2), ADAM, {}),
    "adam with schedule": (optax.adam(optax.cosine_decay_schedule(1e-2, 20)), ADAM, {}),
    "adam with another b2": (optax.adam(1e-2, b2=0.9), mean_square(0.9), {"b2": 0.9}),
    "adamw": (optax.adamw(1e-2, b2=0.95), mean_square(0.95), {"b2": 0.95}),
    "nadam": (optax.nadam(1e-2), ADAM, {}),
    "nadamw": (optax.nadamw(1e-2), ADAM, {}),
    "amsgrad": (optax.amsgrad(1e-2), ADAM, {}),
    "lamb": (optax.lamb(1e-2), ADAM, {}),
    "yogi": (optax.yogi(1e-2), yogi, {}),
    "adabelief": (optax.adabelief(1e-2), belief, {}),
    "ademamix": (optax.contrib.ademamix(1e-2), ADAM, {}),
    "rmsprop": (optax.rmsprop(1e-2), mean_square(0.9, corrected=False), {}),
    "rmsprop from 1": (optax.rmsprop(1e-2, initial_scale=1.0), mean_square(0.9, corrected=False, initial=1.0), {}),
    "rmsprop, corrected": (optax.rmsprop(1e-2, bias_correction=True), mean_square(0.9), {}),
    "rmsprop, centred": (optax.rmsprop(1e-2, centered=True), mean_square(0.9, corrected=False), {}),
    "rmsprop, centred and corrected": (
        optax.rmsprop(1e-2, decay=0.8, centered=True, bias_correction=True), mean_square(0.8), {"b2": 0.8},
    ),
    "rmsprop with momentum": (optax.rmsprop(1e-2, momentum=0.9), mean_square(0.9, corrected=False), {}),
    "adadelta": (optax.adadelta(1e-2), mean_square(0.9, corrected=False), {}),
    "novograd": (optax.novograd(1e-2), novograd, {}),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=2), adafactor, {}),
    "adafactor, nothing factored": (optax.adafactor(1e-2, factored=False), lambda grads: unfactored(grads), {}),
    "clipped": (
        optax.chain(optax.clip(0.5), optax.adam(1e-2)),
        mean_square(0.999, transform=lambda g: np.clip(g, -0.5, 0.5)), {},
    ),
    "named chain": (optax.named_chain(("clip", optax.clip(9.0)), ("adam", optax.adam(1e-2))), ADAM, {}),
    "hyperparameters": (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, b2=0.9), mean_square(0.9), {}),
    "hyperparameters of rmsprop": (
        optax.inject_hyperparams(optax.rmsprop)(1e-2, decay=0.7, bias_correction=True), mean_square(0.7), {},
    ),
    "accumulated": (
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), in_pairs(ADAM), {},
    ),
    "if finite": (optax.apply_if_finite(optax.adam(1e-2), 3), ADAM, {}),
    "schedule free": (optax.contrib.schedule_free_adamw(1e-2), ADAM, {}),
    "schedule free, another b2": (optax.contrib.schedule_free_adamw(1e-2, b2=0.9), mean_square(0.9), {"b2": 0.9}),
    "schedule free with hyperparameters": (
        optax.inject_hyperparams(optax.contrib.schedule_free_adamw)(1e-2, b2=0.9), mean_square(0.9), {},
    ),
    "masked clipping": (optax.chain(optax.masked(optax.clip(9.0), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
                                    optax.adam(1e-2)), ADAM, {}),
    "schedule free rmsprop": (
        optax.contrib.schedule_free(optax.rmsprop(1e-2, bias_correction=True), 1e-2), mean_square(0.9), {"b2": 0.9},
    ),
    "mechanic": (optax.contrib.mechanize(optax.adam(1e-2)), ADAM, {}),
    "mechanic over rmsprop": (
        optax.contrib.mechanize(optax.rmsprop(1e-2, bias_correction=True)), mean_square(0.9), {},
    ),
    "acprop": (optax.contrib.acprop(1e-2), acprop, {}),
}  # fmt: skip


def unfactored(grads):
    nu = 0.0
    for t, g in enumerate(grads, start=1):
        nu = (1 - t**-0.8) * nu + t**-0.8 * g**2
    return nu


def assert_close(moments, truth, rtol=3e-5):
    assert jax.tree.structure(moments) == jax.tree.structure(PARAMS)
    jax.tree.map(lambda m, t: np.testing.assert_allclose(m, t, rtol=rtol, atol=1e-7), moments, truth)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_moments_equal_the_recursion(name):
    optimizer, leaf_recursion, given = OPTIMIZERS[name]
    grads = gradients(0, STEPS)
    params, state = train(optimizer, grads)
    truth = recursion(grads, leaf_recursion)
    assert_close(second_moments(state, params, **given), truth)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(second_moments(state, params, **given)))
    assert_close(jax.jit(lambda s, p: second_moments(s, p, **given))(state, params), truth)


@pytest.mark.parametrize(
    ("name", "b1"),
    [("adam", 0.9), ("nadamw", 0.9), ("amsgrad", 0.9), ("lamb", 0.9), ("yogi", 0.9), ("adabelief", 0.9),
     ("ademamix", 0.9), ("hyperparameters", 0.9)],
)  # fmt: skip
def test_first_moments_equal_the_recursion(name, b1):
    grads = gradients(0, STEPS)
    params, state = train(OPTIMIZERS[name][0], grads)
    assert_close(first_moments(state, params), recursion(grads, mean(b1)))


def test_first_moments_with_another_decay_rate_and_in_half_precision():
    grads = gradients(0, STEPS)
    params, state = train(optax.adam(1e-2, b1=0.5, mu_dtype=jnp.bfloat16), grads)
    moments = first_moments(state, params, b1=0.5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moments))
    # Rounded to 8 bits at each step, so to 2⁻⁸ times the largest of the sum's terms.
    jax.tree.map(lambda m, t: np.testing.assert_allclose(m, t, atol=0.03), moments, recursion(grads, mean(0.5)))


def test_first_moment_of_a_centred_rmsprop():
    grads = gradients(0, STEPS)
    params, state = train(optax.rmsprop(1e-2, centered=True, bias_correction=True), grads)
    assert_close(first_moments(state, params), recursion(grads, mean(0.9)))


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), steps=st.integers(1, 5), b2=st.sampled_from([0.0, 0.5, 0.99, 0.9999]))
def test_bias_correction_for_any_decay_rate(seed, steps, b2):
    grads = gradients(seed, steps)
    params, state = train(optax.adam(1e-2, b2=b2), grads)
    assert_close(second_moments(state, params, b2=b2), recursion(grads, mean_square(b2)), rtol=2e-5)


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.novograd(1e-2), optax.adafactor(1e-2)])
def test_nan_under_jit_before_the_first_update(optimizer):
    untrained = jax.jit(second_moments)(optimizer.init(PARAMS), PARAMS)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(untrained))


def test_gradients_that_are_not_finite_do_not_count():
    grads = gradients(4, STEPS)
    spoilt = [*grads[:3], jax.tree.map(lambda g: g + np.float32(np.nan), grads[0]), *grads[3:]]
    params, state = train(optax.apply_if_finite(optax.adam(1e-2), 3), spoilt)
    assert_close(second_moments(state, params), recursion(grads, ADAM))


def test_moments_of_projected_gradients_are_refused():
    optimizer = optax.contrib.galore(1e-2)
    with pytest.raises(ValueError, match=r"GaLore keeps the moments of projected gradients.*use curvature instead"):
        second_moments(optimizer.init(PARAMS), PARAMS)


def test_lookahead_moments_are_those_of_the_fast_parameters():
    grads = gradients(5, STEPS)
    optimizer = optax.lookahead(optax.adam(1e-2), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    params, state = train(optimizer, grads, params)
    assert_close(second_moments(state, params.fast), recursion(grads, ADAM))


def test_states_that_share_the_parameters_are_put_together():
    grads = gradients(6, STEPS)
    labels = {"layers": [{"w": "adam", "b": "rms"}], "conv": "factored", "scale": "injected"}
    optimizer = optax.partition(
        {
            "adam": optax.adam(1e-2),
            "rms": optax.rmsprop(1e-2),
            "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2),
            "injected": optax.inject_hyperparams(optax.adam)(1e-2, b2=0.8),
        },
        labels,
    )
    params, state = train(optimizer, grads)
    kinds = {
        "adam": ADAM,
        "rms": mean_square(0.9, corrected=False),
        "factored": adafactor,
        "injected": mean_square(0.8),
    }
    truth = jax.tree.map(lambda kind, *leaf: kinds[kind]([np.asarray(g, np.float64) for g in leaf]), labels, *grads)
    assert_close(second_moments(state, params), truth)


def test_leaves_are_matched_by_path_not_by_position():
    grads = gradients(2, 4)
    _, state = train(optax.adam(1e-2), grads)
    as_tuple = {**PARAMS, "layers": tuple(PARAMS["layers"])}
    moments = second_moments(state, as_tuple)
    assert isinstance(moments["layers"], tuple)
    truth = recursion(grads, ADAM)["layers"][0]["w"]
    np.testing.assert_allclose(moments["layers"][0]["w"], truth, rtol=2e-5)


def test_parameters_named_like_fields_of_a_state_are_not_taken_for_one():
    params = {"mu": jnp.ones(3), "nu": jnp.ones(3), "count": jnp.ones(3)}
    grads = gradients(7, 4, params)
    optimizer = optax.MultiSteps(optax.chain(optax.trace(0.9), optax.adam(1e-2)), 1).gradient_transformation()
    params, state = train(optimizer, grads, params)
    moments = second_moments(state, params)
    assert moments.keys() == params.keys() and all(np.all(np.isfinite(leaf)) for leaf in moments.values())


def trained(optimizer):
    return train(optimizer, gradients(3, 1))[1]


HALF = {"layers": [{"w": True, "b": False}], "conv": True, "scale": True}
LABELS = jax.tree.map(lambda keep: "train" if keep else "freeze", HALF)
MISUSES = {
    "sgd": (lambda: second_moments(trained(optax.sgd(0.1)), PARAMS), "holds no second moments.*diagonal_ggn"),
    "sgd with momentum": (
        lambda: second_moments(trained(optax.sgd(0.1, momentum=0.9)), PARAMS),
        "TraceState.* holds no second moments.*diagonal_ggn",
    ),
    "lion": (
        lambda: second_moments(trained(optax.lion(0.1)), PARAMS),
        "ScaleByLionState.* holds no second moments.*diagonal_ggn",
    ),
    "sm3": (lambda: second_moments(optax.sm3(0.1).init(PARAMS), PARAMS), "ScaleBySM3State"),
    "adagrad": (lambda: second_moments(trained(optax.adagrad(0.1)), PARAMS), "ScaleByRssState"),
    "two Adams": (
        lambda: second_moments(trained(optax.chain(optax.scale_by_adam(), optax.adam(0.1))), PARAMS),
        r"several second moments \(ScaleByAdamState, ScaleByAdamState\) of the parameters \['conv'",
    ),
    "count 0": (
        lambda: second_moments(optax.adam(0.1).init(PARAMS), PARAMS),
        "count 0: it holds no moments yet",
    ),
    "count 0 of adafactor": (
        lambda: second_moments(optax.adafactor(0.1).init(PARAMS), PARAMS),
        "FactoredState has count 0",
    ),
    "missing leaf": (
        lambda: second_moments(trained(optax.adam(0.1)), {**PARAMS, "extra": jnp.ones(2)}),
        r"parameters without moments \['extra'\]",
    ),
    "extra leaf": (
        lambda: second_moments(trained(optax.adam(0.1)), {"scale": PARAMS["scale"]}),
        r"moments without parameters \['conv', 'layers/0/b', 'layers/0/w'\]",
    ),
    "masked leaf": (
        lambda: second_moments(trained(optax.masked(optax.adam(0.1), HALF)), PARAMS),
        r"parameters without moments \['layers/0/b'\] \(masked, frozen",
    ),
    "frozen leaf": (
        lambda: second_moments(
            trained(optax.partition({"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, LABELS)), PARAMS
        ),
        r"parameters without moments \['layers/0/b'\] \(masked, frozen",
    ),
    "other shape": (
        lambda: second_moments(trained(optax.adam(0.1)), {**PARAMS, "scale": jnp.ones(2)}),
        r"'scale' has shape \(\) and the parameter has \(2,\)",
    ),
    "other shape, factored": (
        lambda: second_moments(
            trained(optax.adafactor(0.1, min_dim_size_to_factor=2)), {**PARAMS, "conv": jnp.ones((4, 4, 4))}
        ),
        r"'conv' has shape \(1,\) and the parameter has \(4, 4, 4\)",
    ),
    "b2 of 1": (lambda: second_moments(trained(optax.adam(0.1)), PARAMS, b2=1.0), r"b2 must be in \[0, 1\)"),
    "b2 rounded to 1": (
        lambda: second_moments(
            trained(optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.bfloat16)(0.1)), PARAMS
        ),
        r"the injected b2 must be in \[0, 1\), got 1; .*hyperparam_dtype",
    ),
    "no first moment": (
        lambda: first_moments(trained(optax.rmsprop(0.1)), PARAMS),
        "ScaleByRmsState.* holds no running mean of the gradient",
    ),
    "no first moment in sgd": (
        lambda: first_moments(trained(optax.sgd(0.1, momentum=0.9)), PARAMS),
        "TraceState.* holds no running mean of the gradient",
    ),
    "b1 below 0": (lambda: first_moments(trained(optax.adam(0.1)), PARAMS, b1=-0.1), r"b1 must be in \[0, 1\)"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_a_value_error_with_a_remedy(case):
    call, message = MISUSES[case]
    with pytest.raises(ValueError, match=message):
        call()
