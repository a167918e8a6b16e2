"""The ray estimator: random rays from the anchor, each integrated up to where behaviour breaks.

.. math:: \\log w(u) = \\log\\int_0^{R(u)} r^{D-1} \\pi(\\theta_0 + r u)\\,dr - \\log q(u), \\qquad
          \\log \\mathrm{mass} = \\log \\mathbb{E}_q\\, w(u)

The mean weight is an unbiased estimate of the star region's mass, so log mean w is a lower bound in expectation.
Source: Scherlis & Belrose, arXiv 2501.18812, §2; Huang et al. 2020 for the ray method without importance sampling.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from volumejax import tree
from volumejax.boundary import Bracket, Crossing, first_crossing, log_ratio
from volumejax.diagnostics import certified_lower, effective_sample_size, log_mean_error, pareto_k, pareto_k_limit
from volumejax.logmath import log_mean_exp
from volumejax.parallel import default_batch_size, executed, map_keys, require_threefry
from volumejax.priors import Line
from volumejax.proposals import Isotropic, RayDraw
from volumejax.radial import radial, radial_and_slope
from volumejax.regions import Star
from volumejax.results import BoundKind, Kind, RayBatch, Status, VolumeEstimate, to_host
from volumejax.scout import Scouting, cost_along, position_floor, scout
from volumejax.validation import check_question, is_traced

__all__ = ["ray_stream", "ray_volume"]

Cost = Callable[[PyTree], Float[Array, ""]]

_RAYS, _SCOUTS, _AUDIT = 0, 1, 2
"""Tags folded into the key, so that rays, scouting rays and audit points have independent draws."""


class _Problem(eqx.Module):
    """What every ray needs to know. The cutoff and the tolerance are float64 sums of two float32 parts."""

    cost: Cost
    params: PyTree
    prior: Any
    proposal: Any
    cutoff: tuple[Array, Array]
    tolerance: tuple[Array, Array]
    max_evaluations: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    audit_stride: int = eqx.field(static=True)
    region: Star = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)


def ray_volume(
    key: Key[Array, ""],
    cost: Cost,
    params: PyTree,
    prior: Any,
    *,
    cutoff: ArrayLike,
    proposal: Any = Isotropic(),  # noqa: B008 - frozen and stateless
    num_rays: int = 256,
    tolerance: ArrayLike = 0.1,
    batch_size: int | None = None,
    audit_fraction: float = 0.05,
    max_evaluations: int = 100,
    mesh: Mesh | None = None,
) -> VolumeEstimate:
    """Estimate the log prior mass of the star region around `params`; pure, so it may be called under jit and vmap.

    Forward passes only. log mean w over `num_rays` independent rays, with a certified lower bound and the tail diagnostic
    that decides whether the number is an estimate or only a bound.

    Args:
        key: typed threefry key; ray i uses `fold_in(fold_in(key, 0), i)`.
        cost: params -> scalar nats, at most `cutoff` at the anchor; an `equinox.Module` with its data as leaves is
            compiled once for all anchors.
        params: the anchor, a pytree of floating arrays, D numbers in all.
        prior: `Gaussian`, `UniformBox`, `UniformBall` or `Lebesgue`.
        cutoff: ε in nats, positive.
        proposal: how directions are drawn.
        num_rays: number of rays, n.
        tolerance: largest error of one ray's log volume by the boundary search, in nats.
        batch_size: rays traced at once; None chooses by D and backend. Does not change the result.
        audit_fraction: share of rays checked at 32 interior points; violations shrink the ray and are counted.
        max_evaluations: evaluation budget of one ray.
        mesh: device mesh with an axis `rays`; None for one device.

    Returns:
        A `VolumeEstimate` of region "star": NumPy float64 when called from the host; under a trace, arrays of
        JAX's default float dtype. Trouble of single rays is data: see `status` and `trace`.

    Raises:
        ValueError: arguments that do not fit each other. On concrete values also: NaN in the anchor, a cutoff ≤ 0, a cost
            at the anchor above the cutoff. Under a trace the latter give a log mass of −inf.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> ball = lambda w: 0.5 * jnp.sum(w**2)
        >>> estimate = vj.ray_volume(jax.random.key(0), ball, jnp.zeros(10), vj.Gaussian(1.0), cutoff=0.01)
        >>> round(float(estimate.log_mass), 1)
        -27.8

    Reference: Scherlis & Belrose, arXiv 2501.18812, equations 4-8.
    """
    key, problem = _pose(
        key, cost, params, prior, cutoff, proposal, num_rays, tolerance, batch_size, audit_fraction, max_evaluations, mesh
    )
    estimate = _estimate(key, problem, num_rays)
    if not is_traced((key, cost, params, prior, proposal, cutoff)):
        return to_host(estimate)
    narrow = jnp.result_type(float)
    return jax.tree.map(lambda x: x.astype(narrow) if jnp.issubdtype(x.dtype, jnp.floating) else x, estimate)


def ray_stream(
    key: Key[Array, ""],
    cost: Cost,
    params: PyTree,
    prior: Any,
    *,
    cutoff: float,
    proposal: Any = Isotropic(),  # noqa: B008 - frozen and stateless
    num_rays: int = 4096,
    chunk_size: int = 256,
    tolerance: float = 0.1,
    batch_size: int | None = None,
    audit_fraction: float = 0.05,
    max_evaluations: int = 100,
    mesh: Mesh | None = None,
    resume: RayBatch | None = None,
) -> Iterator[VolumeEstimate]:
    """Yield the estimate from all rays so far after every chunk; the last one equals `ray_volume` with the same key.

    For the host: stop at any time, keep what was last yielded, and continue from its `trace`.

    Args:
        key: as for `ray_volume`.
        cost: as for `ray_volume`.
        params: as for `ray_volume`.
        prior: as for `ray_volume`.
        cutoff: as for `ray_volume`.
        proposal: as for `ray_volume`.
        num_rays: rays in all, those resumed included.
        chunk_size: rays between two yields. Does not change the result.
        tolerance: as for `ray_volume`.
        batch_size: as for `ray_volume`.
        audit_fraction: as for `ray_volume`.
        max_evaluations: as for `ray_volume`.
        mesh: as for `ray_volume`.
        resume: the `trace` of an earlier estimate with the same key and arguments.

    Yields:
        `VolumeEstimate` with NumPy float64 leaves.

    Raises:
        ValueError: as for `ray_volume`, before the first ray.
    """
    key, problem = _pose(
        key, cost, params, prior, cutoff, proposal, num_rays, tolerance, batch_size, audit_fraction, max_evaluations, mesh
    )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return _stream(key, problem, num_rays, min(chunk_size, num_rays), resume)


def _stream(
    key: Key[Array, ""], problem: _Problem, num_rays: int, chunk_size: int, resume: RayBatch | None
) -> Iterator[VolumeEstimate]:
    scouting = _scout(key, problem)
    context = _context(problem, scouting)
    rays = resume
    done = 0 if rays is None else rays.log_weight.shape[0]
    if rays is not None and done >= num_rays:
        yield _summarise_on_host(rays, context)
    while done < num_rays:
        # A full chunk every time, so that one program serves all; the surplus of the last is dropped.
        chunk = to_host(_shoot(key, problem, scouting, done, chunk_size))
        keep = min(chunk_size, num_rays - done)
        chunk = jax.tree.map(lambda x, keep=keep: x[:keep], chunk)
        rays = chunk if rays is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), rays, chunk)
        done += keep
        yield _summarise_on_host(rays, context)


def _pose(
    key: Any, cost: Cost, params: PyTree, prior: Any, cutoff: ArrayLike, proposal: Any, num_rays: int,
    tolerance: ArrayLike, batch_size: int | None, audit_fraction: float, max_evaluations: int, mesh: Mesh | None,
) -> tuple[Array, _Problem]:  # fmt: skip
    """Check everything that can be checked beforehand, and collect it."""
    key = require_threefry(key)
    for name, value in (("num_rays", num_rays), ("batch_size", batch_size), ("max_evaluations", max_evaluations)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0.0 <= audit_fraction <= 1.0:
        raise ValueError(f"audit_fraction must lie between 0 and 1, got {audit_fraction}")
    if not is_traced(tolerance) and not float(tolerance) > 0.0:
        raise ValueError(f"tolerance must be a positive number of nats, got {tolerance}")
    params = check_question(cost, params, prior, cutoff)
    proposal.check(params)
    return key, _Problem(
        cost=cost,
        params=params,
        prior=prior,
        proposal=proposal,
        cutoff=_split(cutoff),
        tolerance=_split(tolerance),
        max_evaluations=max_evaluations,
        batch_size=default_batch_size(tree.size(params)) if batch_size is None else batch_size,
        audit_stride=round(1.0 / audit_fraction) if audit_fraction > 0.0 else 0,
        region=Star(),
        mesh=mesh,
    )


@eqx.filter_jit
def _estimate(key: Key[Array, ""], problem: _Problem, num_rays: int) -> VolumeEstimate:
    scouting = _scout(key, problem)
    return _summarise(_shoot(key, problem, scouting, 0, num_rays), _context(problem, scouting))


@eqx.filter_jit
def _scout(key: Key[Array, ""], problem: _Problem) -> Scouting:
    """Find the scale of the region, its power law and the cost's noise from a few rays of their own."""
    return scout(
        jax.random.fold_in(key, _SCOUTS),
        problem.cost,
        problem.params,
        problem.prior,
        problem.proposal,
        cutoff=_join(problem.cutoff),
        batch_size=problem.batch_size,
    )


