"""Behaviours against NumPy formulas in float64, over masks, micro-batches, dtypes and extreme logits."""

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from volumejax import behaviours

FACTORIES = ["kl_to_anchor", "loss", "loss_gap", "error_rate"]


def table(logits, rows):
    """A network whose parameters are its logits, so that tests choose the logits themselves."""
    return jnp.asarray(logits)[rows]


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["w"] + params["b"].reshape((1,) * (inputs.ndim - 1) + (-1,)))
    return hidden @ params["v"]


def network_problem(seed, shape):
    """Return anchor, perturbed parameters, inputs, labels and mask for logits of shape [*shape, 5]."""
    rng = np.random.default_rng(seed)
    anchor = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=(4, 5))}
    anchor = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in anchor.items()}
    params = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), anchor)
    inputs = jnp.asarray(rng.normal(size=(*shape, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, size=shape))
    mask = jnp.asarray(rng.random(shape) < 0.7).at[(0,) * len(shape)].set(True)
    return anchor, params, inputs, labels, mask


def make(name, apply_fn, anchor, inputs, labels, **options):
    factory = getattr(behaviours, name)
    if name == "kl_to_anchor":
        return factory(apply_fn, anchor, inputs, **options)
    if name == "loss_gap":
        return factory(apply_fn, anchor, inputs, labels, **options)
    return factory(apply_fn, inputs, labels, **options)


def kl_table(anchor_logits, logits, **options):
    cost = behaviours.kl_to_anchor(table, anchor_logits, np.arange(len(anchor_logits)), **options)
    return cost, cost(jnp.asarray(logits))


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl64(anchor_logits, logits, mask=None):
    log_p0, log_p = log_softmax64(anchor_logits), log_softmax64(logits)
    per_position = np.sum(np.exp(log_p0) * (log_p0 - log_p), axis=-1)
    return np.mean(per_position if mask is None else per_position[np.asarray(mask)])


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1,), (6,), (5, 3)]),
    classes=st.sampled_from([2, 7]),
    log_scale=st.floats(-6.0, 3.0),
    batch_size=st.sampled_from([None, 1, 4]),
    masked=st.booleans(),
)
def test_kl_equals_the_float64_formula(seed, shape, classes, log_scale, batch_size, masked):
    rng = np.random.default_rng(seed)
    anchor_logits = rng.normal(scale=2.0, size=(*shape, classes)).astype(np.float32)
    change = rng.normal(scale=np.exp(log_scale), size=anchor_logits.shape)
    logits = (anchor_logits + change).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[(0,) * len(shape)] = True
    mask = mask if masked else None
    _, value = kl_table(anchor_logits, logits, mask=mask, batch_size=batch_size)
    assert value.dtype == jnp.float32 and value.shape == ()
    np.testing.assert_allclose(value, kl64(anchor_logits, logits, mask), rtol=3e-5, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_networks_are_measured_in_float32(dtype):
    rng = np.random.default_rng(0)
    anchor_logits = jnp.asarray(rng.normal(size=(512, 10)), dtype)
    logits = anchor_logits + jnp.asarray(0.05 * rng.normal(size=(512, 10)), dtype)
    cost, value = kl_table(anchor_logits, logits)
    assert value.dtype == jnp.float32 and cost.examples.anchor_logits.dtype == dtype
    truth = kl64(anchor_logits.astype(jnp.float32), logits.astype(jnp.float32))
    np.testing.assert_allclose(value, truth, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_anchor_has_cost_and_gradient_zero(batch_size):
    anchor, _, inputs, _, _ = network_problem(0, (10,))
    cost = behaviours.kl_to_anchor(network, anchor, inputs, batch_size=batch_size)
    # Two programs may round the same logits differently, by a few eps each; the cost is their square.
    eps = float(jnp.finfo(jnp.float32).eps)
    assert 0.0 <= float(cost(anchor)) <= (4 * eps) ** 2
    assert all(np.all(np.abs(leaf) <= 16 * eps) for leaf in jax.tree.leaves(jax.grad(cost)(anchor)))


@pytest.mark.parametrize("name", FACTORIES)
def test_nan_logits_give_nan(name):
    logits = jnp.zeros((4, 3))
    cost = make(name, table, logits, jnp.arange(4), jnp.array([0, 1, 2, 0]), batch_size=3)
    assert np.isfinite(cost(logits))
    for row in range(4):
        assert np.isnan(cost(logits.at[row, 1].set(jnp.nan)))


@pytest.mark.parametrize(("name", "shape"), [*((name, (9,)) for name in FACTORIES), ("kl_to_anchor", (5, 3))])
def test_micro_batches_change_nothing_but_rounding(name, shape):
    anchor, params, inputs, labels, mask = network_problem(2, shape)
    whole = make(name, network, anchor, inputs, labels, mask=mask)
    for batch_size in (2, shape[0], 100):
        batched = make(name, network, anchor, inputs, labels, mask=mask, batch_size=batch_size)
        np.testing.assert_allclose(batched(params), whole(params), rtol=1e-6)
    batched = make(name, network, anchor, inputs, labels, mask=mask, batch_size=4)
    for a, b in zip(*map(jax.tree.leaves, (jax.grad(batched)(params), jax.grad(whole)(params))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("padding", "batch_size"), [(1e4, None), (np.nan, 4), (np.inf, None)])
@pytest.mark.parametrize("name", FACTORIES)
def test_masked_positions_count_for_nothing(name, padding, batch_size):
    rng = np.random.default_rng(3)
    anchor_logits, logits = rng.normal(size=(2, 6, 3)).astype(np.float32)
    labels = rng.integers(0, 3, size=6)
    plain = make(name, table, anchor_logits, jnp.arange(6), labels)
    pad = np.full((5, 3), padding, np.float32)
    masked = make(
        name,
        table,
        np.concatenate([anchor_logits, pad]),
        jnp.arange(11),
        np.concatenate([labels, np.full(5, -100)]),
        mask=np.repeat([1, 0], [6, 5]),
        batch_size=batch_size,
    )
    padded = jnp.concatenate([jnp.asarray(logits), pad + 1.0])
    value, gradient = jax.value_and_grad(masked)(padded)
    value_plain, gradient_plain = jax.value_and_grad(plain)(jnp.asarray(logits))
    np.testing.assert_allclose(value, value_plain, rtol=1e-6)
    np.testing.assert_allclose(gradient[:6], gradient_plain, rtol=1e-5, atol=1e-8)
    assert np.all(np.asarray(gradient[6:]) == 0.0)


@pytest.mark.parametrize("name", FACTORIES)
def test_on_selects_examples_under_jit(name):
    anchor, params, inputs, labels, mask = network_problem(4, (8, 2))
    cost = make(name, network, anchor, inputs, labels, mask=mask, batch_size=3)
    indices = jnp.array([5, 0, 0, 7])
    subset = make(name, network, anchor, inputs[indices], labels[indices], mask=mask[indices])
    on = eqx.filter_jit(lambda c, i, p: c.on(i)(p))
    np.testing.assert_allclose(on(cost, indices, params), subset(params), rtol=1e-6)
    np.testing.assert_allclose(cost.on([3])(params), cost.on(jnp.array([3, 3]))(params), rtol=1e-6)


@pytest.mark.parametrize("indices", [[], [[0]], [0.5], [True, False], [8], [-1], 3])
def test_on_rejects_what_selects_no_examples(indices):
    cost = behaviours.kl_to_anchor(table, jnp.zeros((8, 2)), jnp.arange(8))
    with pytest.raises(ValueError, match="indices must"):
        cost.on(indices)


@pytest.mark.parametrize("name", ["kl_to_anchor", "loss_gap"])
def test_a_recomputed_anchor_gives_the_cached_result(name):
    anchor, params, inputs, labels, mask = network_problem(5, (7,))
    cached = make(name, network, anchor, inputs, labels, mask=mask, batch_size=3)
    fresh = make(name, network, anchor, inputs, labels, mask=mask, batch_size=3, recompute_anchor=True)
    assert fresh.examples.anchor_logits is None
    np.testing.assert_allclose(fresh(params), cached(params), rtol=1e-6)
    gradients = jax.grad(fresh)(params)["w"], jax.grad(cached)(params)["w"]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_a_new_anchor_does_not_recompile():
    traces = 0

    @eqx.filter_jit
    def evaluate(cost, params):
        nonlocal traces
        traces += 1
        return cost(params)

    anchor, params, inputs, _, _ = network_problem(6, (7,))
    first = evaluate(behaviours.kl_to_anchor(network, anchor, inputs), params)
    second = evaluate(behaviours.kl_to_anchor(network, params, inputs + 1.0), anchor)
    assert traces == 1 and first != second


def test_costs_map_over_parameters():
    anchor, params, inputs, _, _ = network_problem(7, (7,))
    cost = behaviours.kl_to_anchor(network, anchor, inputs, batch_size=2)
    both = jax.vmap(cost)(jax.tree.map(lambda a, b: jnp.stack([a, b]), anchor, params))
    np.testing.assert_allclose(both, [0.0, cost(params)], rtol=1e-5, atol=1e-12)


def test_inputs_that_the_network_does_not_take_are_named():
    fails = r"apply_fn\(params, inputs\) fails on inputs of shape \[4, 5\] \(TypeError: .*\); pass the parameters"
    with pytest.raises(ValueError, match=fails):
        behaviours.kl_to_anchor(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"fails on inputs of shape \[4, 3\] \(KeyError: 'w'\)"):
        behaviours.kl_to_anchor(lambda params, x: x @ params["w"], {}, jnp.ones((4, 3)))


def test_inputs_may_be_a_pytree():
    inputs = {"x": jnp.ones((4, 3)), "scale": jnp.arange(1.0, 5.0)}

    def apply_fn(w, data):
        return data["scale"][:, None] * (data["x"] @ w)

    anchor = jnp.arange(6.0).reshape(3, 2)
    cost = behaviours.kl_to_anchor(apply_fn, anchor, inputs, batch_size=3)
    truth = kl64(apply_fn(anchor, inputs), apply_fn(0.9 * anchor, inputs))
    np.testing.assert_allclose(cost(0.9 * anchor), truth, rtol=1e-5)


def kl(logits, inputs, apply_fn=table, **options):
    return lambda: behaviours.kl_to_anchor(apply_fn, logits, inputs, **options)


def loss(labels):
    return lambda: behaviours.loss(table, ROWS, labels)


ROWS, OK = np.arange(3), np.ones((3, 2), np.float32)
MISUSES = {
    "leading axes differ": (kl(OK, (np.ones(3), np.ones(4))), "common leading axis"),
    "no leading axis": (kl(OK, np.float32(1.0)), "common leading axis"),
    "empty data": (kl(OK, ROWS[:0]), "no examples"),
    "mask of classes": (kl(OK, ROWS, mask=np.ones((3, 2), bool)), "mask must have the shape"),
    "mask too short": (kl(OK, ROWS, mask=np.ones(2, bool)), "mask has shape"),
    "mask of floats": (kl(OK, ROWS, mask=np.ones(3)), "mask must be boolean"),
    "mask all False": (kl(OK, ROWS, mask=np.zeros(3, bool)), "no position"),
    "no class axis": (kl(OK[:, 0], ROWS), "logits of shape"),
    "one class": (kl(OK[:, :1], ROWS), r"two logits \[0, z\]"),
    "logits transposed": (kl(OK, ROWS, lambda w, x: table(w, x).T), "leading axis"),
    "integer logits": (kl(jnp.ones((3, 2), int), ROWS), "floating-point logits"),
    "tuple of outputs": (kl(OK, ROWS, lambda w, x: (w, x)), "one array of logits"),
    "batch_size 0": (kl(OK, ROWS, batch_size=0), "batch_size must"),
    "unhashable": (kl(OK, ROWS, eqx.nn.Linear(2, 2, key=jax.random.key(0))), "not hashable"),
    "float labels": (loss(np.ones(3)), "labels must be integers"),
    "labels too short": (loss(np.ones(2, int)), "labels have shape"),
    "one-hot labels": (
        lambda: behaviours.loss_gap(table, OK, ROWS, np.ones((3, 2), int)),
        "labels must have the shape of the logits",
    ),
    "late label check": (
        lambda: loss(np.ones((3, 2), int))()(OK),
        "labels must have the shape of the logits",
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_a_value_error_with_a_remedy(case):
    call, message = MISUSES[case]
    with pytest.raises(ValueError, match=message):
        call()
