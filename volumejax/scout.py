"""A few rays sent ahead: at what distance the region ends, how the cost grows there, and how noisy it is."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree
from volumejax.boundary import first_crossing
from volumejax.radial import radial, radial_and_slope, radial_mode

__all__ = ["Scouting", "cost_along", "position_floor", "scout"]

_SCOUTS = 8


class Scouting(eqx.Module):
    """What the scouts found. float64."""

    start: Float[Array, ""]
    """Median crossing, in units of the drawn direction."""
    power: Float[Array, ""]
    """Median d log C / d log s at the crossing."""
    noise: Float[Array, ""]
    """Rounding error of the cost near the cutoff, in the cost's nats."""
    evaluations: Array
    """Cost evaluations spent."""


def cost_along(
    cost: Callable[[PyTree], Array], params: PyTree, direction: PyTree
) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """Return s -> C(params + s·direction) in float64, evaluated with the caller's own x64 setting."""
    ambient = jax.config.jax_enable_x64

    def cost_at(distance: Array) -> Array:
        position = tree.axpy(distance, direction, params)
        with jax.enable_x64(ambient):
            value = cost(position)
        with jax.enable_x64(True):
            return value.astype(jnp.float64)

    return cost_at


def position_floor(params: PyTree, direction: PyTree) -> Float[Array, ""]:
    """Return the distance below which a step disappears in the rounding of the parameters."""
    with jax.enable_x64(True):
        epsilon = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
        length = jnp.sqrt(tree.dot(direction, direction))
        return epsilon * jnp.sqrt(tree.dot(params, params)) / length


def scout(
    key: Key[Array, ""],
    cost: Callable[[PyTree], Array],
    params: PyTree,
    prior: Any,
    proposal: Any,
    *,
    cutoff: Float[Array, ""],
    batch_size: int,
) -> Scouting:
    """Trace eight rays from far inside outwards, to their first crossing.

    Args:
        key: key of the scouts, apart from the rays' own.
        cost: params -> scalar nats.
        params: the anchor.
        prior: supplies the density along a ray.
        proposal: supplies directions.
        cutoff: ε in nats, float64.
        batch_size: scouts traced at once.
    """
    dtype = eqx.filter_eval_shape(cost, params).dtype
    dimension = tree.size(params)
    with jax.enable_x64(True):
        rounding = 0.5 * float(jnp.finfo(dtype).eps) * cutoff

    def one(key: Array) -> tuple[Array, Array, Array, Array]:
        draw = proposal.draw(key, params)
        line = prior.line(params, draw.direction)
        cost_at = cost_along(cost, params, draw.direction)
        floor = position_floor(params, draw.direction)
        with jax.enable_x64(True):
            found = first_crossing(
                cost_at,
                lambda s: radial_and_slope(dimension, line.curvature, line.slope, s),
                cutoff=cutoff,
                start=1e-3 * _scale(params, draw.direction, line, dimension),
                total=radial(dimension, line.curvature, line.slope, jnp.inf),
                noise=rounding,
                limit=line.exit,
                floor=floor,
                leap=True,
            )
            s = found.bracket.inside
            bounded = jnp.isfinite(found.bracket.outside) & (s > 0.0) & jnp.isfinite(s)
            # The cost is smooth on a scale of 1e-5 of the radius: what the second difference leaves is rounding.
            near = jax.lax.map(cost_at, jnp.where(bounded, s, 0.0) * (1.0 + 1e-5 * jnp.arange(-1.0, 2.0)))
            second = near[0] - 2.0 * near[1] + near[2]
            noise = jnp.where(bounded, second / jnp.sqrt(6.0), jnp.nan)
            return s, jnp.where(bounded, found.power, jnp.nan), noise, found.evaluations + near.shape[0]

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(_SCOUTS))
    crossing, power, noise, evaluations = jax.lax.map(one, keys, batch_size=batch_size)
    with jax.enable_x64(True):
        usable = jnp.isfinite(crossing) & (crossing > 0.0)
        start = jnp.exp(jnp.nanmedian(jnp.where(usable, jnp.log(jnp.where(usable, crossing, 1.0)), jnp.nan)))
        power = jnp.nanmedian(jnp.where(power > 0.0, power, jnp.nan))
        noise = jnp.sqrt(jnp.nanmean(jnp.where(jnp.isfinite(noise), noise, jnp.nan) ** 2))
        return Scouting(
            start=jnp.where(jnp.isfinite(start), start, 1.0),
            power=jnp.where(jnp.isfinite(power), jnp.clip(power, 0.5, 20.0), 2.0),
            noise=jnp.maximum(rounding, jnp.where(jnp.isfinite(noise), noise, 0.0)),
            evaluations=jnp.sum(evaluations),
        )


def _scale(params: PyTree, direction: PyTree, line: Any, dimension: int) -> Float[Array, ""]:
    """Return a distance at which the network is surely another one: the prior's own, or the anchor's norm."""
    with jax.enable_x64(True):
        mode = jnp.minimum(radial_mode(dimension + 1, line.curvature, line.slope), line.exit)
        norm = jnp.sqrt(tree.dot(params, params))
        unit = jnp.where(norm > 0.0, norm, 1.0) / jnp.sqrt(tree.dot(direction, direction))
        return jnp.where(jnp.isfinite(mode) & (mode > 0.0), mode, unit)
