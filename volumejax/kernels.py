r"""Hamiltonian Monte Carlo on the tethered ensemble, with the prior and the tether integrated exactly.

The Hamiltonian splits into the quadratic part, whose flow is a rotation in each coordinate, and the cost, which kicks:
the energy error then grows with the number of directions that the cost confines and not with D. Steps are taken in the
turned coordinates of a metric, so that one size fits the stiff and the soft. Behind the wall of the region a trajectory
that steps outside is reflected about the cost's gradient there; two steps outside in a row, or an end outside, reject
it. Reversible and volume-preserving, hence exact.

Beside it, for regions of layers' products: a Metropolis move of two leaves' scales.

References: Neal 2011 (Handbook of Markov Chain Monte Carlo, ch. 5) for the method; Shahbaba, Lan, Johnson & Neal,
Statistics and Computing 2014, for the splitting; Neal, Annals of Statistics 2003, §7.2, for outside reflection.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from volumejax import tree
from volumejax.ensemble import Ensemble, Position, Rung, toll_share
from volumejax.frames import Walls
from volumejax.metric import Metric
from volumejax.ridge import held
from volumejax.tree import wide

__all__ = ["MoveInfo", "hmc", "rescaled"]

JITTER = 0.1
"""A trajectory's step is drawn within this share of the nominal one, so that no period is met exactly."""
_NARROWEST, _WIDEST = 0.03, 3.0
"""Standard deviations between which a change of two leaves' log scales is drawn, evenly in their logarithm."""


class MoveInfo(eqx.Module):
    """What one trajectory did."""

    acceptance: Float[Array, ""]
    """Metropolis probability; 0 where the trajectory ended outside."""
    inside: Bool[Array, ""]
    """Whether the trajectory was allowed by the region."""
    bounces: Int[Array, ""]
    non_finite: Int[Array, ""]
    """Steps at which the cost or its gradient was NaN or infinite."""


class _Flight(eqx.Module):
    place: PyTree
    """δ in the turned coordinates, like the velocity."""
    velocity: PyTree
    slope: PyTree
    """∇E in the turned coordinates."""
    first_slope: PyTree
    cost: Float[Array, ""]
    toll: Float[Array, ""] | None
    legal: Bool[Array, ""]
    was_out: Bool[Array, ""]
    bounces: Int[Array, ""]
    non_finite: Int[Array, ""]


def hmc(
    ensemble: Ensemble, rung: Rung, metric: Metric
) -> tuple[Callable[[PyTree], Position], Callable[..., tuple[Position, MoveInfo]]]:
    """Return `init(displacement) -> position` and `step(key, position[, num_steps, pace]) -> (position, info)`.

    Args:
        ensemble: the target but for its parameters.
        rung: those parameters with masses, step size (float64) and number of steps; may be traced.
        metric: bases and curvatures; behind the walls of a box it may not turn.

    `pace` multiplies the step size.
    """

    def step(
        key: Key[Array, ""], position: Position, num_steps: Any = rung.num_steps, pace: Any = 1.0
    ) -> tuple[Position, MoveInfo]:
        with jax.enable_x64(True):
            return _trajectory(ensemble, rung, metric, key, position, num_steps, pace)

    return ensemble.position, step