@eqx.filter_jit
def _shoot(
    key: Key[Array, ""], problem: _Problem, scouting: Scouting, first: Int[Array, ""] | int, count: int
) -> RayBatch:
    """Trace rays `first` to `first + count`, and audit every `audit_stride`-th ray of the whole run."""
    key = jax.random.fold_in(key, _RAYS)
    batch, mesh, stride = problem.batch_size, problem.mesh, problem.audit_stride
    traced = map_keys(
        lambda key: _trace(key, problem, scouting), key, first + jnp.arange(count), batch_size=batch, mesh=mesh
    )
    lanes = executed(traced.ray.evaluations, batch)
    if stride > 0:
        slots = -first % stride + stride * jnp.arange(-(-count // stride))
        chosen = jax.tree.map(lambda x: x[jnp.minimum(slots, count - 1)], traced)
        audited = map_keys(
            lambda key, ray: _audit(key, ray, problem), key, first + slots, chosen, batch_size=batch, mesh=mesh
        )
        # A slot past the end has no ray; its index is out of range and the update is dropped.
        traced = jax.tree.map(lambda rays, some: rays.at[slots].set(some, mode="drop"), traced, audited)
    return eqx.tree_at(lambda rays: rays.executed, traced.ray, lanes)


class _Traced(eqx.Module):
    """A ray, and how far along it was verified, in units of its direction."""

    ray: RayBatch
    reach: Float[Array, ""]
    log_totals: Float[Array, "2"]
    """The integrals of prior and proposal over the whole ray, kept for the audit."""


def _trace(key: Key[Array, ""], problem: _Problem, scouting: Scouting) -> _Traced:
    """Draw the ray of `key`, find where it leaves the region, and weigh it."""
    draw, line = _aim(key, problem)
    log_totals = _whole_ray(draw, line, problem)
    crossing = first_crossing(
        cost_along(problem.cost, problem.params, draw.direction),
        _log_volume(problem, line),
        cutoff=_join(problem.cutoff),
        start=scouting.start,
        total=log_totals[0],
        tolerance=_join(problem.tolerance),
        power=scouting.power,
        noise=scouting.noise,
        limit=line.exit,
        floor=position_floor(problem.params, draw.direction),
        max_evaluations=problem.max_evaluations,
    )
    return _weigh(draw, line, log_totals, crossing)


def _audit(key: Key[Array, ""], traced: _Traced, problem: _Problem) -> _Traced:
    """Look at interior points of a ray, and cut it back to the first crossing where one of them lies outside."""
    draw, line = _aim(key, problem)
    cost_at = cost_along(problem.cost, problem.params, draw.direction)
    fractions = problem.region.fractions(jax.random.fold_in(key, _AUDIT))
    with jax.enable_x64(True):
        cutoff = _join(problem.cutoff)
        points = jnp.where(jnp.isfinite(traced.reach), traced.reach, 0.0) * fractions
        ratios = log_ratio(jax.lax.map(cost_at, points), cutoff)
        violated = jnp.any(ratios > 0.0)
        first = jax.lax.argmax(ratios > 0.0, 0, jnp.int32)
        before = jnp.maximum(first - 1, 0)
        cut = Bracket(
            inside=jnp.where(first > 0, points[before], 0.0),
            outside=points[first],
            log_ratio_inside=jnp.where(first > 0, ratios[before], -jnp.inf),
            log_ratio_outside=ratios[first],
        )
        # A bracket without width makes the search of an unviolated ray end before its first evaluation.
        settled = Bracket(points[-1], points[-1], ratios[-1], ratios[-1])
        crossing = first_crossing(
            cost_at,
            _log_volume(problem, line),
            cutoff=cutoff,
            start=traced.reach,
            total=traced.log_totals[0],
            tolerance=_join(problem.tolerance),
            limit=line.exit,
            floor=position_floor(problem.params, draw.direction),
            max_evaluations=problem.max_evaluations,
            bracket=jax.tree.map(lambda a, b: jnp.where(violated, a, b), cut, settled),
        )
    shortened = _weigh(draw, line, traced.log_totals, crossing)
    shortened = eqx.tree_at(
        lambda t: (t.ray.status, t.ray.evaluations),
        shortened,
        (jnp.asarray(Status.NON_MONOTONE, jnp.int32), traced.ray.evaluations),
    )
    kept = jax.tree.map(lambda new, old: jnp.where(violated, new, old), shortened, traced)
    extra = fractions.shape[0] + jnp.where(violated, crossing.evaluations, 0)
    return eqx.tree_at(
        lambda t: (t.ray.audited, t.ray.violated, t.ray.audit_evaluations),
        kept,
        (jnp.ones((), bool), violated, extra.astype(jnp.int32)),
    )


def _aim(key: Key[Array, ""], problem: _Problem) -> tuple[RayDraw, Line]:
    """Draw a direction, and look at the prior along it."""
    draw = problem.proposal.draw(key, problem.params)
    return draw, problem.prior.line(problem.params, draw.direction)


def _whole_ray(draw: RayDraw, line: Line, problem: _Problem) -> Float[Array, "2"]:
    """Return the log integrals over the whole ray of the prior, up to its constant, and of the proposal."""
    with jax.enable_x64(True):
        curvatures = jnp.stack([line.curvature, draw.curvature])
        slopes = jnp.stack([line.slope, draw.slope])
        constants = jnp.stack([jnp.zeros((), jnp.float64), draw.log_density])
        return constants + radial(tree.size(problem.params), curvatures, slopes, jnp.inf)


def _log_volume(problem: _Problem, line: Line) -> Callable[[Array], tuple[Array, Array]]:
    dimension = tree.size(problem.params)
    return lambda s: radial_and_slope(dimension, line.curvature, line.slope, s)


def _weigh(draw: RayDraw, line: Line, log_totals: Float[Array, "2"], crossing: Crossing) -> _Traced:
    """Turn the verified reach of a ray into its log weight."""
    with jax.enable_x64(True):
        reach = crossing.bracket.inside
        unbounded = crossing.status == Status.NEVER_CROSSES
        length = jnp.sqrt(tree.dot(draw.direction, draw.direction))
        ray = RayBatch(
            log_weight=line.log_density + crossing.log_volume - log_totals[1],
            radius=jnp.where(unbounded & jnp.isinf(line.exit), jnp.inf, reach * length),
            shortfall=crossing.shortfall,
            status=crossing.status,
            evaluations=crossing.evaluations,
            executed=crossing.evaluations,
            audited=jnp.zeros((), bool),
            violated=jnp.zeros((), bool),
            audit_evaluations=jnp.zeros((), jnp.int32),
        )
        return _Traced(ray, reach, log_totals)


class _Context(eqx.Module):
    """What the summary needs besides the rays: kept free of the problem's shapes, so that it compiles once per count."""

    prior_term: Float[Array, ""]
    noise: Float[Array, ""]
    scout_evaluations: Int[Array, ""]
    proper: bool = eqx.field(static=True)
    region: str = eqx.field(static=True)


@eqx.filter_jit
def _context(problem: _Problem, scouting: Scouting) -> _Context:
    with jax.enable_x64(True):
        relative_noise = scouting.noise / _join(problem.cutoff)
        return _Context(
            prior_term=problem.prior.anchor_term(problem.params),
            noise=tree.size(problem.params) / scouting.power * relative_noise,
            scout_evaluations=scouting.evaluations,
            proper=problem.prior.proper,
            region=problem.region.name,
        )


def _summarise(rays: RayBatch, context: _Context) -> VolumeEstimate:
    """Reduce the rays to an estimate, in float64."""
    count = rays.log_weight.shape[0]
    with jax.enable_x64(True):
        x = rays.log_weight.astype(jnp.float64)
        log_mass = log_mean_exp(x)
        weight = jax.nn.softmax(jnp.where(jnp.isneginf(log_mass), 0.0, x))
        shortfall = jnp.sum(weight * rays.shortfall.astype(jnp.float64))
        k = pareto_k(x)
        only_bound = ~(k <= pareto_k_limit(count))
        # A violation among the audited says that others went unseen: then the weights are too large.
        unseen = jnp.any(rays.violated) & ~jnp.all(rays.audited)
        return VolumeEstimate(
            log_mass=log_mass,
            std_error=jnp.where(only_bound, jnp.inf, jnp.hypot(log_mean_error(x), shortfall)),
            lower=certified_lower(x),
            upper=jnp.asarray(0.0 if context.proper else jnp.inf, jnp.float64),
            kind=jnp.where(only_bound, Kind.LOWER_BOUND, Kind.ESTIMATE).astype(jnp.int32),
            bound_kind=jnp.where(unseen, BoundKind.NONE, BoundKind.CERTIFIED).astype(jnp.int32),
            hysteresis=jnp.full((2,), jnp.nan, jnp.float64),
            prior_term=context.prior_term,
            volume_term=log_mass - context.prior_term,
            mean_log_weight=jnp.mean(x),
            std_log_weight=_spread(x),
            max_log_weight=jnp.max(x),
            ess=effective_sample_size(x),
            pareto_k=k,
            noise=context.noise,
            scout_evaluations=context.scout_evaluations,
            num_rays=count,
            region=context.region,
            trace=rays,
        )


def _spread(log_weights: Float[Array, "rays"]) -> Float[Array, ""]:
    """Return the standard deviation; +inf where some rays have no weight, or there is but one."""
    if log_weights.shape[0] < 2:
        return jnp.full((), jnp.inf, jnp.float64)
    spread = jnp.std(log_weights, ddof=1)
    return jnp.where(jnp.isnan(spread), jnp.inf, spread)


_summarise_jitted = eqx.filter_jit(_summarise)


def _summarise_on_host(rays: RayBatch, context: _Context) -> VolumeEstimate:
    """Reduce NumPy rays; x64 is on so that their float64 weights are not rounded on the way in."""
    with jax.enable_x64(True):
        return to_host(_summarise_jitted(jax.tree.map(jnp.asarray, rays), context))


def _split(value: ArrayLike) -> tuple[Array, Array]:
    """Return two float32 numbers whose sum is `value` to float64 accuracy: traced, so that a sweep compiles once."""
    if is_traced(value):
        return jnp.asarray(value, jnp.float32), jnp.zeros((), jnp.float32)
    head = np.float32(value)
    return jnp.asarray(head), jnp.asarray(np.float32(float(value) - float(head)))


def _join(parts: tuple[Array, Array]) -> Float[Array, ""]:
    with jax.enable_x64(True):
        return parts[0].astype(jnp.float64) + parts[1].astype(jnp.float64)
