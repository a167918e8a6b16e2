"""Optax states as the model libraries and checkpoints hold them, against the recursion re-run in NumPy."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from volumejax.optax_moments import first_moments, second_moments
from volumejax.optax_states import by_path, find_moments, kinds_of

INPUTS = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
TARGETS = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
STEPS = 4


def mean_square(b2, corrected):
    def leaf(grads):
        nu = 0.0
        for g in grads:
            nu = b2 * nu + (1 - b2) * g**2
        return nu / (1 - b2 ** len(grads)) if corrected else nu

    return leaf


def deviation(grads):
    """AdaBelief's."""
    mu, nu = 0.0, 0.0
    for g in grads:
        mu = 0.9 * mu + 0.1 * g
        nu = 0.999 * nu + 0.001 * (g - mu) ** 2
    return nu / (1 - 0.999 ** len(grads))


def norm_mean(grads):
    """NovoGrad's."""
    norm = np.sum(grads[0] ** 2)
    for g in grads[1:]:
        norm = 0.25 * norm + 0.75 * np.sum(g**2)
    return np.full(grads[0].shape, norm / grads[0].size)


def factored(grads):
    """Adafactor's."""
    if grads[0].ndim < 2:
        nu = 0.0
        for t, g in enumerate(grads, start=1):
            nu = (1 - t**-0.8) * nu + t**-0.8 * g**2
        return nu
    short, long = np.argsort(grads[0].shape)[-2:]
    rows, columns = 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        rows = (1 - t**-0.8) * rows + t**-0.8 * np.mean(g**2, axis=long, keepdims=True)
        columns = (1 - t**-0.8) * columns + t**-0.8 * np.mean(g**2, axis=short, keepdims=True)
    return rows * columns / np.mean(rows, axis=short, keepdims=True)


OPTIMIZERS = {
    "adam": (optax.chain(optax.clip_by_global_norm(1e3), optax.adam(1e-2)), mean_square(0.999, True)),
    "injected": (optax.inject_hyperparams(optax.adamw)(1e-2, b2=0.9), mean_square(0.9, True)),
    "rmsprop": (optax.rmsprop(1e-2), mean_square(0.9, False)),
    "novograd": (optax.novograd(1e-2), norm_mean),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=2), factored),
    "partition": (
        optax.partition(
            {"matrix": optax.adam(1e-2), "vector": optax.adabelief(1e-2)},
            lambda params: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", params),
        ),
        lambda grads: mean_square(0.999, True)(grads) if grads[0].ndim == 2 else deviation(grads),
    ),
}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(3)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.tanh(self.layers[0](x)))


def mean_error(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


def by_linen(optimizer):
    """The parameters, the state and the gradients after training a flax linen model."""
    model = Linen()
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), INPUTS)["params"], tx=optimizer
    )
    grads = []
    for _ in range(STEPS):
        grads.append(jax.grad(lambda p, s: mean_error(s.apply_fn({"params": p}, INPUTS)))(state.params, state))
        state = state.apply_gradients(grads=grads[-1])
    return state.params, state, grads


def by_nnx(optimizer):
    model = Nnx(nnx.Rngs(0))
    trainer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    grads = []
    for _ in range(STEPS):
        grads.append(nnx.grad(lambda m: mean_error(m(INPUTS)))(model))
        trainer.update(model, grads[-1])
    return nnx.state(model, nnx.Param), trainer, grads


