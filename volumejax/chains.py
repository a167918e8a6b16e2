"""What a chain estimator leaves behind beside its log mass: the curve over cutoffs, λ̂, the evidence rung by rung."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["ChainTrace", "Curve", "LearningCoefficient"]

Numbers = Array | np.ndarray


MOST_SEPARATION = 3.0
"""R-hat over chains from which on they are taken not to meet: slow mixing alone gives up to 2."""


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
    """λ̂(β) = β(E_β C − C(θ0)), the local slope of the curve averaged over cutoffs with weight βe^{−βε}mass(ε)."""

    value: Float[Numbers, ""]
    std_error: Float[Numbers, ""]
    beta: Float[Numbers, ""]


class ChainTrace(eqx.Module):
    """The evidence: one entry per rung of the κ ladder (`levels`), per temperature, or per chain.

    Passes are (cooling, heating); NaN marks what was not visited.
    """

    precision: Float[Numbers, "levels"]
    """a = stiffness + κ; the first level is the reference, without the cost."""
    mean_cost: Float[Numbers, "2 levels"]
    mean_square: Float[Numbers, "2 levels"]
    """Mean of |δ|² in whitened coordinates: the tether profile."""
    acceptance: Float[Numbers, "2 levels"]
    inside: Float[Numbers, "2 levels"]
    """Share of trajectories that the region allowed."""
    overlap: Float[Numbers, "gaps"]
    """Mean Metropolis probability of the map between neighbouring levels: the rate at which replicas would swap."""
    r_hat: Float[Numbers, "levels"]
    """Split R-hat of |δ|² over the passes: well above 1 where cooling and heating disagree."""
    separation: Float[Numbers, ""]
    """R-hat over the chains of one pass, by quartiles, of the leaves' log squares along its last rungs, the worst leaf
    and pass: far above 1 where chains stay in separate parts of the region."""
    work_std: Float[Numbers, "gaps"]
    log_weights: Float[Numbers, "chains"]
    """Annealing weights of the cooling chains, whose mean is the mass in expectation."""
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
        """The largest R-hat of any level; NaN before the heating pass."""
        finite = np.asarray(self.r_hat)[np.isfinite(np.asarray(self.r_hat))]
        return float(finite.max()) if finite.size else math.nan

    @property
    def least_acceptance(self) -> float:
        """The smallest acceptance of any level."""
        seen = np.asarray(self.acceptance)[:, 1:]
        return float(np.nanmin(seen)) if np.isfinite(seen).any() else math.nan

    @property
    def least_overlap(self) -> float:
        """The smallest overlap of neighbouring levels."""
        seen = np.asarray(self.overlap)
        return float(np.nanmin(seen)) if np.isfinite(seen).any() else math.nan

    def scalars(self) -> dict[str, float | int]:
        """Return the numbers that a logger wants."""
        return {
            "num_chains": self.num_chains,
            "gradients": int(self.gradients),
            "max_r_hat": self.slowest,
            "separation": float(self.separation),
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

    def remarks(self) -> list[str]:
        """Return what a reader must know about the chains."""
        remarks = []
        if self.progress < 1.0:
            remarks.append(f"stopped at {100 * float(self.progress):.0f} % of the planned work; what was done is kept")
        if self.non_finite > 0.0:
            remarks.append(
                f"{100 * float(self.non_finite):.2g} % of trajectories met a NaN or infinite cost (counted as outside)"
            )
        if self.separation > MOST_SEPARATION:
            remarks.append(
                f"the chains stay in separate parts of the region (R-hat between them {self.separation:.1f}): how much "
                "each part weighs is not known; more chains do not help, higher effort may"
            )
        if self.least_acceptance < 0.05:
            remarks.append(
                f"acceptance falls to {self.least_acceptance:.2f} on some level: its chains hardly move; raise effort"
            )
        return remarks
