"""From a tally to a `VolumeEstimate`: estimate, error, bound, mixing test, curve."""

import dataclasses

import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from volumejax.chain_errors import LAG, lag_of, standard_errors
from volumejax.chains import (
    LEAST_OVERLAP,
    MOST_BLOCKED,
    MOST_LEADING,
    MOST_SEPARATION,
    MOST_SHORTFALL,
    ChainTrace,
    Curve,
    LearningCoefficient,
)
from volumejax.diagnostics import certified_lower, effective_sample_size, split_r_hat
from volumejax.results import BoundKind, Kind, VolumeEstimate
from volumejax.tally import COOLING, HEATING, Tally

__all__ = ["Plan", "summarise"]

Vector = NDArray[np.float64]

_ROUNDING = 1e-9
"""Error of sums in float64, per dimension and nat."""
_SMALL, _SHARE = 1.7, 0.017
"""A run is not mixed where the passes differ, beyond chance, by more than this: nats, or a share of |log mass|."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a summary needs besides the records."""

    cutoff: float
    cutoffs: Vector
    dimension: int
    prior_term: float
    proper: bool
    region: str


def summarise(
    tally: Tally, plan: Plan, costs: Float[Array | np.ndarray, "chains"], gradients: int, progress: float, *,
    final: bool, noise: float = np.nan,
) -> VolumeEstimate:  # fmt: skip
    """Reduce what is there: a bound while the chains cool, an estimate from one pass, in the end from both.

    The standard error joins that of chance with the part of the hysteresis that chance does not explain, as if the two
    passes lay three standard deviations to either side.
    """
    nothing = np.full(tally.chains, -np.inf)
    weights = tally.bound_weights(np.asarray(costs)) if _cooled_once(tally) else nothing
    lower = float(certified_lower(tally.hedged(weights)))
    trace = _trace(tally, plan, None, weights, gradients, progress)
    base = {
        "upper": 0.0 if plan.proper else np.inf,
        "prior_term": plan.prior_term,
        "pareto_k": np.nan,
        "noise": noise,
    }
    if not tally.final_factors:
        return _estimate(
            tally, plan, base, trace, weights=weights, log_mass=lower, std_error=np.inf, lower=lower,
            kind=Kind.LOWER_BOUND, hysteresis=(np.nan, np.nan),
        )  # fmt: skip
    everyone = np.arange(tally.chains)
    heated = final and bool(np.isfinite(tally.kappa_seen["work_up"][HEATING, 1]).any())
    passes = (COOLING, HEATING) if heated else (COOLING,)
    if not final:
        cooling = tally.log_mass(plan.cutoff, chains=everyone, passes=(COOLING,))
        return _estimate(
            tally, plan, base, trace, weights=weights, log_mass=cooling, std_error=np.inf, lower=lower,
            kind=Kind.LOWER_BOUND, hysteresis=(cooling, np.nan),
        )  # fmt: skip
    whole = tally.sums(plan.cutoffs, plan.cutoff, chains=everyone, passes=passes)
    cooling, heating = (
        tally.log_mass(plan.cutoff, chains=everyone, passes=(which,), near=whole) for which in (COOLING, HEATING)
    )
    if not np.isfinite(whole.log_mass):
        return _estimate(
            tally, plan, base, trace, weights=weights, log_mass=lower, std_error=np.inf, lower=lower,
            kind=Kind.LOWER_BOUND, hysteresis=(cooling, heating),
        )  # fmt: skip
    errors = standard_errors(tally, whole, plan.cutoffs, plan.cutoff, passes)
    gap = cooling - heating
    lag = float(lag_of(gap, errors.passes)) if np.isfinite(gap) else np.inf
    systematic = lag / LAG
    std_error = float(np.hypot(errors.mass, systematic) + _ROUNDING * (plan.dimension + abs(whole.log_mass)))
    trace = _trace(tally, plan, (whole, errors.energies), weights, gradients, progress)
    mixed = (
        np.isfinite(std_error)
        and lag <= max(_SMALL, _SHARE * abs(whole.log_mass))
        # Between levels that do not overlap the ratio is anything between what the two ways say, in both passes.
        and not trace.least_overlap < LEAST_OVERLAP
        and not trace.shortfall > MOST_SHORTFALL
        and not trace.leading > MOST_LEADING
        and not trace.blocked > MOST_BLOCKED
        and trace.least_acceptance > 0.02
        and not trace.separation > MOST_SEPARATION
        # Chains that are stuck where little mass is agree with each other and not with their own weights.
        and whole.log_mass + 2.0 * std_error > lower
    )
    return _estimate(
        tally,
        plan,
        base,
        trace,
        weights=weights,
        log_mass=whole.log_mass,
        std_error=std_error,
        lower=lower,
        kind=Kind.ESTIMATE if mixed else Kind.NOT_MIXED,
        hysteresis=(cooling, heating),
        curve=Curve(plan.cutoffs, whole.curve, np.hypot(errors.curve, systematic)),
        coefficient=LearningCoefficient(
            np.asarray(whole.energies[tally.joint]),
            np.asarray(errors.energies[tally.joint] if mixed else np.inf),
            np.asarray(tally.temperature.beta[tally.joint]),
        ),
    )


