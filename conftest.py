"""Test-wide settings: run-time checks of shapes, no implicit rank promotion, hypothesis without deadlines."""

import os
import pathlib

# Most of the tests' time is compilation, of programs that then run for milliseconds: optimise them less.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
# And share what one process or module has compiled with the others.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import jaxtyping

jaxtyping.install_import_hook("volumejax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("volumejax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("volumejax")
