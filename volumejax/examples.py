"""Data with a leading axis over examples: checked once at the door, then taken in micro-batches."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

__all__ = [
    "Examples",
    "check_batch_size",
    "check_function",
    "check_logits",
    "is_concrete",
    "make_examples",
    "micro_batch",
    "num_batches",
    "trace_logits",
]


class Examples(eqx.Module):
    """Arrays with one common leading axis over examples; every field but `inputs` may be absent."""

    inputs: PyTree
    labels: Int[Array, "examples ..."] | None = None
    anchor_logits: Float[Array, "examples ... classes"] | None = None
    mask: Bool[Array, "examples ..."] | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return jax.tree.leaves(self)[0].shape[0]


def make_examples(inputs: PyTree, *, labels: Any = None, mask: Any = None) -> Examples:
    """Return the data as arrays.

    Args:
        inputs: a pytree of arrays with a common leading axis over examples.
        labels: integers, one for each position; kept as int32.
        mask: boolean or integers, one for each position; non-zero positions count.

    Returns:
        `Examples` without anchor logits.

    Raises:
        ValueError: no examples, leading axes that differ, another dtype, or a mask that leaves nothing.
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
    leading = {shape[:1] for shape in shapes}
    if len(leading) != 1 or () in leading:
        raise ValueError(
            "inputs must be arrays with a common leading axis over examples, "
            f"got shapes {[list(shape) for shape in shapes]}"
        )
    number = shapes[0][0]
    if number == 0:
        raise ValueError("inputs hold no examples; pass at least one")
    labels = None if labels is None else _labels(jnp.asarray(labels), number)
    mask = None if mask is None else _mask(jnp.asarray(mask), number)
    return Examples(inputs, labels, None, mask)


def check_logits(logits: Any, examples: Examples) -> tuple[int, ...]:
    """Return the shape of `logits` (possibly abstract); ValueError where it does not fit `examples`."""
    if not (hasattr(logits, "shape") and hasattr(logits, "dtype")):
        raise ValueError(
            f"apply_fn must return one array of logits, got {type(logits).__name__}; return only its logits"
        )
    shape, number = tuple(logits.shape), len(examples)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"apply_fn must return floating-point logits, got {logits.dtype}; return them before any argmax"
        )
    if len(shape) < 2 or shape[0] != number:
        raise ValueError(
            f"apply_fn must return logits of shape [{number}, ..., classes] for {number} examples, got "
            f"{list(shape)}; keep the leading axis of the inputs and put the class axis last"
        )
    if shape[-1] < 2:
        raise ValueError(
            f"the class axis of the logits has length {shape[-1]}, and a softmax over it is constant; "
            "for a binary output z return the two logits [0, z]"
        )
    for name, array in (("labels", examples.labels), ("mask", examples.mask)):
        if array is not None and array.shape != shape[:-1]:
            raise ValueError(
                f"{name} must have the shape of the logits {list(shape)} without the class axis, "
                f"got {list(array.shape)}; give one value for each position"
            )
    return shape


def trace_logits(apply_fn: Callable, params: PyTree, examples: Examples) -> tuple[int, ...]:
    """Return the shape of the logits on the examples, without computing them; ValueError where they do not fit."""
    try:
        logits = jax.eval_shape(apply_fn, params, examples.inputs)
    except Exception as error:
        shapes = ", ".join(str(list(jnp.shape(leaf))) for leaf in jax.tree.leaves(examples.inputs))
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"apply_fn(params, inputs) fails on inputs of shape {shapes} ({type(error).__name__}: {reason}); pass the "
            "parameters of this model, and inputs as it takes them with their leading axis"
        ) from error
    return check_logits(logits, examples)


def check_function(apply_fn: Callable) -> None:
    """Raise a ValueError unless `apply_fn` can be part of a compilation key."""
    try:
        hash(apply_fn)
    except TypeError:
        raise ValueError(
            f"apply_fn ({type(apply_fn).__name__}) is not hashable; pass a plain function "
            "apply_fn(params, inputs) and put its arrays into params"
        ) from None


def check_batch_size(batch_size: int | None) -> None:
    """Raise a ValueError unless `batch_size` is None or a positive integer."""
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size must be None or an integer of at least 1, got {batch_size!r}")


def num_batches(examples: PyTree, batch_size: int) -> int:
    """Return how many batches of `batch_size` it takes to see every example."""
    return -(-jax.tree.leaves(examples)[0].shape[0] // batch_size)


def micro_batch(examples: PyTree, index: Any, batch_size: int) -> tuple[PyTree, Bool[Array, "batch"]]:
    """Return batch number `index` and which of its examples no earlier batch has held.

    The last batch starts early enough to be full, so that no padding is made up and no example counts twice.
    """
    number = jax.tree.leaves(examples)[0].shape[0]
    start = jnp.minimum(index * batch_size, number - batch_size)
    batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch_size), examples)
    return batch, start + jnp.arange(batch_size) >= index * batch_size


def is_concrete(array: Array) -> bool:
    """Return whether the values are known now, outside any transformation."""
    return not isinstance(array, Tracer)


def _labels(labels: Array, number: int) -> Array:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}; use class numbers from 0 to classes − 1")
    if labels.shape[:1] != (number,):
        raise ValueError(f"labels have shape {list(labels.shape)} but inputs hold {number} examples; pair them up")
    return labels.astype(jnp.int32)


def _mask(mask: Array, number: int) -> Array:
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise ValueError(f"mask must be boolean or 0/1 integers, got {mask.dtype}; weights are not supported")
    if mask.shape[:1] != (number,):
        raise ValueError(f"mask has shape {list(mask.shape)} but inputs hold {number} examples; pair them up")
    mask = mask != 0
    if is_concrete(mask) and not np.any(mask):
        raise ValueError("mask leaves no position to average over; it must be True somewhere")
    return mask
