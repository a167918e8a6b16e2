"""What a chain estimator leaves behind beside its log mass: the curve over cutoffs, λ̂, the evidence rung by rung."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.lib.stride_tricks import sliding_window_view

__all__ = ["ChainTrace", "Curve", "LearningCoefficient"]

Numbers = Array | np.ndarray


MOST_SEPARATION = 3.0
"""R-hat over chains from which on they are taken not to meet: slow mixing alone gives up to 2."""
LEAST_OVERLAP = 1e-3
"""Overlap of two neighbouring levels from which on they are bridged; it is 0.3 and more where all is well."""
MOST_SHORTFALL = 2.0
"""Standard deviations of the cost by which chains may stay below the cutoff at the last temperature."""
MOST_LEADING = 0.5
"""Share of the final factor that one sample of a star may have."""
MOST_BLOCKED = 0.2
"""Share of the visits beyond the natural temperature at which chains may stand still."""
MOST_STANDSTILL = 0.05
"""Share of their way over which chains may be held in one place unmentioned."""
RAISE_EFFORT = "raise effort"
"""The remedy for chains that have not mixed, in the same words wherever it is given, so that it is said once."""
_ENOUGH_CHAINS = 16
"""Whose mean acceptance says that chains hardly move; single trajectories of a good run are refused too."""
MOST_R_HAT, LEAST_ESS = 1.05, 100
"""Of the cost's chains, for a learning coefficient to be quoted."""


class Curve(eqx.Module):
    """log mass as a function of the cutoff, in nats."""

    cutoffs: Float[Numbers, "cutoffs"]
    log_mass: Float[Numbers, "cutoffs"]
    std_error: Float[Numbers, "cutoffs"]

    @property
    def slope(self) -> np.ndarray:
        """Slope d log mass / d log cutoff between neighbouring cutoffs, shape (cutoffs − 1,); NaN without samples."""
        with np.errstate(invalid="ignore"):
            log_mass = np.asarray(self.log_mass)
            known = np.where(np.isfinite(log_mass), log_mass, np.nan)
            return np.diff(known) / np.diff(np.log(np.asarray(self.cutoffs)))


