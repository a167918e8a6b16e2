"""The local volume as a training metric: measured every so many steps, inside a jitted train step or beside it."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer, Key, PyTree

from volumejax.behaviours import Behaviour
from volumejax.casting import NUM_SCOUTS
from volumejax.functions import Function
from volumejax.parallel import default_batch_size, require_threefry
from volumejax.proposals import Isotropic
from volumejax.rays import ray_volume
from volumejax.results import RayBatch, Status, VolumeEstimate
from volumejax.tree import check_floating, size
from volumejax.validation import check_prior, named

__all__ = ["VolumeProbe"]

Cost = Callable[[PyTree], Float[Array, ""]]

_NUMBERS = (
    "log_mass", "std_error", "lower", "prior_term", "volume_term", "mean_log_weight", "std_log_weight",
    "max_log_weight", "noise", "ess", "pareto_k",
)  # fmt: skip
_COUNTS = ("converged", "violated", "evaluations")


_SUCH_AS = "for instance lambda params, inputs: kl_to_anchor(apply_fn, params, inputs)"


class VolumeProbe(Function):
    """Measures the local volume of the network in training by rays, on every `every`-th step; NaN on the others.

    Anchor, data and optimizer state are arguments of the call, so one compiled program serves all steps and all
    anchors. It draws from its own key and returns nothing but numbers: training goes on as without it. The wait
    between two probes costs nothing, a probe as many forward passes as its rays need.

    Args:
        behaviour: `behaviour(params, data) -> cost`, how the cost is made for the anchor at hand, for instance
            `lambda params, inputs: vj.kl_to_anchor(apply_fn, params, inputs)`. One and the same function for the whole
            run, since a new one compiles anew.
        prior: `Gaussian`, `UniformBox`, `UniformBall` or `Lebesgue`.
        cutoff: ε in nats, positive.
        every: steps between two probes; step 0 is one of them.
        proposal: how directions are drawn: a proposal, or a function `(opt_state, params, prior) -> proposal` such as
            `functools.partial(vj.adam_proposal, beta=1e4)`.
        num_rays: rays of one probe.
        tolerance: as for `ray_volume`, in nats.
        batch_size: rays traced at once; None takes at most 8 on a CPU, and what `ray_volume` would elsewhere. Does not
            change the result.
        audit_fraction: as for `ray_volume`.
        max_evaluations: as for `ray_volume`.
        mesh: device mesh with an axis `rays`; None for one device.

    Raises:
        ValueError: `every` or `num_rays` below 1, or something else than functions and proposals where one is asked.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> distance = lambda anchor, scale: lambda w: jnp.sum(scale * (w - anchor) ** 2)
        >>> probe = vj.VolumeProbe(distance, vj.Gaussian(1.0), cutoff=0.01, every=100)
        >>> for step in range(2):
        ...     metrics = probe(jax.random.key(0), step, jnp.zeros(10), jnp.full(10, 0.5))
        ...     print(f"{metrics['log_mass']:.1f}")
        -27.8
        nan
    """

    behaviour: Callable[[PyTree, PyTree], Cost]
    prior: Any
    cutoff: ArrayLike
    every: int = eqx.field(static=True, default=100)
    proposal: Any = Isotropic()
    num_rays: int = eqx.field(static=True, default=64)
    tolerance: ArrayLike = 0.1
    batch_size: int | None = eqx.field(static=True, default=None)
    audit_fraction: float = eqx.field(static=True, default=0.05)
    max_evaluations: int = eqx.field(static=True, default=100)
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """Refuse what could not be asked for later without a compiled program in the way."""
        for name, value in (("every", self.every), ("num_rays", self.num_rays)):
            if not isinstance(value, int | np.integer):
                raise ValueError(f"{name} must be a whole number, got {value}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not callable(self.behaviour) or isinstance(self.behaviour, Behaviour):
            what = "the cost of one network" if callable(self.behaviour) else type(self.behaviour).__name__
            raise ValueError(f"behaviour must be a function (params, data) -> cost, got {what}; {_SUCH_AS}")
        check_prior(self.prior)
        if isinstance(self.proposal, type) or not (hasattr(self.proposal, "draw") or callable(self.proposal)):
            raise ValueError(
                "proposal must be a proposal or a function (opt_state, params, prior) -> proposal, got "
                f"{named(self.proposal)}; pass Isotropic() or functools.partial(adam_proposal, beta=...)"
            )

    def __call__(
        self, key: Key[Array, ""], step: ArrayLike, params: PyTree, data: PyTree = None, opt_state: PyTree = None
    ) -> dict[str, Float[Array, ""]]:
        """Measure if the step is due; pure, and itself compiled, so it may be called from the host and under jit.

        Args:
            key: typed threefry key, the same at every step: the step is folded in.
            step: number of the step, a whole number.
            params: the anchor, a pytree of floating arrays. Half-precision ones are widened to float32 first, since
                a ray asks for steps far below their rounding.
            data: what `behaviour` takes; not consulted where the step is not due.
            opt_state: handed to a `proposal` that is a function, otherwise ignored.

        Returns:
            Scalars of JAX's default float dtype, all NaN where the step is not due, the parameters are not finite, or
            the optimizer has no moments yet: `log_mass`, `std_error`, `lower`,
            `prior_term`, `volume_term`, `mean_log_weight`, `std_log_weight`, `max_log_weight` and `noise` in nats,
            `ess`, `pareto_k`, and `converged` and `violated`, the shares of rays whose end was found and of audited
            rays that had left the region before, and `evaluations`, forward passes that the rays needed. They mean
            what they do in a `VolumeEstimate`: `std_error` is +inf where the value is only a bound, and `log_mass`
            −inf where the cost at the anchor is above the cutoff.

        Raises:
            ValueError: a step that is no whole number, arguments that do not fit each other.
        """
        key = require_threefry(key)
        check_floating(params, "params")
        if jnp.ndim(step) != 0 or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise ValueError(
                f"step must be one whole number, got {jnp.result_type(step)} of shape {jnp.shape(step)}; pass "
                "the counter of the training loop"
            )
        # A number from the host is converted there: on the device that would be a program of its own.
        count = step if isinstance(step, jax.Array) else np.asarray(step, np.int32)
        return _probe(self, key, count, params, data, opt_state)

    def due(self, step: int | np.integer) -> bool:
        """Return whether the step is measured: for the host, to log only what there is without asking the device."""
        return int(step) % self.every == 0


@eqx.filter_jit
def _probe(
    probe: VolumeProbe,
    key: Array,
    step: Integer[Array | np.ndarray, ""],
    params: PyTree,
    data: PyTree,
    opt_state: PyTree,
) -> dict[str, Array]:
    def measure() -> dict[str, Array]:
        anchor = jax.tree.map(_single, params)
        proposal = probe.proposal
        if not hasattr(proposal, "draw"):
            proposal = proposal(opt_state, anchor, probe.prior)
        cost = probe.behaviour(anchor, data)
        if not callable(cost):
            what = "an array" if isinstance(cost, jax.Array) else type(cost).__name__
            raise ValueError(f"behaviour(params, data) must return a cost, got {what}; {_SUCH_AS}")
        estimate = ray_volume(
            jax.random.fold_in(key, step),
            cost,
            anchor,
            probe.prior,
            cutoff=probe.cutoff,
            proposal=proposal,
            num_rays=probe.num_rays,
            tolerance=probe.tolerance,
            batch_size=_lanes(probe.batch_size, anchor),
            audit_fraction=probe.audit_fraction,
            max_evaluations=probe.max_evaluations,
            mesh=probe.mesh,
        )
        # Where training has diverged, or the optimizer has no moments yet, there is no number, not even a bound.
        # Of an infinite moment a scale of zero is left, and then weights that are NaN.
        sound = _is_finite((anchor, proposal)) & ~jnp.isnan(estimate.log_mass)
        return {name: jnp.where(sound, value, jnp.nan) for name, value in _scalars(estimate).items()}

    missing = {name: jnp.full((), jnp.nan, jnp.result_type(float)) for name in (*_NUMBERS, *_COUNTS)}
    return jax.lax.cond(step % probe.every == 0, measure, lambda: missing)


def _is_finite(tree: PyTree) -> Array:
    """Return whether no leaf holds NaN or infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _scalars(estimate: VolumeEstimate) -> dict[str, Array]:
    rays = cast(RayBatch, estimate.trace)
    ended = (rays.status == Status.CONVERGED) | (rays.status == Status.NEVER_CROSSES)
    counts = (
        jnp.mean(ended),
        jnp.sum(rays.violated) / jnp.sum(rays.audited),
        estimate.scout_evaluations + jnp.sum(rays.evaluations) + jnp.sum(rays.audit_evaluations),
    )
    scalars = {name: getattr(estimate, name) for name in _NUMBERS} | dict(zip(_COUNTS, counts, strict=True))
    return {name: jnp.asarray(value, jnp.result_type(float)) for name, value in scalars.items()}


def _lanes(batch_size: int | None, params: PyTree) -> int | None:
    """Return how many rays to trace at once where that was left open."""
    if batch_size is not None or jax.default_backend() != "cpu":
        return batch_size
    # Scouts and audited rays are few. On a CPU the lanes beside them take time, a third of it at twice this number.
    return min(default_batch_size(size(params)), NUM_SCOUTS)


def _single(leaf: Array) -> Array:
    """Widen half precision; wider floats stay as they are."""
    return jnp.asarray(leaf).astype(jnp.promote_types(jnp.result_type(leaf), jnp.float32))
