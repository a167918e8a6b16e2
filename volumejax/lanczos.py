"""Lanczos on parameter pytrees: curvature–vector products in, a tridiagonal matrix out.

With full reorthogonalisation, in blocks, so that no eigenvalue is found twice. Nothing is ravelled: the basis is a
pytree whose leaves have one more axis, and keeps their sharding. Vectors are float32, their inner products float64.
Not matfree's, as in `eigenpairs`: that one is an optional extra, works on one flat array, and sums in its dtype.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from volumejax import tree
from volumejax.spectrum import Tridiagonal

__all__ = ["lanczos"]

_BLOCK = 8
"""Basis vectors that are projected out at once."""
_EXHAUSTED = 64.0 * float(np.finfo(np.float32).eps)
"""A residual below this share of the largest entry of T is rounding: the Krylov space is complete."""


def lanczos(product: Callable[[PyTree], PyTree], start: PyTree, num_steps: int) -> Tridiagonal:
    """Return the tridiagonal matrix of `num_steps` steps of Lanczos from `start`, on the host.

    Args:
        product: vector -> H·vector for a symmetric H; traceable. An `equinox.Module` is compiled once for all its
            arrays.
        start: a float32 pytree, not zero.
        num_steps: k, cut to D; the basis takes 4·k·D bytes. Fewer where the Krylov space ends earlier.

    Example:
        >>> import jax.numpy as jnp
        >>> print(lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 2).diagonal)
        [2. 2.]

    Reference: Golub & Meurant 2010, chapter 4.
    """
    steps = min(num_steps, tree.size(start))
    with jax.enable_x64(False):
        alphas, betas, square = _lanczos(product, start, steps)
    a, b = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
    size = np.maximum.accumulate(np.maximum(np.abs(a), b))
    ended = np.flatnonzero(b <= _EXHAUSTED * size)
    last = int(ended[0]) + 1 if ended.size else steps
    residual = 0.0 if ended.size or last == tree.size(start) else float(b[last - 1])
    return Tridiagonal(a[:last], b[: last - 1], residual, float(square))


@eqx.filter_jit
def _lanczos(product: Callable, start: PyTree, num_steps: int) -> tuple[Array, Array, Array]:
    rows = -(-num_steps // _BLOCK) * _BLOCK
    basis = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), jnp.float32), start)
    square = tree.dot(start, start)

    def goes_on(carry: tuple[Array, PyTree, PyTree, Any]) -> Array:
        i, _, _, (alphas, betas) = carry
        with jax.enable_x64(True):
            largest = jnp.maximum(jnp.max(jnp.abs(alphas)), jnp.max(betas))
            return (i < num_steps) & ((i == 0) | (betas[jnp.maximum(i - 1, 0)] > _EXHAUSTED * largest))

    def advance(carry: tuple[Array, PyTree, PyTree, Any]) -> tuple[Array, PyTree, PyTree, Any]:
        i, basis, v, (alphas, betas) = carry
        basis = jax.tree.map(lambda b, x: b.at[i].set(x), basis, v)
        w = product(v)
        alpha = tree.dot(v, w)
        # What is large is taken out in float64: a float32 sum over 10⁶ terms of it would blur the small eigenvalues.
        before = jnp.maximum(i - 1, 0)
        w = tree.axpy(-alpha, v, w)
        with jax.enable_x64(True):
            pull = jnp.where(i > 0, betas[before], 0.0)
        w = tree.axpy(-pull, jax.tree.map(lambda b: b[before], basis), w)
        # One pass: quadrature needs the vectors orthogonal to the root of the rounding only (Simon 1984).
        w = jax.lax.fori_loop(0, i // _BLOCK + 1, lambda k, w: _project_out(basis, k, w), w)
        norm = jnp.sqrt(tree.dot(w, w))
        with jax.enable_x64(True):
            inverse = jnp.where(norm > 0.0, 1.0 / jnp.where(norm > 0.0, norm, 1.0), 0.0)
            alphas, betas = alphas.at[i].set(alpha), betas.at[i].set(norm)
        return i + 1, basis, _scaled(inverse, w), (alphas, betas)

    with jax.enable_x64(True):
        logs = (jnp.zeros(num_steps, jnp.float64), jnp.zeros(num_steps, jnp.float64))
        unit = 1.0 / jnp.sqrt(square)
    begun = (jnp.int32(0), basis, _scaled(unit, start), logs)
    _, _, _, (alphas, betas) = jax.lax.while_loop(goes_on, advance, begun)
    return alphas, betas, square


def _project_out(basis: PyTree, block: Array, w: PyTree) -> PyTree:
    """Take the part along one block of basis vectors, zeros among them, out of `w`."""
    highest = jax.lax.Precision.HIGHEST
    part = jax.tree.map(lambda b: jax.lax.dynamic_slice_in_dim(b, block * _BLOCK, _BLOCK), basis)
    shares = jax.tree.map(lambda b, x: jnp.tensordot(b, x, x.ndim, precision=highest), part, w)
    share = jax.tree.reduce(jnp.add, shares)
    return jax.tree.map(lambda b, x: x - jnp.tensordot(share, b, 1, precision=highest), part, w)


def _scaled(factor: Array, vector: PyTree) -> PyTree:
    with jax.enable_x64(True):
        return jax.tree.map(lambda x: (factor * tree.wide(x)).astype(jnp.float32), vector)
