"""How work is cut: into chunks of lanes that run as one vmapped program, over the devices of a mesh."""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

__all__ = [
    "ABSENT",
    "Launcher",
    "cut",
    "default_batch_size",
    "launchers",
    "local_mesh",
    "local_mesh_for_both",
    "num_cores",
    "num_devices",
    "require_threefry",
    "spread",
    "use_every_core",
]

T = TypeVar("T")

RAYS_AXIS = "rays"
ABSENT = np.iinfo(np.int32).max
"""Index of a lane without a ray: out of range everywhere, so that what it computes is dropped."""


def cut(indices: Int[np.ndarray, "rays"], lanes: int) -> Int[np.ndarray, "chunks lanes"]:
    """Return the indices in rows of `lanes`, the last one filled up with `ABSENT`."""
    chunks = -(-len(indices) // lanes)
    padded = np.pad(indices.astype(np.int32), (0, chunks * lanes - len(indices)), constant_values=ABSENT)
    return padded.reshape(chunks, lanes)


def spread(lanes: Int[Array, "lanes"], mesh: Mesh | None) -> Int[Array, "lanes"]:
    """Divide lanes among the devices along the mesh's axis `rays`; without a mesh they stay where they are."""
    if mesh is None:
        return lanes
    # The axes of `jax.make_mesh` are explicit unless asked otherwise, and a constraint needs automatic ones.
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return jax.lax.with_sharding_constraint(lanes, NamedSharding(automatic, PartitionSpec(RAYS_AXIS)))


def num_devices(mesh: Mesh | None) -> int:
    """Return the number of devices along the axis `rays`, 1 without a mesh.

    Raises:
        ValueError: the mesh has no such axis.
    """
    if mesh is None:
        return 1
    if RAYS_AXIS not in mesh.shape:
        raise ValueError(f"mesh has the axes {tuple(mesh.shape)}; name the one that rays are spread over '{RAYS_AXIS}'")
    return mesh.shape[RAYS_AXIS]


def local_mesh(lanes: int) -> Mesh | None:
    """Return a mesh over as many devices of this process as divide `lanes` evenly; None where that is one."""
    devices = jax.local_devices()
    count = next(k for k in range(min(len(devices), lanes), 0, -1) if lanes % k == 0)
    return Mesh(np.array(devices[:count]), (RAYS_AXIS,)) if count > 1 else None


class Launcher:
    """A mesh, and the thread from which programs are launched there.

    On CPUs those that one thread launches wait for each other, whatever their devices. Without a thread of its own a
    launcher uses its caller's.
    """

    def __init__(self, mesh: Mesh | None, *, own_thread: bool = False) -> None:
        """Take the precision of the caller's context, which a thread does not inherit."""
        self.mesh = mesh
        self._worker = ThreadPoolExecutor(1, "volumejax") if own_thread else None
        self._x64 = jax.config.read("jax_enable_x64")
        self._precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]

    def launch(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call the function, soon, and return what will hold its result; arrays in that may still be on their way."""
        if self._worker is not None:
            return self._worker.submit(self._call, function, *args)
        done: Future[T] = Future()
        done.set_result(function(*args))
        return done

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        with jax.enable_x64(self._x64), jax.default_matmul_precision(self._precision):
            return function(*args)


def launchers(mesh: Mesh | None, lanes: int) -> tuple[Launcher, ...]:
    """Return one for each half of a mesh where two jobs of so many lanes find room side by side, else one for it all.

    Only within a process: several would have to agree on which job is ahead.
    """
    count = num_devices(mesh)
    if mesh is None or count < 2 * lanes or mesh.is_multi_process:
        return (Launcher(mesh),)
    axis = mesh.axis_names.index(RAYS_AXIS)
    halves = np.split(mesh.devices, [count // 2, count // 2 * 2], axis)[:2]
    return tuple(Launcher(Mesh(half, mesh.axis_names), own_thread=True) for half in halves)


def local_mesh_for_both(lanes: int) -> Mesh | None:
    """Return `local_mesh` of the lanes, or of twice as many where two jobs find room side by side."""
    return local_mesh(2 * lanes if len(jax.local_devices()) >= 2 * lanes else lanes)


def num_cores() -> int:
    """Return how many processor cores this process may use: a batch job may own a few of a machine's many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_every_core() -> None:
    """Let JAX take each of those cores for a device: a small network's matrices are too small to be shared by cores.

    For programs, before they use JAX; what the environment says of devices holds, and so does what JAX has begun with.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags:
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_cores())


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
            raise ValueError(
                f"key must be a JAX random key such as jax.random.key(0), got {key.dtype} of shape {key.shape}"
            )
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if key.shape != ():
        raise ValueError(f"key must be a single key, got keys of shape {key.shape}; vmap over them, or pass one")
    if "threefry" not in str(jax.random.key_impl(key)):
        raise ValueError(
            "key must be a threefry key, whose draws do not depend on vmap: jax.random.key(0, impl='threefry2x32')"
        )
    return key
