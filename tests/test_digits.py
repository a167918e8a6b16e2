"""The digits task: the paper's figures, its curvature, and costs that share their compiled code."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from volumejax import tree
from volumejax.curvature import dense_ggn, diagonal_ggn
from volumejax.optax_moments import second_moments
from volumejax.tasks.digits import digits_task


@pytest.fixture(scope="module")
def tasks():
    return [digits_task(seed) for seed in range(3)]


def test_training_reproduces_the_recorded_figures(tasks):
    for task in tasks:
        assert task.train_accuracy == 1.0
        assert abs(task.rms - 0.23) < 0.01
        assert abs(task.test_accuracy - 0.978) < 0.01
    assert len({task.rms for task in tasks}) == 3


def test_data_and_parameters_have_the_papers_shape(tasks):
    task = tasks[0]
    assert tree.size(task.params) == 4810 and type(task.params) is dict
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(task.params))
    assert task.inputs.shape == (1024, 64) and task.test_inputs.shape == (773, 64)
    assert float(task.inputs.min()) == 0.0 and float(task.inputs.max()) == 1.0
    np.testing.assert_array_equal(task.inputs, tasks[1].inputs)
    train = {row.tobytes() for row in np.asarray(task.inputs)}
    assert not any(row.tobytes() in train for row in np.asarray(task.test_inputs))
    accuracy = np.mean(np.argmax(task.apply_fn(task.params, task.test_inputs), -1) == task.test_labels)
    assert abs(task.test_accuracy - accuracy) < 1e-6


def test_the_optimizer_state_is_that_of_the_last_step(tasks):
    state = optax.tree.get(tasks[0].opt_state, "ScaleByAdamState")
    assert int(state.count) == 400
    moments = second_moments(tasks[0].opt_state, tasks[0].params)
    assert jax.tree.structure(moments) == jax.tree.structure(tasks[0].params)
    assert all(np.all(np.asarray(leaf) >= 0.0) for leaf in jax.tree.leaves(moments))


def test_the_anchor_costs_nothing_and_a_new_anchor_compiles_nothing(tasks):
    traces = 0

    @eqx.filter_jit
    def evaluate(cost, params):
        nonlocal traces
        traces += 1
        return cost(params)

    for task in tasks:
        assert 0.0 <= float(evaluate(task.cost, task.params)) < 1e-10
        assert float(evaluate(task.cost, jax.tree.map(lambda x: 1.1 * x, task.params))) > 1e-4
    assert traces == 1
    assert tasks[0].apply_fn is tasks[1].apply_fn


def test_dense_and_diagonal_curvature_agree_and_predict_the_cost(tasks):
    task = tasks[0]
    dense = dense_ggn(task.apply_fn, task.params, task.inputs)
    diagonal, unravel = ravel_pytree(diagonal_ggn(task.apply_fn, task.params, task.inputs))
    np.testing.assert_allclose(jnp.diag(dense), diagonal, rtol=1e-4, atol=1e-6 * float(diagonal.max()))
    # Random directions meet the curvature; at this length the cost is quadratic to a few per cent.
    step = 2e-3 * jax.random.normal(jax.random.key(0), diagonal.shape)
    cost = task.cost(jax.tree.map(jnp.add, task.params, unravel(step)))
    np.testing.assert_allclose(cost, 0.5 * step @ dense @ step, rtol=0.05)


def test_the_seed_decides_everything(tasks):
    again = digits_task(1)
    jax.tree.map(np.testing.assert_array_equal, again.params, tasks[1].params)


def test_misuse(monkeypatch):
    with pytest.raises(ValueError, match="num_epochs must be at least 1"):
        digits_task(num_epochs=0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"volumejax\[run\]"):
        digits_task()
