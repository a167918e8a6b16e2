r"""Particles that are weighed, drawn anew and moved from the prior down a ladder of temperatures, in separate islands.

At each level of the ladder a particle gains the log weight −(β'−β)C. Where an island's weights have become uneven it
draws its particles anew in proportion to them, and every particle makes an adjusted move at the new temperature. The
mean weight of an island, times what its draws have put aside, is unbiased for Z(β')/Z(0) if ladder and moves are fixed
beforehand, whatever they are.

References: Del Moral, Doucet & Jasra, JRSS B 68, 411 (2006), for the sampler; Neal 2001 for the weights; Kitagawa 1996
for the systematic draw.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from volumejax import tree
from volumejax.diagnostics import effective_sample_size
from volumejax.ensemble import Ensemble, Position, Rung
from volumejax.kernels import hmc
from volumejax.logmath import log_mean_exp
from volumejax.metric import Metric
from volumejax.parallel import spread

__all__ = ["MOST_LEVELS", "Ladder", "Swarm", "Visit", "descend", "mean_squares", "populate"]

MOST_LEVELS = 16
"""Levels visited in one call of the compiled program, at most."""
_UNEVEN = 0.5
"""Effective share of an island's particles below which they are drawn anew."""
_SPREAD = 0.7
"""Steps are drawn log-uniformly over so many e-folds below the tuned one: no one step fits all of a singular region."""


class Ladder(NamedTuple):
    """Levels and how particles move there; the first is the prior, without moves."""

    beta: Any
    step_size: Any
    masses: Any
    """One over the mean square of each leaf's whitened coordinates, [levels, leaves]."""


class Swarm(eqx.Module):
    """Where the particles of all islands stand."""

    position: Position
    """Axes [islands, particles]; without the first inside the map over islands, as are the others."""
    log_weight: Float[Array, "*islands particles"]
    log_norm: Float[Array, "*islands"]
    """Log of what earlier draws have put aside."""


class Visit(NamedTuple):
    """What was seen on the levels visited; axes [levels, islands, …]."""

    cost: Float[Array | np.ndarray, "*levels_and_islands particles"]
    """After the move; nats, +inf for NaN."""
    log_weight: Float[Array | np.ndarray, "*levels_and_islands particles"]
    """Of the particles while they moved."""
    log_norm: Float[Array | np.ndarray, "*levels_and_islands"]
    ess: Float[Array | np.ndarray, "*levels_and_islands"]
    """Effective share of the particles before they were drawn anew."""
    acceptance: Float[Array | np.ndarray, "*levels_and_islands"]


@eqx.filter_jit
def populate(
    ensemble: Ensemble, key: Key[Array, ""], islands: Int[Array, "islands"], count: int, batch_size: int,
    mesh: Mesh | None,
) -> Swarm:  # fmt: skip
    """Draw `count` particles for each island from the prior; the one of an island's key and its own number."""
    particles = jnp.arange(count, dtype=jnp.int32)

    def one(island: Array, particle: Array) -> Position:
        displacement = ensemble.frame.draw_prior(jax.random.fold_in(jax.random.fold_in(key, island), particle))
        with jax.enable_x64(True):
            cost = _outside(ensemble.value(displacement))
            return Position(displacement, cost, cost, ensemble.no_virials)

    def island(index: Array) -> Position:
        return jax.lax.map(lambda p: one(index, p), particles, batch_size=batch_size)

    position = jax.vmap(island)(spread(islands, mesh))
    with jax.enable_x64(True):
        even = jnp.zeros((len(islands), count), jnp.float64)
        return Swarm(position, even, jnp.zeros(len(islands), jnp.float64))


@eqx.filter_jit
def mean_squares(swarm: Swarm) -> Float[Array, "islands leaves"]:
    """Return the mean square of each leaf's whitened coordinates, over the particles of each island; float64."""
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(swarm.position.displacement)
        return jnp.stack([jnp.mean(tree.wide(x) ** 2, axis=range(1, x.ndim)) for x in leaves], axis=1)


