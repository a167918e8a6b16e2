"""Rays and chains on problems with a known answer: is this installation, on this machine, right?"""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from volumejax.low_rank import LowRankPrecision
from volumejax.proposals import Dense, Diagonal, Isotropic
from volumejax.rays import ray_volume
from volumejax.reference import Reference, ellipsoid, normal_crossing, quadratic, rank_one, shell, tanh_neuron
from volumejax.regions import Connected, Star
from volumejax.results import Kind, VolumeEstimate
from volumejax.tether import tether_volume
from volumejax.tuning import curvature_proposal

MAX_DEVIATION = 4.0
"""Largest accepted |estimate - truth|, in standard errors."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem for rays.

    Attributes:
        name: what it is.
        problem: builds it.
        matched: whether rays follow the curvature; else they are isotropic.
        max_error: largest accepted standard error in nats, so that a bloated one cannot pass.
        must_settle: True where only an estimate will do, False where only a bound will, None for either.
    """

    name: str
    problem: Callable[[], Reference]
    matched: bool
    max_error: float = 0.5
    must_settle: bool | None = None


@dataclasses.dataclass(frozen=True)
class ChainCase:
    """A problem for tethered chains, which must come to an estimate.

    Attributes:
        name: what it is.
        problem: builds it; all of its region must be connected.
        region: what the chains measure.
        effort: as for `tether_volume`.
        max_error: largest accepted standard error in nats.
    """

    name: str
    problem: Callable[[], Reference]
    region: Star | Connected
    effort: float = 0.1
    max_error: float = 0.2


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """What came out.

    Attributes:
        name: the problem.
        method: matched rays, isotropic rays, star chains or connected chains.
        truth: exact log mass of the region that the method measures, nats.
        log_mass: the estimate, nats.
        std_error: its standard error, inf for a bound.
        lower: certified lower bound, nats.
        is_bound: whether the result calls itself a lower bound.
        deviation: (estimate - truth) in standard errors, nan for a bound.
        verdict: ok, or what is wrong.
        seconds: wall time with compilation.
    """

    name: str
    method: str
    truth: float
    log_mass: float
    std_error: float
    lower: float
    is_bound: bool
    deviation: float
    verdict: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the verdict is ok."""
        return self.verdict == "ok"


_SPREAD = np.logspace(-3, 2, 100)

CASES = (
    Case("quadratic, 20 scales", lambda: quadratic(1 / np.arange(1, 21), cutoff=1e-2), True, 0.02, True),
    Case("quadratic, rank 5 of 50", lambda: quadratic(_rank(5, 50), cutoff=1e-2), True, 0.05, True),
    Case("ellipsoid, D = 100", lambda: ellipsoid(_SPREAD, cutoff=0.01), True, 0.02, True),
    Case("ellipsoid, D = 100", lambda: ellipsoid(_SPREAD, cutoff=0.01), False, 0.5, False),
    Case("rank one (3, 5)", lambda: rank_one(3, 5, cutoff=1e-2), False),
    Case("tanh neuron (3, 5)", lambda: tanh_neuron(3, 5, cutoff=1e-2), False),
    Case("shell seen from e1, D = 3", lambda: shell(3, cutoff=1e-2), False),
    Case("shell seen from e1, D = 10", lambda: shell(10, cutoff=1e-2), False),
    ChainCase("quadratic, 20 scales", lambda: quadratic(1 / np.arange(1, 21), cutoff=1e-2), Connected()),
    ChainCase("crossing (1, 1), Gaussian", lambda: normal_crossing((1, 1), cutoff=1e-4, gaussian=True), Connected()),
    ChainCase("rank one (4, 4)", lambda: rank_one(4, 4, cutoff=1e-4), Connected()),
    ChainCase("tanh neuron (50, 10)", lambda: tanh_neuron(50, 10, cutoff=1e-6), Connected(), effort=0.3, max_error=0.4),
    ChainCase("shell seen from e1, D = 3", lambda: shell(3, cutoff=1e-2), Star()),
    ChainCase("shell, round the back, D = 3", lambda: shell(3, cutoff=1e-2), Connected()),
)


def run_checks(
    cases: tuple[Case | ChainCase, ...] = CASES, *, num_rays: int = 2048, seed: int = 0
) -> Iterator[CheckRow]:
    """Estimate each problem's log mass by rays or chains and hold it against the exact value.

    A row passes if it is an estimate within four standard errors of the truth, with a standard error below
    the case's cap, or if it calls itself a lower bound and the bound lies below the truth.

    Args:
        cases: what to run.
        num_rays: rays per case of rays.
        seed: of the rays and the chains.

    Yields:
        One row per case, as soon as it is done.
    """
    for case in cases:
        began = time.perf_counter()
        problem = case.problem()
        estimate, truth, method = _attack(case, problem, num_rays, seed)
        log_mass = float(estimate.log_mass)
        std_error, lower = float(estimate.std_error), float(estimate.lower)
        is_bound = int(estimate.kind) != Kind.ESTIMATE
        deviation = float("nan") if is_bound else (log_mass - truth) / std_error
        yield CheckRow(
            name=case.name,
            method=method,
            truth=truth,
            log_mass=log_mass,
            std_error=std_error,
            lower=lower,
            is_bound=is_bound,
            deviation=deviation,
            verdict=_verdict(case, is_bound, std_error, deviation, lower, truth),
            seconds=time.perf_counter() - began,
        )


def _attack(case: Case | ChainCase, problem: Reference, num_rays: int, seed: int) -> tuple[VolumeEstimate, float, str]:
    """The estimate, the exact value, and the method in words."""
    key, question = jax.random.key(seed), (problem.cost, problem.params, problem.prior)
    if isinstance(case, ChainCase):
        estimate = tether_volume(key, *question, cutoff=problem.cutoff, region=case.region, effort=case.effort)
        star = isinstance(case.region, Star)
        return estimate, float(problem.star_log_mass if star else problem.log_mass), f"{case.region.name} chains"
    proposal = _proposal(case, problem)
    estimate = ray_volume(key, *question, cutoff=problem.cutoff, proposal=proposal, num_rays=num_rays)
    return estimate, float(problem.star_log_mass), "matched rays" if case.matched else "isotropic rays"


def _proposal(case: Case, problem: Reference) -> Isotropic | Diagonal | Dense | LowRankPrecision:
    if not case.matched:
        return Isotropic()
    return curvature_proposal(
        problem.curvature, problem.params, problem.prior, beta=None, shift=True, cutoff=problem.cutoff
    )


def _verdict(
    case: Case | ChainCase, is_bound: bool, std_error: float, deviation: float, lower: float, truth: float
) -> str:
    if not lower <= truth:
        return "bound above the truth"
    must_settle = True if isinstance(case, ChainCase) else case.must_settle
    if must_settle is not None and must_settle == is_bound:
        return "labelled a bound" if is_bound else "not labelled a bound"
    if is_bound:
        return "ok"
    if not abs(deviation) <= MAX_DEVIATION:
        return f"off by {deviation:+.1f} SE"
    return "ok" if std_error <= case.max_error else f"SE above {case.max_error:g}"


def _rank(rank: int, dimension: int) -> np.ndarray:
    return (np.arange(dimension) < rank).astype(float)
