"""One map over indices: chunked, vmapped, and spread over devices. The same keys give the same rays however it is cut."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, Key

__all__ = ["default_batch_size", "executed", "map_keys", "require_threefry"]

RAYS_AXIS = "rays"


def map_keys(
    function: Callable[..., Any],
    key: Key[Array, ""],
    indices: Int[Array, "rays"],
    *arguments: Any,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Any:
    """Return `function(fold_in(key, i), *argument[i])` for every index i, stacked.

    Args:
        function: maps a key, and one slice of each argument, to a pytree of arrays.
        key: threefry key.
        indices: global indices; they alone decide the keys.
        arguments: pytrees with a leading axis as long as `indices`.
        batch_size: how many run in one vmapped program.
        mesh: spread the indices over its axis `rays`; None keeps them on one device.

    Returns:
        The results, with a leading axis as long as `indices`.
    """

    def one(packed: tuple) -> Any:
        index, rest = packed
        return function(jax.random.fold_in(key, index), *rest)

    def chunked(indices: Array, arguments: tuple) -> Any:
        count = indices.shape[0]
        return jax.lax.map(one, (indices, arguments), batch_size=min(batch_size, count))

    if mesh is None:
        return chunked(indices, arguments)
    devices, count = mesh.shape[RAYS_AXIS], indices.shape[0]
    missing = -count % devices
    # The last ones are repeated so that every device gets as many, and dropped again.
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]), (indices, arguments))
    spec = PartitionSpec(RAYS_AXIS)
    spread = jax.shard_map(chunked, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    return jax.tree.map(lambda x: x[:count], spread(*padded))


def executed(counts: Int[Array, "rays"], batch_size: int) -> Int[Array, "rays"]:
    """Return what each lane ran, given what it needed: in a vmapped loop all lanes run as long as the slowest.

    Holds for one device; each batch is a run of `batch_size` neighbours, the last one shorter.
    """
    total = counts.shape[0]
    batch = min(batch_size, total)
    batches = -(-total // batch)
    padded = jnp.pad(counts, (0, batches * batch - total))
    longest = jnp.max(jnp.reshape(padded, (batches, batch)), axis=1)
    return jnp.repeat(longest, batch)[:total]


def default_batch_size(dimension: int) -> int:
    """Return how many rays to trace at once, so that a few copies of the parameters per ray fit in memory and cache."""
    on_cpu = jax.default_backend() == "cpu"
    numbers, most = (2**25, 16) if on_cpu else (2**30, 512)
    return int(min(max(numbers // max(dimension, 1), 1), most))


def require_threefry(key: Any) -> Key[Array, ""]:
    """Return `key` as a typed threefry key.

    Raises:
        ValueError: it is no key, or one of another implementation, whose draws change under vmap.
    """
    if not hasattr(key, "dtype"):
        raise ValueError(f"key must be a JAX random key such as jax.random.key(0), got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape != (2,):
            raise ValueError(f"key must be a JAX random key such as jax.random.key(0), got an array of {key.dtype}")
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if key.shape != ():
        raise ValueError(f"key must be a single key, got keys of shape {key.shape}; vmap over them, or pass one")
    if "threefry" not in str(jax.random.key_impl(key)):
        raise ValueError("key must be a threefry key, whose draws do not depend on vmap: jax.random.key(0, impl='threefry2x32')")
    return key
