"""A parameter pytree as one long vector: size, inner products, steps along a direction.

Sums run leaf by leaf in float64, so that with 10^7 parameters the result still resolves a hundredth of a nat.
Nothing is ravelled: leaves keep their sharding.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

__all__ = [
    "axpy",
    "broadcast_to",
    "check_floating",
    "dot",
    "is_traced",
    "leaf_dots",
    "normal_like",
    "size",
    "uniform_like",
    "unit_ball_like",
    "wide",
]


def check_floating(tree: PyTree, name: str) -> None:
    """Raise a ValueError unless every leaf of `tree` is a real floating-point array, and there is at least one.

    Args:
        tree: parameters, as a pytree.
        name: what to call the tree in the message.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} has no array leaves; pass the parameters as a pytree of arrays")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            what = type(leaf).__name__ if dtype is None else f"dtype {dtype}"
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has {what}, not a real floating-point array; keep only the "
                "weights, e.g. with equinox.partition(model, equinox.is_inexact_array) or nnx.split(model, nnx.Param)"
            )


def size(tree: PyTree) -> int:
    """Return the number of scalars in `tree`, the dimension D."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Return the inner product of two trees of equal structure, summed in float64."""
    with jax.enable_x64(True):
        return jnp.sum(leaf_dots(a, b)) if jax.tree.leaves(a) else jnp.zeros((), jnp.float64)


def leaf_dots(a: PyTree, b: PyTree) -> Float[Array, "leaves"]:
    """Return the inner product of each leaf of `a` with its partner in `b`, in float64."""
    with jax.enable_x64(True):
        # The product is taken in float64 too: it fuses into the reduction, and float32 products would each
        # carry an error that a common factor turns into a bias of D·2⁻²⁵ nats.
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jnp.stack([jnp.sum(wide(x) * wide(y)) for x, y in pairs])


def axpy(scale: ArrayLike, direction: PyTree, origin: PyTree) -> PyTree:
    """Return origin + scale·direction, computed in float64 and rounded once to the dtype of `origin`.

    Rounding once makes the errors of the coordinates independent. A scale rounded to float32 beforehand would move
    all of them together, which costs D·2⁻²⁵ nats of volume.
    """
    with jax.enable_x64(True):
        factor = jnp.asarray(scale, jnp.float64)
        return jax.tree.map(lambda d, o: (wide(o) + factor * wide(d)).astype(o.dtype), direction, origin)


def normal_like(key: Key[Array, ""], tree: PyTree) -> PyTree:
    """Draw independent float32 standard normals shaped like `tree`, leaf i from `fold_in(key, i)`."""
    leaves, treedef = jax.tree.flatten(tree)
    draws = [_normal(jax.random.fold_in(key, i), jnp.shape(leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def uniform_like(key: Key[Array, ""], tree: PyTree) -> PyTree:
    """Draw independent float32 uniforms from [0, 1) shaped like `tree`, leaf i from `fold_in(key, i)`."""
    leaves, treedef = jax.tree.flatten(tree)
    draws = [jax.random.uniform(jax.random.fold_in(key, i), x.shape, jnp.float32) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def unit_ball_like(key: Key[Array, ""], tree: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """Draw a point shaped like `tree` uniformly in the unit ball, as a float32 direction and its float64 factor."""
    z = normal_like(key, tree)
    u = jax.random.uniform(jax.random.fold_in(key, len(jax.tree.leaves(tree))), (), jnp.float32)
    with jax.enable_x64(True):
        return z, wide(u) ** (1.0 / size(tree)) / jnp.sqrt(dot(z, z))


def _normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    # Drawn flat and in whole vector registers: XLA's CPU compiler takes four times as long over the generator for odd
    # shapes.
    count = math.prod(shape)
    return jnp.reshape(jax.random.normal(key, (-(-count // 64) * 64,), jnp.float32)[:count], shape)


def broadcast_to(value: Any, tree: PyTree, name: str) -> PyTree:
    """Return `value` as a pytree with the structure of `tree`.

    Args:
        value: a scalar, used for every leaf, or a pytree like `tree` whose leaves are scalars or arrays of
            the leaf's own shape.
        tree: the parameters to match.
        name: what to call `value` in messages.

    Raises:
        ValueError: the structures differ, or a leaf has another shape; the leaf is named.
    """
    treedef = jax.tree.structure(tree)
    if value is not None and jax.tree_util.treedef_is_leaf(jax.tree.structure(value)) and jnp.ndim(value) == 0:
        return jax.tree.unflatten(treedef, [value] * treedef.num_leaves)
    if jax.tree.structure(value) != treedef:
        raise ValueError(
            f"{name} is a pytree of another structure than the parameters; pass a scalar, or a tree built with "
            f"jax.tree.map over the parameters (got {jax.tree.structure(value)}, want {treedef})"
        )
    for (path, leaf), part in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(value), strict=True):
        if jnp.shape(part) not in ((), jnp.shape(leaf)):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(part)}, the parameter there has shape "
                f"{jnp.shape(leaf)}; use that shape or a scalar"
            )
    return value


def wide(x: Any) -> Array:
    """Return `x` as a float64 array; call inside `enable_x64`."""
    return jnp.asarray(x).astype(jnp.float64)


def is_traced(value: Any) -> bool:
    """Return whether any leaf of `value` is an abstract value inside a JAX transformation."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))
