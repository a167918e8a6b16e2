r"""The ray estimator: random rays from the anchor, each integrated up to where behaviour breaks.

.. math:: \log w(u) = \log\int_0^{R(u)} r^{D-1} \pi(\theta_0 + r u)\,dr - \log q(u), \qquad
          \log \mathrm{mass} = \log \mathbb{E}_q\, w(u)

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
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from volumejax import tree
from volumejax.casting import Campaign, Errand, Plan, Question, cast, join, plan_rays, plan_scouts
from volumejax.diagnostics import certified_lower, effective_sample_size, log_mean_error, pareto_k, pareto_k_limit
from volumejax.logmath import log_mean_exp
from volumejax.parallel import ABSENT, default_batch_size, num_devices, require_threefry
from volumejax.proposals import Isotropic
from volumejax.regions import Star
from volumejax.results import BoundKind, Kind, RayBatch, Status, VolumeEstimate, to_host
from volumejax.tree import is_traced
from volumejax.validation import check_question, named

__all__ = ["ray_stream", "ray_volume"]

Cost = Callable[[PyTree], Float[Array, ""]]


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

    Forward passes only. log mean w over `num_rays` independent rays, with a certified lower bound and the tail
    diagnostic that decides whether the number is an estimate or only a bound.

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
        audit_fraction: share of rays checked at 32 interior points; violations shrink the ray and are counted. Where
            one is found and not all rays were checked, or where none was checked, no bound is certified.
        max_evaluations: evaluation budget of one ray.
        mesh: device mesh with an axis `rays`; None for one device.

    Returns:
        A `VolumeEstimate` of region "star": NumPy float64 when called from the host; under a trace, arrays of
        JAX's default float dtype. Trouble of single rays is data: see `status` and `trace`.

    Raises:
        ValueError: arguments that do not fit each other. On concrete values also: NaN in the anchor, a cutoff ≤ 0, a
            cost at the anchor above the cutoff. Under a trace the latter give a log mass of −inf.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> ball = lambda w: 0.5 * jnp.sum(w**2)
        >>> estimate = vj.ray_volume(jax.random.key(0), ball, jnp.zeros(10), vj.Gaussian(1.0), cutoff=0.01)
        >>> round(float(estimate.log_mass), 1)
        -27.8

    Reference: Scherlis & Belrose, arXiv 2501.18812, equations 4-8.
    """
    key, question, lanes, stride = _pose(
        key,
        cost,
        params,
        prior,
        cutoff,
        proposal,
        num_rays,
        tolerance,
        batch_size,
        audit_fraction,
        max_evaluations,
        mesh,
    )
    estimate = _estimate(key, question, num_rays, stride, lanes)
    if not is_traced(estimate):
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

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> question = (lambda w: 0.5 * jnp.sum(w**2), jnp.zeros(10), vj.Gaussian(1.0))
        >>> stream = vj.ray_stream(jax.random.key(0), *question, cutoff=0.01, num_rays=96, chunk_size=64)
        >>> [estimate.num_rays for estimate in stream]
        [64, 96]
    """
    key, question, lanes, stride = _pose(
        key,
        cost,
        params,
        prior,
        cutoff,
        proposal,
        num_rays,
        tolerance,
        batch_size,
        audit_fraction,
        max_evaluations,
        mesh,
    )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return _stream(key, question, num_rays, min(chunk_size, num_rays), stride, lanes, resume)


def _pose(
    key: Any, cost: Cost, params: PyTree, prior: Any, cutoff: ArrayLike, proposal: Any, num_rays: int,
    tolerance: ArrayLike, batch_size: int | None, audit_fraction: float, max_evaluations: int, mesh: Mesh | None,
) -> tuple[Array, Question, int, int]:  # fmt: skip
    """Check everything that can be checked beforehand; return key, question, lanes and audit stride."""
    key = require_threefry(key)
    for name, value in (("num_rays", num_rays), ("batch_size", batch_size), ("max_evaluations", max_evaluations)):
        if value is not None and not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be a whole number, got {value}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0.0 <= audit_fraction <= 1.0:
        raise ValueError(f"audit_fraction must lie between 0 and 1, got {audit_fraction}")
    if not is_traced(tolerance) and not float(np.asarray(tolerance)) > 0.0:
        raise ValueError(f"tolerance must be a positive number of nats, got {tolerance}")
    if cutoff is None:
        raise ValueError("cutoff must be a positive number of nats, got None; 0.01 is a common one")
    params, attainable = check_question(cost, params, prior, cutoff)
    if isinstance(proposal, type) or not hasattr(proposal, "draw"):
        raise ValueError(
            f"proposal must be one such as Isotropic() or Diagonal(...), got {named(proposal)}; call what "
            "makes it, e.g. adam_proposal(opt_state, params, prior, cutoff=...)"
        )
    proposal.check(params)
    question = Question(
        cost=cost,
        params=params,
        prior=prior,
        proposal=proposal,
        cutoff=_split(attainable),
        tolerance=_split(tolerance),
        region=Star(),
        max_evaluations=max_evaluations,
        mesh=mesh,
        callers_x64=bool(jax.config.read("jax_enable_x64")),
    )
    batch = default_batch_size(tree.size(params)) if batch_size is None else batch_size
    return key, question, batch * num_devices(mesh), round(1.0 / audit_fraction) if audit_fraction > 0.0 else 0


class _Context(eqx.Module):
    """What the summary needs besides the rays; free of the question's shapes, so that it compiles once per count."""

    prior_term: Float[Array, ""]
    noise: Float[Array, ""]
    resolution: Float[Array, ""]
    answerable: Bool[Array, ""]
    """Whether the anchor lies in its own region; under a trace this cannot be refused beforehand."""
    scout_evaluations: Int[Array, ""]
    proper: bool = eqx.field(static=True)
    region: str = eqx.field(static=True)


