"""The ridge: a smooth maximum of the cost along the star's segments, in the guide's place once the tether is gone."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from volumejax.tree import wide

__all__ = ["EYES", "RIDGE_PRICE", "Climb", "Places", "Ridge", "held", "places_of", "ridge_of"]

EYES, _SHARPNESS = 4, 24.0
"""Places at which the ridge looks, for each of the guide's, and the share of the room below the cutoff over which it is
smooth: one in so many."""
RIDGE_PRICE = 1 + EYES
"""Gradients of the guide that one is worth where the ridge has a share."""
_NOWHERE = -1e300
"""The log of nothing."""


class Places(eqx.Module):
    """Numbers in an array of fixed length, so that one program serves lists of any."""

    values: Array | np.ndarray
    count: Int[Array | np.ndarray, ""]

    @property
    def listed(self) -> tuple:
        """The numbers, on the host."""
        return tuple(np.asarray(self.values)[: int(self.count)].tolist())

    @property
    def counts(self) -> Bool[Array, "most"]:
        """Which entries of the array are any of them."""
        return jnp.arange(len(self.values), dtype=jnp.int32) < self.count


def places_of(numbers: Sequence[float] | Sequence[int], most: int, dtype: Any = np.float32) -> Places:
    """Return a list of at most so many numbers."""
    values = np.zeros(most, dtype)
    values[: len(numbers)] = numbers
    return Places(values, np.asarray(len(numbers), np.int32))


class Ridge(eqx.Module):
    """A smooth maximum of the cost along the star's segment, brought to the guide's height; float64."""

    share: Float[Array, ""]
    """What it is multiplied by."""
    sharpness: Float[Array, ""]
    """Per nat."""
    eyes: Places
    """Which of the checked points it sees."""
    asks_rays: Bool[Array, ""]
    """Whether those of the samples are to be looked along."""

    def __call__(self, costs: Float[Array, "checks"]) -> Float[Array, ""]:
        """Return the ridge of a segment with these costs at its checked points."""
        seen = self.sharpness * wide(costs)[self.eyes.values]
        return self.share * jax.scipy.special.logsumexp(seen, where=self.eyes.counts) / self.sharpness


class Climb(eqx.Module):
    """What the ridge makes of the places seen so far."""

    top: Float[Array, ""]
    """The largest cost."""
    height: Float[Array, ""]
    """Sharpness times that."""
    weight: Float[Array, ""]
    """Σ e^(sharpness · C − height)."""
    slope: PyTree
    """Σ e^(sharpness · C − height) ∇C, float32."""

    @staticmethod
    def begun(like: PyTree) -> "Climb":
        """Return that of no place; under float64."""
        low, none = jnp.full((), _NOWHERE), jnp.zeros(())
        return Climb(low, low, none, jax.tree.map(jnp.zeros_like, like))

    def seeing(self, ridge: Ridge, cost: Array, slope: PyTree, is_eye: Bool[Array, ""]) -> "Climb":
        """Return that with one place more, if it is one of the ridge's."""
        seen = jnp.where(is_eye, wide(cost), _NOWHERE)
        height = jnp.maximum(self.height, jnp.where(is_eye, ridge.sharpness * seen, _NOWHERE))
        before = jnp.exp(self.height - height)
        weight = jnp.where(is_eye, jnp.exp(ridge.sharpness * seen - height), 0.0)
        old, new = before.astype(jnp.float32), weight.astype(jnp.float32)
        return Climb(
            jnp.maximum(self.top, seen),
            height,
            before * self.weight + weight,
            jax.tree.map(lambda x, g: old * x + new * g, self.slope, slope),
        )

    def ended(self, ridge: Ridge) -> tuple[Float[Array, ""], PyTree]:
        """Return the ridge and its gradient, the latter float32."""
        factor = (ridge.share / self.weight).astype(jnp.float32)
        value = ridge.share * (self.height + jnp.log(self.weight)) / ridge.sharpness
        return value, jax.tree.map(lambda g: factor * g, self.slope)


def ridge_of(room: float, bulge: float, checks: int, guides: int, *, asks_rays: bool) -> Ridge:
    """Return the ridge of a star.

    Args:
        room: how far the cutoff lies above the anchor's cost, nats.
        bulge: by how much higher than the guide the largest cost on a segment is.
        checks: points at which segments are checked.
        guides: places at which the guide looks.
        asks_rays: whether the samples' rays are to be looked along.
    """
    eyes = min(EYES * guides, checks)
    seen = [round(i * checks / eyes) - 1 for i in range(1, eyes + 1)]
    with jax.enable_x64(True):
        share, sharpness = jnp.float64(1.0 / bulge), jnp.float64(_SHARPNESS / room)
        return Ridge(share, sharpness, places_of(seen, checks, np.int32), jnp.asarray(asks_rays))


def held(cost: Any, ridge: Any, share: Any) -> Any:
    """Return what β multiplies, of the guide and the ridge with that share of it; None for none."""
    if ridge is None or share is None:
        return cost
    return jnp.where(share > 0.0, (1.0 - share) * cost + share * ridge, cost)
