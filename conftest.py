"""Test-wide settings: run-time checks of shapes, no implicit rank promotion, hypothesis without deadlines."""

import os

# Most of the tests' time is compilation, of programs that then run for milliseconds: optimise them less.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"

import hypothesis
import jax
import jaxtyping

jaxtyping.install_import_hook("volumejax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("volumejax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("volumejax")
