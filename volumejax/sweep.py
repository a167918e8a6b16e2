"""The best proposal of a family, chosen on pilot rays and then measured on fresh ones."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from volumejax import tree
from volumejax.eigenpairs import Eigenpairs
from volumejax.low_rank import LowRankPrecision
from volumejax.parallel import default_batch_size, require_threefry
from volumejax.proposals import Diagonal
from volumejax.rays import ray_volume
from volumejax.results import VolumeEstimate
from volumejax.tempering import CurvatureModel, tempered
from volumejax.tuning import curvature_model, model_beta
from volumejax.validation import check_question

__all__ = ["Sweep", "TunedProposal", "fresh_key", "tune_proposal"]

_PILOT, _FRESH = 0, 1
"""Tags folded into the key, so that the rays that choose are not those that count."""
_DECADES = (-1.0, 0.0, 1.0, 2.0)
"""Powers of ten by which β is tried around the one that matches the cutoff."""
_SHARES = (0.0, 0.1, 1.0)
"""Dampings to try, in units of the root mean square of the curvature's power."""
_EXPONENTS = (0.3, 0.5)
_FINER_BETAS = (10.0**-0.5, 1.0, 10.0**0.5)
_FINER_SHARES = (0.3, 1.0, 3.0)
_FIRST_SHARES = (0.0, 0.01, 0.03)
"""In place of the finer ones where the best of the first round has no damping."""
_FINER_EXPONENTS = (-0.1, 0.0, 0.1)
"""What the second round tries around the best of the first: factors of β and of the damping, steps of the exponent."""


class Sweep(eqx.Module):
    """All candidates, with what the pilot rays said of them; every candidate saw the same draws."""

    beta: Float[np.ndarray, "candidates"]
    exponent: Float[np.ndarray, "candidates"]
    damping: Float[np.ndarray, "candidates"]
    shift: Bool[np.ndarray, "candidates"]
    log_weights: Float[np.ndarray, "candidates rays"]
    """In nats; −inf for a ray without volume."""

    def candidate(self, index: int) -> tuple[float, float, float, float]:
        """Beta, exponent, damping and shift of one candidate."""
        columns = (self.beta, self.exponent, self.damping, self.shift)
        return tuple(float(column[index]) for column in columns)  # pyright: ignore[reportReturnType] - four of them

    @property
    def mean_log_weight(self) -> Float[np.ndarray, "candidates"]:
        """What is maximised; −inf where a ray had no volume."""
        return np.mean(self.log_weights, axis=1)

    @property
    def std_error(self) -> Float[np.ndarray, "candidates"]:
        """Standard error of the mean log weight."""
        finite = np.all(np.isfinite(self.log_weights), axis=1)
        safe = np.where(finite[:, None], self.log_weights, 0.0)
        error = np.std(safe, axis=1, ddof=1) / np.sqrt(safe.shape[1])
        return np.where(finite, error, np.inf)

    @property
    def best(self) -> int:
        """Index of the candidate with the largest mean log weight."""
        return int(np.argmax(np.where(np.isnan(self.mean_log_weight), -np.inf, self.mean_log_weight)))


def _sweep(candidates: Float[np.ndarray, "candidates 4"], log_weights: Float[np.ndarray, "candidates rays"]) -> Sweep:
    beta, exponent, damping, shift = candidates.T
    return Sweep(beta, exponent, damping, shift > 0.0, log_weights)


class TunedProposal(eqx.Module):
    """The chosen proposal, its estimate from fresh rays, and the sweep that chose it."""

    proposal: Diagonal | LowRankPrecision
    estimate: VolumeEstimate
    sweep: Sweep

    @property
    def choice(self) -> dict[str, float | bool]:
        """The chosen beta, exponent, damping and shift."""
        i = self.sweep.best
        numbers = {name: float(getattr(self.sweep, name)[i]) for name in ("beta", "exponent", "damping")}
        return {**numbers, "shift": bool(self.sweep.shift[i])}


