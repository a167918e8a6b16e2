"""What the estimators return: pytrees of arrays, with summaries for people, loggers and ArviZ."""

import enum
import importlib
import math
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from volumejax.chains import RAISE_EFFORT, ChainTrace, Curve, LearningCoefficient
from volumejax.islands import IslandTrace
from volumejax.spectrum import SpectrumTrace
from volumejax.tree import is_traced

__all__ = ["BoundKind", "Kind", "RayBatch", "Status", "VolumeEstimate", "last_estimate"]


class Status(enum.IntEnum):
    """How the boundary search ended on one ray."""

    CONVERGED = 0
    """The crossing is bracketed to within the tolerance."""
    NOISE_LIMITED = 1
    """The bracket is as narrow as the cost's own rounding allows, and still wider than the tolerance."""
    NEVER_CROSSES = 2
    """The cost stays within the cutoff as far as the prior has mass."""
    NON_FINITE = 3
    """The region ends where the cost is NaN or infinite."""
    NON_MONOTONE = 4
    """An interior point lay outside the region; the ray was cut back to the first crossing found."""
    NEVER_INSIDE = 5
    """The ray has no volume: next to the anchor the cost is above the cutoff, or the prior's support ends."""
    UNRESOLVED = 6
    """The evaluation budget ran out first; the last inside point counts."""


class Kind(enum.IntEnum):
    """What may be claimed for `log_mass`."""

    ESTIMATE = 0
    LOWER_BOUND = 1
    NOT_MIXED = 2
    MODEL = 3


class BoundKind(enum.IntEnum):
    """On what `lower` rests."""

    CERTIFIED = 0
    ASSUMES_EXACT_START = 1
    NONE = 2


class RayBatch(eqx.Module):
    """One entry per ray, no axis for a single one.

    `executed` counts the evaluations of the search with those run while the ray waited for the rest of its batch.
    """

    log_weight: Float[Array | np.ndarray, "*rays"]
    """Log importance weight, in nats; −inf for a ray without volume."""
    radius: Float[Array | np.ndarray, "*rays"]
    """Euclidean distance from the anchor to the largest point verified inside; +inf where the ray never crosses."""
    shortfall: Float[Array | np.ndarray, "*rays"]
    """Estimated volume left between that point and the crossing itself, in nats: what makes the weight a lower
    bound."""
    status: Int[Array | np.ndarray, "*rays"]
    evaluations: Int[Array | np.ndarray, "*rays"]
    executed: Int[Array | np.ndarray, "*rays"]
    audited: Bool[Array | np.ndarray, "*rays"]
    violated: Bool[Array | np.ndarray, "*rays"]
    """Audited, and found outside the region before its first claimed crossing."""
    audit_evaluations: Int[Array | np.ndarray, "*rays"]