def by_equinox(optimizer):
    model = eqx.nn.MLP(4, 2, 3, 1, jax.nn.tanh, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(params)
    grads = []
    for _ in range(STEPS):
        grads.append(eqx.filter_grad(lambda m: mean_error(jax.vmap(m)(INPUTS)))(model))
        updates, state = optimizer.update(grads[-1], state, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
    return eqx.filter(model, eqx.is_inexact_array), state, grads


LIBRARIES = {"linen": by_linen, "nnx": by_nnx, "equinox": by_equinox}


def recursion(grads, leaf_recursion):
    leaves = [by_path(grad) for grad in grads]
    return {path: leaf_recursion([np.asarray(g[path], np.float64) for g in leaves]) for path in leaves[0]}


def assert_close(moments, truth):
    found = by_path(moments)
    assert found.keys() == truth.keys()
    for path, value in truth.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-12)


@pytest.fixture(scope="module")
def trained():
    return {(library, name): LIBRARIES[library](OPTIMIZERS[name][0]) for library in LIBRARIES for name in OPTIMIZERS}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_moments_of_every_library_equal_the_recursion(library, name, trained):
    params, state, grads = trained[library, name]
    moments = second_moments(state, params)
    assert jax.tree.structure(moments) == jax.tree.structure(params)
    truth = recursion(grads, OPTIMIZERS[name][1])
    assert len(truth) == 4
    assert_close(moments, truth)
    if hasattr(state, "opt_state"):
        assert_close(second_moments(state.opt_state, params), truth)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_parameters_and_states_in_all_their_forms(name, trained):
    params, trainer, grads = trained["nnx", name]
    truth = recursion(grads, OPTIMIZERS[name][1])
    pure, whole = nnx.to_pure_dict(params), nnx.state(trainer)
    for state in (trainer, trainer.opt_state, nnx.as_pure(trainer.opt_state)):
        assert_close(second_moments(state, pure), truth)
        assert_close(second_moments(state, params), truth)
    assert_close(second_moments(whole, params), truth)
    assert_close(second_moments(nnx.to_pure_dict(whole), pure), truth)


def bare(node):
    """What a checkpoint keeps of a state: fields by name, tuples as lists, nothing of what is empty."""
    if hasattr(node, "_asdict"):
        return {name: bare(value) for name, value in node._asdict().items()} or None
    if isinstance(node, dict):
        return {name: bare(value) for name, value in node.items()}
    if isinstance(node, tuple | list):
        return [bare(value) for value in node]
    return np.asarray(node)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_restored_as_bare_containers(name, trained):
    params, state, grads = trained["linen", name]
    truth = recursion(grads, OPTIMIZERS[name][1])
    restored = bare(state.opt_state)
    assert_close(second_moments(restored, params), truth)
    assert_close(second_moments({"step": 4, "params": bare(params), "opt_state": restored}, params), truth)


@pytest.mark.filterwarnings("ignore")  # of the checkpoint library's own
@pytest.mark.parametrize("library", LIBRARIES)
def test_states_restored_by_orbax(library, trained, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params, trainer, grads = trained[library, "injected"]
    state = nnx.state(trainer) if library == "nnx" else getattr(trainer, "opt_state", trainer)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state")
    assert not hasattr(restored, "_fields")
    assert_close(second_moments(restored, params), recursion(grads, OPTIMIZERS["injected"][1]))


def test_wrappers_and_other_kinds_restored_as_bare_containers():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    grads = [jax.tree.map(lambda x, s=s: x * s, params) for s in (1.0, -2.0, 3.0)]
    inner = {
        "amsgrad": optax.amsgrad(1e-2),
        "centred": optax.rmsprop(1e-2, centered=True),
        "schedule free": optax.contrib.schedule_free_adamw(1e-2),
        "accumulated": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        "finite": optax.apply_if_finite(optax.lamb(1e-2), 3),
    }
    for name, optimizer in inner.items():
        state = optimizer.init(params)
        for grad in grads:
            _, state = optimizer.update(grad, state, params)
        typed, restored = second_moments(state, params), second_moments(bare(state), params)
        jax.tree.map(np.testing.assert_array_equal, typed, restored)
        assert all(float(jnp.min(leaf)) > 0.0 for leaf in jax.tree.leaves(typed)), name


def test_first_moments_of_bare_containers(trained):
    params, state, grads = trained["linen", "adam"]
    mean = jax.tree.map(lambda *g: 0.1 * sum(0.9**i * x for i, x in enumerate(g[::-1])) / (1 - 0.9**STEPS), *grads)
    assert_close(first_moments(bare(state.opt_state), params), by_path(mean))


def test_a_bare_sm3_is_not_taken_for_a_centred_rmsprop():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="no second moments"):
        second_moments(bare(optax.sm3(1e-2).init(params)), params)


def test_paths_agree_between_containers():
    array = jnp.ones(2)
    assert by_path([{"w": array}]).keys() == by_path({"0": {"w": {"value": array}}}).keys() == {("0", "w")}
    assert by_path(array).keys() == {()}
    assert by_path({"value": {"kernel": array}}).keys() == {("value", "kernel")}


def test_states_are_found_and_named():
    params = {"w": jnp.ones(2)}
    optimizer = optax.partition({"a": optax.chain(optax.clip(1.0), optax.adam(1e-2))}, {"w": "a"})
    state = optimizer.init(params)
    assert [found.layout.name for found in find_moments(state, params)] == ["ScaleByAdamState"]
    assert kinds_of(state) == ["MaskedState", "PartitionState", "ScaleByAdamState"]
    assert kinds_of(optax.sgd(1e-2).init(params)) == ["no state at all"]
    assert find_moments(params, params) == []
