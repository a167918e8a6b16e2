"""The largest eigenvalues of a curvature and their eigenvectors, from its products alone (Lanczos, by matfree)."""

import importlib
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree

__all__ = ["Eigenpairs", "top_eigenpairs"]

_EXHAUSTED = 4e-6
"""A step of the iteration smaller than so many parts of the largest eigenvalue is rounding: 30 float32 epsilons."""


class Eigenpairs(eqx.Module):
    """The largest eigenvalues of a symmetric matrix on parameters, in decreasing order, and unit eigenvectors."""

    values: Float[Array, "rank"]
    vectors: PyTree[Float[Array, "rank ..."]]
    """A pytree like the parameters, its leaves of shape (rank, *leaf shape)."""
    residuals: Float[Array, "rank"]
    """|H u − λ u|: an eigenvalue of H lies at most so far from each value."""

    @property
    def rank(self) -> int:
        """Number of pairs."""
        return self.values.shape[0]


def top_eigenpairs(
    key: Key[Array, ""],
    product: Callable[[PyTree], PyTree],
    params: PyTree,
    *,
    rank: int,
    num_products: int | None = None,
) -> Eigenpairs:
    """Return the `rank` largest eigenvalues of a curvature with their eigenvectors, by Lanczos iteration.

    Args:
        key: draws the first vector.
        product: v -> H v with H symmetric, from `ggn_product` or `hessian_product`; an `equinox.Module` with its data
            as leaves is compiled once.
        params: a pytree like the vectors that `product` takes.
        rank: number of pairs.
        num_products: length of the iteration, which holds as many vectors; None for 2·rank + 20, at most D. Look at
            the residuals: a longer iteration makes them smaller.

    Returns:
        `Eigenpairs` in float32. An eigenvalue that occurs several times is found once, and where H has fewer than
        `rank` distinct ones that are not lost in rounding, the last values and vectors are zero.

    Raises:
        ValueError: rank or num_products out of range.
        ImportError: matfree is not installed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pairs = top_eigenpairs(jax.random.key(0), lambda v: jnp.array([1.0, 9.0, 2.0]) * v, jnp.zeros(3), rank=1)
        >>> print(f"{pairs.values[0]:.3f} {abs(pairs.vectors[0, 1]):.3f}")
        9.000 1.000

    Reference: Lanczos 1950; Krämer et al. 2024, arXiv:2405.17277, for the implementation in matfree.
    """
    dimension = tree.size(params)
    if not 1 <= rank <= dimension:
        raise ValueError(f"rank must lie between 1 and the number of parameters {dimension}, got {rank}")
    length = min(2 * rank + 20, dimension) if num_products is None else num_products
    if not rank <= length <= dimension:
        raise ValueError(
            f"num_products must lie between rank {rank} and the number of parameters {dimension}, got {length}"
        )
    try:
        tridiagonalise = importlib.import_module("matfree.decomp").tridiag_sym
    except ImportError as error:
        raise ImportError("top_eigenpairs needs matfree: pip install 'volumejax[curvature]'") from error
    return _lanczos(key, product, params, tridiagonalise, rank, length)


@eqx.filter_jit
def _lanczos(
    key: Array, product: Callable, params: PyTree, tridiagonalise: Callable, rank: int, length: int
) -> Eigenpairs:
    flat, unravel = ravel_pytree(tree.normal_like(key, params))
    start = flat / jnp.linalg.norm(flat)
    rows, small, *_ = tridiagonalise(length, custom_vjp=False)(lambda v: ravel_pytree(product(unravel(v)))[0], start)
    # Where the vectors have exhausted what H does not annihilate, the iteration goes on with rounding for a direction.
    coupling = jnp.diagonal(small, 1)
    alive = coupling > _EXHAUSTED * jnp.nanmax(jnp.abs(small))
    alive = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(alive.astype(jnp.int32)) > 0])
    both = alive[:, None] & alive[None, :]
    values, mix = jnp.linalg.eigh(jnp.where(both, small, 0.0))
    # Eigenvectors outside the living block are the unit vectors of its complement, up to a mixing at value zero.
    within = jnp.where(alive[:, None], mix, 0.0)
    real = jnp.sum(within**2, axis=0) > 0.5
    order = jnp.argsort(jnp.where(real, values, -jnp.inf))[::-1][:rank]
    found = real[order]
    vectors = jnp.matmul(
        jnp.where(found, within[:, order], 0.0).T, jnp.where(alive[:, None], rows, 0.0), precision="highest"
    )
    values, vectors = jnp.where(found, values[order], 0.0), jax.vmap(unravel)(vectors)

    def residual(pair: tuple[Array, PyTree]) -> Array:
        value, vector = pair
        gap = jax.tree.map(lambda h, u: h - value * u, product(vector), vector)
        return jnp.sqrt(tree.dot(gap, gap)).astype(jnp.float32)

    return Eigenpairs(values, vectors, jax.lax.map(residual, (values, vectors)))
