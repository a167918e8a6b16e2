"""First crossing of a cost through its cutoff along one ray; knows no parameters.

The search works in (log s, log C), where a quadratic cost is a straight line, and its stopping rule is in nats of
volume. Written for one ray; `jax.vmap` makes a batch of it.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from volumejax.results import Status

__all__ = ["Bracket", "Crossing", "first_crossing", "open_bracket"]

GROWTH = 1.5
"""Largest factor by which an expansion step may pass the last inside point."""
_TAIL = 1e-4
"""A ray whose remaining prior mass is worth less than this many nats counts as never crossing."""
_FAR = 1e15
"""A ray still inside at this many times its first guess, which it takes 85 expansions to reach, is taken never to
cross."""
_CLOSE = 0.05
"""Share of the tolerance within which the inner end has to lie to the interpolated crossing."""

LogVolume = Callable[[Array], tuple[Array, Array]]
"""s -> (log ∫_0^s of the prior along the ray, its derivative by log s)."""


class Bracket(eqx.Module):
    """The largest s known to be inside and the smallest known to be outside, with log(C/ε) at both."""

    inside: Float[Array, ""]
    outside: Float[Array, ""]
    log_ratio_inside: Float[Array, ""]
    log_ratio_outside: Float[Array, ""]


class Crossing(eqx.Module):
    """Where a ray leaves the region. `bracket.inside` is verified: the cost there was seen to be within the cutoff."""

    bracket: Bracket
    log_volume: Float[Array, ""]
    """Log volume up to `bracket.inside`, in nats."""
    shortfall: Float[Array, ""]
    """Estimated volume between `bracket.inside` and the crossing itself, in nats."""
    status: Int[Array, ""]
    evaluations: Int[Array, ""]
    power: Float[Array, ""]
    """d log C / d log s near the crossing; NaN where fewer than two finite costs were seen."""


class _Search(eqx.Module):
    bracket: Bracket
    volumes: Float[Array, "2"]
    """Log volume up to the inner and the outer end."""
    slope: Float[Array, ""]
    """d log volume / d log s at the last trial."""
    trial: Float[Array, ""]
    points: Float[Array, "2 3"]
    """log s and log(C/ε) of the last three evaluations, newest first; NaN where there is none."""
    widths: Float[Array, "2"]
    """Width of the bracket in log s, one and two steps ago."""
    shrinks: Int[Array, ""]
    evaluations: Int[Array, ""]
    status: Int[Array, ""]
    done: Bool[Array, ""]


class _Rules(eqx.Module):
    """What stays fixed during one search. float64."""

    cutoff: Array
    tolerance: Array
    power: Array
    noise: Array
    limit: Array
    floor: Array
    total: Array
    """Log volume of the whole ray."""
    start: Array
    leap: Array


def open_bracket() -> Bracket:
    """Return the bracket (0, ∞) of a ray about which nothing is known."""
    with jax.enable_x64(True):
        inf = jnp.full((), jnp.inf, jnp.float64)
        return Bracket(jnp.zeros((), jnp.float64), inf, -inf, inf)


def first_crossing(
    cost_at: Callable[[Float[Array, ""]], Float[Array, ""]],
    log_volume: LogVolume,
    *,
    cutoff: ArrayLike,
    start: ArrayLike,
    total: ArrayLike,
    tolerance: ArrayLike = 0.1,
    power: ArrayLike = 2.0,
    noise: ArrayLike = 0.0,
    limit: ArrayLike = jnp.inf,
    floor: ArrayLike = 0.0,
    leap: ArrayLike = False,
    max_evaluations: int = 100,
    bracket: Bracket | None = None,
) -> Crossing:
    """Bracket the first s at which the cost exceeds the cutoff, to `tolerance` nats of volume.

    Expands from `start` by at most a factor `GROWTH` a step, then closes in by inverse quadratic interpolation in
    (log s, log C), safeguarded by bisection. A barrier narrower than an expansion step can be jumped: the caller
    audits.

    Args:
        cost_at: cost in nats at a float64 distance s; NaN and ±inf count as outside.
        log_volume: log volume in nats up to s, and its derivative by log s; takes arrays.
        cutoff: ε > 0, in nats.
        start: first distance to try, a guess of the crossing.
        total: log volume up to infinity, in nats; +inf where the prior is improper.
        tolerance: largest volume between the two ends of the bracket, in nats.
        power: guess of d log C / d log s, used until two costs are known.
        noise: absolute rounding error of the cost near the cutoff, in nats.
        limit: end of the prior's support along the ray.
        floor: distance below which a step vanishes in the parameters' rounding.
        leap: whether steps may be longer while the cost is below a thousandth of the cutoff, where it is taken for
            quadratic: for a start that is no guess of the crossing.
        max_evaluations: budget; when spent, the last inside point counts.
        bracket: what is known already, to resume; without width it ends the search at once.

    Returns:
        The bracket, its volume, `Status`, number of evaluations and local power; float64.
    """
    with jax.enable_x64(True):
        values = (
            jnp.asarray(x).astype(jnp.float64) for x in (cutoff, tolerance, power, noise, limit, floor, total, start)
        )
        rules = _Rules(*values, leap=jnp.asarray(leap))
        known = open_bracket() if bracket is None else bracket
        begin = _Search(
            bracket=known,
            volumes=jnp.asarray([-jnp.inf, jnp.inf], jnp.float64),
            slope=jnp.ones((), jnp.float64),
            trial=jnp.minimum(rules.start, rules.limit),
            points=jnp.full((2, 3), jnp.nan, jnp.float64),
            widths=jnp.full((2,), jnp.inf, jnp.float64),
            shrinks=jnp.zeros((), jnp.int32),
            evaluations=jnp.zeros((), jnp.int32),
            status=jnp.where(rules.limit > 0.0, jnp.int32(Status.UNRESOLVED), jnp.int32(Status.NEVER_INSIDE)),
            done=rules.limit <= 0.0,
        )

        def advance(search: _Search) -> _Search:
            search = _judge(search, rules)
            return eqx.tree_at(lambda s: s.trial, search, _propose(search, rules))

        def body(search: _Search) -> _Search:
            volume = log_volume(search.trial)
            return advance(_absorb(search, cost_at(search.trial), volume, rules))

        if bracket is not None:
            volumes, slopes = log_volume(jnp.stack([known.inside, known.outside]))
            ready = advance(eqx.tree_at(lambda s: (s.volumes, s.slope), begin, (volumes, slopes[1])))
            fresh = (known.inside == 0.0) & jnp.isinf(known.outside)
            begin = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), begin, ready)
        end = jax.lax.while_loop(lambda s: ~s.done & (s.evaluations < max_evaluations), body, begin)

        far = end.bracket.inside >= _FAR * rules.start
        unbounded = ~end.done & jnp.isinf(end.bracket.outside) & far
        # Under an improper prior a ray without end has infinite volume.
        endless = unbounded & jnp.isposinf(rules.total)
        return Crossing(
            bracket=eqx.tree_at(lambda b: b.inside, end.bracket, jnp.where(endless, jnp.inf, end.bracket.inside)),
            log_volume=jnp.where(endless, jnp.inf, end.volumes[0]),
            shortfall=_shortfall(end),
            status=jnp.where(unbounded, jnp.int32(Status.NEVER_CROSSES), end.status),
            evaluations=end.evaluations,
            power=_local_power(end.points),
        )


def log_ratio(cost: Array, cutoff: Array) -> Array:
    """Return log(C/ε): −∞ for C ≤ 0, which rounding can produce, and +∞ for what is not finite."""
    with jax.enable_x64(True):
        positive = jnp.isfinite(cost) & (cost > 0.0)
        ratio = jnp.log(jnp.where(positive, cost, 1.0) / cutoff)
        return jnp.where(positive, ratio, jnp.where(jnp.isfinite(cost), -jnp.inf, jnp.inf))


def _absorb(search: _Search, cost: Array, volume: tuple[Array, Array], rules: _Rules) -> _Search:
    """Enter one evaluation into the bracket and the history."""
    s, old = search.trial, search.bracket
    y = log_ratio(cost, rules.cutoff)
    inside = y <= 0.0
    bracket = Bracket(
        inside=jnp.where(inside, s, old.inside),
        outside=jnp.where(inside, old.outside, s),
        log_ratio_inside=jnp.where(inside, y, old.log_ratio_inside),
        log_ratio_outside=jnp.where(inside, old.log_ratio_outside, y),
    )
    point = jnp.stack([jnp.log(s), jnp.where(jnp.isfinite(y), y, jnp.nan)])
    low, high = search.volumes
    return _Search(
        bracket=bracket,
        volumes=jnp.stack([jnp.where(inside, volume[0], low), jnp.where(inside, high, volume[0])]),
        slope=volume[1],
        trial=s,
        points=jnp.concatenate([point[:, None], search.points[:, :2]], axis=1),
        widths=jnp.stack([jnp.log(old.outside / old.inside), search.widths[0]]),
        shrinks=jnp.where(inside, 0, search.shrinks + 1).astype(jnp.int32),
        evaluations=search.evaluations + 1,
        status=search.status,
        done=search.done,
    )


def _judge(search: _Search, rules: _Rules) -> _Search:
    """Decide whether the search has ended, and how."""
    low, high = search.bracket.inside, search.bracket.outside
    closed = (low > 0.0) & jnp.isfinite(high)
    nats = jnp.where(jnp.isinf(high), rules.total, search.volumes[1]) - search.volumes[0]
    rise = rules.cutoff * (jnp.exp(search.bracket.log_ratio_outside) - jnp.exp(search.bracket.log_ratio_inside))
    # Two evaluations differ by √2 times the noise of one; about that much says nothing more about the crossing.
    blurred = closed & ((rise <= 2.0 * rules.noise) | (high <= low * (1.0 + 2.0**-50)))
    # A bracket that closed by luck may have its inner end anywhere in it; one more step brings it to the crossing, so
    # that the result does not hang on the last bits of the cost.
    narrow = closed & (nats <= rules.tolerance) & (_shortfall(search) <= _CLOSE * rules.tolerance)
    # The crossing itself is only known to within the noise: in volume, slope·noise/(ε·power) nats.
    loud = rules.noise >= rules.cutoff * jnp.minimum(
        0.25, rules.tolerance * rules.power / jnp.maximum(search.slope, 1.0)
    )
    opaque = jnp.isposinf(search.bracket.log_ratio_outside)
    end_of_prior = jnp.isinf(high) & (low > 0.0) & ((low >= rules.limit) | (nats <= _TAIL))
    vanished = (low == 0.0) & (high <= jnp.maximum(rules.floor, 1e-280))
    verdicts = (
        (end_of_prior, Status.NEVER_CROSSES),
        (vanished, Status.NEVER_INSIDE),
        (narrow & opaque, Status.NON_FINITE),
        (narrow & ~loud, Status.CONVERGED),
        (narrow | blurred, Status.NOISE_LIMITED),
    )
    status = jnp.full((), Status.UNRESOLVED, jnp.int32)
    for holds, verdict in reversed(verdicts):
        status = jnp.where(holds, jnp.int32(verdict), status)
    done = end_of_prior | vanished | narrow | blurred
    return eqx.tree_at(lambda s: (s.status, s.done), search, (status, done))


def _shortfall(search: _Search) -> Array:
    """Interpolate log C linearly between the ends of the bracket; half the bracket where one end has no finite log."""
    low, high = search.bracket.log_ratio_inside, search.bracket.log_ratio_outside
    closed = jnp.isfinite(search.bracket.outside) & (search.bracket.inside > 0.0)
    smooth = jnp.isfinite(low) & jnp.isfinite(high) & (high > low)
    share = jnp.where(smooth, -low / jnp.where(smooth, high - low, 1.0), 0.5)
    nats = jnp.where(closed, search.volumes[1] - search.volumes[0], 0.0)
    return jnp.where(share > 0.0, share * nats, 0.0)


def _propose(search: _Search, rules: _Rules) -> Array:
    """Return the next distance to try."""
    bracket = search.bracket
    x_low, x_high = jnp.log(bracket.inside), jnp.log(bracket.outside)
    root = _interpolate(search.points, rules.power)
    # One step from an end that lies at the root closes the bracket; aiming 0.3 % of it inside of the root keeps
    # the inner end, which is what counts, within thousandths of the tolerance.
    step = 0.9 * rules.tolerance / jnp.maximum(search.slope, 1e-300)
    aim = root - 0.003 * step

    # Bracketed: the interpolated root, unless that does not help.
    width = x_high - x_low
    slow = width > 0.5 * search.widths[1]
    good = jnp.isfinite(root) & (root >= x_low) & (root <= x_high) & ~slow
    closing = (aim - x_low <= 0.01 * step) & (width > step)
    inner = jnp.where(good, jnp.clip(aim, x_low, x_high - 0.003 * step), 0.5 * (x_low + x_high))
    between = jnp.where(closing, x_low + jnp.minimum(step, 0.75 * width), inner)

    # Only inside points so far: outwards, by at most GROWTH.
    most = jnp.full((), math.log(GROWTH), jnp.float64)
    ratio = bracket.log_ratio_inside
    leap = jnp.where(
        jnp.isfinite(ratio), jnp.clip(0.5 * (math.log(1e-2) - ratio), most, math.log(100.0)), math.log(10.0)
    )
    most = jnp.where(rules.leap & (ratio < math.log(1e-3)), leap, most)
    ahead = jnp.where(jnp.isfinite(root), jnp.clip(root - x_low, jnp.minimum(step, most), most), most)

    # Only outside points so far: inwards, ever faster, since the crossing may be at 0.
    hasten = -math.log(2.0) * jnp.exp2(search.shrinks.astype(jnp.float64))
    behind = jnp.where(jnp.isfinite(root), jnp.minimum(aim - x_high, -0.003 * step), hasten)
    behind = jnp.where(search.shrinks > 2, jnp.minimum(behind, hasten), behind)

    outwards = jnp.where(jnp.isinf(bracket.outside), x_low + ahead, between)
    trial = jnp.exp(jnp.where(bracket.inside == 0.0, x_high + behind, outwards))
    # Below the floor a step would leave the parameters as they are, and look inside.
    return jnp.clip(trial, jnp.minimum(rules.floor, bracket.outside), rules.limit)


def _interpolate(points: Float[Array, "2 3"], power: Array) -> Array:
    """Return the root of log(C/ε) in log s: inverse quadratic, else secant, else from the newest point and `power`."""
    x, y = points

    def ratio(a: Array, b: Array) -> Array:
        return a / jnp.where(b == 0.0, jnp.nan, b)

    from_power = x[0] - y[0] / power
    slope = ratio(x[1] - x[0], y[1] - y[0])
    secant = jnp.where(slope > 0.0, x[0] - slope * y[0], jnp.nan)
    bend = ratio(ratio(x[2] - x[1], y[2] - y[1]) - slope, y[2] - y[0])
    quadratic = secant + bend * y[0] * y[1]
    # Far from the root the parabola may turn back; then the secant is the better guess.
    trusted = jnp.isfinite(quadratic) & (jnp.abs(quadratic - secant) <= 0.5 * jnp.abs(secant - x[0]))
    return jnp.where(trusted, quadratic, jnp.where(jnp.isfinite(secant), secant, from_power))


def _local_power(points: Float[Array, "2 3"]) -> Array:
    """Return d log C / d log s from the widest pair of recent evaluations."""
    x, y = points
    last = jnp.where(jnp.isfinite(y[2]), 2, 1)
    gap = x[last] - x[0]
    return (y[last] - y[0]) / jnp.where(gap == 0.0, jnp.nan, gap)