def _trajectory(
    ensemble: Ensemble, rung: Rung, metric: Metric, key: Array, start: Position, num_steps: Any, pace: Any
) -> tuple[Position, MoveInfo]:
    a, beta = (jnp.asarray(x, jnp.float32) for x in (rung.precision, rung.beta))
    scene = (jnp.asarray(rung.masses, jnp.float32), a, beta, start.displacement)
    masses, precisions = metric.masses(*scene), metric.precisions(*scene)
    # The generator does not lower under float64 when the call around it runs without.
    with jax.enable_x64(False):
        lot, jitter = jax.random.uniform(jax.random.fold_in(key, 0), (2,), jnp.float32)
        noise = tree.normal_like(jax.random.fold_in(key, 1), start.displacement)
        chance = jax.random.uniform(jax.random.fold_in(key, 2), (), jnp.float32)
    h = jnp.asarray(pace, jnp.float32) * rung.step_size.astype(jnp.float32) * (1.0 + JITTER * (2.0 * jitter - 1.0))
    h = h * jnp.exp(-lot * rung.spread.astype(jnp.float32))
    launch = jax.tree.map(lambda z, m: z / jnp.sqrt(m), noise, masses)
    num_steps = jnp.asarray(num_steps, jnp.int32)
    share_of_toll = toll_share(a, beta) / jnp.where(beta > 0.0, beta, 1.0)
    walls = ensemble.frame.walls
    climbs = None if ensemble.ridge is None or rung.ridge is None else jnp.asarray(rung.ridge, jnp.float64)
    turns = _turns(ensemble, metric, h, a, masses)

    def flow(place: PyTree, velocity: PyTree, moves: Array) -> tuple[PyTree, PyTree, Array]:
        if walls is None:
            return (*_rotate(turns, place, velocity, moves), jnp.ones((), bool))
        return _fold(walls, place, velocity, jnp.where(moves, h, jnp.float32(0.0)))

    def advance(i: Array, flight: _Flight) -> _Flight:
        # The first pass stands still: it measures the slope at the start, so that the cost's gradient is compiled once.
        moves = i > 0
        place, velocity, folded = flow(flight.place, flight.velocity, moves)
        displacement = metric.restored(place)
        seen, slope = ensemble.slope(displacement, share_of_toll, climbs)
        slope = metric.turned(slope)
        permitted = ensemble.permits(seen.top, displacement)
        share = jnp.where((i == 0) | (i == num_steps), jnp.float32(0.5), jnp.float32(1.0)) * h
        pulling = jax.tree.map(lambda g, d: beta * g if walls is None else beta * g + a * d, slope, place)
        kicked = jax.tree.map(lambda v, g, m: v - share * g / m, velocity, pulling, masses)
        bounced = _reflect(ensemble, metric, displacement, velocity, slope, masses)
        broken = ~jnp.isfinite(seen.cost) | ~jnp.isfinite(_sum(jax.tree.map(jnp.sum, slope)))
        return _Flight(
            place=place,
            velocity=jax.tree.map(lambda x, y: jnp.where(permitted, x, y), kicked, bounced),
            slope=slope,
            first_slope=jax.tree.map(lambda x, y: jnp.where(moves, x, y), flight.first_slope, slope),
            cost=seen.cost,
            toll=seen.toll,
            legal=flight.legal & folded & ~broken & (permitted | ((i < num_steps) & ~flight.was_out)),
            was_out=~permitted,
            bounces=flight.bounces + (~permitted).astype(jnp.int32),
            non_finite=flight.non_finite + broken.astype(jnp.int32),
        )

    no, yes, none = jnp.zeros((), bool), jnp.ones((), bool), jnp.zeros((), jnp.int32)
    place = metric.turned(start.displacement)
    begun = _Flight(place, launch, place, place, start.cost, start.toll, yes, no, none, none)
    end = jax.lax.fori_loop(jnp.int32(0), num_steps + jnp.int32(1), advance, begun)
    arrived = metric.restored(end.place)
    reach, ridge = ensemble.look(arrived, end.cost)
    inside = end.legal & ensemble.permits(reach, arrived)
    there = Position(arrived, end.cost, reach, start.virials, end.toll, ridge)
    error = _kinetic_gain(masses, launch, end.velocity) + _potential_gain(ensemble, rung, start, there)
    acceptance = jnp.where(inside & jnp.isfinite(error), jnp.exp(-jnp.maximum(error, 0.0)), 0.0)
    taken = wide(chance) < acceptance
    stayed = (start.displacement, start.cost, start.reach, start.toll, start.ridge, begun.place, end.first_slope)
    moved = (arrived, end.cost, reach, end.toll, ridge, end.place, end.slope)
    *here, place, slope = jax.tree.map(lambda x, y: jnp.where(taken, x, y), moved, stayed)
    displacement, cost, reach, toll, ridge = here
    virials = jnp.stack([tree.leaf_dots(v, slope) for v in ensemble.fields(metric, precisions, (a, beta), place)])
    position = Position(displacement, cost, reach, virials, toll, ridge)
    return position, MoveInfo(acceptance, inside, end.bounces, end.non_finite)


