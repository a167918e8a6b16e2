r"""Coordinates in which the mean output stays where it is while everything but the output's offset moves.

At any place of a network's region the cost is far stiffer in a few directions than in all others, one for each class
but one, and they turn from place to place: along them the mean of the logits over the examples shifts. Where one leaf b
is added to the logits, as the bias of the last layer is, chains move in (θ, b') with

.. math:: b = b' - (\bar f(\theta, 0) - \bar f(\theta_0, 0))

in place of b. \bar f is the mean over the examples of the logits less their mean over classes, which no softmax sees;
in these coordinates it depends on b' alone. The change is a shear: its determinant is one.

References: Montavon & Müller 2012 (Neural Networks: Tricks of the Trade) for centring; Sagun et al. 2017 and Papyan
2020 (JMLR 21) for as many outlying curvatures as classes.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from volumejax.behaviours import Behaviour

__all__ = ["Shear", "find_shear"]

_EXACT = 1e-4
"""Up to so much of the largest logit."""


class Shear(eqx.Module):
    """A behaviour and the leaf that is added to its logits."""

    behaviour: Behaviour
    leaf: int = eqx.field(static=True)
    """Its place among the leaves of the parameters."""
    origin: Float[Array, "classes"]
    """The mean of the logits at the anchor less the leaf there."""

    def __call__(self, params: PyTree) -> tuple[Float[Array, ""], Float[Array, "classes"]]:
        """Return the cost, and what comes to the leaf b' of `params`: b − b'; both float32."""
        examples = self.behaviour.examples
        logits = self.behaviour.apply_fn(params, examples.inputs).astype(jnp.float32)
        slip = self.origin - _centre(logits, examples.mask, jax.tree.leaves(params)[self.leaf])
        return self.behaviour.of_logits(_added(logits, slip)), slip

    def restored(self, params: PyTree) -> PyTree:
        """Return the parameters that (θ, b') stand for."""
        leaves, treedef = jax.tree.flatten(params)
        leaves[self.leaf] = leaves[self.leaf] + self(params)[1]
        return treedef.unflatten(leaves)


def find_shear(cost: Any, params: PyTree, places: list[PyTree]) -> Shear | None:
    """Return the shear of a behaviour, or None where it has no leaf that is added to the logits.

    None as well for other costs, and where examples come in micro-batches: the mean would take a pass of its own.

    Args:
        cost: to be looked at.
        params: the anchor.
        places: parameters, drawn from the prior, at which to look besides.
    """
    if not isinstance(cost, Behaviour):
        return None
    examples = cost.examples
    if cost.batch_size is not None and cost.batch_size < len(examples):
        return None
    outputs = jax.jit(lambda p: cost.apply_fn(p, examples.inputs).astype(jnp.float32))
    logits = [outputs(p) for p in (params, *places)]
    leaves, treedef = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        if leaf.shape != logits[0].shape[-1:] or leaf.dtype != jnp.float32:
            continue
        push = jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), jnp.float32)
        push = push * (1.0 + jnp.max(jnp.abs(leaf)))

        def pushed(place: PyTree, i: int = i, push: Array = push) -> Array:
            moved = jax.tree.leaves(place)
            moved[i] = moved[i] + push
            return outputs(treedef.unflatten(moved))

        if all(_is_added(pushed(p), found, push) for p, found in zip((params, *places), logits, strict=True)):
            return Shear(cost, i, _centre(logits[0], examples.mask, leaf))
    return None


def _added(logits: Array, offset: Array) -> Array:
    return logits + offset.reshape((1,) * (logits.ndim - 1) + (-1,))


def _is_added(moved: Array, logits: Array, push: Array) -> bool:
    off = jnp.max(jnp.abs(moved - _added(logits, push)))
    return bool(off <= _EXACT * jnp.maximum(jnp.max(jnp.abs(logits)), jnp.max(jnp.abs(push))))


def _centre(logits: Array, mask: Array | None, offset: Array) -> Float[Array, "classes"]:
    """Return the mean of the logits less the offset over the positions that count, less its own mean over classes."""
    rows = logits.reshape(-1, logits.shape[-1])
    if mask is None:
        mean = jnp.mean(rows, axis=0)
    else:
        keep = mask.reshape(-1, 1)
        mean = jnp.sum(jnp.where(keep, rows, 0.0), axis=0) / jnp.sum(keep)
    without = mean - offset.astype(jnp.float32)
    return without - jnp.mean(without)
