"""Behaviours: how differently a network acts from its anchor, as a cost in nats per example.

A behaviour is a callable `cost(params) -> scalar`. It is a pytree whose leaves are the data and the anchor's
outputs, so that `equinox.filter_jit` compiles it once for all anchors of one architecture. Logits are cast to
float32 before the softmax, and everything after is float32, whatever the compute dtype of the network.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from volumejax.examples import (
    Examples,
    check_batch_size,
    check_function,
    check_logits,
    is_concrete,
    make_examples,
    micro_batch,
    num_batches,
    trace_logits,
)
from volumejax.functions import Function
from volumejax.softmax import cross_entropy, divergence, is_wrong, label_gap

__all__ = ["Behaviour", "error_rate", "kl_to_anchor", "loss", "loss_gap"]


class Behaviour(Function):
    """The mean of a per-position measure over the unmasked positions; made by the factories of this module.

    Calling it gives a float32 scalar. A NaN logit at an unmasked position gives NaN; a mask without any
    position gives NaN. Gradients recompute each micro-batch, so that their memory does not grow with the
    number of examples.
    """

    apply_fn: Callable = eqx.field(static=True)
    measure: Callable = eqx.field(static=True)
    examples: Examples
    anchor_params: PyTree = None
    batch_size: int | None = eqx.field(static=True, default=None)

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        """Return the cost of `params`."""
        return _mean(self, params)

    def of_logits(self, logits: Float[Array, "examples ... classes"]) -> Float[Array, ""]:
        """Return the cost of a network with these outputs on all examples."""
        sums = _summed(self, logits, self.examples, jnp.ones(len(self.examples), bool))
        return sums[0] / sums[1]

    @property
    def num_examples(self) -> int:
        """Number of examples, from which `on` selects."""
        return len(self.examples)

    def on(self, indices: Any) -> "Behaviour":
        """Return the same behaviour on the examples `indices` (one-dimensional integers), repeats allowed.

        Works under jit, where an index out of range is clamped; outside it raises a ValueError.
        """
        indices = jnp.asarray(indices)
        if indices.ndim != 1 or indices.size == 0 or not jnp.issubdtype(indices.dtype, jnp.integer):
            raise ValueError(
                f"indices must be a non-empty one-dimensional array of integers, got {indices.dtype}"
                f"{list(indices.shape)}; turn a boolean selection into indices with jnp.flatnonzero"
            )
        if is_concrete(indices) and not (0 <= int(indices.min()) and int(indices.max()) < len(self.examples)):
            raise ValueError(f"indices must lie in [0, {len(self.examples)}), the number of examples")
        return dataclasses.replace(self, examples=jax.tree.map(lambda x: x[indices], self.examples))


def kl_to_anchor(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    mask: Any = None,
    batch_size: int | None = None,
    recompute_anchor: bool = False,
) -> Behaviour:
    r"""Return the mean Kullback-Leibler divergence from the anchor's softmax outputs, in nats per position.

        C(θ) = mean over positions of Σ_k p0_k (e^{d_k} − 1 − d_k),   d = log p(θ) − log p0

    This equals Σ p0 log(p0/p), but all its terms are non-negative: nothing cancels, the float noise is of
    second order, and the anchor itself has cost and gradient zero. It is infinite where p vanishes and p0
    does not.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits` with shape [examples, ..., classes]; a hashable
            function, which may not let examples interact. One and the same function for several anchors
            avoids recompiling.
        params: the anchor, a pytree.
        inputs: an array or a pytree of arrays with a common leading axis over examples.
        mask: boolean or 0/1 integers with shape logits.shape[:-1]; positions that are False count for
            nothing.
        batch_size: examples per micro-batch; None takes all at once. The last batch overlaps the one before
            it.
        recompute_anchor: run the anchor at every call, which doubles the work, instead of keeping its logits.

    Returns:
        A `Behaviour`. A class whose logit is −inf at the anchor and at θ is left out.

    Raises:
        ValueError: on shapes or dtypes that do not fit, before anything is computed.

    Example:
        >>> import jax.numpy as jnp
        >>> linear = lambda w, x: x @ w
        >>> cost = kl_to_anchor(linear, jnp.eye(2), jnp.eye(2))
        >>> print(f"{cost(jnp.eye(2)):.3f} {cost(jnp.zeros((2, 2))):.3f}")
        0.000 0.111

    Reference: Scherlis & Belrose 2025, arXiv:2501.18812, section 2.
    """
    examples = make_examples(inputs, mask=mask)
    return _with_anchor(apply_fn, divergence, params, examples, batch_size, recompute_anchor)


def loss(
    apply_fn: Callable, inputs: PyTree, labels: Any, *, mask: Any = None, batch_size: int | None = None
) -> Behaviour:
    """Return the mean cross-entropy, −log p(label), in nats per position.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits`, as for `kl_to_anchor`.
        inputs: a pytree of arrays with a common leading axis over examples.
        labels: integers in [0, classes) with shape logits.shape[:-1]; any other label at an unmasked position
            makes the cost NaN.
        mask: as for `kl_to_anchor`.
        batch_size: as for `kl_to_anchor`.

    Returns:
        A `Behaviour`.

    Raises:
        ValueError: on shapes or dtypes that do not fit; those that depend on the logits are raised at the
            first call.

    Example:
        >>> import jax.numpy as jnp
        >>> cost = loss(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
        >>> print(f"{cost(jnp.zeros((2, 2))):.3f}")
        0.693
    """
    return _with_labels(apply_fn, cross_entropy, inputs, labels, mask, batch_size)


def loss_gap(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    labels: Any,
    *,
    mask: Any = None,
    batch_size: int | None = None,
    recompute_anchor: bool = False,
) -> Behaviour:
    """Return how much the mean cross-entropy exceeds the anchor's, in nats per position; it may be negative.

    It is the mean of −(log p(label) − log p0(label)), taken from differences of logits: near the anchor it is
    far more exact than the difference of two losses.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits`, as for `kl_to_anchor`.
        params: the anchor.
        inputs: a pytree of arrays with a common leading axis over examples.
        labels: as for `loss`.
        mask: as for `kl_to_anchor`.
        batch_size: as for `kl_to_anchor`.
        recompute_anchor: as for `kl_to_anchor`.

    Returns:
        A `Behaviour`.

    Raises:
        ValueError: on shapes or dtypes that do not fit, before anything is computed.

    Example:
        >>> import jax.numpy as jnp
        >>> cost = loss_gap(lambda w, x: x @ w, jnp.eye(2), jnp.eye(2), jnp.array([0, 1]))
        >>> print(f"{cost(2.0 * jnp.eye(2)):.3f}")
        -0.186
    """
    examples = make_examples(inputs, labels=labels, mask=mask)
    return _with_anchor(apply_fn, label_gap, params, examples, batch_size, recompute_anchor)


def error_rate(
    apply_fn: Callable, inputs: PyTree, labels: Any, *, mask: Any = None, batch_size: int | None = None
) -> Behaviour:
    """Return the fraction of positions whose largest logit is not the label's (ties: the first class wins).

    It is piecewise constant: its gradient is zero, so only rays and particles from the prior can use it.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits`, as for `kl_to_anchor`.
        inputs: a pytree of arrays with a common leading axis over examples.
        labels: as for `loss`.
        mask: as for `kl_to_anchor`.
        batch_size: as for `kl_to_anchor`.

    Returns:
        A `Behaviour`, in errors per position.

    Raises:
        ValueError: as for `loss`.

    Example:
        >>> import jax.numpy as jnp
        >>> cost = error_rate(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 0]))
        >>> print(f"{cost(jnp.eye(2)):.2f}")
        0.50
    """
    return _with_labels(apply_fn, is_wrong, inputs, labels, mask, batch_size)


@eqx.filter_jit
def _mean(behaviour: Behaviour, params: PyTree) -> Float[Array, ""]:
    """Sums per micro-batch are kept and then added, which rounds less than a running sum."""
    examples, batch_size = behaviour.examples, behaviour.batch_size
    if batch_size is None or batch_size >= len(examples):
        sums = _sum(behaviour, params, examples, jnp.ones(len(examples), bool))
    else:
        batched = jax.checkpoint(
            lambda index: _sum(behaviour, params, *micro_batch(examples, index, batch_size)),
            prevent_cse=False,
        )
        sums = jax.lax.map(batched, jnp.arange(num_batches(examples, batch_size)))
    total, count = sums[..., 0], sums[..., 1]
    return jnp.sum(total) / jnp.sum(count)


def _sum(behaviour: Behaviour, params: PyTree, examples: Examples, fresh: Bool[Array, "batch"]) -> Float[Array, "2"]:
    """Return the summed measure over the positions that count, and their number."""
    return _summed(behaviour, behaviour.apply_fn(params, examples.inputs), examples, fresh)


def _summed(behaviour: Behaviour, logits: Array, examples: Examples, fresh: Bool[Array, "batch"]) -> Float[Array, "2"]:
    shape = check_logits(logits, examples)
    anchor_logits = examples.anchor_logits
    if behaviour.anchor_params is not None:
        anchor_logits = jax.lax.stop_gradient(behaviour.apply_fn(behaviour.anchor_params, examples.inputs))
    keep = jnp.broadcast_to(fresh.reshape(fresh.shape + (1,) * (len(shape) - 2)), shape[:-1])
    if examples.mask is not None:
        keep = keep & examples.mask
    # Both selections are needed: the inner one stops gradients (0·NaN), the outer one stops values.
    logits = jnp.where(keep[..., None], logits.astype(jnp.float32), 0.0)
    measured = behaviour.measure(logits, anchor_logits, examples.labels)
    return jnp.stack([jnp.sum(jnp.where(keep, measured, 0.0)), jnp.sum(keep, dtype=jnp.float32)])


def _with_labels(
    apply_fn: Callable, measure: Callable, inputs: PyTree, labels: Any, mask: Any, batch_size: int | None
) -> Behaviour:
    check_function(apply_fn)
    check_batch_size(batch_size)
    examples = make_examples(inputs, labels=labels, mask=mask)
    return Behaviour(apply_fn, measure, examples, None, batch_size)


def _with_anchor(
    apply_fn: Callable,
    measure: Callable,
    params: PyTree,
    examples: Examples,
    batch_size: int | None,
    recompute_anchor: bool,
) -> Behaviour:
    check_function(apply_fn)
    check_batch_size(batch_size)
    trace_logits(apply_fn, params, examples)
    params = jax.tree.map(jnp.asarray, params)
    if recompute_anchor:
        return Behaviour(apply_fn, measure, examples, params, batch_size)
    logits = _all_logits(apply_fn, params, examples.inputs, batch_size)
    return Behaviour(apply_fn, measure, dataclasses.replace(examples, anchor_logits=logits), None, batch_size)


@eqx.filter_jit
def _all_logits(apply_fn: Callable, params: PyTree, inputs: PyTree, batch_size: int | None) -> Array:
    number = jax.tree.leaves(inputs)[0].shape[0]
    if batch_size is None or batch_size >= number:
        return apply_fn(params, inputs)
    count = num_batches(inputs, batch_size)
    batches = jax.lax.map(lambda index: apply_fn(params, micro_batch(inputs, index, batch_size)[0]), jnp.arange(count))
    last = number - (count - 1) * batch_size
    return jnp.concatenate([batches[:-1].reshape(-1, *batches.shape[2:]), batches[-1][-last:]])
