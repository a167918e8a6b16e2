"""Test-wide settings: run-time checks of shapes, no implicit rank promotion, hypothesis without deadlines."""

import gc
import importlib.util
import mmap
import os
import pathlib


def _is_known(flag: str) -> bool:
    """Whether this jaxlib knows a flag of XLA; another one would end the process."""
    spec = importlib.util.find_spec("jaxlib")
    library = pathlib.Path(spec.submodule_search_locations[0]) / "libjax_common.so"
    if not library.exists():
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(flag.encode()) >= 0


# Most of the tests' time is compilation, of programs that then run for milliseconds: optimise them less, and take the
# code generator that is twice as fast (and whose programs are slower on large networks).
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
if _is_known("xla_cpu_use_fusion_emitters"):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# And share what one process or module has compiled with the others.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Each worker keeps to its own cores: threads that share them cost a fifth of the time.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    _own = _cores[int(_WORKER.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, _own or _cores)

import hypothesis
import jax
import jaxtyping

jaxtyping.install_import_hook("volumejax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("volumejax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("volumejax")

# What has been imported stays: cycles are looked for among the rest, and less often.
gc.freeze()
gc.set_threshold(100_000, 20, 20)