def rescaled(ensemble: Ensemble, rung: Rung, key: Key[Array, ""], start: Position) -> Position:
    """Move the parameters of two leaves, all of one up and of the other down by the same factor, or stay.

    A Metropolis move that leaves the ensemble as it is. Where a cost is one of layers' product, regions have arms where
    one layer is wide and another narrow: in each of them other steps and another metric would fit, and trajectories
    take long from one to the other. It multiplies the parameters, not what they are off the anchor by: those are what
    layers have in common. A trajectory has to follow, since virials are not measured.

    Args:
        ensemble: the target but for its parameters; of two leaves or more.
        rung: those parameters; may be traced.
        key: of the move.
        start: where the chain stands.
    """
    leaves, treedef = jax.tree.flatten(start.displacement)
    with jax.enable_x64(False):
        up = jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(leaves))
        down = (up + jax.random.randint(jax.random.fold_in(key, 1), (), 1, len(leaves))) % len(leaves)
        width = jax.random.uniform(jax.random.fold_in(key, 2), (), jnp.float32, *np.log([_NARROWEST, _WIDEST]))
        change = jnp.exp(width) * jax.random.normal(jax.random.fold_in(key, 3), (), jnp.float32)
        chance = jax.random.uniform(jax.random.fold_in(key, 4), (), jnp.float32)
    with jax.enable_x64(True):
        places = jnp.arange(len(leaves))
        changes = change * ((places == up).astype(jnp.float32) - (places == down).astype(jnp.float32))
        displacement = jax.tree.map(
            lambda d, mean, scale, by: d + jnp.expm1(by) * (d + (mean / scale).astype(d.dtype)),
            start.displacement, ensemble.frame.anchor, ensemble.frame.scale, treedef.unflatten(list(changes)),
        )  # fmt: skip
        end = ensemble.position(displacement)
        spread = jnp.sum(jnp.asarray([x.size for x in leaves], jnp.float64) * wide(changes))
        gain = _potential_gain(ensemble, rung, start, end) - spread
        fits = ensemble.permits(end.reach, displacement) & (wide(chance) < jnp.exp(-gain))
        return jax.tree.map(lambda x, y: jnp.where(fits, x, y), end, start)


def _potential_gain(ensemble: Ensemble, rung: Rung, before: Position, after: Position) -> Array:
    climbs = None if ensemble.ridge is None or rung.ridge is None else jnp.asarray(rung.ridge, jnp.float64)
    gain = rung.beta * (held(after.cost, after.ridge, climbs) - held(before.cost, before.ridge, climbs))
    gain = gain + _quadratic_gain(ensemble, jnp.asarray(rung.precision), before.displacement, after.displacement)
    if before.toll is None or after.toll is None:
        return gain
    return gain + toll_share(rung.precision, rung.beta) * (after.toll - before.toll)


class _Turns(eqx.Module):
    """The flow of the quadratic part for one step: each coordinate turns about −b/a at the angular speed √(a/m)."""

    offset: PyTree | None
    """b/a in the turned coordinates."""
    shortening: PyTree
    """cos − 1."""
    drift: PyTree
    spring: PyTree


def _turns(ensemble: Ensemble, metric: Metric, time: Array, a: Array, masses: PyTree) -> _Turns:
    pull = ensemble.frame.pull
    speeds = jax.tree.map(lambda m: jnp.sqrt(a / m), masses)
    return _Turns(
        offset=None if pull is None else jax.tree.map(lambda b: b / a, metric.turned(pull)),
        shortening=jax.tree.map(lambda s: -2.0 * jnp.square(jnp.sin(0.5 * s * time)), speeds),
        drift=jax.tree.map(lambda s: time * jnp.sinc(s * time / jnp.float32(jnp.pi)), speeds),
        spring=jax.tree.map(lambda s: s * jnp.sin(s * time), speeds),
    )


