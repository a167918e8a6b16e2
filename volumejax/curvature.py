r"""Curvature of the KL behaviour at its anchor: the generalised Gauss-Newton matrix, dense, its diagonal, its products.

    H = (1/N) Σ_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n,   J_n = ∂ logits_n / ∂θ

For softmax outputs this is the Fisher information, and the exact Hessian of `kl_to_anchor` at the anchor. The
middle matrix is S Sᵀ with S = diag(√p) − p √pᵀ, so the columns of S are pulled back, one for each class, and
squared. Where classes are many, random signs ε in place of the classes give the same in the mean: E (Jᵀ S ε)² is the
diagonal (Bekas, Kokiopoulou & Saad 2007), and no more than one gradient is held.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from volumejax import tree
from volumejax.examples import (
    Examples,
    check_batch_size,
    check_function,
    make_examples,
    micro_batch,
    num_batches,
    trace_logits,
)
from volumejax.functions import Function

__all__ = [
    "MAX_DENSE_DIMENSION",
    "DiagonalEstimate",
    "GGNProduct",
    "check_dense",
    "dense_ggn",
    "diagonal_ggn",
    "ggn_product",
    "mean_of_probes",
    "sampled_diagonal_ggn",
]

MAX_DENSE_DIMENSION = 20_000


class DiagonalEstimate(eqx.Module):
    """A diagonal of curvature from random probes, in nats per squared unit of the parameters, float32."""

    value: PyTree
    std_error: PyTree
    """Standard error of each entry, from the scatter of the probes."""


class GGNProduct(Function):
    """The function v -> H v; its data are leaves, so that it may be passed through `eqx.filter_jit`."""

    apply_fn: Callable = eqx.field(static=True)
    params: PyTree
    inputs: PyTree
    mask: Bool[Array, "examples ..."]
    batch_size: int = eqx.field(static=True)

    def __call__(self, vector: PyTree) -> PyTree:
        """Return H·vector in float32."""
        return _product(self.apply_fn, self.params, self.inputs, self.mask, self.batch_size, vector)


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
    check_dense(params, "diagonal_ggn")
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


def sampled_diagonal_ggn(
    key: Key[Array, ""],
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    num_probes: int = 16,
    mask: Any = None,
    batch_size: int | None = 8,
) -> DiagonalEstimate:
    """Return an unbiased estimate of the diagonal of H, for outputs with many classes or positions.

    One backward pass for each example and probe, whatever the number of classes and positions.

    Args:
        key: example n of probe k uses `fold_in(fold_in(key, k), n)`, so `batch_size` does not change the result.
        apply_fn: as for `dense_ggn`.
        params: as for `dense_ggn`, of any size.
        inputs: as for `dense_ggn`.
        num_probes: random signs for each output, at least 2; the error falls with their root.
        mask: as for `dense_ggn`.
        batch_size: examples at a time; a batch holds about two gradients for each of its examples.

    Returns:
        `DiagonalEstimate` shaped like `params`, its value non-negative.

    Raises:
        ValueError: data that does not fit, or fewer than two probes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w, x = jnp.zeros((1, 2)), jnp.ones((3, 1))
        >>> h = sampled_diagonal_ggn(jax.random.key(0), lambda w, x: x @ w, w, x, num_probes=400)
        >>> bool(jnp.all(jnp.abs(h.value - 0.25) <= 4 * h.std_error + 1e-6))
        True

    Reference: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix", section 2.
    """
    arguments = _prepare(apply_fn, params, inputs, mask, batch_size)
    return mean_of_probes(lambda k: _probe(k, apply_fn, params, *arguments), key, num_probes)


def ggn_product(
    apply_fn: Callable, params: PyTree, inputs: PyTree, *, mask: Any = None, batch_size: int | None = 64
) -> GGNProduct:
    """Return the function v -> H v on pytrees like `params`; H itself is never made.

    Args:
        apply_fn: as for `dense_ggn`.
        params: as for `dense_ggn`, of any size.
        inputs: as for `dense_ggn`.
        mask: as for `dense_ggn`.
        batch_size: examples at a time; does not change the result beyond rounding.

    Raises:
        ValueError: data that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> product = ggn_product(lambda w, x: x @ w, jnp.zeros((1, 2)), jnp.ones((3, 1)))
        >>> print(jnp.round(product(jnp.array([[1.0, 0.0]])), 3).tolist())
        [[0.25, -0.25]]

    Reference: Schraudolph 2002, "Fast curvature matrix-vector products", section 3.
    """
    return GGNProduct(apply_fn, params, *_prepare(apply_fn, params, inputs, mask, batch_size))


def check_dense(params: PyTree, instead: str) -> None:
    """Raise a ValueError where a D × D matrix would be too large; `instead` is the function to use then."""
    dimension = tree.size(params)
    if dimension > MAX_DENSE_DIMENSION:
        raise ValueError(
            f"a dense curvature of {dimension:,} parameters is refused above {MAX_DENSE_DIMENSION:,}: it "
            f"would take {4e-9 * dimension**2:,.1f} GB; use {instead}"
        )


@eqx.filter_jit
def mean_of_probes(probe: Callable[[Array], PyTree], key: Key[Array, ""], num_probes: int) -> DiagonalEstimate:
    """Return mean and standard error of `probe(fold_in(key, k))` over k, holding a few copies at a time."""
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, got {num_probes}; one probe has no standard error")
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), eqx.filter_eval_shape(probe, key))

    def step(carry: tuple[PyTree, PyTree], k: Array) -> tuple[tuple[PyTree, PyTree], None]:
        # Welford's update: squares of a mean that dwarfs its error would cancel.
        mean, scatter = carry
        value = probe(jax.random.fold_in(key, k))
        after = jax.tree.map(lambda m, x: m + (x - m) / (k + 1).astype(jnp.float32), mean, value)
        scatter = jax.tree.map(lambda s, x, a, b: s + (x - a) * (x - b), scatter, value, mean, after)
        return (after, scatter), None

    (mean, scatter), _ = jax.lax.scan(step, (zeros, zeros), jnp.arange(num_probes))
    return DiagonalEstimate(mean, jax.tree.map(lambda s: jnp.sqrt(s / (num_probes * (num_probes - 1))), scatter))


def _prepare(
    apply_fn: Callable, params: PyTree, inputs: PyTree, mask: Any, batch_size: int | None
) -> tuple[PyTree, Bool[Array, "examples ..."], int]:
    """Return inputs, an explicit mask, and the batch size cut to the data."""
    tree.check_floating(params, "params")
    check_function(apply_fn)
    check_batch_size(batch_size)
    examples = make_examples(inputs, mask=mask)
    positions = trace_logits(apply_fn, params, examples)[:-1]
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


@eqx.filter_jit
def _product(
    apply_fn: Callable, params: PyTree, inputs: PyTree, mask: Array, batch_size: int, vector: PyTree
) -> PyTree:
    tangent = jax.tree.map(lambda v, x: v.astype(x.dtype), vector, params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

    def add(total: PyTree, batch: Examples, keep: Array) -> PyTree:
        logits, pull, change = _linear(apply_fn, params, batch.inputs, tangent)
        p = jax.nn.softmax(logits.astype(jnp.float32))
        change = change.astype(jnp.float32)
        # Under a batch of vectors p is shared: jaxlib 0.10.2 gets this wrong on CPUs where p comes first in the sum.
        force = p * (change - jnp.sum(change * p, axis=-1, keepdims=True))
        (gradient,) = pull(jnp.where(keep[..., None], force, 0.0).astype(logits.dtype))
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradient)

    return _over_batches(add, zeros, inputs, mask, batch_size)


def _linear(apply_fn: Callable, params: PyTree, inputs: PyTree, tangent: PyTree) -> tuple[Array, Callable, Array]:
    """Return the logits, their pull-back, and their change along the tangent."""

    def outputs(p: PyTree) -> Array:
        return apply_fn(p, inputs)

    logits, pull = jax.vjp(outputs, params)
    return logits, pull, jax.jvp(outputs, (params,), (tangent,))[1]


def _probe(key: Array, apply_fn: Callable, params: PyTree, inputs: PyTree, mask: Array, batch_size: int) -> PyTree:
    """Return the mean over positions of (Jᵀ S ε)², example by example."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

    def square(index: Array, example: PyTree, keep: Array) -> PyTree:
        logits, pull = jax.vjp(lambda p: apply_fn(p, jax.tree.map(lambda x: x[None], example))[0], params)
        p = jax.nn.softmax(logits.astype(jnp.float32))
        signs = jax.random.rademacher(jax.random.fold_in(key, index), p.shape, jnp.float32)
        root = jnp.sqrt(p)
        force = root * signs - p * jnp.sum(root * signs, axis=-1, keepdims=True)
        (gradient,) = pull(jnp.where(keep[..., None], force, 0.0).astype(logits.dtype))
        return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), gradient)

    def add(total: PyTree, batch: Examples, keep: Array) -> PyTree:
        squares = jax.vmap(lambda pair, keep: square(pair[0], pair[1], keep))(batch.inputs, keep)
        return jax.tree.map(lambda t, s: t + jnp.sum(s, axis=0), total, squares)

    numbered = (jnp.arange(mask.shape[0]), inputs)
    return _over_batches(add, zeros, numbered, mask, batch_size)


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