def _estimate(
    tally: Tally, plan: Plan, base: dict[str, float], trace: ChainTrace, *, weights: Vector, log_mass: float,
    std_error: float, lower: float, kind: Kind, hysteresis: tuple[float, float], curve: Curve | None = None,
    coefficient: LearningCoefficient | None = None,
) -> VolumeEstimate:  # fmt: skip
    finite = weights[np.isfinite(weights)]
    certified = np.isfinite(lower)
    scalars = {
        **base,
        "log_mass": log_mass,
        "std_error": std_error,
        "lower": lower,
        "volume_term": log_mass - plan.prior_term,
        "mean_log_weight": float(np.mean(weights)) if len(weights) else np.nan,
        "std_log_weight": float(np.std(finite, ddof=1)) if len(finite) > 1 else np.nan,
        "max_log_weight": float(np.max(weights)),
        "ess": float(effective_sample_size(weights)),
    }
    return VolumeEstimate(
        **{name: np.asarray(value, np.float64) for name, value in scalars.items()},
        kind=np.asarray(kind, np.int32),
        bound_kind=np.asarray(BoundKind.CERTIFIED if certified else BoundKind.NONE, np.int32),
        hysteresis=np.asarray(hysteresis, np.float64),
        scout_evaluations=np.asarray(0, np.int32),
        num_rays=tally.chains,
        region=plan.region,
        curve=curve,
        learning_coefficient=coefficient,
        trace=trace,
    )


def _trace(
    tally: Tally, plan: Plan, sums: tuple | None, weights: Vector, gradients: int, progress: float
) -> ChainTrace:
    seen = tally.kappa_seen
    levels, shown = len(tally.kappa.precision), tally.shown
    count = np.sum(~np.isnan(seen["cost"]), axis=2)

    def mean(name: str) -> Vector:
        return np.where(count > 0, np.nansum(seen[name], axis=2) / np.maximum(count, 1), np.nan)

    acceptance, inside = mean("acceptance"), mean("inside")
    non_finite = seen["non_finite"]
    empty = np.full(np.count_nonzero(shown), np.nan)
    integrals = (np.nan, np.nan)
    overlap = work_std = np.full(levels - 1, np.nan)
    r_hat = np.full(levels, np.nan)
    energies = errors = heat = empty
    if sums is not None:
        whole, errors = sums
        energies, errors, heat = (values[shown] for values in (whole.energies, errors, whole.heat_capacities))
        overlap = tally.overlaps(whole.kappa_differences)
        works = seen["work_down"][:, :-1]
        finite = np.where(np.isfinite(works), works, np.nan)
        joined = np.moveaxis(finite, 0, 1).reshape(levels - 1, -1)
        work_std = np.array([np.std(row[~np.isnan(row)]) if (~np.isnan(row)).sum() > 1 else np.nan for row in joined])
        r_hat = np.array([split_r_hat(seen["square"][:, level]) for level in range(levels)])
        integrals = _integrals(tally, plan, whole.log_mass + float(np.sum(whole.kappa_differences[1:])))
    return ChainTrace(
        precision=tally.kappa.precision,
        mean_cost=mean("cost"),
        mean_square=mean("square"),
        acceptance=np.where(np.arange(levels) > 0, acceptance, np.nan),
        inside=np.where(np.arange(levels) > 0, inside, np.nan),
        overlap=overlap,
        r_hat=r_hat,
        separation=np.asarray(tally.separation()),
        standstill=np.asarray(tally.standstill()),
        shortfall=np.asarray(np.nan if sums is None else tally.shortfall(plan.cutoff)),
        leading=np.asarray(np.nan if sums is None else sums[0].leading),
        blocked=np.asarray(tally.blocked()),
        work_std=work_std,
        log_weights=weights,
        betas=np.asarray(tally.temperature.beta)[shown],
        energies=energies,
        energy_errors=errors,
        heat_capacities=heat,
        integrated=np.asarray(integrals[0]),
        integrated_virial=np.asarray(integrals[1]),
        gradients=np.asarray(gradients, np.int64),
        non_finite=np.asarray(np.nanmean(non_finite > 0) if np.isfinite(non_finite).any() else 0.0),
        progress=np.asarray(progress),
    )


def _integrals(tally: Tally, plan: Plan, without_ladder: float) -> tuple[float, float]:
    """Return log mass with the κ ladder's free energy replaced by ∫ E[½a|δ|²] d log a, raw and with the regressor.

    The regressor is B = δ·∇U − D, whose mean is zero where no wall is felt.
    """
    seen, kappa = tally.kappa_seen, tally.kappa
    used = np.flatnonzero(kappa.precision > 0.0)[1:]
    x = np.log(kappa.precision[used])
    a, beta = kappa.precision[used, None], kappa.beta[used, None]

    def flat(name: str) -> Vector:
        return np.moveaxis(seen[name][:, used], 0, 1).reshape(len(used), -1)

    slope = 0.5 * a * flat("square")
    regressor = beta * flat("virial") + a * flat("square") + flat("pulled") - plan.dimension
    centred = regressor - np.nanmean(regressor, axis=1, keepdims=True)
    variance = np.nanmean(centred**2, axis=1)
    share = np.where(variance > 0.0, np.nanmean(slope * centred, axis=1) / np.where(variance > 0.0, variance, 1.0), 0.0)
    raw = np.nanmean(slope, axis=1)
    corrected = np.nanmean(slope - share[:, None] * regressor, axis=1)
    # Below the last positive precision of a flat ladder the integrand falls off like a.
    tail = 1.0 if kappa.precision[-1] == 0.0 else 0.0
    return tuple(
        float(without_ladder + np.trapezoid(values[::-1], x[::-1]) + tail * values[-1]) for values in (raw, corrected)
    )  # pyright: ignore[reportReturnType]


def _cooled_once(tally: Tally) -> bool:
    """Whether the chains have felt the cost: before, their weights say nothing about the region."""
    return bool(np.isfinite(tally.kappa_seen["cost"][COOLING, 1]).any())
