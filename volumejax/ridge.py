"""The ridge: a smooth maximum of the cost along the star's segments, in the guide's place once the tether is gone."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from volumejax.tree import wide

__all__ = ["EYES", "RIDGE_PRICE", "Ridge", "held", "ridge_above"]

EYES, _SHARPNESS = 4, 24.0
"""Places at which the ridge looks, for each of the guide's, and the share of the room below the cutoff over which it is
smooth: one in so many."""
RIDGE_PRICE = 1 + EYES
"""Gradients of the guide that one is worth where the ridge has a share."""


class Ridge(eqx.Module):
    """A smooth maximum of the cost along the star's segment, brought to the guide's height; float64."""

    share: Float[Array, ""]
    """What it is multiplied by."""
    sharpness: Float[Array, ""]
    """Per nat."""

    def __call__(self, costs: Float[Array, "eyes"]) -> Float[Array, ""]:
        """Return the ridge of these costs."""
        return self.share * jax.scipy.special.logsumexp(self.sharpness * wide(costs)) / self.sharpness

    def slope(self, costs: Float[Array, "eyes"]) -> Float[Array, "eyes"]:
        """Return how it answers to each of them."""
        return self.share * jax.nn.softmax(self.sharpness * wide(costs))


def ridge_above(room: float, bulge: float) -> Ridge:
    """Return the ridge of a star.

    Args:
        room: how far the cutoff lies above the anchor's cost, nats.
        bulge: by how much higher than the guide the largest cost on a segment is.
    """
    with jax.enable_x64(True):
        return Ridge(jnp.float64(1.0 / bulge), jnp.float64(_SHARPNESS / room))


def held(cost: Any, ridge: Any, share: Any) -> Any:
    """Return what β multiplies, of the guide and the ridge with that share of it; None for none."""
    if ridge is None or share is None:
        return cost
    return jnp.where(share > 0.0, (1.0 - share) * cost + share * ridge, cost)