class VolumeEstimate(eqx.Module):
    """A log mass with its uncertainty, its bounds and the evidence for both. All in nats unless said otherwise."""

    log_mass: Float[Array | np.ndarray, ""]
    std_error: Float[Array | np.ndarray, ""]
    """Standard error of `log_mass`, the shortfall of the boundary search included; +inf where the tail diagnostic says
    that none can be given."""
    lower: Float[Array | np.ndarray, ""]
    """Certified lower bound at 95 %, −∞ where `bound_kind` is NONE. Rays certify it for the star as the audit sees
    it."""
    upper: Float[Array | np.ndarray, ""]
    """What can be proved from above: 0 under a proper prior, +inf otherwise."""
    kind: Int[Array | np.ndarray, ""]
    bound_kind: Int[Array | np.ndarray, ""]
    hysteresis: Float[Array | np.ndarray, "..."]
    """(cooling, heating) log masses of a chain estimator; NaN where no chain ran."""
    prior_term: Float[Array | np.ndarray, ""]
    """−½ (θ0−m)ᵀΛ(θ0−m): the part of `log_mass` that the anchor's distance from the prior's mean accounts for."""
    volume_term: Float[Array | np.ndarray, ""]
    mean_log_weight: Float[Array | np.ndarray, ""]
    std_log_weight: Float[Array | np.ndarray, ""]
    max_log_weight: Float[Array | np.ndarray, ""]
    ess: Float[Array | np.ndarray, ""]
    """Kish effective sample size."""
    pareto_k: Float[Array | np.ndarray, ""]
    noise: Float[Array | np.ndarray, ""]
    """Effect of the cost's rounding, common to all rays or chains, so not in `std_error`. By rays D/2 times its
    relative noise at the cutoff; by chains what matrix products in full precision would change, NaN on a CPU."""
    scout_evaluations: Int[Array | np.ndarray, ""]
    """Cost evaluations spent on finding scale and noise before the first ray."""
    num_rays: int = eqx.field(static=True)
    """Independent weights: rays, annealed chains, or random probes."""
    region: str = eqx.field(static=True)
    curve: Curve | None = None
    learning_coefficient: LearningCoefficient | None = None
    trace: RayBatch | ChainTrace | IslandTrace | SpectrumTrace | None = None

    @property
    def bits(self) -> Any:
        """Complexity in bits, −log_mass / ln 2."""
        return -self.log_mass / math.log(2.0)

    @property
    def log10(self) -> Any:
        """The base-10 logarithm of the mass."""
        return self.log_mass / math.log(10.0)

    @property
    def evaluations(self) -> int:
        """Cost evaluations of rays, gradients of all chains, or curvature products (concrete estimates only)."""
        if isinstance(self.trace, SpectrumTrace):
            return int(self.trace.products)
        if isinstance(self.trace, ChainTrace):
            return int(self.trace.gradients) * self.trace.num_chains
        if isinstance(self.trace, IslandTrace):
            return int(self.trace.gradients)
        rays = 0 if self.trace is None else np.sum(self.trace.evaluations) + np.sum(self.trace.audit_evaluations)
        return int(self.scout_evaluations) + int(rays)

    @property
    def violation_rate(self) -> float:
        """Share of audited rays that left the region before the crossing first claimed; NaN without an audit."""
        if not isinstance(self.trace, RayBatch) or not np.any(self.trace.audited):
            return math.nan
        return float(np.sum(self.trace.violated) / np.sum(self.trace.audited))

    @property
    def counts(self) -> dict[str, int]:
        """Rays by status, those that occur."""
        if not isinstance(self.trace, RayBatch):
            return {}
        codes = np.asarray(self.trace.status)
        return {s.name.lower(): int(np.sum(codes == s)) for s in Status if np.any(codes == s)}

    @property
    def status(self) -> str:
        """What a reader must know before quoting the number, with the remedy; concrete estimates only."""
        return "; ".join(self._remarks()) or "ok"

    def _remarks(self) -> list[str]:
        remarks = []
        kind, n = Kind(int(self.kind)), self.num_rays
        if isinstance(self.trace, ChainTrace):
            remarks += self._chain_remarks(kind, self.trace)
        elif isinstance(self.trace, IslandTrace):
            remarks += self._island_remarks(kind, self.trace)
        elif isinstance(self.trace, SpectrumTrace):
            remarks += ["a quadratic model at the anchor, and no bound", *self.trace.remarks()]
        elif not self.log_mass > -np.inf:
            remarks.append(
                "no mass found: the anchor is outside the cutoff or the prior, or its parameters or cost are NaN; "
                "check the cost at the anchor"
            )
        elif kind is Kind.LOWER_BOUND:
            remarks.append(
                f"a lower bound: a few of {n} rays carry the weight (ESS {float(self.ess):.1f}, "
                f"k-hat {float(self.pareto_k):.2f}); a proposal closer to the region's shape helps, more rays hardly do"
            )
        if self.noise > max(0.5, 0.5 * float(self.std_error)):
            remarks.append(
                f"rounding may move it by {float(self.noise):.2g} nats; on an accelerator run it under "
                "jax.default_matmul_precision('highest')"
            )
        counts = self.counts
        if counts.get("never_inside", 0) == n > 0:
            remarks.append("no ray found volume: the cost exceeds the cutoff next to the anchor; raise the cutoff")
        if counts.get("noise_limited"):
            remarks.append(
                f"{counts['noise_limited']} of {n} radii are limited by the cost's rounding; raise the cutoff or "
                "compute the cost more accurately"
            )
        if counts.get("non_finite"):
            remarks.append(
                f"{counts['non_finite']} of {n} rays end where the cost is NaN or infinite (counted as outside)"
            )
        if counts.get("unresolved"):
            remarks.append(f"{counts['unresolved']} of {n} rays used up their evaluations; raise max_evaluations")
        if np.isposinf(self.log_mass):
            remarks.append("infinite: the region is unbounded under an improper prior; use a proper prior")
        rate = self.violation_rate
        if rate > 0:
            remarks.append(
                f"{100 * rate:.1f} % of audited rays had left the region before the crossing found; "
                "audit all of them with audit_fraction=1"
            )
        elif (
            math.isnan(rate) and BoundKind(int(self.bound_kind)) is BoundKind.NONE and isinstance(self.trace, RayBatch)
        ):
            remarks.append("no ray was audited, so no bound is certified; set audit_fraction above 0")
        return remarks

    def _chain_remarks(self, kind: Kind, trace: ChainTrace) -> list[str]:
        own = []
        if kind is Kind.NOT_MIXED:
            says = " and ".join(self._passes(trace))
            above = ", together above what a probability can be" if self.log_mass > self.upper else ""
            own.append((f"not mixed: {says}{_max_r_hat(trace)}{above}; only `lower` may be quoted", RAISE_EFFORT))
        elif kind is Kind.LOWER_BOUND and trace.ended:
            own.append(("a lower bound: on some rung every chain was lost at the wall", RAISE_EFFORT))
        elif kind is Kind.LOWER_BOUND:
            own.append(("a lower bound: the heating pass that would show the bias has not ended", ""))
        said = {""}
        remarks = []
        for fact, remedy in own + trace.remarks():
            remarks.append(fact if remedy in said else f"{fact}; {remedy}")
            said.add(remedy)
        return remarks

    def _passes(self, trace: ChainTrace) -> list[str]:
        """Return what either pass says, in words."""
        silent = "lost every chain at the wall" if trace.ended else "has not ended"
        return [
            f"{name} says {value:.2f}" if math.isfinite(value) else f"{name} {silent}"
            for name, value in zip(("cooling", "heating"), map(float, self.hysteresis), strict=True)
        ]

    def _island_remarks(self, kind: Kind, trace: IslandTrace) -> list[str]:
        remarks = []
        if kind is Kind.NOT_MIXED:
            empty = int(np.sum(~np.isfinite(np.asarray(trace.log_weights))))
            what = (
                f"{empty} of {len(trace.log_weights)} islands never came inside; a cost without steps, a loss in place "
                "of an error rate, would lead them"
                if empty
                else f"the islands' log weights scatter by {trace.scatter:.2f} nats"
            )
            remarks.append(f"not converged: {what}; only `lower` may be quoted; raise effort or num_particles")
        elif kind is Kind.LOWER_BOUND:
            remarks.append("a lower bound: too few islands are done for an error")
        return remarks + trace.remarks()

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the scalars, flat, for a logger; concrete estimates only."""
        numbers = (
            "log_mass", "std_error", "lower", "upper", "prior_term", "volume_term", "mean_log_weight",
            "std_log_weight", "max_log_weight", "ess", "pareto_k", "noise", "bits", "log10",
        )  # fmt: skip
        flat: dict[str, float | int | str] = {name: float(getattr(self, name)) for name in numbers}
        flat |= {
            "kind": Kind(int(self.kind)).name.lower(),
            "bound_kind": BoundKind(int(self.bound_kind)).name.lower(),
            "region": self.region,
            "num_rays": self.num_rays,
            "evaluations": self.evaluations,
            "violation_rate": self.violation_rate,
            "status": self.status,
        }
        hysteresis = np.asarray(self.hysteresis, np.float64)
        if hysteresis.shape == (2,):
            flat |= {"hysteresis_cooling": float(hysteresis[0]), "hysteresis_heating": float(hysteresis[1])}
        if isinstance(self.trace, ChainTrace | IslandTrace):
            flat |= self.trace.scalars()
        if self.learning_coefficient is not None:
            flat |= {
                "learning_coefficient": float(self.learning_coefficient.value),
                "learning_coefficient_error": float(self.learning_coefficient.std_error),
            }
        return flat | {f"rays_{name}": count for name, count in self.counts.items()}

    def __str__(self) -> str:
        """Return the summary of a concrete estimate."""
        return repr(self) if is_traced(self) else self.summary()

    def summary(self) -> str:
        """Return the estimate as a few lines of text; concrete estimates only."""
        log_mass, lower, upper = float(self.log_mass), float(self.lower), float(self.upper)
        if self._is_bound:
            joint = isinstance(self.trace, ChainTrace) and Kind(int(self.kind)) is Kind.NOT_MIXED
            other = "both passes together, not to be quoted," if joint else "log mean weight"
            head = f"log mass ≥ {lower:.2f} nats (95 %), {other} {log_mass:.2f}"
        else:
            head = f"log mass = {log_mass:.2f} ± {float(self.std_error):.2g} nats, in [{lower:.2f}, {upper:.2f}]"
        if isinstance(self.trace, ChainTrace):
            overlap = self.trace.least_overlap
            evidence = (
                f"  {self.trace.num_chains} chains x {int(self.trace.gradients)} gradients: "
                f"{', '.join(self._passes(self.trace))}{_max_r_hat(self.trace)}"
                + (f", min overlap {overlap:.2f}" if math.isfinite(overlap) else "")
            )
        elif isinstance(self.trace, IslandTrace):
            evidence = (
                f"  {self.num_rays} islands of {int(self.trace.num_particles)} particles in all, "
                f"{len(self.trace.betas)} levels: log weights scatter by {self.trace.scatter:.2f}, "
                f"{self.evaluations} gradients"
            )
        elif isinstance(self.trace, SpectrumTrace):
            low, high = (float(x) for x in self.trace.bracket)
            evidence = f"  {int(self.trace.products)} curvature products: quadrature bracket [{low:.2f}, {high:.2f}]"
        else:
            evidence = (
                f"  {self.num_rays} rays: log weight {float(self.mean_log_weight):.2f} ± "
                f"{float(self.std_log_weight):.2f}, ESS {float(self.ess):.1f}, k-hat {float(self.pareto_k):.2f}, "
                f"{self.evaluations} evaluations"
            )
        return "\n".join(
            [
                f"{head}  [{self.region} region]",
                f"  {self._terms()}",
                evidence,
                f"  status: {self.status}",
            ]
        )

    def _terms(self) -> str:
        """Return the two terms, where there is an anchor, and the complexity in bits."""
        mass = float(self.lower if self._is_bound else self.log_mass)
        least, most = ("≥ ", "at most ") if self._is_bound else ("", "")
        bits = f"{most}{0.0 - mass / math.log(2.0):.1f} bits" if math.isfinite(mass) else "no finite number of bits"
        if np.isnan(self.prior_term):
            return bits
        prior_term = float(self.prior_term)
        return f"prior term {prior_term:.2f}, volume term {least}{mass - prior_term:.2f}, {bits}"

    @property
    def _is_bound(self) -> bool:
        """Whether only `lower` may be quoted."""
        return Kind(int(self.kind)) in (Kind.LOWER_BOUND, Kind.NOT_MIXED)

    def to_datatree(self) -> Any:
        """Return the estimate as an `xarray.DataTree`: scalars at the root, arrays under `/trace` and `/curve`.

        Raises:
            ImportError: xarray is not installed.
        """
        try:
            xarray = importlib.import_module("xarray")
        except ImportError as error:
            raise ImportError("to_datatree needs xarray: pip install 'volumejax[xarray]'") from error
        flat = self.to_dict()
        text = {k: v for k, v in flat.items() if isinstance(v, str)}
        root = xarray.Dataset({k: v for k, v in flat.items() if k not in text}, attrs=text)
        nodes = {"/": root}
        if isinstance(self.trace, RayBatch):
            arrays = {name: ("rays", np.asarray(value)) for name, value in vars(self.trace).items()}
            nodes["/trace"] = xarray.Dataset(arrays)
        elif self.trace is not None:
            nodes["/trace"] = xarray.Dataset(self.trace.labelled())
        if self.curve is not None:
            nodes["/curve"] = xarray.Dataset(
                {name: ("cutoffs", np.asarray(getattr(self.curve, name))) for name in ("log_mass", "std_error")},
                coords={"cutoffs": np.asarray(self.curve.cutoffs)},
            )
        return xarray.DataTree.from_dict(nodes)


def _max_r_hat(trace: ChainTrace) -> str:
    """Return the largest R-hat as words; nothing for fewer than four chains a pass, of which it cannot be told."""
    return f", max R-hat {trace.slowest:.2f}" if math.isfinite(trace.slowest) else ""


def last_estimate(stream: Iterator[VolumeEstimate]) -> VolumeEstimate:
    """Return the last of a stream of estimates; after Ctrl-C the latest, where there is one."""
    estimate = None
    try:
        for latest in stream:
            estimate = latest
    except KeyboardInterrupt:
        if estimate is None:
            raise
    if estimate is None:
        raise RuntimeError("the run ended without an estimate")
    return estimate


def to_host(tree: Any) -> Any:
    """Return a result with NumPy leaves: float64 scalars survive outside `enable_x64` only as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
