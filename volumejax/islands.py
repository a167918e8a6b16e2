"""What a particle estimator leaves behind beside its log mass: the evidence island by island and level by level."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["IslandTrace"]

Numbers = Array | np.ndarray

MOST_SCATTER = 1.5
"""Standard deviation of the islands' log weights, in nats, from which on they are taken not to have converged."""
_HARDLY = 0.05
"""Acceptance below which particles hardly move."""


class IslandTrace(eqx.Module):
    """One entry per island, or per level of the temperature ladder; NaN marks what was not reached."""

    log_weights: Float[Numbers, "islands"]
    """Independent unbiased estimates of the mass, one per island, as logarithms."""
    betas: Float[Numbers, "levels"]
    """Inverse temperatures, in inverse nats; the first is 0, the prior itself."""
    mean_cost: Float[Numbers, "levels"]
    """Mean cost there, in nats, over all islands and particles."""
    ess: Float[Numbers, "levels"]
    """Kish effective share of the particles before the moves, averaged over islands, between 0 and 1."""
    acceptance: Float[Numbers, "levels"]
    prior_costs: Float[Numbers, "draws"]
    """Cost of every draw from the prior, ascending; NaN costs come last as +inf."""
    num_particles: Int[Numbers, ""]
    """Of all islands together."""
    gradients: Int[Numbers, ""]
    """Gradients of all particles, pilot included."""
    non_finite: Float[Numbers, ""]
    """Share of prior draws whose cost is NaN or infinite; they count as outside."""
    progress: Float[Numbers, ""]
    """Share of the islands that are done."""

    @property
    def scatter(self) -> float:
        """Standard deviation of the islands' log weights, in nats; NaN for fewer than two."""
        x = np.asarray(self.log_weights, np.float64)
        if len(x) < 2:
            return math.nan
        return float(np.std(x, ddof=1)) if np.all(np.isfinite(x)) else math.inf

    @property
    def disagrees(self) -> bool:
        """Whether the islands have not converged on one answer."""
        return not self.scatter <= MOST_SCATTER

    def share_of_prior(self, cutoff: float) -> float:
        """Return the share of draws from the prior whose cost is at most `cutoff`."""
        return float(np.mean(np.asarray(self.prior_costs) <= cutoff))

    def scalars(self) -> dict[str, float | int]:
        """Return the numbers that a logger wants."""
        return {
            "num_islands": len(self.log_weights),
            "num_particles": int(self.num_particles),
            "num_levels": len(self.betas),
            "gradients": int(self.gradients),
            "scatter": self.scatter,
            "min_acceptance": float(np.nanmin(np.asarray(self.acceptance))),
            "min_ess": float(np.nanmin(np.asarray(self.ess))),
            "non_finite": float(self.non_finite),
            "progress": float(self.progress),
        }

    def labelled(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return the arrays with the names of their axes."""
        axes = {
            "islands": ("log_weights",),
            "levels": ("betas", "mean_cost", "ess", "acceptance"),
            "draws": ("prior_costs",),
        }
        return {name: ((axis,), np.asarray(getattr(self, name))) for axis, group in axes.items() for name in group}

    def remarks(self) -> list[str]:
        """Return what a reader must know about the particles."""
        remarks = []
        if self.progress < 1.0:
            remarks.append(f"stopped with {100 * float(self.progress):.0f} % of the islands; what was done is kept")
        if self.non_finite > 0.0:
            remarks.append(
                f"{100 * float(self.non_finite):.2g} % of draws from the prior have a NaN or infinite cost (counted as "
                "outside)"
            )
        if np.nanmin(np.asarray(self.acceptance)) < _HARDLY:
            remarks.append("on some level the particles hardly move; raise effort")
        return remarks
