"""Several parameter pytrees as one, with a leading axis: inner products and combinations, leaf by leaf in float64.

Nothing is ravelled, so leaves keep their sharding. Call everything here inside ``with jax.enable_x64(True):``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from volumejax.tree import wide

__all__ = ["add_rows", "gram", "like_row", "mix_rows", "over_rows", "project"]

Rows = PyTree[Float[Array, "rank ..."]]


def gram(a: PyTree, b: PyTree) -> Float[Array, "rows_a rows_b"]:
    """Return the inner product of every row of `a` with every row of `b`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> with jax.enable_x64(True):
        ...     print(gram({"w": jnp.array([[3.0, 4.0], [1.0, 0.0]])}, {"w": jnp.array([[1.0, 2.0]])}))
        [[11.]
         [ 1.]]
    """

    def of_leaf(x: Array, y: Array) -> Array:
        axes = tuple(range(1, x.ndim))
        return _contract(x, y, axes, axes)

    return jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, a, b))


def project(rows: Rows, vector: PyTree) -> Float[Array, "rank"]:
    """Return the inner product of every row with a vector."""

    def of_leaf(u: Array, x: Array) -> Array:
        return _contract(u, x, tuple(range(1, u.ndim)), tuple(range(u.ndim - 1)))

    return jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, rows, vector))


def add_rows(vector: PyTree, coefficients: Float[Array, "rank"], rows: Rows) -> PyTree:
    """Return vector + Σ coefficientᵢ·rowᵢ."""
    return jax.tree.map(lambda x, u: wide(x) + mix_rows(coefficients, u), vector, rows)


def mix_rows(coefficients: Float[Array, "*new rank"], leaf: Float[Array, "rank ..."]) -> Float[Array, "..."]:
    """Return sums over the rows of a leaf, one for each set of coefficients."""
    return _contract(coefficients, leaf, (coefficients.ndim - 1,), (0,))


def over_rows(values: Float[Array, "rank"], leaf: Float[Array, "rank ..."]) -> Float[Array, "rank ..."]:
    """Return one value per row, shaped so that it multiplies a leaf of rows."""
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def like_row(rows: Rows) -> PyTree:
    """Return the shapes of one row, in float32."""
    return jax.tree.map(lambda u: jax.ShapeDtypeStruct(jnp.shape(u)[1:], jnp.float32), rows)


def _contract(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> Array:
    # Not `jnp.tensordot`: it names float64 as the type of the result, which a vmap around a jitted caller, applied
    # where x64 is off again, would turn into float32.
    return jax.lax.dot_general(wide(a), wide(b), ((axes_a, axes_b), ((), ())), precision=jax.lax.Precision.HIGHEST)
