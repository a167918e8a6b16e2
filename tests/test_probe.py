"""The probe in training loops of three model libraries: compiled once, no trace left in the training."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import volumejax as vj

INPUTS = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, size=32)
KEY = jax.random.key(7)
PRIOR = vj.Gaussian(1.0)
STEPS = 6
EVERY = 3
NUM_RAYS = 32
CUTOFF = 0.05
KEYS = {
    "log_mass", "std_error", "lower", "prior_term", "volume_term", "mean_log_weight", "std_log_weight",
    "max_log_weight", "noise", "ess", "pareto_k", "converged", "violated", "evaluations",
}  # fmt: skip


def error(logits, labels=LABELS):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def make_probe(apply_fn, **options):
    def behaviour(anchor, inputs):
        return vj.kl_to_anchor(apply_fn, anchor, inputs)

    return vj.VolumeProbe(behaviour, PRIOR, CUTOFF, every=EVERY, num_rays=NUM_RAYS, **options)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(5)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


@pytest.fixture
def compilations():
    """Counts programs compiled since it was last set to 0."""
    count = [0]

    def listen(event, duration_secs, **details):
        del duration_secs, details
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def by_linen(probed):
    """A jitted step with donated buffers, directions from Adam's moments."""
    model = Linen()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.05))
    proposal = functools.partial(vj.adam_proposal, beta=100.0, damping=0.1)
    probe = make_probe(lambda params, x: model.apply({"params": params}, x), proposal=proposal)

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(state, inputs):
        loss, grads = jax.value_and_grad(lambda p: error(model.apply({"params": p}, inputs)))(state.params)
        state = state.apply_gradients(grads=grads)
        metrics = probe(KEY, state.step, state.params, inputs, state.opt_state) if probed else {}
        return state, {"loss": loss, **metrics}

    for _ in range(STEPS):
        state, metrics = step(state, INPUTS)
        yield metrics, state.params


def by_nnx(probed):
    """Under `nnx.jit`; the model is split where the probe looks at it."""
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.rmsprop(0.01), wrt=nnx.Param)
    graph = nnx.graphdef(model)
    probe = make_probe(lambda state, x: nnx.merge(graph, state)(x))

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, inputs):
        loss, grads = nnx.value_and_grad(lambda model: error(model(inputs)))(model)
        optimizer.update(model, grads)
        params = nnx.state(model, nnx.Param)
        metrics = probe(KEY, optimizer.step[...], params, inputs) if probed else {}
        return {"loss": loss, **metrics}

    for _ in range(STEPS):
        metrics = step(model, optimizer, INPUTS)  # pyright: ignore[reportCallIssue] - nnx.jit types it as a method
        yield metrics, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def by_equinox(probed):
    """From the host, with a rematerialised model in half precision."""
    model = eqx.nn.MLP(4, 3, 5, 1, jax.nn.tanh, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = optax.adam(0.05)
    state = optimizer.init(params)

    def apply_fn(params, x):
        one = jax.checkpoint(lambda params, x: eqx.combine(params, rest)(x))
        return jax.vmap(one, in_axes=(None, 0))(params, x)

    probe = make_probe(apply_fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, inputs):
        loss, grads = jax.value_and_grad(lambda p: error(apply_fn(p, inputs.astype(jnp.bfloat16))))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for count in range(1, STEPS + 1):
        params, state, loss = step(params, state, INPUTS)
        metrics = probe(KEY, count, params, INPUTS, state) if probed else {}
        yield {"loss": loss, **metrics}, params


LIBRARIES = {"linen": by_linen, "nnx": by_nnx, "equinox": by_equinox}


def run(loop, compilations=None):
    """The metrics and the parameters of every step, and how many programs were compiled at the first and after it."""
    chex.clear_trace_counter()
    steps, first, later = [], 0, 0
    for metrics, params in loop:
        steps.append(jax.device_get((metrics, params)))
        if compilations is not None:
            first, later = (compilations[0], 0) if len(steps) == 1 else (first, later + compilations[0])
            compilations[0] = 0
    return [metrics for metrics, _ in steps], [params for _, params in steps], (first, later)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_training_goes_on_as_without_the_probe_and_nothing_compiles_again(library, compilations):
    metrics, params, (first, later) = run(LIBRARIES[library](True), compilations)
    plain, plain_params, _ = run(LIBRARIES[library](False))
    assert first > 0 and later == 0
    assert [float(m["loss"]) for m in metrics] == [float(m["loss"]) for m in plain]
    assert len({float(m["loss"]) for m in metrics}) == STEPS
    jax.tree.map(np.testing.assert_array_equal, params, plain_params)

    for count, values in enumerate(metrics, start=1):
        assert values.keys() == {"loss"} | KEYS
        assert all(np.shape(value) == () for value in values.values())
        assert all(np.isnan(values[name]) == (count % EVERY != 0) for name in KEYS)
    measured = [values for count, values in enumerate(metrics, start=1) if count % EVERY == 0]
    assert all(values["converged"] == 1.0 and values["violated"] == 0.0 for values in measured)
    assert all(values["lower"] <= values["log_mass"] < 0.0 for values in measured)
    # Half-precision weights, unless they are widened, leave a noise of more than a nat here.
    assert all(values["noise"] < 0.01 for values in measured)
    assert measured[0]["log_mass"] != measured[1]["log_mass"]


def quadratic(anchor, scale):
    return lambda w: 0.5 * jnp.sum(scale * (w - anchor) ** 2)


@pytest.fixture(scope="module")
def probe():
    return vj.VolumeProbe(quadratic, vj.Gaussian(1.0), 0.02, every=10)


def test_values_are_those_of_ray_volume_and_nothing_compiles_for_another_anchor(probe, compilations):
    anchor, scale = jnp.linspace(0.0, 0.1, 6), jnp.linspace(0.5, 2.0, 6)
    far, steep = anchor + 0.5, 2.0 * scale
    first = jax.device_get(probe(KEY, 0, anchor, scale))
    assert compilations[0] > 0
    compilations[0] = 0
    moved = jax.device_get(probe(KEY, 20, far, steep))
    between = jax.device_get(probe(KEY, np.int64(21), anchor, scale))
    again = jax.device_get(probe(KEY, 0, anchor, scale))
    assert compilations[0] == 0 and again == first
    assert all(np.isnan(value) for value in between.values())

    for step, values, here, factor in ((0, first, anchor, scale), (20, moved, far, steep)):
        estimate = vj.ray_volume(
            jax.random.fold_in(KEY, step), quadratic(here, factor), here, vj.Gaussian(1.0), cutoff=0.02, num_rays=64
        )
        for name in ("log_mass", "std_error", "lower", "prior_term", "mean_log_weight", "ess", "pareto_k"):
            np.testing.assert_allclose(values[name], getattr(estimate, name), rtol=1e-4, atol=1e-4)
        assert values["evaluations"] == estimate.evaluations


def test_the_count_of_compilations_tells_a_new_behaviour(compilations):
    """What the tests above rely on: a probe that does compile again is seen."""
    anchor, scale = jnp.linspace(0.0, 0.1, 6), jnp.ones(6)
    for _ in range(2):
        again = vj.VolumeProbe(lambda *both: quadratic(*both), vj.Gaussian(1.0), 0.02, every=10, num_rays=8)
        compilations[0] = 0
        probed = jax.device_get(again(KEY, 0, anchor, scale))
        assert compilations[0] > 0 and np.isfinite(probed["log_mass"])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, scale):
        return again(KEY, 0, params, scale)["log_mass"]

    chex.clear_trace_counter()
    step(anchor, scale)
    step(anchor + 1.0, 2.0 * scale)
    with pytest.raises(AssertionError, match="traced"):
        step(anchor.astype(jnp.bfloat16), scale)


