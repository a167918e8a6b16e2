"""Taking chains along a ladder of ensembles: at each rung they move, are measured, and are carried to the next one.

One compiled program serves every pass: the ladder is a table of fixed length and the route through it is data.
"""

import math
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from volumejax import tree
from volumejax.ensemble import FIELDS, PACES, SHORT, Ensemble, Position, Rung, trajectories
from volumejax.functions import jit_ahead
from volumejax.kernels import hmc, rescaled
from volumejax.metric import Metric
from volumejax.parallel import spread
from volumejax.results import to_host
from volumejax.sample_rays import POINTS, look_along

__all__ = ["MOST_VISITS", "Journey", "Record", "begin", "laid_out_like", "pad", "set_out", "slopes"]

Table = TypeVar("Table")

MOST_VISITS = 32
"""Rungs visited in one call of the compiled program, at most."""
_WIDEST = 5.0
"""Half a change of log a up to which a slide grows like its exponential; the last may be infinite."""
_COIN, _SCALES, _SHARED = 2**31 - 1, 2**31 - 2, math.log(2.0)
"""Of the keys below a visit's, that of the coin, and below a move's, that of the leaves' scales; and what a place costs
that two may have come to."""
TABLE = 1024
"""Rungs that a table holds at least, so that different ladders share one program."""


class Record(NamedTuple):
    """What was seen on the rungs visited, in nats; axes [visits, chains], then leaves where there are any."""

    cost: np.ndarray
    reach: np.ndarray
    square: np.ndarray
    """|δ|²."""
    pulled: np.ndarray
    """b·δ."""
    virial: np.ndarray
    """δ·∇E."""
    leaf_squares: np.ndarray
    stretchings: np.ndarray
    """Effect on U of stretching each leaf, B_l = Σ δ ∂U − D_l, then of stretching it by its softness, Σ q (δ ∂U − 1),
    and of sliding it either way: of mean zero where no wall is felt; axes [visits, chains, FIELDS · leaves]."""
    rises: np.ndarray
    """The part of it that is E's own."""
    work_down: np.ndarray
    """Work of the step to the next rung; +inf where the chain is outside."""
    work_up: np.ndarray
    """Work of the inverse step to the rung before; +inf where the chain cannot have come from there."""
    acceptance: np.ndarray
    """Mean Metropolis probability of the long trajectories."""
    inside: np.ndarray
    """Share of them that the region allowed."""
    bounces: np.ndarray
    """Steps outside for each move, and likewise of the next."""
    non_finite: np.ndarray
    permitted: np.ndarray
    """Whether the chain stands inside the region; one that was drawn outside may come in, but has no weight."""
    ridge: np.ndarray
    """Of the star, NaN elsewhere."""
    ray_end: np.ndarray
    """How far the chain's ray goes, as `look_along` finds it; NaN where nobody asks."""
    ray_costs: np.ndarray
    """And the costs on it; axes [visits, chains, POINTS], of the connected region one NaN for all."""


@eqx.filter_jit
def begin(
    ensemble: Ensemble,
    key: Key[Array, ""],
    precision: Float[Array, ""],
    chains: Int[Array, "chains"],
    mesh: Mesh | None,
) -> Position:
    """Draw a start for each chain from the Gaussian of `precision` around the anchor under the prior; exact.

    Chain i uses `fold_in(key, i)`.
    """

    def one(index: Array) -> Position:
        displacement = ensemble.frame.draw_reference(jax.random.fold_in(key, index), precision)
        return ensemble.position(displacement)

    return jax.vmap(one)(spread(chains, mesh))


