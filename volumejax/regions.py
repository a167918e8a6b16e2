"""The regions whose mass is asked for, as tests of membership."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, PyTree

from volumejax import tree

__all__ = ["Connected", "Star"]


class Star(eqx.Module):
    """{θ : C ≤ ε on the whole segment from the anchor to θ}: what rays can see.

    Args:
        num_checks: points at which a segment is looked at.
    """

    num_checks: int = eqx.field(static=True, default=32)
    name: ClassVar[str] = "star"

    def __check_init__(self) -> None:
        if self.num_checks < 1:
            raise ValueError(f"Star num_checks must be at least 1, got {self.num_checks}")

    def fractions(self, key: Key[Array, ""]) -> Float[Array, "checks"]:
        """Draw one point in each of `num_checks` equal parts of the unit segment, ascending, float64."""
        jitter = jax.random.uniform(key, (self.num_checks,), jnp.float32)
        with jax.enable_x64(True):
            strata = jnp.arange(self.num_checks, dtype=jnp.float64)
            return (strata + jitter.astype(jnp.float64)) / self.num_checks

    def contains(
        self,
        key: Key[Array, ""],
        cost: Callable[[PyTree], Float[Array, ""]],
        anchor: PyTree,
        params: PyTree,
        cutoff: ArrayLike,
    ) -> Bool[Array, ""]:
        """Return whether `params`, and the checked points between it and the anchor, are within the cutoff."""
        step = jax.tree.map(jnp.subtract, params, anchor)
        between = jax.lax.map(lambda t: cost(tree.axpy(t, step, anchor)), self.fractions(key))
        return within(jnp.append(between, cost(params)), cutoff)


class Connected(eqx.Module):
    """The component of {C ≤ ε} that contains the anchor, at the resolution of a chain's steps."""

    name: ClassVar[str] = "connected"

    def contains(self, costs: Float[Array, "points"], cutoff: ArrayLike) -> Bool[Array, ""]:
        """Return whether a trajectory that starts inside stays inside, from the cost at each of its points."""
        return within(costs, cutoff)


def within(costs: Float[Array, "points"], cutoff: ArrayLike) -> Bool[Array, ""]:
    """Return whether every cost is within the cutoff, compared in float64; NaN and infinities are outside."""
    with jax.enable_x64(True):
        return jnp.all(jnp.isfinite(costs) & (costs.astype(jnp.float64) <= jnp.asarray(cutoff).astype(jnp.float64)))