def test_due_steps(probe):
    assert [step for step in range(25) if probe.due(step)] == [0, 10, 20]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda probe: vj.VolumeProbe(quadratic, PRIOR, 0.1, every=0), "every must be at least 1, got 0"),
        (lambda probe: vj.VolumeProbe(quadratic, PRIOR, 0.1, num_rays=0), "num_rays must be at least 1, got 0"),
        (
            lambda probe: vj.VolumeProbe(vj.loss(jnp.dot, jnp.ones((3, 2)), jnp.zeros(3, int)), PRIOR, 0.1),
            "got the cost of one network; for instance lambda params, inputs: kl_to_anchor",
        ),
        (lambda probe: vj.VolumeProbe(quadratic, PRIOR, 0.1, proposal="adam"), "got str; pass Isotropic"),
        (lambda probe: vj.VolumeProbe(quadratic, PRIOR, 0.1, proposal=vj.Isotropic), "got the class Isotropic, not an"),
        (lambda probe: vj.VolumeProbe(quadratic, vj.Gaussian, 0.1), "prior must be .*, got the class Gaussian"),
        (lambda probe: vj.VolumeProbe(quadratic, 0.5, 0.1), "prior must be .*, got float"),
        (
            lambda probe: vj.VolumeProbe(lambda w, data: jnp.sum(w), PRIOR, 0.1)(KEY, 0, jnp.ones(2)),
            "must return a cost, got .*; for instance lambda",
        ),
        (lambda probe: probe(KEY, 1.0, jnp.ones(2)), "step must be one whole number, got float"),
        (
            lambda probe: probe(KEY, jnp.arange(2), jnp.ones(2)),
            r"step must be one whole number, got int32 of shape \(2,",
        ),
        (lambda probe: probe(jax.random.key(0, impl="rbg"), 1, jnp.ones(2)), "must be a threefry key"),
        (lambda probe: probe(KEY, 1, {"w": np.arange(2)}), "not a real floating-point array"),
    ],
)
def test_misuse_is_refused_with_a_remedy(probe, call, message):
    with pytest.raises(ValueError, match=message):
        call(probe)


def test_weights_or_moments_that_are_no_numbers_give_no_number(probe):
    """Not −inf, which would pass for a bound."""
    broken = probe(KEY, 0, jnp.ones(6).at[2].set(jnp.nan), jnp.ones(6))
    early = eqx.tree_at(lambda p: p.proposal, probe, functools.partial(vj.adam_proposal, beta=10.0))
    before = early(KEY, 0, jnp.ones(6), jnp.ones(6), optax.adam(0.1).init(jnp.ones(6)))
    adam = optax.adam(0.1)
    _, spoilt = adam.update(jnp.ones(6).at[1].set(1e30), adam.init(jnp.ones(6)))
    after = early(KEY, 0, jnp.ones(6), jnp.ones(6), spoilt)
    assert broken.keys() == before.keys() == after.keys() == KEYS
    assert all(np.isnan(value) for value in [*broken.values(), *before.values(), *after.values()])


def test_a_proposal_function_without_a_state_is_an_error(probe):
    with pytest.raises(ValueError, match="opt_state is missing; pass the state of the optimizer"):
        eqx.tree_at(lambda p: p.proposal, probe, vj.adam_proposal)(KEY, 0, jnp.ones(2), jnp.ones(2))
