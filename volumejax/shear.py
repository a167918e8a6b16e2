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

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from volumejax.behaviours import Behaviour

__all__ = ["Shear", "find_shear"]

_EXACT = 1e-3
"""Share of the push up to which a logit may miss it, and of the cost up to which it may be off."""
_PROBES = 16
"""Directions over which a second derivative is averaged."""


class Shear(eqx.Module):
    """A behaviour and the leaf that is added to its logits."""

    behaviour: Behaviour
    leaf: int = eqx.field(static=True)
    """Its place among the leaves of the parameters."""
    origin: Float[Array, "classes"]
    """The mean of the logits at the anchor less the leaf there, less its mean over classes."""

    def __call__(self, params: PyTree) -> tuple[Float[Array, ""], Float[Array, "classes"]]:
        """Return the cost, and what comes to the leaf b' of `params`: b − b'; both float32."""
        logits = _outputs(self.behaviour, params)
        slip = self.origin - _centre(logits, self.behaviour.examples.mask, jax.tree.leaves(params)[self.leaf])
        return self.behaviour.of_logits(_added(logits, slip)), slip

    @eqx.filter_jit
    def curvature(self, params: PyTree) -> Float[Array, ""]:
        """Return the mean second derivative of the cost in the offset there, in nats per square of it."""
        logits = _outputs(self.behaviour, params)
        probes = jax.random.rademacher(jax.random.key(0), (_PROBES, logits.shape[-1]), jnp.float32)
        probes = probes - jnp.mean(probes, axis=1, keepdims=True)
        slope = jax.grad(lambda offset: self.behaviour.of_logits(_added(logits, offset)))
        turned = jax.vmap(lambda v: jax.jvp(slope, (jnp.zeros_like(v),), (v,))[1])(probes)
        return jnp.sum(probes * turned) / jnp.sum(jnp.square(probes))

    def restored(self, params: PyTree) -> PyTree:
        """Return the parameters that (θ, b') stand for."""
        leaves, treedef = jax.tree.flatten(params)
        leaves[self.leaf] = leaves[self.leaf] + self(params)[1]
        return treedef.unflatten(leaves)


def find_shear(cost: Any, params: PyTree, places: Iterable[PyTree]) -> Shear | None:
    """Return the shear of a behaviour, or None where it has no leaf that is added to the logits.

    None as well for other costs, and where examples come in micro-batches: the mean would take a pass of its own.

    Args:
        cost: to be looked at.
        params: the anchor.
        places: other parameters at which to look; drawn only for a behaviour.
    """
    if not isinstance(cost, Behaviour) or (cost.batch_size is not None and cost.batch_size < cost.num_examples):
        return None
    classes = jax.eval_shape(cost.apply_fn, params, cost.examples.inputs).shape[-1:]
    leaves = jax.tree.leaves(params)
    fitting = [i for i, leaf in enumerate(leaves) if leaf.shape == classes and leaf.dtype == jnp.float32]
    places = (params, *places)
    for i in fitting:
        if all(_is_added(cost, i, place) for place in places):
            shear = Shear(cost, i, _centre(_outputs(cost, params), cost.examples.mask, leaves[i]))
            if all(_agrees(shear, place) for place in places):
                return shear
    return None


def _outputs(behaviour: Behaviour, params: PyTree) -> Array:
    return behaviour.apply_fn(params, behaviour.examples.inputs).astype(jnp.float32)


@eqx.filter_jit
def _is_added(behaviour: Behaviour, leaf: int, params: PyTree) -> Array:
    """Return whether a push of the leaf is seen in each logit that counts, as it is and above its rounding."""
    leaves, treedef = jax.tree.flatten(params)
    classes = leaves[leaf].size
    before, mask = _outputs(behaviour, params), behaviour.examples.mask
    counts = jnp.ones((), bool) if mask is None else mask[..., None]
    size = 1.0 + jnp.max(jnp.abs(leaves[leaf])) + jnp.max(jnp.abs(jnp.where(counts, before, 0.0)))
    push = size * jnp.linspace(1.0, 2.0, classes) * (-1.0) ** jnp.arange(classes)
    leaves[leaf] = leaves[leaf] + push
    off = jnp.abs(_outputs(behaviour, treedef.unflatten(leaves)) - _added(before, push))
    return jnp.all((off <= _EXACT * size) | ~counts)


@eqx.filter_jit
def _agrees(shear: Shear, params: PyTree) -> Array:
    """Return whether the cost is that of the parameters meant."""
    cost, slip = shear(params)
    meant = shear.behaviour(shear.restored(params))
    return jnp.all(jnp.isfinite(slip)) & jnp.isclose(cost, meant, rtol=_EXACT, atol=_EXACT)


def _added(logits: Array, offset: Array) -> Array:
    return logits + offset.reshape((1,) * (logits.ndim - 1) + (-1,))


def _centre(logits: Array, mask: Array | None, offset: Array) -> Float[Array, "classes"]:
    """Return the mean of the logits less the offset over the positions that count, less its own mean over classes."""
    counts = None if mask is None else mask.reshape(-1, 1)
    without = jnp.mean(logits.reshape(-1, logits.shape[-1]), axis=0, where=counts) - offset
    return without - jnp.mean(without)
