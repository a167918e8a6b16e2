"""The paper's benchmark: a 64-64-10 MLP trained on scikit-learn's digits (arXiv 2501.18812, section 4)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from volumejax import tree
from volumejax.behaviours import Behaviour, error_rate, kl_to_anchor
from volumejax.models.mlp import mlp_apply, mlp_params

__all__ = ["Task", "digits_checkpoints", "digits_task", "log_spaced_steps"]

FEATURES = (64, 64, 10)
NUM_TRAIN = 1024
BATCH_SIZE = 64
LEARNING_RATE = 0.05
WEIGHT_DECAY = 5e-4


@dataclasses.dataclass(frozen=True)
class Task:
    """A trained network and what is asked about it.

    Attributes:
        apply_fn: `apply_fn(params, inputs) -> logits`, the same function for every seed.
        params: the anchor, a nested dictionary of float32 arrays.
        inputs: training inputs, over which the cost is taken.
        labels: training labels.
        test_inputs: held-out inputs.
        test_labels: held-out labels.
        opt_state: final optax state of the training.
        cost: KL to the anchor on the training inputs, in nats per example.
        train_accuracy: share of training examples classified rightly.
        test_accuracy: share of held-out examples classified rightly.
        rms: root mean square of the parameters.
    """

    apply_fn: Callable
    params: PyTree
    inputs: Float[Array, "train features"]
    labels: Int[Array, "train"]
    test_inputs: Float[Array, "test features"]
    test_labels: Int[Array, "test"]
    opt_state: Any
    cost: Behaviour
    train_accuracy: float
    test_accuracy: float
    rms: float


def digits_task(seed: int = 0, *, num_epochs: int = 25) -> Task:
    """Train the MLP on 1,024 digits and return it with its KL cost; takes a second or two on a CPU.

    Adam, learning rate 0.05 with cosine decay to 0, batches of 64, eps_root 1e-8, loss = mean cross-entropy +
    ½·5e-4·|θ|². The seed sets the initial weights and the order of the batches, not the split of the data.

    Args:
        seed: seed of the training.
        num_epochs: passes over the training data, of 16 steps each.

    Returns:
        A `Task` with D = 4,810.

    Raises:
        ValueError: num_epochs below 1.
        ImportError: scikit-learn is missing.

    Example:
        >>> task = digits_task()
        >>> print(f"{task.rms:.2f} {task.train_accuracy:.2f}")
        0.23 1.00
    """
    return digits_checkpoints((), seed, num_epochs=num_epochs)[-1]


def log_spaced_steps(number: int, num_epochs: int = 25) -> list[int]:
    """Return at most `number` steps of the training from 0 to its last, evenly spaced in log(1 + step).

    Example:
        >>> log_spaced_steps(5)
        [0, 3, 19, 89, 400]
    """
    last = num_epochs * (NUM_TRAIN // BATCH_SIZE)
    steps = np.expm1(np.linspace(0.0, math.log1p(last), number))
    return sorted({int(step) for step in np.round(steps)})


def digits_checkpoints(steps: Sequence[int], seed: int = 0, *, num_epochs: int = 25) -> list[Task]:
    """Train as `digits_task` and return the network after each of these steps, and after the last.

    Args:
        steps: increasing numbers of steps done, from 0, the initial weights, whose optimizer state has no moments yet.
        seed: as for `digits_task`.
        num_epochs: as for `digits_task`.

    Returns:
        A `Task` for each step and one for the end; their costs share compiled code.

    Raises:
        ValueError: num_epochs below 1, or a step outside the training.
        ImportError: scikit-learn is missing.

    Example:
        >>> [f"{task.train_accuracy:.1f}" for task in digits_checkpoints([0, 20])]
        ['0.1', '0.9', '1.0']
    """
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
    last = num_epochs * (NUM_TRAIN // BATCH_SIZE)
    if any(not 0 <= step <= last for step in steps):
        raise ValueError(f"steps must lie between 0 and {last}, the last of the training, got {list(steps)}")
    inputs, labels = _load_digits()
    history = _train(jax.random.key(seed), inputs[:NUM_TRAIN], labels[:NUM_TRAIN], num_epochs)
    return [_task(inputs, labels, *jax.tree.map(lambda x, i=step: x[i], history)) for step in (*steps, last)]


def _task(inputs: Array, labels: Array, params: PyTree, opt_state: Any) -> Task:
    train, test = slice(None, NUM_TRAIN), slice(NUM_TRAIN, None)
    apply_fn = mlp_apply(FEATURES)
    return Task(
        apply_fn=apply_fn,
        params=params,
        inputs=inputs[train],
        labels=labels[train],
        test_inputs=inputs[test],
        test_labels=labels[test],
        opt_state=opt_state,
        cost=kl_to_anchor(apply_fn, params, inputs[train]),
        train_accuracy=1.0 - float(error_rate(apply_fn, inputs[train], labels[train])(params)),
        test_accuracy=1.0 - float(error_rate(apply_fn, inputs[test], labels[test])(params)),
        rms=math.sqrt(float(tree.dot(params, params)) / tree.size(params)),
    )


def _load_digits() -> tuple[Float[Array, "examples features"], Int[Array, "examples"]]:
    """Return pixels in [0, 1] and labels, in the order of the seed-0 permutation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data comes with scikit-learn; install it with: pip install 'volumejax[run]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    order = np.asarray(jax.random.permutation(jax.random.key(0), len(labels)))
    return jnp.asarray(pixels[order] / 16.0, jnp.float32), jnp.asarray(labels[order], jnp.int32)


@functools.partial(jax.jit, static_argnames="num_epochs")
def _train(key: Array, inputs: Array, labels: Array, num_epochs: int) -> tuple[PyTree, Any]:
    """Return parameters and optimizer states after 0, 1, 2, ... steps, stacked."""
    apply_fn = mlp_apply(FEATURES)
    num_batches = len(labels) // BATCH_SIZE
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, num_epochs * num_batches)
    optimizer = optax.adam(schedule, eps_root=1e-8)
    init_key, order_key = jax.random.split(key)
    params = mlp_params(FEATURES, init_key)

    def loss(params: PyTree, batch: Array) -> Array:
        logits = apply_fn(params, inputs[batch])
        data = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()
        return data + 0.5 * WEIGHT_DECAY * optax.tree.norm(params, squared=True)

    def step(carry: tuple[PyTree, Any], batch: Array) -> tuple[tuple[PyTree, Any], tuple[PyTree, Any]]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        after = optax.apply_updates(params, updates), opt_state
        return after, after

    epochs = jax.vmap(lambda k: jax.random.permutation(k, len(labels)))(jax.random.split(order_key, num_epochs))
    batches = epochs.reshape(num_epochs * num_batches, BATCH_SIZE)
    start = params, optimizer.init(params)
    _, history = jax.lax.scan(step, start, batches)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, history)
