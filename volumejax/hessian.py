"""Curvature of any cost params -> scalar: the Hessian's products, its diagonal from random probes, and all of it.

A cost that works in micro-batches, such as `kl_to_anchor(..., batch_size=64)`, is differentiated in micro-batches.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree
from volumejax.curvature import DiagonalEstimate, check_dense, mean_of_probes
from volumejax.examples import check_batch_size
from volumejax.functions import Function

__all__ = ["HessianProduct", "dense_hessian", "diagonal_hessian", "hessian_product"]

Cost = Callable[[PyTree], Float[Array, ""]]


class HessianProduct(Function):
    """The function v -> H v; the cost and the parameters are leaves, for `eqx.filter_jit`."""

    cost: Cost
    params: PyTree

    def __call__(self, vector: PyTree) -> PyTree:
        """Return H·vector in float32."""
        return _product(self.cost, self.params, vector)


def hessian_product(cost: Cost, params: PyTree) -> HessianProduct:
    """Return the function v -> H v on pytrees like `params`, by forward over reverse differentiation.

    Args:
        cost: params -> scalar nats, twice differentiable.
        params: where to take the curvature, of any size.

    Raises:
        ValueError: parameters that are not floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> print(hessian_product(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 3.0]))(jnp.array([1.0, 0.0])))
        [6. 2.]

    Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    tree.check_floating(params, "params")
    return HessianProduct(cost, params)


def diagonal_hessian(key: Key[Array, ""], cost: Cost, params: PyTree, *, num_probes: int = 64) -> DiagonalEstimate:
    """Return an unbiased estimate of the Hessian's diagonal, the mean of ε∘Hε over random signs ε.

    Unlike the Gauss-Newton diagonal it may be negative: take absolute values, or clip, for a proposal. An entry's
    variance per probe is the sum of the squares of its row off the diagonal.

    Args:
        key: probe k uses `fold_in(key, k)`.
        cost: as for `hessian_product`.
        params: as for `hessian_product`.
        num_probes: at least 2; the error falls with their root.

    Returns:
        `DiagonalEstimate` shaped like `params`.

    Raises:
        ValueError: fewer than two probes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> print(diagonal_hessian(jax.random.key(0), lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0])).value)
        [12. 48.]

    Reference: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix", section 2.
    """
    product = hessian_product(cost, params)

    def probe(key: Array) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        drawn = [jax.random.rademacher(k, x.shape, jnp.float32) for k, x in zip(keys, leaves, strict=True)]
        signs = jax.tree.unflatten(treedef, drawn)
        return jax.tree.map(jnp.multiply, signs, product(signs))

    return mean_of_probes(probe, key, num_probes)


def dense_hessian(cost: Cost, params: PyTree, *, batch_size: int = 64) -> Float[Array, "D D"]:
    """Return the whole Hessian, in nats per squared unit of the parameters.

    Args:
        cost: as for `hessian_product`.
        params: as for `hessian_product`, at most 20,000 scalars.
        batch_size: columns at a time; each needs the memory of a few gradients.

    Returns:
        A symmetric float32 matrix, rows and columns in the order of `ravel_pytree(params)`; it may be indefinite.

    Raises:
        ValueError: D above 20,000.

    Example:
        >>> import jax.numpy as jnp
        >>> print(dense_hessian(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 3.0])))
        [[6. 2.]
         [2. 0.]]
    """
    check_batch_size(batch_size)
    product = hessian_product(cost, params)
    check_dense(params, "diagonal_hessian or top_eigenpairs")
    return _dense(product, min(batch_size, tree.size(params)))


@eqx.filter_jit
def _product(cost: Cost, params: PyTree, vector: PyTree) -> PyTree:
    tangent = jax.tree.map(lambda v, x: v.astype(x.dtype), vector, params)
    change = jax.jvp(jax.grad(lambda p: cost(p)), (params,), (tangent,))[1]
    return jax.tree.map(lambda x: x.astype(jnp.float32), change)


@eqx.filter_jit
def _dense(product: HessianProduct, batch_size: int) -> Float[Array, "D D"]:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), product.params)
    flat, unravel = ravel_pytree(zeros)

    def column(index: Array) -> Array:
        return ravel_pytree(product(unravel(flat.at[index].set(1.0))))[0]

    matrix = jax.lax.map(column, jnp.arange(flat.size), batch_size=batch_size)
    # Rounding differs between rows and columns, which an eigenvalue solver would notice.
    return 0.5 * (matrix + matrix.T)
