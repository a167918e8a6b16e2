"""Tracing rays in chunks: scouts first, then the rays themselves, then an audit, all by one compiled loop.

Scouting rays have keys of their own. They find at what distance the region ends, how the cost grows there and how
noisy it is, so that a ray starts its search close to its crossing. One loop for every errand means that the cost is
compiled twice and not six times: once in the search and once for points along a ray.
"""

import enum
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from volumejax import tree
from volumejax.boundary import Bracket, Crossing, first_crossing, log_ratio, open_bracket
from volumejax.parallel import ABSENT, cut, spread
from volumejax.priors import Line
from volumejax.proposals import RayDraw
from volumejax.radial import radial, radial_and_slope, radial_mode
from volumejax.regions import Star
from volumejax.results import RayBatch, Status

__all__ = [
    "Campaign",
    "Errand",
    "Question",
    "Scouting",
    "cast",
    "cost_along",
    "plan_rays",
    "plan_scouts",
    "position_floor",
]

NUM_SCOUTS = 8
_RAYS, _SCOUTS, _AUDIT = 0, 1, 2
"""Tags folded into the key, so that rays, scouting rays and audit points have independent draws."""
_NOISE_STEP = 1e-5
"""Relative distance over which a cost is smooth: what a second difference leaves is rounding."""


class Errand(enum.IntEnum):
    """What a chunk of lanes is sent out for."""

    REST = 0
    SCOUT = 1
    """Trace scouts from far inside outwards."""
    MEASURE = 2
    """Measure the cost's noise where the scouts left the region, and the cost of the anchor."""
    TRACE = 3
    """Trace rays, starting where the scouts left the region."""
    AUDIT = 4
    """Look at interior points of traced rays, and cut a ray back to its first crossing where one lies outside."""


class Question(eqx.Module):
    """What every ray needs to know. The cutoff and the tolerance are float64 sums of two float32 parts."""

    cost: Callable[[PyTree], Float[Array, ""]]
    params: PyTree
    prior: Any
    proposal: Any
    cutoff: tuple[Array, Array]
    tolerance: tuple[Array, Array]
    region: Star = eqx.field(static=True)
    max_evaluations: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)
    callers_x64: bool = eqx.field(static=True)
    """Under which setting the cost was meant to run: we switch float64 on for our own scalars only."""

    @property
    def dimension(self) -> int:
        """D."""
        return tree.size(self.params)


class Scouting(eqx.Module):
    """What the scouts found. float64."""

    start: Float[Array, ""]
    """Median crossing, in units of the drawn direction."""
    power: Float[Array, ""]
    """Median d log C / d log s at the crossing."""
    noise: Float[Array, ""]
    """Rounding error of the cost near the cutoff, in the cost's nats."""


class Campaign(eqx.Module):
    """What is carried from chunk to chunk. NaN marks what is not known yet."""

    scout_reach: Float[Array, "scouts"]
    scout_power: Float[Array, "scouts"]
    scout_noise: Float[Array, "scouts"]
    scout_evaluations: Int[Array, "scouts"]
    anchor_cost: Float[Array, ""]
    reach: Float[Array, "rays"]
    """How far each ray was verified, in units of its direction."""

    @classmethod
    def begin(cls, num_rays: int) -> "Campaign":
        """Return a campaign in which nothing has happened."""
        with jax.enable_x64(True):
            unknown = jnp.full((NUM_SCOUTS,), jnp.nan, jnp.float64)
            none = jnp.zeros((NUM_SCOUTS,), jnp.int32)
            return cls(unknown, unknown, unknown, none, unknown[0], jnp.zeros((num_rays,), jnp.float64))

    def scouting(self, question: Question) -> Scouting:
        """Return the medians over the scouts, with defaults where they found nothing."""
        with jax.enable_x64(True):
            start = jnp.exp(jnp.nanmedian(jnp.log(self.scout_reach)))
            power = jnp.nanmedian(self.scout_power)
            # The median of |x| is 0.6745 standard deviations; a scout that met a wall does not spoil it.
            noise = jnp.nanmedian(jnp.abs(self.scout_noise)) / 0.6745
            return Scouting(
                start=jnp.where(jnp.isfinite(start), start, 1.0),
                power=jnp.where(jnp.isfinite(power), jnp.clip(power, 0.5, 20.0), 2.0),
                noise=jnp.fmax(_representation(question), jnp.where(jnp.isfinite(noise), noise, 0.0)),
            )


Plan = tuple[Int[np.ndarray, "chunks"], Int[np.ndarray, "chunks lanes"]]
"""An errand for each chunk, and the index of a ray or scout for each of its lanes."""