@eqx.filter_jit
def descend(
    ensemble: Ensemble,
    metric: Metric,
    key: Key[Array, ""],
    swarm: Swarm,
    levels: Ladder,
    first: Int[Array, ""],
    count: Int[Array, ""],
    num_steps: Int[Array, ""],
    islands: Int[Array, "islands"],
    batch_size: int,
    mesh: Mesh | None,
) -> tuple[Swarm, Visit]:
    """Weigh and move the particles at the levels first, first + 1, … of a table, `count` of them.

    Args:
        ensemble: the prior's frame and the cost.
        metric: of the moves.
        key: the move of particle p of island i at level k uses `fold_in(fold_in(fold_in(key, i), k), p)`.
        swarm: at level first − 1.
        levels: a table from `annealing.pad`.
        first: at least 1.
        count: at most `MOST_LEVELS`; what is returned of later visits is zero.
        num_steps: mean leapfrog steps of a trajectory.
        islands: their numbers.
        batch_size: particles of an island at once.
        mesh: over whose axis `rays` islands are spread.
    """
    islands = spread(islands, mesh)

    def level(swarm: Swarm, where: Array) -> tuple[Swarm, Visit]:
        return jax.vmap(lambda s, i: _visit(ensemble, metric, key, s, levels, where, i, num_steps, batch_size))(
            swarm, islands
        )

    blank = jax.eval_shape(level, swarm, first)[1]

    def next_level(swarm: Swarm, k: Array) -> tuple[Swarm, Visit]:
        with jax.enable_x64(True):
            rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)
        return jax.lax.cond(k < count, level, lambda swarm, _: (swarm, rest), swarm, first + k)

    return jax.lax.scan(next_level, swarm, jnp.arange(MOST_LEVELS, dtype=jnp.int32))


def _visit(
    ensemble: Ensemble,
    metric: Metric,
    key: Array,
    swarm: Swarm,
    levels: Ladder,
    where: Array,
    island: Array,
    mean_steps: Array,
    batch_size: int,
) -> tuple[Swarm, Visit]:
    """Do what `descend` does for one island and level."""
    key = jax.random.fold_in(jax.random.fold_in(key, island), where)
    count = swarm.log_weight.shape[0]
    particles = jnp.arange(count, dtype=jnp.int32)
    # All particles share the number of steps, so that none waits.
    lot, length = jax.random.uniform(jax.random.fold_in(key, count), (2,), jnp.float32)
    num_steps = jnp.maximum(jnp.round((0.5 + length) * mean_steps), 1.0).astype(jnp.int32)
    with jax.enable_x64(True):
        gain = levels.beta[where] - levels.beta[where - 1]
        log_weight = swarm.log_weight - jnp.where(gain > 0.0, gain * swarm.position.cost, 0.0)
        share = effective_sample_size(log_weight) / count
        anew = share < _UNEVEN
        source = jnp.where(anew, _systematic(log_weight, lot), particles)
        position = jax.tree.map(lambda x: x[source], swarm.position)
        log_norm = swarm.log_norm + jnp.where(anew, log_mean_exp(log_weight), 0.0)
        log_weight = jnp.where(anew, jnp.zeros_like(log_weight), log_weight)
        rung = Rung(
            precision=jnp.float64(ensemble.frame.stiffness),
            beta=levels.beta[where],
            masses=levels.masses[where],
            step_size=levels.step_size[where],
            spread=jnp.float64(_SPREAD),
            num_steps=mean_steps,
            num_moves=jnp.int32(1),
            stretch=jnp.zeros(1, jnp.float64),
        )
    _, step = hmc(ensemble, rung, metric)

    def move(args: tuple[Array, Position]) -> tuple[Position, Array]:
        particle, position = args
        position, info = step(jax.random.fold_in(key, particle), position, num_steps)
        return position, info.acceptance

    position, acceptance = jax.lax.map(move, (particles, position), batch_size=batch_size)
    with jax.enable_x64(True):
        visit = Visit(position.cost, log_weight, log_norm, share, jnp.mean(acceptance))
    return Swarm(position, log_weight, log_norm), visit


def _outside(cost: Array) -> Array:
    """Return the cost with +inf for what is none."""
    return jnp.where(jnp.isfinite(cost), cost, jnp.inf)


def _systematic(log_weight: Array, lot: Array) -> Int[Array, "particles"]:
    """Draw as many indices as there are weights, each in proportion to its own, from one uniform number."""
    count, top = log_weight.shape[0], jnp.max(log_weight)
    edges = jnp.cumsum(jnp.exp(log_weight - jnp.where(jnp.isfinite(top), top, 0.0)))
    # Half a step of the generator keeps the lot off zero, where the first particle would be drawn whatever its weight.
    ticks = (jnp.arange(count, dtype=jnp.float64) + lot.astype(jnp.float64) + 2.0**-24) * (edges[-1] / count)
    # An island that has died out keeps its particles: its weight is zero whatever they do.
    found = jnp.searchsorted(edges, ticks, side="right").astype(jnp.int32)
    return jnp.where(edges[-1] > 0.0, jnp.minimum(found, count - 1), jnp.arange(count, dtype=jnp.int32))
