"""Rays on problems with a known answer: is this installation, on this machine, right?"""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from volumejax.proposals import Dense, Diagonal, Isotropic
from volumejax.rays import ray_volume
from volumejax.reference import Reference, ellipsoid, quadratic, rank_one, shell, tanh_neuron
from volumejax.results import Kind
from volumejax.tuning import curvature_proposal

MAX_DEVIATION = 4.0
"""Largest accepted |estimate - truth|, in standard errors."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem and how to attack it.

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
class CheckRow:
    """What came out.

    Attributes:
        name: the problem.
        proposal: matched or isotropic.
        truth: exact log mass of the star region, nats.
        log_mass: the estimate, nats.
        std_error: its standard error, inf for a bound.
        lower: certified lower bound, nats.
        is_bound: whether the result calls itself a lower bound.
        deviation: (estimate - truth) in standard errors, nan for a bound.
        verdict: ok, or what is wrong.
        seconds: wall time with compilation.
    """

    name: str
    proposal: str
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
)


def run_checks(cases: tuple[Case, ...] = CASES, *, num_rays: int = 2048, seed: int = 0) -> Iterator[CheckRow]:
    """Estimate each problem's log mass by rays and hold it against the exact value.

    A row passes if it is an estimate within four standard errors of the truth, with a standard error below
    the case's cap, or if it calls itself a lower bound and the bound lies below the truth.

    Args:
        cases: what to run.
        num_rays: rays per case.
        seed: of the rays.

    Yields:
        One row per case, as soon as it is done.
    """
    for case in cases:
        began = time.perf_counter()
        problem = case.problem()
        estimate = ray_volume(
            jax.random.key(seed),
            problem.cost,
            problem.params,
            problem.prior,
            cutoff=problem.cutoff,
            proposal=_proposal(case, problem),
            num_rays=num_rays,
        )
        truth, log_mass = float(problem.star_log_mass), float(estimate.log_mass)
        std_error, lower = float(estimate.std_error), float(estimate.lower)
        is_bound = int(estimate.kind) != Kind.ESTIMATE
        deviation = float("nan") if is_bound else (log_mass - truth) / std_error
        yield CheckRow(
            name=case.name,
            proposal="matched" if case.matched else "isotropic",
            truth=truth,
            log_mass=log_mass,
            std_error=std_error,
            lower=lower,
            is_bound=is_bound,
            deviation=deviation,
            verdict=_verdict(case, is_bound, std_error, deviation, lower, truth),
            seconds=time.perf_counter() - began,
        )


def _proposal(case: Case, problem: Reference) -> Isotropic | Diagonal | Dense:
    if not case.matched:
        return Isotropic()
    return curvature_proposal(
        problem.curvature, problem.params, problem.prior, beta=None, shift=True, cutoff=problem.cutoff
    )


def _verdict(case: Case, is_bound: bool, std_error: float, deviation: float, lower: float, truth: float) -> str:
    if not lower <= truth:
        return "bound above the truth"
    if case.must_settle is not None and case.must_settle == is_bound:
        return "labelled a bound" if is_bound else "not labelled a bound"
    if is_bound:
        return "ok"
    if not abs(deviation) <= MAX_DEVIATION:
        return f"off by {deviation:+.1f} SE"
    return "ok" if std_error <= case.max_error else f"SE above {case.max_error:g}"


def _rank(rank: int, dimension: int) -> np.ndarray:
    return (np.arange(dimension) < rank).astype(float)