def plan_scouts(lanes: int) -> Plan:
    """Return the chunks that scout and measure."""
    chunks = cut(np.arange(NUM_SCOUTS), lanes)
    errands = np.repeat([Errand.SCOUT, Errand.MEASURE], len(chunks)).astype(np.int32)
    return errands, np.concatenate([chunks, chunks])


def plan_rays(first: int, count: int, audit_stride: int, lanes: int) -> Plan:
    """Return the chunks that trace `count` rays from `first` on, and audit every `audit_stride`-th of the whole run."""
    traces = cut(np.arange(first, first + count), lanes)
    plan = [(Errand.TRACE, traces)]
    if audit_stride > 0:
        chosen = np.arange(first + -first % audit_stride, first + count, audit_stride)
        plan.append((Errand.AUDIT, cut(chosen, lanes)))
    errands = [np.full(len(chunks), errand, np.int32) for errand, chunks in plan]
    return np.concatenate(errands), np.concatenate([chunks for _, chunks in plan])


def cast(
    key: Key[Array, ""],
    question: Question,
    campaign: Campaign,
    errands: Int[Array, "chunks"],
    indices: Int[Array, "chunks lanes"],
) -> tuple[Campaign, RayBatch]:
    """Run the errands in order.

    Args:
        key: key of the run; ray i uses `fold_in(fold_in(key, 0), i)`.
        question: what is asked.
        campaign: what is known.
        errands: `Errand` of each chunk.
        indices: ray or scout of each lane; out-of-range indices are lanes without a ray.

    Returns:
        What is known afterwards, and the rays by chunk and lane.
    """

    def run(campaign: Campaign, chunk: tuple[Array, Array]) -> tuple[Campaign, RayBatch]:
        return _run_errand(key, question, campaign, *chunk)

    return jax.lax.scan(run, campaign, (errands, indices))


def cost_along(question: Question, direction: PyTree) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """Return s -> C(params + s·direction) in float64, evaluated with the caller's own x64 setting."""

    def cost_at(distance: Array) -> Array:
        position = tree.axpy(distance, direction, question.params)
        with jax.enable_x64(question.callers_x64):
            value = question.cost(position)
        with jax.enable_x64(True):
            return value.astype(jnp.float64)

    return cost_at


def position_floor(params: PyTree, direction: PyTree) -> Float[Array, ""]:
    """Return the distance below which a step disappears in the rounding of every parameter."""

    def of_leaf(x: Array, y: Array) -> Array:
        limit = jnp.finfo(x.dtype)
        size, speed = jnp.abs(x).astype(jnp.float64), jnp.abs(y).astype(jnp.float64)
        smallest = float(limit.eps) * size + float(limit.tiny)
        return jnp.min(jnp.where(speed > 0.0, smallest / jnp.where(speed > 0.0, speed, 1.0), jnp.inf), initial=jnp.inf)

    with jax.enable_x64(True):
        floors = jax.tree.map(of_leaf, params, direction)
        floor = jax.tree.reduce(jnp.minimum, floors, jnp.full((), jnp.inf, jnp.float64))
        return jnp.where(jnp.isfinite(floor), floor, 0.0)


class _Aim(eqx.Module):
    """A drawn direction, the prior along it, and the log integrals of prior and proposal over the whole ray."""

    draw: RayDraw
    line: Line
    totals: Float[Array, "*lanes 2"]
    floor: Float[Array, "*lanes"]


def _run_errand(
    key: Key[Array, ""], question: Question, campaign: Campaign, errand: Array, indices: Array
) -> tuple[Campaign, RayBatch]:
    """Aim the lanes, look at points where the errand asks for it, search, and note what was found."""
    indices = spread(indices, question.mesh)
    scouting = campaign.scouting(question)
    ahead = (errand == Errand.SCOUT) | (errand == Errand.MEASURE)
    of_errand = jax.random.fold_in(key, jnp.where(ahead, _SCOUTS, _RAYS))
    keys = jax.vmap(lambda i: jax.random.fold_in(of_errand, i))(indices)
    aims = jax.vmap(lambda key: _aim(key, question))(keys)
    audit_keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, _AUDIT), i))(indices)

    with jax.enable_x64(True):
        of_scouts = campaign.scout_reach[jnp.minimum(indices, NUM_SCOUTS - 1)]
        of_rays = campaign.reach[jnp.minimum(indices, campaign.reach.shape[0] - 1)]
        reach = jnp.where(ahead, of_scouts, of_rays)
        reach = jnp.where(jnp.isfinite(reach), reach, 0.0)
        points, num_points = _points(audit_keys, question, errand, reach)
    costs = _look(question, aims, points, num_points)

    known, violated = jax.vmap(lambda p, c: _known(p, c, errand, _cutoff(question)), in_axes=1)(points, costs)
    crossings = jax.vmap(lambda aim, known: _search(question, scouting, aim, known, errand))(aims, known)
    rays = jax.vmap(_weigh)(aims, crossings)

    audited = errand == Errand.AUDIT
    extra = jnp.where(audited, num_points + crossings.evaluations, 0)
    rays = eqx.tree_at(
        lambda r: (r.executed, r.audited, r.violated, r.audit_evaluations),
        rays,
        (
            jnp.broadcast_to(jnp.max(crossings.evaluations), indices.shape),
            jnp.broadcast_to(audited, indices.shape),
            violated,
            extra.astype(jnp.int32),
        ),
    )
    return _note(campaign, errand, indices, crossings, costs, num_points), rays