class LearningCoefficient(eqx.Module):
    """λ̂(β) = β(E_β C − C(θ0)), the local slope of the curve averaged over cutoffs with weight βe^{−βε}mass(ε).

    The fields from `heat_capacity` on are those of `learning_coefficient`; None where another estimator made it.
    """

    value: Float[Numbers, ""]
    std_error: Float[Numbers, ""]
    beta: Float[Numbers, ""]
    heat_capacity: Float[Numbers, ""] | None = None
    """β² Var_β C = λ̂ − dλ̂/d log β: equal to λ̂ where the curve is a power law."""
    heat_capacity_error: Float[Numbers, ""] | None = None
    r_hat: Float[Numbers, ""] | None = None
    """Split R-hat of the cost over the chains."""
    ess: Float[Numbers, ""] | None = None
    """Effective sample size of the cost, all chains together."""
    acceptance: Float[Numbers, ""] | None = None
    """Mean Metropolis probability; NaN for unadjusted chains."""
    step_size: Float[Numbers, ""] | None = None
    gradients: Int[Numbers, ""] | None = None
    """Gradients per chain, the discarded pilot included."""
    costs: Float[Numbers, "chains draws"] | None = None
    """C − C(θ0) of every draw, in nats, on all data."""

    def without_logarithm(self, other: "LearningCoefficient") -> "LearningCoefficient":
        """Return λ from two temperatures, without the term −(m−1)/log β of a multiplicity m that need not be known.

        With L = log β, λ ≈ (L₂λ̂₂ − L₁λ̂₁)/(L₂ − L₁): λL − (m−1) is a straight line in L. What is left falls like 1/L²
        where the cost and the prior have scales of about one.

        Args:
            other: the result at another β, from its own key; both β above 1.

        Raises:
            ValueError: the same β twice, or one of at most 1.

        Example:
            >>> cold, hot = (LearningCoefficient(*map(np.asarray, x)) for x in ((1.9, 0.01, 1e8), (1.85, 0.01, 1e5)))
            >>> round(float(cold.without_logarithm(hot).value), 3)
            1.983
        """
        logs = [float(np.log(np.asarray(x.beta))) for x in (self, other)]
        if min(logs) <= 0.0 or logs[0] == logs[1]:
            raise ValueError(
                "two different temperatures with β above 1 are needed; run learning_coefficient at another β"
            )
        shares = np.array([logs[0], -logs[1]]) / (logs[0] - logs[1])
        value = float(shares @ [float(self.value), float(other.value)])
        error = math.hypot(*(shares * [float(self.std_error), float(other.std_error)]))
        return LearningCoefficient(np.asarray(value), np.asarray(error), np.asarray(max(self.beta, other.beta)))

    @property
    def status(self) -> str:
        """What a reader must know before quoting the number, with the remedy; concrete results only."""
        return "; ".join(self._remarks()) or "ok"

    def _remarks(self) -> list[str]:
        remarks = []
        if self.costs is not None and not np.all(np.isfinite(np.asarray(self.costs))):
            return ["some costs are NaN or infinite: an unadjusted step that is too long, or a cost that breaks down"]
        if self.r_hat is not None and not float(self.r_hat) <= MOST_R_HAT:
            remarks.append(f"not mixed: R-hat {float(self.r_hat):.3f}; take more draws or longer trajectories")
        if self.ess is not None and not float(self.ess) >= LEAST_ESS:
            remarks.append(f"only {float(self.ess):.0f} effective draws: the error is uncertain; take more draws")
        if self.acceptance is not None and float(self.acceptance) < 0.3:
            remarks.append(f"acceptance {float(self.acceptance):.2f}: the chains hardly move")
        if self.value < 0.0:
            remarks.append(
                "negative: the anchor is no minimum of the cost; train on, or use a cost that is least there"
            )
        return remarks

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the scalars, flat, for a logger; concrete results only."""
        numbers = ("value", "std_error", "beta", "heat_capacity", "heat_capacity_error", "r_hat", "ess")
        numbers += ("acceptance", "step_size")
        known = {name: float(x) for name in numbers if (x := getattr(self, name)) is not None}
        return known | ({} if self.gradients is None else {"gradients": int(self.gradients)}) | {"status": self.status}

    def summary(self) -> str:
        """Return the result as a few lines of text; concrete results only."""
        head = f"λ̂ = {float(self.value):.4g} ± {float(self.std_error):.2g} at β = {float(self.beta):g}"
        if self.heat_capacity is None or self.r_hat is None or self.ess is None:
            return head
        return (
            f"{head}\n  heat capacity {float(self.heat_capacity):.4g} ± {float(self.heat_capacity_error or 0.0):.2g}\n"
            f"  R-hat {float(self.r_hat):.3f}, {float(self.ess):.0f} effective draws, "
            f"{int(self.gradients or 0)} gradients a chain\n  status: {self.status}"
        )


class ChainTrace(eqx.Module):
    """The evidence: one entry per rung of the κ ladder (`levels`), per temperature, or per chain.

    Passes are (cooling, heating); NaN marks what was not visited.
    """

    precision: Float[Numbers, "levels"]
    """a = stiffness + κ; the first level is the reference, without the cost."""
    mean_cost: Float[Numbers, "2 levels"]
    mean_square: Float[Numbers, "2 levels"]
    """Mean of |δ|² in whitened coordinates, sheared ones where the cost has a shear: the tether profile."""
    acceptance: Float[Numbers, "2 levels"]
    inside: Float[Numbers, "2 levels"]
    """Share of trajectories that the region allowed."""
    overlap: Float[Numbers, "gaps"]
    """Mean Metropolis probability of the map between neighbouring levels: the rate at which replicas would swap."""
    r_hat: Float[Numbers, "levels"]
    """Split R-hat of |δ|² over the passes: well above 1 where cooling and heating disagree; NaN for fewer than four
    chains a pass."""
    separation: Float[Numbers, ""]
    """R-hat over the chains of one pass, by quartiles, of the leaves' log squares along its last rungs, the worst leaf
    and pass: far above 1 where chains stay in separate parts of the region. Single chains of the two passes are
    compared with each other, less what both lag."""
    standstill: Float[Numbers, ""]
    """Share of a pass's gradients in the longest stretch over which a chain's long trajectories were all refused; the
    mean over chains, of the worse pass."""
    shortfall: Float[Numbers, ""]
    """Standard deviations of the cost by which its upper tenth lies below the cutoff at the last temperature, 0 where
    that is within reach of weights; NaN before."""
    leading: Float[Numbers, ""]
    """Largest share that a single sample has of the last factor of a star's mass; NaN for other regions and before."""
    blocked: Float[Numbers, ""]
    """Share of a star's visits, where the ridge rises and on to the natural β, whose long trajectories were all
    refused; NaN where it does not rise."""
    work_std: Float[Numbers, "gaps"]
    log_weights: Float[Numbers, "chains"]
    """Annealing weights of the cooling chains, each at most the mass in expectation."""
    betas: Float[Numbers, "temperatures"]
    energies: Float[Numbers, "temperatures"]
    """λ̂(β) at each temperature."""
    energy_errors: Float[Numbers, "temperatures"]
    heat_capacities: Float[Numbers, "temperatures"]
    """β² Var C."""
    integrated: Float[Numbers, ""]
    """log mass by thermodynamic integration of ½a|δ|² over log a: a cross-check with a quadrature error."""
    integrated_virial: Float[Numbers, ""]
    """The same with the virial regressor; biased upward where a wall is felt."""
    gradients: Int[Numbers, ""]
    """Gradients per chain, pilot included."""
    non_finite: Float[Numbers, ""]
    """Share of trajectories that met a NaN or infinite cost or gradient."""
    progress: Float[Numbers, ""]
    """Share of the planned work that is done."""

    @property
    def num_chains(self) -> int:
        """Chains of each pass."""
        return len(self.log_weights)

    @property
    def slowest(self) -> float:
        """The largest R-hat of any level; NaN before the heating pass and for fewer than four chains a pass."""
        finite = np.asarray(self.r_hat)[np.isfinite(np.asarray(self.r_hat))]
        return float(finite.max()) if finite.size else math.nan

    @property
    def least_acceptance(self) -> float:
        """The smallest acceptance of any level, or of as many neighbours as have enough chains to judge by."""
        known = [each[np.isfinite(each)] for each in np.asarray(self.acceptance)[:, 1:]]
        width = math.ceil(_ENOUGH_CHAINS / self.num_chains)
        means = [np.mean(sliding_window_view(each, min(width, each.size)), axis=1) for each in known if each.size]
        return float(np.min(np.concatenate(means))) if means else math.nan

    @property
    def least_overlap(self) -> float:
        """The smallest overlap of neighbouring levels."""
        seen = np.asarray(self.overlap)
        return float(np.nanmin(seen)) if np.isfinite(seen).any() else math.nan

    @property
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return float(self.progress) >= 1.0

    def scalars(self) -> dict[str, float | int]:
        """Return the numbers that a logger wants."""
        return {
            "num_chains": self.num_chains,
            "gradients": int(self.gradients),
            "max_r_hat": self.slowest,
            "separation": float(self.separation),
            "standstill": float(self.standstill),
            "shortfall": float(self.shortfall),
            "leading": float(self.leading),
            "blocked": float(self.blocked),
            "min_acceptance": self.least_acceptance,
            "min_overlap": self.least_overlap,
            "integrated": float(self.integrated),
            "non_finite": float(self.non_finite),
            "progress": float(self.progress),
        }

    def labelled(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return the arrays with the names of their axes."""
        axes = {
            "levels": ("precision", "r_hat"),
            "passes levels": ("mean_cost", "mean_square", "acceptance", "inside"),
            "gaps": ("overlap", "work_std"),
            "chains": ("log_weights",),
            "temperatures": ("betas", "energies", "energy_errors", "heat_capacities"),
        }
        return {
            name: (tuple(names.split()), np.asarray(getattr(self, name)))
            for names, group in axes.items()
            for name in group
        }

    def remarks(self) -> list[tuple[str, str]]:
        """Return what a reader must know about the chains, each with its remedy, or "" where there is none."""
        remarks = []
        if self.progress < 1.0:
            stopped = f"stopped at {100 * float(self.progress):.0f} % of the planned work; what was done is kept"
            remarks.append((stopped, ""))
        if self.non_finite > 0.0:
            share = f"{100 * float(self.non_finite):.2g} % of trajectories"
            remarks.append((f"{share} met a NaN or infinite cost (counted as outside)", ""))
        if self.separation > MOST_SEPARATION:
            parts = f"the chains stay in separate parts of the region (R-hat between them {self.separation:.1f})"
            unknown = "how much each part weighs is not known; more chains do not help, higher effort may"
            remarks.append((f"{parts}: {unknown}", ""))
        if self.standstill > MOST_STANDSTILL:
            still = f"chains stood still for {100 * self.standstill:.0f} % of their way"
            held = "held in narrow places or at the wall, which sets the passes apart"
            remarks.append((f"{still}, {held}", RAISE_EFFORT))
        if self.shortfall > MOST_SHORTFALL:
            below = f"the chains end {self.shortfall:.1f} standard deviations below the cutoff"
            remarks.append((f"{below}: nothing tells how much lies between", RAISE_EFFORT))
        if self.leading > MOST_LEADING:
            most = f"one sample makes {100 * self.leading:.0f} % of what comes after the last temperature"
            remarks.append((f"{most}: most of the region may not have been seen", RAISE_EFFORT))
        if self.blocked > MOST_BLOCKED:
            held = f"chains stood still on {100 * self.blocked:.0f} % of their visits on the way to the wall"
            remarks.append((f"{held}: the region beyond may be larger than they saw", RAISE_EFFORT))
        if (share := float(np.min(self.betas) / self.betas[-1])) < 1.0:
            # The temperatures end where the mean cost is the cutoff, the warmest of them unless the chains ran warmer.
            colder = f"β is {share:.2g} of the one at which the mean cost is the cutoff: chains press on the wall"
            remarks.append((colder, "raise beta_factor"))
        if self.least_overlap < LEAST_OVERLAP:
            apart = f"two neighbouring levels hardly overlap ({self.least_overlap:.2g})"
            remarks.append((f"{apart}: nothing tells how far apart they are", RAISE_EFFORT))
        if self.least_acceptance < 0.05:
            stiff = f"acceptance falls to {self.least_acceptance:.2f} on some level: its chains hardly move"
            remarks.append((stiff, RAISE_EFFORT))
        return remarks
