"""Functions that carry their data as leaves, and how they are compiled where nobody is to wait for them."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np

__all__ = ["Function", "jit_ahead"]

F = TypeVar("F", bound=Callable[..., Any])


class Function(eqx.Module):
    """A module to be called, which is hashed and compared as itself, as functions are.

    By its fields otherwise, and arrays have no hash: `jax.jit` and `jax.checkpoint` would refuse it.
    """

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def jit_ahead(function: F) -> F:
    """Compile a function of pytrees, whose arrays are traced and all else is static; calls return before work is done.

    `eqx.filter_jit` waits for the end of each call, to raise Equinox's own errors, so that two devices called one after
    the other would work one after the other. Arguments go by position, and the result holds arrays only.
    """

    def run(arrays: Any, rest: tuple) -> Any:
        leaves, structure = rest
        return function(*eqx.combine(arrays, jax.tree.unflatten(structure, leaves)))

    # By which it is known to profilers and `jax.log_compiles`.
    run.__name__ = function.__name__  # pyright: ignore[reportFunctionMemberAccess]
    compiled = jax.jit(run, static_argnums=1)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        arrays, rest = eqx.partition(args, lambda x: isinstance(x, jax.Array | np.ndarray))
        leaves, structure = jax.tree.flatten(rest)
        return compiled(arrays, (tuple(leaves), structure))

    return call  # pyright: ignore[reportReturnType]