def _aim(key: Key[Array, ""], question: Question) -> _Aim:
    draw = question.proposal.draw(key, question.params)
    line = question.prior.line(question.params, draw.direction)
    with jax.enable_x64(True):
        curvatures = jnp.stack([line.curvature, draw.curvature])
        slopes = jnp.stack([line.slope, draw.slope])
        constants = jnp.stack([jnp.zeros((), jnp.float64), draw.log_density])
        totals = constants + radial(question.dimension, curvatures, slopes, jnp.inf)
        return _Aim(draw, line, totals, position_floor(question.params, draw.direction))


def _points(
    keys: Key[Array, "lanes"], question: Question, errand: Array, reach: Float[Array, "lanes"]
) -> tuple[Float[Array, "points lanes"], Int[Array, ""]]:
    """Return the distances to look at, and how many of them this errand needs."""
    with jax.enable_x64(True):
        interior = jax.vmap(question.region.fractions)(keys).T
        count = interior.shape[0]
        # Three neighbours on the near side of the crossing, since beyond it there may be a wall, and the anchor itself.
        near = jnp.concatenate([1.0 - _NOISE_STEP * jnp.arange(3.0), jnp.zeros(count - 3)])
        shares = jnp.where(errand == Errand.AUDIT, interior, near[:, None])
        needed = jnp.where(errand == Errand.AUDIT, count, jnp.where(errand == Errand.MEASURE, 4, 0))
        return reach[None] * shares, needed.astype(jnp.int32)


def _look(question: Question, aims: _Aim, points: Float[Array, "points lanes"], num_points: Array) -> Array:
    """Return the cost at the first `num_points` points of every lane."""

    def at(j: Array, costs: Array) -> Array:
        def one(direction: PyTree, s: Array) -> Array:
            return cost_along(question, direction)(s)

        return costs.at[j].set(jax.vmap(one)(aims.draw.direction, points[j]))

    with jax.enable_x64(True):
        return jax.lax.fori_loop(jnp.int32(0), num_points, at, jnp.zeros_like(points))


def _known(
    points: Float[Array, "points"], costs: Float[Array, "points"], errand: Array, cutoff: Array
) -> tuple[Bracket, Array]:
    """Return the bracket from which a lane searches, and whether an audited point lay outside."""
    with jax.enable_x64(True):
        ratios = log_ratio(costs, cutoff)
        audited = errand == Errand.AUDIT
        violated = audited & jnp.any(ratios > 0.0)
        first = jax.lax.argmax(ratios > 0.0, 0, jnp.int32)
        before = jnp.maximum(first - 1, 0)
        shortened = Bracket(
            inside=jnp.where(first > 0, points[before], 0.0),
            outside=points[first],
            log_ratio_inside=jnp.where(first > 0, ratios[before], -jnp.inf),
            log_ratio_outside=ratios[first],
        )
        # A bracket without width ends a search before its first evaluation.
        settled = jax.tree.map(jnp.ones_like, shortened)
        searching = (errand == Errand.SCOUT) | (errand == Errand.TRACE)
        return jax.tree.map(
            lambda free, cut, rest: jnp.where(searching, free, jnp.where(violated, cut, rest)),
            open_bracket(), shortened, settled,
        ), violated  # fmt: skip