def _context(question: Question, campaign: Campaign) -> _Context:
    scouting = campaign.scouting(question)
    with jax.enable_x64(True):
        return _Context(
            prior_term=question.prior.anchor_term(question.params),
            noise=question.dimension / scouting.power * scouting.noise / join(question.cutoff),
            resolution=jnp.minimum(join(question.tolerance), 0.1),
            answerable=campaign.anchor_cost <= join(question.cutoff),
            scout_evaluations=jnp.sum(campaign.scout_evaluations, dtype=jnp.int32),
            proper=question.prior.proper,
            region=question.region.name,
        )


@eqx.filter_jit
def _estimate(key: Key[Array, ""], question: Question, num_rays: int, stride: int, lanes: int) -> VolumeEstimate:
    """The whole run as one program."""
    rays_plan = plan_rays(0, num_rays, stride, lanes)
    scouts_plan = plan_scouts(rays_plan[1].shape[1])
    errands, indices = (np.concatenate(parts) for parts in zip(scouts_plan, rays_plan, strict=True))
    campaign, chunks = cast(key, question, Campaign.begin(num_rays), jnp.asarray(errands), jnp.asarray(indices))
    return _summarise(_gather(chunks, errands, indices, 0, num_rays), _context(question, campaign))


@eqx.filter_jit
def _cast(
    key: Key[Array, ""], question: Question, campaign: Campaign, errands: Array, indices: Array
) -> tuple[Campaign, RayBatch, _Context]:
    campaign, chunks = cast(key, question, campaign, errands, indices)
    return campaign, chunks, _context(question, campaign)


def _stream(
    key: Key[Array, ""], question: Question, num_rays: int, chunk_size: int, stride: int, lanes: int,
    resume: RayBatch | None,
) -> Iterator[VolumeEstimate]:  # fmt: skip
    width = plan_rays(0, chunk_size, stride, lanes)[1].shape[1]
    scouts_plan = plan_scouts(width)
    length = max(len(scouts_plan[0]), max(len(plan_rays(i, chunk_size, stride, width)[0]) for i in range(stride + 1)))

    def send(campaign: Campaign, plan: Plan) -> tuple[Campaign, RayBatch, _Context]:
        # Every plan is made as long as the longest, so that one program serves scouts and all chunks of rays.
        errands, indices = plan
        missing = length - len(errands)
        errands = np.pad(errands, (0, missing), constant_values=Errand.REST)
        indices = np.pad(indices, ((0, missing), (0, 0)), constant_values=ABSENT)
        return _cast(key, question, campaign, jnp.asarray(errands), jnp.asarray(indices))

    campaign, _, context = send(Campaign.begin(num_rays), scouts_plan)
    rays = resume
    done = 0 if rays is None else rays.log_weight.shape[0]
    if rays is not None and done >= num_rays:
        yield _summarise_on_host(rays, context)
    while done < num_rays:
        count = min(chunk_size, num_rays - done)
        plan = plan_rays(done, count, stride, width)
        campaign, chunks, _ = send(campaign, plan)
        fresh = _gather(to_host(chunks), *plan, done, count)
        rays = fresh if rays is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), rays, fresh)
        done += count
        yield _summarise_on_host(rays, context)