def tune_proposal(
    key: Key[Array, ""],
    cost: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    prior: Any,
    *,
    cutoff: float,
    curvature: PyTree | Eigenpairs,
    eigenpairs: Eigenpairs | None = None,
    betas: Sequence[float] | None = None,
    exponents: Sequence[float] | None = None,
    dampings: Sequence[float] | None = None,
    shifts: Sequence[bool] = (True, False),
    num_pilot_rays: int = 16,
    num_rays: int = 256,
    tolerance: float = 0.1,
    audit_fraction: float = 0.05,
    max_evaluations: int = 100,
) -> TunedProposal:
    r"""Choose β, exponent, damping and shift by the mean log weight of pilot rays; measure the choice on fresh rays.

    Candidates are the tempered posteriors of a curvature h that is known up to a monotone law,

    .. math:: \Sigma^{-1} = \beta (h^{\text{exponent}} + \text{damping})^2 + \Lambda,
              \quad \mu = -\Sigma\Lambda(\theta_0 - m) \text{ or } 0

    with eigenvalues raised to 2·exponent. The mean of log w is what one ray gives for certain: E log w ≤ log mass, and
    the gap is the divergence of the rays from the region. The maximum over rays, or their log mean exp, would follow a
    few lucky rays. What is left open is looked for in two rounds, a coarse one, and one around its best candidate.

    Args:
        key: typed threefry key; pilot rays and fresh rays have keys of their own.
        cost: as for `ray_volume`.
        params: as for `ray_volume`.
        prior: as for `ray_volume`.
        cutoff: as for `ray_volume`.
        curvature: h, non-negative, a pytree like the parameters: `second_moments`, `diagonal_ggn`, the absolute
            `diagonal_hessian`; or `Eigenpairs`.
        eigenpairs: the stiffest directions beside a diagonal, as for `curvature_proposal`.
        betas: inverse temperatures; None for 0 and decades around the one that matches the cutoff once a few rays
            have told the unit of the curvature, then half a decade around the best. Under a flat prior they make no
            difference, and there is one.
        exponents: powers of the curvature; ½ is the curvature itself. None for 0.3 and 0.5, then 0.1 around the best.
        dampings: non-negative, in units of h^exponent; None for 0, 0.1 and 1 times its root mean square, then a third
            and three times the best.
        shifts: whether to use μ. Without a centre in the prior only False.
        num_pilot_rays: rays per candidate, the same draws for all.
        num_rays: fresh rays for the estimate.
        tolerance: as for `ray_volume`.
        audit_fraction: as for `ray_volume`, of the fresh rays.
        max_evaluations: as for `ray_volume`.

    Returns:
        `TunedProposal`: `proposal`, `estimate` (from fresh rays), `choice`, and `sweep` with every candidate.

    Raises:
        ValueError: as for `ray_volume` and `curvature_proposal`; no candidate, or each has pilot rays without volume.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> h = jnp.logspace(-1, 3, 10)
        >>> valley = lambda w: 0.5 * jnp.sum(h * w**2)
        >>> question = (valley, jnp.zeros(10), vj.Gaussian(1.0))
        >>> powers = {"exponents": (0.25, 0.5), "dampings": (0.0,)}
        >>> tuned = vj.tune_proposal(jax.random.key(0), *question, cutoff=0.01, curvature=h, num_rays=64, **powers)
        >>> tuned.choice["exponent"], len(tuned.sweep.beta)
        (0.5, 20)
    """
    key = require_threefry(key)
    params, _ = check_question(cost, params, prior, cutoff)
    if num_pilot_rays < 2:
        raise ValueError(f"num_pilot_rays must be at least 2, got {num_pilot_rays}")
    if not len(shifts):
        raise ValueError("shifts is empty; give True, False or both")
    for name, values in (("betas", betas), ("exponents", exponents), ("dampings", dampings)):
        if values is not None and not all(value >= 0.0 and math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be finite and not negative, got {tuple(values)}")
        if values is not None and not len(values):
            raise ValueError(f"{name} is empty; give it at least one value, or leave it out")
    model = curvature_model(curvature, params, eigenpairs)
    lanes = min(num_pilot_rays, default_batch_size(tree.size(params)))
    # Each candidate holds as many vectors as it traces rays, and its own low-rank part.
    vectors = lanes + (0 if model.values is None else len(model.values))
    pilot = _Pilot(
        key=jax.random.fold_in(key, _PILOT), cost=cost, params=params, prior=prior, model=model,
        cutoff=jnp.asarray(cutoff, jnp.float32), tolerance=jnp.asarray(tolerance, jnp.float32),
        num_rays=num_pilot_rays, lanes=lanes, max_evaluations=max_evaluations,
        together=max(1, default_batch_size(tree.size(params)) // vectors),
    )  # fmt: skip
    candidates = _candidates(pilot, cutoff, betas, _EXPONENTS if exponents is None else exponents, dampings, shifts)
    log_weights, _ = pilot.send(candidates)
    sweep = _sweep(candidates, log_weights)
    finer = _around(candidates[sweep.best], pilot, betas is None, exponents is None, dampings is None)
    finer = finer[~np.any(np.all(np.isclose(finer[:, None], candidates, rtol=1e-6, atol=0.0), axis=2), axis=1)]
    if len(finer):
        found, _ = pilot.send(finer)
        sweep = _sweep(np.concatenate([candidates, finer]), np.concatenate([log_weights, found]))
    if not np.isfinite(sweep.mean_log_weight[sweep.best]):
        raise ValueError(
            "tune_proposal: under every candidate some pilot ray has no volume; raise the cutoff, or give larger "
            "dampings and betas"
        )
    proposal = _propose(model, params, prior, *sweep.candidate(sweep.best))
    estimate = ray_volume(
        fresh_key(key), cost, params, prior, cutoff=cutoff, proposal=proposal, num_rays=num_rays,
        tolerance=tolerance, audit_fraction=audit_fraction, max_evaluations=max_evaluations,
    )  # fmt: skip
    return TunedProposal(proposal, estimate, sweep)


def fresh_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """Return the key of the fresh rays of `tune_proposal`, by which others have the same draws."""
    return jax.random.fold_in(key, _FRESH)


class _Pilot(eqx.Module):
    """The pilot rays of a family: the same draws for every candidate (beta, exponent, damping, shift)."""

    key: Key[Array, ""]
    cost: Callable[[PyTree], Float[Array, ""]]
    params: PyTree
    prior: Any
    model: CurvatureModel
    cutoff: Float[Array, ""]
    tolerance: Float[Array, ""]
    num_rays: int = eqx.field(static=True)
    lanes: int = eqx.field(static=True)
    """Rays of a candidate traced at once."""
    max_evaluations: int = eqx.field(static=True)
    together: int = eqx.field(static=True)
    """Candidates traced at once."""

    def send(self, candidates: Float[np.ndarray, "candidates 4"]) -> tuple[np.ndarray, np.ndarray]:
        """Return log weights and radii, [candidates, rays], by one program for all candidates."""
        missing = -len(candidates) % self.together
        padded = np.pad(candidates, ((0, missing), (0, 0)), mode="edge").reshape(-1, self.together, 4)
        parts = [_trace(self, jnp.asarray(part, jnp.float32)) for part in padded]
        log_weights, radii = (np.concatenate(arrays)[: len(candidates)] for arrays in zip(*parts, strict=True))
        return log_weights.astype(np.float64), radii.astype(np.float64)


@eqx.filter_jit
def _trace(pilot: _Pilot, candidates: Float[Array, "together 4"]) -> tuple[Array, Array]:
    def one(candidate: Float[Array, "4"]) -> tuple[Array, Array]:
        beta, exponent, damping, shift = candidate
        proposal = tempered(pilot.model.bent(exponent, damping), pilot.params, pilot.prior, beta, shift)
        rays: Any = ray_volume(
            pilot.key, pilot.cost, pilot.params, pilot.prior, cutoff=pilot.cutoff, proposal=proposal,
            num_rays=pilot.num_rays, tolerance=pilot.tolerance, batch_size=pilot.lanes, audit_fraction=0.0,
            max_evaluations=pilot.max_evaluations,
        ).trace  # fmt: skip
        return rays.log_weight, rays.radius

    return jax.lax.map(one, candidates, batch_size=pilot.together if pilot.together > 1 else None)


def _candidates(
    pilot: _Pilot,
    cutoff: float,
    betas: Sequence[float] | None,
    exponents: Sequence[float],
    dampings: Sequence[float] | None,
    shifts: Sequence[bool],
) -> Float[np.ndarray, "candidates 4"]:
    """Return the product of what was given; where β is not, around the one that matches the rays' own reach."""
    flat = _is_flat(pilot)
    shifts = sorted({bool(shift) and hasattr(pilot.prior, "displacement") for shift in shifts})
    rows, reach = [], math.inf
    if betas is None and not flat:
        # Rays of the prior's own shape: what every other candidate has to beat.
        radius = pilot.send(np.array([[0.0, 0.5, 0.0, 0.0]]))[1]
        reach = float(np.median(radius[radius > 0.0])) if np.any(radius > 0.0) else math.inf
        rows += [np.array([[0.0, 0.5, 0.0, float(shift)] for shift in shifts])]
    elif betas is None and pilot.model.values is None:
        rows += [np.array([[1.0, 0.0, 0.0, 0.0]])]  # round ones
    for exponent in exponents:
        size = _root_mean_square(pilot.model.bent(exponent, 0.0), pilot.params)
        for damping in [share * size for share in _SHARES] if dampings is None else dampings:
            bent = pilot.model.bent(exponent, damping)
            if flat and not _positive(bent):
                continue
            tried = betas if betas is not None else [1.0] if flat else _betas(bent, pilot, cutoff, reach)
            rows.append(np.array(list(itertools.product(tried, [exponent], [damping], map(float, shifts)))))
    rows = [row for row in rows if row.size]
    if not rows:
        raise ValueError(
            "tune_proposal has no candidate: give betas, exponents, dampings and shifts at least one value each, and "
            "under a flat prior a positive damping"
        )
    return np.unique(np.concatenate(rows), axis=0)


def _around(
    best: Float[np.ndarray, "4"], pilot: _Pilot, open_beta: bool, open_exponent: bool, open_damping: bool
) -> Float[np.ndarray, "candidates 4"]:
    """Return what lies between the candidates of the first round, around its best, along what was left open.

    β goes with the exponent and the damping, so that the mean precision stays the same.
    """
    beta, exponent, damping, shift = best
    scaled = open_beta and not _is_flat(pilot)
    powers = [exponent + step for step in _FINER_EXPONENTS] if open_exponent else [exponent]
    size = _root_mean_square(pilot.model.bent(exponent, 0.0), pilot.params)
    rows = []
    if beta > 0.0 and size > 0.0:
        shares = _FIRST_SHARES if damping == 0.0 else [factor * damping / size for factor in _FINER_SHARES]
        level = _root_mean_square(pilot.model.bent(exponent, damping), pilot.params)
        for power in powers:
            size = _root_mean_square(pilot.model.bent(power, 0.0), pilot.params)
            for floor in [share * size for share in shares] if open_damping else [damping]:
                bent = pilot.model.bent(power, floor)
                if _is_flat(pilot) and not _positive(bent):
                    continue
                same = beta * (level / _root_mean_square(bent, pilot.params)) ** 2 if scaled else beta
                rows += [(factor * same, power, floor, shift) for factor in (_FINER_BETAS if scaled else (1.0,))]
    return np.array(rows, np.float64).reshape(-1, 4)


def _betas(bent: CurvatureModel, pilot: _Pilot, cutoff: float, reach: float) -> list[float]:
    """Return temperatures around the one that matches, once the curvature is in the unit that the rays feel.

    A curvature in an unknown unit, such as moments of gradients over an unknown batch, is told it by the rays of the
    prior's own shape, of median length r: ½r²·(mean curvature along them) = ε.
    """
    with jax.enable_x64(True):
        spread = jax.tree.map(
            lambda p: jnp.where(p > 0.0, 1.0 / tree.wide(p), 0.0), pilot.prior.precision(pilot.params)
        )
        along = tree.dot(bent.diagonal, spread)
        if bent.values is not None:
            squares = jax.tree.map(
                lambda u, s: jnp.sum(u**2 * s[None], axis=tuple(range(1, u.ndim))), bent.vectors, spread
            )
            along += jnp.sum(bent.values * jax.tree.reduce(jnp.add, squares))
        mean = float(along / sum(jnp.sum(s) for s in jax.tree.leaves(spread)))
    unit = 2.0 * cutoff / (reach**2 * mean) if math.isfinite(reach) and mean > 0.0 else 1.0
    scaled = CurvatureModel(
        jax.tree.map(lambda h: unit * h, bent.diagonal),
        None if bent.values is None else unit * bent.values,
        bent.vectors,
    )
    return list(model_beta(scaled, pilot.params, pilot.prior, cutoff, False) * unit * 10.0 ** np.array(_DECADES))


def _is_flat(pilot: _Pilot) -> bool:
    return all(float(jnp.max(p)) == 0.0 for p in jax.tree.leaves(pilot.prior.precision(pilot.params)))


def _root_mean_square(bent: CurvatureModel, params: PyTree) -> float:
    """Return the root mean square of h^exponent, from h^(2·exponent)."""
    total = sum(float(jnp.sum(h)) for h in jax.tree.leaves(bent.diagonal))
    total += 0.0 if bent.values is None else float(jnp.sum(bent.values))
    return float(np.sqrt(total / tree.size(params)))


def _positive(bent: CurvatureModel) -> bool:
    return all(bool(jnp.all(h > 0.0)) for h in jax.tree.leaves(bent.diagonal))


def _propose(
    model: CurvatureModel, params: PyTree, prior: Any, beta: float, exponent: float, damping: float, shift: float
) -> Diagonal | LowRankPrecision:
    return tempered(model.bent(exponent, damping), params, prior, np.float32(beta), 1.0 if shift > 0.0 else None)