def _search(question: Question, scouting: Scouting, aim: _Aim, known: Bracket, errand: Array) -> Crossing:
    line, dimension = aim.line, question.dimension
    with jax.enable_x64(True):
        scouting_now = errand == Errand.SCOUT
        far_inside = 1e-3 * _scale(question.params, aim)
        return first_crossing(
            cost_along(question, aim.draw.direction),
            lambda s: radial_and_slope(dimension, line.curvature, line.slope, s),
            cutoff=_cutoff(question),
            start=jnp.where(scouting_now, far_inside, scouting.start),
            total=aim.totals[0],
            tolerance=join(question.tolerance),
            power=scouting.power,
            noise=scouting.noise,
            limit=line.exit,
            floor=aim.floor,
            leap=scouting_now,
            max_evaluations=question.max_evaluations,
            bracket=known,
        )


def _scale(params: PyTree, aim: _Aim) -> Float[Array, ""]:
    """Return a distance at which the network is surely another one: the prior's own, or the anchor's norm."""
    with jax.enable_x64(True):
        mode = jnp.minimum(radial_mode(tree.size(params) + 1, aim.line.curvature, aim.line.slope), aim.line.exit)
        norm = jnp.sqrt(tree.dot(params, params))
        length = jnp.sqrt(tree.dot(aim.draw.direction, aim.draw.direction))
        unit = jnp.where(norm > 0.0, norm, 1.0) / length
        return jnp.where(jnp.isfinite(mode) & (mode > 0.0), mode, unit)


def _weigh(aim: _Aim, crossing: Crossing) -> RayBatch:
    """Turn the verified reach of a ray into its log weight."""
    with jax.enable_x64(True):
        unbounded = (crossing.status == Status.NEVER_CROSSES) & jnp.isinf(aim.line.exit)
        length = jnp.sqrt(tree.dot(aim.draw.direction, aim.draw.direction))
        return RayBatch(
            log_weight=aim.line.log_density + crossing.log_volume - aim.totals[1],
            radius=jnp.where(unbounded, jnp.inf, crossing.bracket.inside * length),
            shortfall=crossing.shortfall,
            status=crossing.status,
            evaluations=crossing.evaluations,
            executed=crossing.evaluations,
            audited=jnp.zeros((), bool),
            violated=jnp.zeros((), bool),
            audit_evaluations=jnp.zeros((), jnp.int32),
        )


def _note(
    campaign: Campaign, errand: Array, indices: Array, crossings: Crossing, costs: Array, num_points: Array
) -> Campaign:
    """Enter what the lanes found; a lane that has nothing to say writes out of range."""
    with jax.enable_x64(True):
        reach = crossings.bracket.inside
        found = jnp.isfinite(reach) & (reach > 0.0)
        crossed = found & jnp.isfinite(crossings.bracket.outside)
        nowhere = jnp.int32(ABSENT)
        scout = jnp.where(errand == Errand.SCOUT, indices, nowhere)
        measure = jnp.where(errand == Errand.MEASURE, indices, nowhere)
        trace = jnp.where(errand == Errand.TRACE, indices, nowhere)
        second = (costs[0] - 2.0 * costs[1] + costs[2]) / jnp.sqrt(6.0)
        known = jnp.isfinite(campaign.scout_power[jnp.minimum(indices, NUM_SCOUTS - 1)])
        return Campaign(
            scout_reach=campaign.scout_reach.at[scout].set(jnp.where(found, reach, jnp.nan), mode="drop"),
            scout_power=campaign.scout_power.at[scout].set(jnp.where(crossed, crossings.power, jnp.nan), mode="drop"),
            scout_noise=campaign.scout_noise.at[measure].set(jnp.where(known, second, jnp.nan), mode="drop"),
            scout_evaluations=campaign.scout_evaluations.at[scout]
            .set(crossings.evaluations, mode="drop")
            .at[measure]
            .add(num_points, mode="drop"),
            anchor_cost=jnp.where(errand == Errand.MEASURE, costs[3, 0], campaign.anchor_cost),
            reach=campaign.reach.at[trace].set(reach, mode="drop"),
        )


def _representation(question: Question) -> Float[Array, ""]:
    """Return half a unit in the last place of the cutoff, in the cost's dtype."""
    with jax.enable_x64(question.callers_x64):
        dtype = eqx.filter_eval_shape(question.cost, question.params).dtype
    with jax.enable_x64(True):
        return 0.5 * float(jnp.finfo(dtype).eps) * _cutoff(question)


def _cutoff(question: Question) -> Float[Array, ""]:
    return join(question.cutoff)


def join(parts: tuple[Array, Array]) -> Float[Array, ""]:
    """Return the float64 sum of two float32 parts."""
    with jax.enable_x64(True):
        return parts[0].astype(jnp.float64) + parts[1].astype(jnp.float64)
