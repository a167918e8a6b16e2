r"""Curvature of the KL behaviour at its anchor: the generalised Gauss-Newton matrix, dense or its diagonal.

    H = (1/N) Σ_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n,   J_n = ∂ logits_n / ∂θ

For softmax outputs this is the Fisher information, and the exact Hessian of `kl_to_anchor` at the anchor. The
middle matrix is S Sᵀ with S = diag(√p) − p √pᵀ, so the columns of S are pulled back, one for each class, and
squared.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from volumejax import tree
from volumejax.examples import (
    Examples,
    check_batch_size,
    check_function,
    check_logits,
    make_examples,
    micro_batch,
    num_batches,
)

__all__ = ["MAX_DENSE_DIMENSION", "dense_ggn", "diagonal_ggn"]

MAX_DENSE_DIMENSION = 20_000


def dense_ggn(
    apply_fn: Callable, params: PyTree, inputs: PyTree, *, mask: Any = None, batch_size: int | None = 64
) -> Float[Array, "D D"]:
    """Return the whole matrix H, in nats per squared unit of the parameters.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits` with shape [examples, ..., classes]; examples may not
            interact.
        params: where to take the curvature, a pytree with D scalars.
        inputs: a pytree of arrays with a common leading axis over examples.
        mask: as for `kl_to_anchor`; the mean is over its True positions.
        batch_size: examples at a time; one batch needs 4·D·batch_size·positions·classes bytes beside the
            result.

    Returns:
        A symmetric positive semi-definite float32 matrix, rows and columns in the order of
        `ravel_pytree(params)`.

    Raises:
        ValueError: D above 20,000, or data that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> h = dense_ggn(lambda w, x: x @ w, jnp.zeros((1, 2)), jnp.ones((3, 1)))
        >>> print(jnp.round(h, 3).tolist())
        [[0.25, -0.25], [-0.25, 0.25]]

    Reference: Martens 2020, "New insights and perspectives on the natural gradient method", section 9.2.
    """
    dimension = tree.size(params)
    if dimension > MAX_DENSE_DIMENSION:
        raise ValueError(
            f"a dense curvature of {dimension:,} parameters is refused above {MAX_DENSE_DIMENSION:,}: it "
            f"would take {4e-9 * dimension**2:,.1f} GB; use diagonal_ggn"
        )
    return _dense(apply_fn, params, *_prepare(apply_fn, params, inputs, mask, batch_size))


def diagonal_ggn(
    apply_fn: Callable, params: PyTree, inputs: PyTree, *, mask: Any = None, batch_size: int | None = 64
) -> PyTree:
    """Return the diagonal of H, in nats per squared unit of the parameters.

    Exact, at the price of one backward pass for each example, position and class.

    Args:
        apply_fn: as for `dense_ggn`.
        params: as for `dense_ggn`, of any size.
        inputs: as for `dense_ggn`.
        mask: as for `dense_ggn`.
        batch_size: examples at a time; a batch holds about three gradients for each of its examples.

    Returns:
        A float32 pytree shaped like `params`, non-negative.

    Raises:
        ValueError: data that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> h = diagonal_ggn(lambda w, x: x @ w, jnp.zeros((1, 2)), jnp.ones((3, 1)))
        >>> print(jnp.round(h, 3).tolist())
        [[0.25, 0.25]]
    """
    return _diagonal(apply_fn, params, *_prepare(apply_fn, params, inputs, mask, batch_size))


def _prepare(
    apply_fn: Callable, params: PyTree, inputs: PyTree, mask: Any, batch_size: int | None
) -> tuple[PyTree, Bool[Array, "examples ..."], int]:
    """Return inputs, an explicit mask, and the batch size cut to the data."""
    tree.check_floating(params, "params")
    check_function(apply_fn)
    check_batch_size(batch_size)
    examples = make_examples(inputs, mask=mask)
    positions = check_logits(jax.eval_shape(apply_fn, params, examples.inputs), examples)[:-1]
    keep = jnp.ones(positions, bool) if examples.mask is None else examples.mask
    return examples.inputs, keep, len(examples) if batch_size is None else min(batch_size, len(examples))


@eqx.filter_jit
def _dense(apply_fn: Callable, params: PyTree, inputs: PyTree, mask: Array, batch_size: int) -> Array:
    dimension = tree.size(params)

    def rows(example: PyTree, keep: Array) -> Array:
        num_rows, row = _pulled_rows(apply_fn, params, example, keep)
        return jax.vmap(lambda index: _ravel(row(index)))(jnp.arange(num_rows))

    def add(total: Array, batch: Examples, keep: Array) -> Array:
        block = jax.vmap(rows)(batch.inputs, keep).reshape(-1, dimension)
        return total + jnp.matmul(block.T, block, precision=jax.lax.Precision.HIGHEST)

    total = _over_batches(add, jnp.zeros((dimension, dimension), jnp.float32), inputs, mask, batch_size)
    # The matrix product is symmetric only up to rounding, which an eigenvalue solver would notice.
    return 0.5 * (total + total.T)


@eqx.filter_jit
def _diagonal(apply_fn: Callable, params: PyTree, inputs: PyTree, mask: Array, batch_size: int) -> PyTree:
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

    def squares(example: PyTree, keep: Array) -> PyTree:
        num_rows, row = _pulled_rows(apply_fn, params, example, keep)

        def add_row(total: PyTree, index: Array) -> tuple[PyTree, None]:
            return jax.tree.map(lambda t, g: t + jnp.square(g), total, row(index)), None

        return jax.lax.scan(add_row, zeros, jnp.arange(num_rows))[0]

    def add(total: PyTree, batch: Examples, keep: Array) -> PyTree:
        per_example = jax.vmap(squares)(batch.inputs, keep)
        return jax.tree.map(lambda t, s: t + jnp.sum(s, axis=0), total, per_example)

    return _over_batches(add, zeros, inputs, mask, batch_size)


def _over_batches(add: Callable, zeros: PyTree, inputs: PyTree, mask: Array, batch_size: int) -> PyTree:
    """Return the mean over positions of what `add(total, batch, keep)` accumulates."""
    examples = Examples(inputs, mask=mask)

    def step(total: PyTree, index: Array) -> tuple[PyTree, None]:
        batch, fresh = micro_batch(examples, index, batch_size)
        keep = batch.mask & fresh.reshape(fresh.shape + (1,) * (mask.ndim - 1))
        return add(total, batch, keep), None

    total, _ = jax.lax.scan(step, zeros, jnp.arange(num_batches(examples, batch_size)))
    count = jnp.sum(mask, dtype=jnp.float32)
    return jax.tree.map(lambda t: t / count, total)


def _pulled_rows(
    apply_fn: Callable, params: PyTree, example: PyTree, keep: Array
) -> tuple[int, Callable[[Array], PyTree]]:
    """Return the number of rows of Sᵀ J for one example, and a function from an index to that row."""
    logits, pull = jax.vjp(lambda p: apply_fn(p, jax.tree.map(lambda x: x[None], example))[0], params)
    classes = logits.shape[-1]
    positions = math.prod(logits.shape[:-1])
    p = jax.nn.softmax(logits.astype(jnp.float32)).reshape(positions, classes)
    factor = jnp.sqrt(p)[:, None, :] * (jnp.eye(classes)[None] - p[:, :, None])
    factor = jnp.where(keep.reshape(positions, 1, 1), factor, 0.0)

    def row(index: Array) -> PyTree:
        position, column = index // classes, index % classes
        here = jnp.arange(positions) == position
        cotangent = jnp.where(here[:, None], factor[:, :, column], 0.0)
        (gradient,) = pull(cotangent.reshape(logits.shape).astype(logits.dtype))
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

    return positions * classes, row


def _ravel(gradient: PyTree) -> Float[Array, "D"]:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