@jit_ahead
def _travel(
    ensemble: Ensemble,
    metric: Metric,
    key: Key[Array, ""],
    positions: Position,
    table: Rung,
    route: Int[Array, "visits"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    batch_size: int | None,
    indices: Int[Array, "chains"],
) -> tuple[Position, dict[str, Array]]:
    with jax.enable_x64(True):
        num_chains = positions.cost.shape[0]

        def visit(k: Array, carry: tuple[Position, dict[str, Array]]) -> tuple[Position, dict[str, Array]]:
            positions, log = carry
            here = route[k]
            rung = jax.tree.map(lambda x: x[here], table)
            ahead = jnp.clip(route[k + 1], here - 1, here + 1)
            with jax.enable_x64(False):
                visit_key = jax.random.fold_in(key, first + k)

            def one(index: Array, position: Position) -> tuple[dict[str, Array], Position]:
                return _visit_one(ensemble, metric, visit_key, table, rung, here, ahead, index, position)

            if batch_size is None or batch_size >= num_chains:
                seen, moved = jax.vmap(one)(indices, positions)
            else:
                seen, moved = jax.lax.map(lambda args: one(*args), (indices, positions), batch_size=batch_size)
            return moved, jax.tree.map(lambda log, x: log.at[k].set(x), log, seen)

        shapes = jax.eval_shape(
            lambda p: jax.vmap(
                lambda i, p: _visit_one(
                    ensemble, metric, key, table, jax.tree.map(lambda x: x[0], table), route[0], route[0], i, p
                )
            )(indices, p)[0],
            positions,
        )
        log = jax.tree.map(lambda s: jnp.zeros((MOST_VISITS, *s.shape), s.dtype), shapes)
        return jax.lax.fori_loop(jnp.int32(0), count, visit, (positions, log))


def _visit_one(
    ensemble: Ensemble, metric: Metric, key: Array, table: Rung, rung: Rung, here: Array, ahead: Array, index: Array,
    position: Position,
) -> tuple[dict[str, Array], Position]:  # fmt: skip
    """One chain on one rung: moves, a look both ways, and the step on."""
    _, step = hmc(ensemble, rung, metric)

    count = jnp.asarray(trajectories(rung.num_steps, rung.spread), jnp.int32)

    def move(m: Array, carry: tuple[Position, Array]) -> tuple[Position, Array]:
        position, sums = carry
        with jax.enable_x64(False):
            move_key = jax.random.fold_in(jax.random.fold_in(key, index), m)
            # All chains share the number of steps, so that none waits; it varies so that no period is met again. In
            # short trajectories a chain that lags throws off the excess energy with which long ones end outside.
            share = 0.5 + jax.random.uniform(jax.random.fold_in(key, m), (), jnp.float32)
        place = m % count
        share = share * jnp.where(place == 0, jnp.float32(1.0), jnp.float32(1.0 / SHORT))
        steps = jnp.maximum(jnp.round(share * rung.num_steps), 1.0).astype(jnp.int32)
        pace = jnp.asarray(PACES, jnp.float32)[place]
        if ensemble.rescales:
            with jax.enable_x64(False):
                scale_key = jax.random.fold_in(move_key, _SCALES)
            scaled = jax.tree_util.Partial(rescaled, ensemble, rung, scale_key)
            # The looks along a star's segment are dear.
            often = not ensemble.checks
            position = scaled(position) if often else jax.lax.cond(place == 0, scaled, lambda p: p, position)
        position, info = step(move_key, position, steps, pace)
        # Nearly all short trajectories are taken: the steps are to be judged by the long ones.
        judged = (place == 0).astype(jnp.float64)
        seen = (judged * info.acceptance, judged * info.inside, info.bounces, info.non_finite)
        return position, sums + jnp.stack([x.astype(jnp.float64) for x in seen])

    levels = None if ensemble.ridge is None or table.ridge is None else jnp.asarray(table.ridge)
    moves = count * jnp.asarray(rung.num_moves, jnp.int32)
    position, sums = jax.lax.fori_loop(jnp.int32(0), moves, move, (position, jnp.zeros(4, jnp.float64)))
    sums = sums / jnp.maximum(jnp.asarray(rung.num_moves), 1)

    before = jnp.maximum(here - 1, 0)
    d = position.displacement
    state = (jnp.asarray(rung.precision), jnp.asarray(rung.beta))

    def scene(level: Array) -> tuple[PyTree, tuple[Array, Array]]:
        stiffness, a, beta = (
            jnp.asarray(x, jnp.float32)[level] for x in (table.masses, table.precision, table.beta)
        )  # fmt: skip
        return metric.precisions(stiffness, a, beta, d), (a, beta)

    def ahead_of(target: Array) -> tuple[tuple[Array, Array], tuple[Any, Any]]:
        there = (jnp.asarray(table.precision)[target], jnp.asarray(table.beta)[target])
        return there, (None, None) if levels is None else (levels[here], levels[target])

    def look(state_so_far: tuple[Position, Array], way: tuple[Array, ...]) -> tuple[tuple[Position, Array], Array]:
        onward, was_outside = state_so_far
        sign, above, target, taken, stays = way
        # The way back takes the same map, which is the upper rung's.
        precisions, upper = scene(above)
        soft, treedef = jax.tree.flatten(ensemble.softness(precisions))
        plain, softened, *slid = jnp.asarray(table.stretch)[above].astype(jnp.float32).reshape(FIELDS, len(soft))
        logs = [s + t * q for s, t, q in zip(plain, softened, soft, strict=True)]
        gains = treedef.unflatten([jnp.expm1(sign * s) for s in logs])
        shift = None
        if ensemble.slides:
            # A free coordinate goes from −b/a to −b/a', beside which it is stretched.
            # Exactly so for a share of one; a leaf with little pull may have a share of hundreds.
            lower = jnp.asarray(table.precision, jnp.float32)[above + 1]
            half = jnp.clip(0.5 * jnp.log(upper[0] / lower), -_WIDEST, _WIDEST)
            half = jnp.where(jnp.abs(half) > 1e-6, half, 1e-6)
            pace = -jnp.exp(half) * jnp.expm1(half) / half
            backs = [jnp.where(sign < 0.0, -jnp.exp(-s), jnp.where(sign > 1.0, 1.0 + jnp.exp(s), 1.0)) for s in logs]
            slides = [jax.tree.leaves(way) for way in ensemble.slide(metric, *upper)]
            goes = [
                sum(pace * s[i] * way[i] for s, way in zip(slid, slides, strict=True)) * back
                for i, back in enumerate(backs)
            ]
            shift = treedef.unflatten(goes)
        # Whoever takes a map twice looks as far as an image does that takes it once.
        furthest = jnp.max(jnp.expm1(jnp.sign(sign) * plain))
        image, work = ensemble.carry(position, metric, gains, shift, state, *ahead_of(target), furthest)
        outside = ~jnp.isfinite(work)
        goes = taken & ~outside & ~(stays & was_outside)
        return (jax.tree.map(lambda x, y: jnp.where(goes, x, y), image, onward), outside), work

    with jax.enable_x64(False):
        stays = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, index), _COIN))
    # The map by which chains come here, then its inverse; the next map twice, then once. The first of each pair tells
    # whether the place at the lower end is next to the wall.
    ways = (
        jnp.asarray([1.0, -1.0, 2.0, 1.0], jnp.float32),
        jnp.stack([before, before, here, here]),
        jnp.stack([before, before, here + 1, here + 1]),
        jnp.stack([False, ahead < here, False, ahead > here]),
        jnp.stack([False, stays, False, False]),
    )
    (onward, _), works = jax.lax.scan(look, (position, jnp.zeros((), bool)), ways)
    permitted = ensemble.permits(position.reach, d)
    rests = [ensemble.rest(position, state, *ahead_of(level)) for level in (before, here + 1)]
    work_up, work_down = _works(works, stays, rests[0], jnp.where(permitted, rests[1], jnp.inf))
    place, sizes = metric.turned(d), jnp.asarray([x.size for x in jax.tree.leaves(d)], jnp.float64)
    pull = jax.tree.map(jnp.zeros_like, d) if ensemble.frame.pull is None else metric.turned(ensemble.frame.pull)
    stretchings = [
        state[1] * virial + state[0] * tree.leaf_dots(x, place) + tree.leaf_dots(x, pull) - divergence
        for virial, x, divergence in zip(
            position.virials, ensemble.fields(metric, *scene(here), place), (sizes, sizes, 0.0, 0.0), strict=True
        )
    ]
    ray_end, ray_costs = jnp.full((), jnp.nan), jnp.full(1, jnp.nan)
    if ensemble.ridge is not None:
        unknown = (ray_end, jnp.full(POINTS, jnp.nan))
        ray_end, ray_costs = jax.lax.cond(ensemble.ridge.asks_rays, lambda: look_along(ensemble, d), lambda: unknown)
    seen = {
        "cost": position.cost,
        "reach": position.reach,
        "square": tree.dot(d, d),
        "pulled": ensemble.frame.pulled(d),
        "virial": jnp.sum(position.virials[0]),
        "leaf_squares": tree.leaf_dots(d, d),
        "stretchings": jnp.concatenate(stretchings),
        "rises": jnp.ravel(position.virials),
        "work_down": work_down,
        "work_up": work_up,
        "acceptance": sums[0],
        "inside": sums[1],
        "bounces": sums[2],
        "non_finite": sums[3],
        "permitted": permitted,
        "ridge": jnp.full((), jnp.nan) if position.ridge is None else position.ridge,
        "ray_end": ray_end,
        "ray_costs": ray_costs,
    }
    return seen, onward