def _rotate(turns: _Turns, place: PyTree, velocity: PyTree, moves: Bool[Array, ""]) -> tuple[PyTree, PyTree]:
    """Flow for the time of `turns`, or not at all."""
    on = moves.astype(jnp.float32)
    offsets = place if turns.offset is None else jax.tree.map(jnp.add, place, turns.offset)
    # The displacement is moved by a difference, so that a short step is not rounded to that of a long offset.
    new_place = jax.tree.map(
        lambda x, o, v, c, t: x + on * (c * o + t * v), place, offsets, velocity, turns.shortening, turns.drift
    )
    new_velocity = jax.tree.map(
        lambda o, v, c, s: v + on * (c * v - s * o), offsets, velocity, turns.shortening, turns.spring
    )
    return new_place, new_velocity


def _fold(walls: Walls, d: PyTree, v: PyTree, time: Array) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    """Flow straight on for a time, mirrored at the walls of the box; the quadratic part is left to the kicks."""
    ahead = jax.tree.map(lambda x, v: x + time * v, d, v)
    under = jax.tree.map(lambda x, low: x < low, ahead, walls.low)
    over = jax.tree.map(lambda x, high: x > high, ahead, walls.high)
    mirrored = jax.tree.map(
        lambda x, low, high, u, o: jnp.where(u, 2.0 * low - x, jnp.where(o, 2.0 * high - x, x)),
        ahead, walls.low, walls.high, under, over,
    )  # fmt: skip
    turned = jax.tree.map(lambda v, u, o: jnp.where(u | o, -v, v), v, under, over)
    held = jax.tree.map(lambda x, low, high: jnp.all((x >= low) & (x <= high)), mirrored, walls.low, walls.high)
    return mirrored, turned, jax.tree.reduce(jnp.logical_and, held)


def _reflect(ensemble: Ensemble, metric: Metric, d: PyTree, v: PyTree, slope: PyTree, masses: PyTree) -> PyTree:
    """Mirror the velocity about the normal of the wall: the cost's gradient, or the ball's radius outside the ball."""
    normal = slope
    if ensemble.frame.ball is not None:
        supported = ensemble.frame.supports(d)
        radius = metric.turned(jax.tree.map(jnp.add, d, ensemble.frame.ball.centre))
        normal = jax.tree.map(lambda g, r: jnp.where(supported, g, r), slope, radius)
    length = _sum(jax.tree.map(lambda n, m: jnp.sum(n * n / m), normal, masses))
    along = _sum(jax.tree.map(lambda v, n: jnp.sum(v * n), v, normal))
    factor = 2.0 * along / jnp.where(length > 0.0, length, 1.0)
    return jax.tree.map(lambda v, n, m: v - factor * n / m, v, normal, masses)


def _quadratic_gain(ensemble: Ensemble, a: Array, before: PyTree, after: PyTree) -> Array:
    """Return the change of ½a|δ|² + b·δ, leaf by leaf from differences, float64."""
    change = jax.tree.map(lambda x, y: wide(y) - wide(x), before, after)
    middle = jax.tree.map(lambda x, y: 0.5 * (wide(x) + wide(y)), before, after)
    return a * tree.dot(change, middle) + ensemble.frame.pulled(change)


def _kinetic_gain(masses: PyTree, before: PyTree, after: PyTree) -> Array:
    gains = jax.tree.map(
        lambda m, x, y: 0.5 * jnp.sum(wide(m) * (wide(y) - wide(x)) * (wide(y) + wide(x))), masses, before, after
    )
    return _sum(gains)


def _sum(values: PyTree) -> Array:
    return jax.tree.reduce(jnp.add, values)