def _gather(chunks: RayBatch, errands: np.ndarray, indices: np.ndarray, first: int, count: int) -> RayBatch:
    """Return rays `first` to `first + count` in order, the audited ones with what the audit found."""
    namespace = np if isinstance(chunks.log_weight, np.ndarray) else jnp
    lanes = indices.shape[1]

    def places(errand: Errand) -> np.ndarray:
        """The flat place of each ray of that errand; 0 for the others."""
        of_errand = np.flatnonzero(np.repeat(errands == errand, lanes) & (indices.ravel() < first + count))
        place = np.zeros(count, np.int32)
        place[indices.ravel()[of_errand] - first] = of_errand
        return place

    traced, audited = places(Errand.TRACE), places(Errand.AUDIT)
    flat = jax.tree.map(lambda x: x.reshape(-1), chunks)
    ray, check = (jax.tree.map(lambda x, at=at: x[at], flat) for at in (traced, audited))
    was_audited = namespace.asarray(audited > 0)
    cut = was_audited & check.violated
    return RayBatch(
        log_weight=namespace.where(cut, check.log_weight, ray.log_weight),
        radius=namespace.where(cut, check.radius, ray.radius),
        shortfall=namespace.where(cut, check.shortfall, ray.shortfall),
        status=namespace.where(cut, namespace.int32(Status.NON_MONOTONE), ray.status),
        evaluations=ray.evaluations,
        executed=ray.executed,
        audited=was_audited,
        violated=cut,
        audit_evaluations=namespace.where(was_audited, check.audit_evaluations, 0),
    )


def _summarise(rays: RayBatch, context: _Context) -> VolumeEstimate:
    """Reduce the rays to an estimate, in float64."""
    count = rays.log_weight.shape[0]
    with jax.enable_x64(True):
        x = jnp.where(context.answerable, rays.log_weight.astype(jnp.float64), -jnp.inf)
        log_mass = log_mean_exp(x)
        weight = jax.nn.softmax(jnp.where(jnp.isneginf(log_mass), 0.0, x))
        shortfall = jnp.sum(weight * rays.shortfall.astype(jnp.float64))
        k = pareto_k(x, context.resolution)
        # A violation among the audited says that others went unseen: then some weights are too large.
        unseen = jnp.any(rays.violated) & ~jnp.all(rays.audited)
        only_bound = ~(k <= pareto_k_limit(count)) | unseen
        uncertified = unseen | ~jnp.any(rays.audited) | jnp.isposinf(log_mass)
        return VolumeEstimate(
            log_mass=log_mass,
            std_error=jnp.where(only_bound, jnp.inf, jnp.hypot(log_mean_error(x), shortfall)),
            lower=jnp.where(uncertified, -jnp.inf, certified_lower(x)),
            upper=jnp.asarray(0.0 if context.proper else jnp.inf, jnp.float64),
            kind=jnp.where(only_bound, Kind.LOWER_BOUND, Kind.ESTIMATE).astype(jnp.int32),
            bound_kind=jnp.where(uncertified, BoundKind.NONE, BoundKind.CERTIFIED).astype(jnp.int32),
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


def _spread(log_weights: Float[Array | np.ndarray, "rays"]) -> Float[Array, ""]:
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
    value = np.asarray(value, np.float64)
    head = np.float32(value)
    return jnp.asarray(head), jnp.asarray(np.float32(value - head))