def _works(
    works: Float[Array, "4"], stays: Bool[Array, ""], rest_up: Float[Array, ""], rest_down: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the works of a chain's steps up and down.

    A map would take those that stand next to the wall through it. They stay where they are, and share that place with
    the images of others: on the way back each is as likely to have stayed as to have come, which a coin decides.

    Args:
        works: of the maps as `_visit_one` tries them, +inf where the image is outside.
        stays: the coin.
        rest_up: work without a map.
        rest_down: likewise, +inf for a chain that is outside.
    """
    shared = jnp.where(jnp.isfinite(works[::2]), 0.0, _SHARED)
    up = jnp.where(stays & (shared[0] > 0.0), rest_up, works[1]) - shared[0]
    return up, jnp.where(jnp.isfinite(works[3]), works[3] + shared[1], rest_down + _SHARED)


@jit_ahead
def slopes(
    ensemble: Ensemble, positions: Position, batch_size: int | None, share_of_toll: Any = 0.0
) -> list[Float[Array, "chains ..."]]:
    """Return the gradient of E and of a share of the toll where each chain stands, in whitened coordinates, by leaf."""

    def one(displacement: PyTree) -> list[Array]:
        return jax.tree.leaves(ensemble.slope(displacement, jnp.asarray(share_of_toll, jnp.float32))[1])

    return jax.lax.map(one, positions.displacement, batch_size=batch_size or len(positions.cost))


@eqx.filter_jit
def _ridges(ensemble: Ensemble, positions: Position, batch_size: int | None) -> Float[Array, "chains"] | None:
    if batch_size is None:
        return jax.vmap(ensemble.looked)(positions).ridge
    return jax.lax.map(ensemble.looked, positions, batch_size=batch_size).ridge


def laid_out_like(positions: Position, model: Position) -> Position:
    """Return the positions on the devices where those of `model` lie, so that the next call runs the same program."""
    with jax.enable_x64(True):
        return jax.tree.map(
            lambda x, y: x if x.sharding == y.sharding else jax.device_put(x, y.sharding), positions, model
        )


def pad(table: Table) -> Table:
    """Return a table of rungs on the device, filled up with copies of the last to a length shared by many ladders."""
    rungs, length = len(jax.tree.leaves(table)[0]), TABLE
    while length <= rungs:
        length *= 2
    padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], length - rungs, axis=0)]), table)
    with jax.enable_x64(True):
        return jax.device_put(padded)


class Journey(NamedTuple):
    """Chains on their way along a route; the numbers may still be on theirs."""

    ends: Position
    """Where they will stand."""
    log: dict[str, Array]
    count: int
    """Rungs visited."""

    @property
    def arrived(self) -> bool:
        """Whether nobody would have to wait for the record."""
        return all(x.is_ready() for x in self.log.values())  # pyright: ignore[reportAttributeAccessIssue]

    def record(self) -> Record:
        """Wait for what was seen."""
        host = to_host(self.log)
        return Record(**{name: host[name][: self.count] for name in Record._fields})


def set_out(
    ensemble: Ensemble,
    metric: Metric,
    key: Key[Array, ""],
    positions: Position,
    table: Rung,
    route: list[int],
    first: int,
    batch_size: int | None,
    chains: np.ndarray | None = None,
) -> Journey:
    """Visit the rungs `route[:-1]`, at most `MOST_VISITS`, and step on to `route[-1]`, without waiting for it.

    Args:
        ensemble: the target.
        metric: of the moves.
        key: visit k of chain i uses `fold_in(fold_in(key, first + k), i)`, so that results do not depend on the cut.
        positions: of all chains, leading axis; on their devices the program runs.
        table: from `pad`; without a ridge the star's guide alone holds the chains.
        route: rungs, each a neighbour of the one before or the same.
        first: number of visits before.
        batch_size: chains at once.
        chains: their indices i; None for 0, 1, 2 and so on.
    """
    count = len(route) - 1
    if not 0 < count <= MOST_VISITS:
        raise ValueError(f"a route takes between 1 and {MOST_VISITS} visits, got {count}")
    if ensemble.ridge is not None:
        with jax.enable_x64(True):
            if table.ridge is None:
                table = eqx.tree_at(lambda t: t.ridge, table, jnp.zeros_like(table.beta), is_leaf=lambda x: x is None)
            elif first == 0:
                ridges = jax.device_put(_ridges(ensemble, positions, batch_size), positions.cost.sharding)
                positions = eqx.tree_at(lambda p: p.ridge, positions, ridges)
    padded = jnp.asarray(np.pad(np.asarray(route, np.int32), (0, MOST_VISITS - count), mode="edge"))
    indices = jnp.asarray(np.arange(len(positions.cost)) if chains is None else chains, jnp.int32)
    ends, log = _travel(
        ensemble, metric, key, positions, table, padded, jnp.int32(first), jnp.int32(count), batch_size, indices
    )
    return Journey(laid_out_like(ends, positions), log, count)
