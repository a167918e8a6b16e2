"""From a configuration to rows: trains the anchor, builds prior and proposals, runs rays, chains and particles."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from volumejax import curvature, tree
from volumejax.behaviours import loss
from volumejax.chains import ChainTrace
from volumejax.config import (
    AdamProposal,
    Config,
    DenseGGNProposal,
    DiagonalGGNProposal,
    IsotropicProposal,
    Particles,
    Tether,
    TunedProposal,
)
from volumejax.islands import IslandTrace
from volumejax.low_rank import LowRankPrecision
from volumejax.optax_moments import second_moments
from volumejax.parallel import local_mesh, local_mesh_for_both
from volumejax.priors import Gaussian
from volumejax.proposals import Dense, Diagonal
from volumejax.rays import ray_stream
from volumejax.records import PARTICLES, TETHER, Row
from volumejax.regions import Connected, Star
from volumejax.results import VolumeEstimate
from volumejax.tasks.digits import Task, digits_task
from volumejax.temper import temper_stream
from volumejax.tether import default_num_chains, tether_stream
from volumejax.tuning import curvature_proposal, damped_proposal

Proposal = Diagonal | Dense | LowRankPrecision
ProposalConfig = IsotropicProposal | AdamProposal | DiagonalGGNProposal | DenseGGNProposal | TunedProposal


_REGIONS = {"star": Star(), "connected": Connected()}
_PARTICLES_PILOT = 0.2
"""Share of the particles' work that their pilot takes, about."""
_BEFORE = {"pilot": (0.0, 0.13), "trying the ladder": (0.13, 0.08)}
"""Where a tether's stages before its passes begin, and what share of its work they take, about."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: training, curvature, or the name of a proposal or a tether.
        done: rays or percent done, or 1 when a stage without either has ended.
        total: rays in all, 100 percent, or 1.
        seconds: since the stage began.
        estimate: from the rays or chains so far.
        unit: what `done` counts: rays or %.
        phase: what the chains of a tether are doing, e.g. pilot.
    """

    stage: str
    done: int
    total: int
    seconds: float
    estimate: VolumeEstimate | None = None
    unit: str = "rays"
    phase: str = ""


OnProgress = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The question with its numbers filled in: everything that the rays need.

    Attributes:
        config: what was asked for.
        task: the trained network and its cost.
        prior: on all of its parameters.
        proposals: one for each entry of ``config.proposals``.
        seconds: wall time by stage.
    """

    config: Config
    task: Task
    prior: Gaussian
    proposals: tuple[Proposal, ...]
    seconds: dict[str, float]

    def facts(self) -> dict[str, float | int | str]:
        """What a report says about the network and the prior."""
        return {
            "dimension": tree.size(self.task.params),
            "train_accuracy": self.task.train_accuracy,
            "test_accuracy": self.task.test_accuracy,
            "rms": self.task.rms,
            "sigma": sigma_of(self.config, self.task),
            "cost": self.config.cost,
            "anchor_cost": float(self.task.cost(self.task.params)),
        }


def prepare(config: Config, on_progress: OnProgress) -> Setting:
    """Train the anchor and build the prior and the proposals.

    Args:
        config: the experiment.
        on_progress: called as a stage begins and ends.

    Returns:
        The setting for `run_experiment`.

    Raises:
        ValueError: the configuration asks for something that the library refuses.
    """
    seconds: dict[str, float] = {}
    with stage("training", seconds, on_progress):
        task = digits_task(config.task.seed, num_epochs=config.task.num_epochs)
        if config.cost == "loss":
            task = dataclasses.replace(task, cost=loss(task.apply_fn, task.inputs, task.labels))
    prior = Gaussian(sigma_of(config, task))
    diagonal, dense = None, None
    with stage("curvature", seconds, on_progress):
        if any(isinstance(entry, DiagonalGGNProposal) for entry in config.proposals):
            diagonal = jax.block_until_ready(curvature.diagonal_ggn(task.apply_fn, task.params, task.inputs))
        if any(isinstance(entry, DenseGGNProposal) for entry in config.proposals):
            dense = jax.block_until_ready(curvature.dense_ggn(task.apply_fn, task.params, task.inputs))
        proposals: list[Proposal] = []
        for entry in config.proposals:
            made = _unshifted_twin(entry, config.proposals, proposals)
            if made is None:
                made = build_proposal(entry, task, prior, diagonal, dense, cutoff=config.cutoff)
            proposals.append(made)
        jax.block_until_ready(jax.tree.leaves(proposals))
    return Setting(config, task, prior, tuple(proposals), seconds)


def run_experiment(setting: Setting, on_progress: OnProgress) -> Iterator[Row]:
    """Send the rays of every proposal, then run the chains of every tether.

    All rows share the key, so a row does not depend on the rows before it.

    Args:
        setting: from `prepare`.
        on_progress: called after every chunk of rays, and every few seconds while chains run.

    Yields:
        A row as soon as it is finished. On KeyboardInterrupt the row from the rays or chains so far, marked as partial,
        and then nothing more.

    Raises:
        ValueError: the question is ill-posed, e.g. the cost at the anchor exceeds the cutoff.
    """
    config = setting.config
    for entry, proposal in zip(config.proposals, setting.proposals, strict=True):
        estimate, began = None, time.perf_counter()
        on_progress(Progress(entry.name, 0, config.num_rays, 0.0))
        try:
            for estimate in ray_stream(
                jax.random.key(config.seed),
                setting.task.cost,
                setting.task.params,
                setting.prior,
                cutoff=config.cutoff,
                proposal=proposal,
                num_rays=config.num_rays,
                chunk_size=config.chunk_size,
                tolerance=config.tolerance,
                audit_fraction=config.audit_fraction,
            ):
                seconds = time.perf_counter() - began
                on_progress(Progress(entry.name, estimate.num_rays, config.num_rays, seconds, estimate))
        except KeyboardInterrupt:
            if estimate is not None:
                yield make_row(entry, estimate, time.perf_counter() - began, config.num_rays)
            return
        if estimate is not None:
            yield make_row(entry, estimate, time.perf_counter() - began, config.num_rays)
    for entry in (*config.tethers, *config.particles):
        if isinstance(entry, Tether):
            row = _run_chains(entry, setting, on_progress)
        else:
            row = _run_particles(entry, setting, on_progress)
        if row is not None:
            yield row
        if row is None or not row.complete:
            return


def _run_particles(entry: Particles, setting: Setting, on_progress: OnProgress) -> Row | None:
    """The row of particles from the prior; partial after Ctrl-C, None where no island was done by then."""
    estimate, complete, began = None, False, time.perf_counter()

    def listen(phase: str, share: float) -> None:
        share = _PARTICLES_PILOT * share if phase == "pilot" else _PARTICLES_PILOT + (1 - _PARTICLES_PILOT) * share
        seconds = time.perf_counter() - began
        on_progress(Progress(entry.name, min(99, int(100 * share)), 100, seconds, estimate, "%", phase))

    on_progress(Progress(entry.name, 0, 100, 0.0, None, "%", "pilot"))
    try:
        for latest in temper_stream(
            jax.random.key(setting.config.seed),
            setting.task.cost,
            setting.prior,
            setting.task.params,
            cutoff=setting.config.cutoff,
            anchor=setting.task.params,
            effort=entry.effort,
            num_particles=entry.num_particles,
            num_islands=entry.num_islands,
            mesh=local_mesh(entry.num_islands),
            on_progress=listen,
        ):
            estimate = latest
        complete = True
        on_progress(Progress(entry.name, 100, 100, time.perf_counter() - began, estimate, "%", "islands"))
    except KeyboardInterrupt:
        pass
    if estimate is None:
        return None
    return _chain_row(entry, PARTICLES, estimate, time.perf_counter() - began, complete)


def _run_chains(entry: Tether, setting: Setting, on_progress: OnProgress) -> Row | None:
    """The row of one tether; partial after Ctrl-C, None where the chains had not yet felt the region by then."""
    estimate, complete, began = None, False, time.perf_counter()
    percent, phase = 0, "pilot"

    def show(share: float) -> None:
        nonlocal percent
        # The pilot plans the rest, so its own share is a guess, and 100 is kept for the end.
        percent = min(99, max(percent, 1, int(100 * share)))
        seconds = time.perf_counter() - began
        on_progress(Progress(entry.name, percent, 100, seconds, estimate, "%", phase))

    def listen(stage: str, share: float) -> None:
        nonlocal phase
        phase = stage
        if stage in _BEFORE:
            begun, part = _BEFORE[stage]
            show(begun + part * share)

    on_progress(Progress(entry.name, 0, 100, 0.0, None, "%", phase))
    try:
        for estimate in tether_stream(
            jax.random.key(setting.config.seed),
            setting.task.cost,
            setting.task.params,
            setting.prior,
            cutoff=setting.config.cutoff,
            region=_REGIONS[entry.region],
            effort=entry.effort,
            num_chains=entry.num_chains,
            decades=entry.decades,
            mesh=local_mesh_for_both(entry.num_chains or default_num_chains(tree.size(setting.task.params))),
            on_progress=listen,
        ):
            show(_progress(estimate))
        complete = True
        on_progress(Progress(entry.name, 100, 100, time.perf_counter() - began, estimate, "%", phase))
    except KeyboardInterrupt:
        pass
    if estimate is None or not (complete or np.isfinite(estimate.lower)):
        return None
    return _chain_row(entry, TETHER, estimate, time.perf_counter() - began, complete)


def _progress(estimate: VolumeEstimate) -> float:
    return float(estimate.trace.progress) if isinstance(estimate.trace, ChainTrace) else 0.0


def _chain_row(entry: Tether | Particles, kind: str, estimate: VolumeEstimate, seconds: float, complete: bool) -> Row:
    trace, curve = estimate.trace, estimate.curve
    labelled = trace.labelled() if isinstance(trace, ChainTrace | IslandTrace) else {}
    arrays = {name: values for name, (_, values) in labelled.items()}
    if curve is not None:
        arrays |= {f"curve_{name}": np.asarray(values) for name, values in vars(curve).items()}
    return Row(
        label=entry.name,
        kind=kind,
        seconds=seconds,
        complete=complete,
        estimate=estimate.to_dict(),
        chains=arrays,
    )


def make_row(entry: ProposalConfig, estimate: VolumeEstimate, seconds: float, wanted: int) -> Row:
    """Return the row of one proposal's rays."""
    recorded = entry.recorded.model_dump(exclude_none=True) if entry.recorded else {}
    trace = estimate.trace
    return Row(
        label=entry.name,
        kind=entry.kind,
        seconds=seconds,
        complete=estimate.num_rays >= wanted,
        recorded=recorded,
        estimate=estimate.to_dict(),
        rays={} if trace is None else {name: np.asarray(value) for name, value in vars(trace).items()},
    )


def sigma_of(config: Config, task: Task) -> float:
    """Return the prior's standard deviation."""
    return task.rms if isinstance(config.prior.sigma, str) else float(config.prior.sigma)


def build_proposal(
    entry: ProposalConfig,
    task: Task,
    prior: Gaussian,
    diagonal: PyTree | None,
    dense: Float[Array, "D D"] | None,
    *,
    cutoff: float,
) -> Proposal:
    """Return the proposal that an entry describes; a tuned one is chosen by its rays and not built."""
    if isinstance(entry, TunedProposal):
        raise ValueError(f"{entry.name} has to be tuned first; run it as a series")
    if isinstance(entry, IsotropicProposal):
        # Unit scales are the isotropic proposal, and run in the program that the diagonal ones compile anyway.
        return Diagonal(jax.tree.map(jnp.ones_like, task.params))
    if isinstance(entry, AdamProposal):
        moments = second_moments(task.opt_state, task.params)
        return damped_proposal(moments, task.params, damping=entry.damping, exponent=entry.exponent)
    if isinstance(entry, DiagonalGGNProposal) and entry.damping is not None:
        damping, exponent = entry.damping, 0.5 if entry.exponent is None else entry.exponent
        return damped_proposal(diagonal, task.params, damping=damping, exponent=exponent)
    matrix = diagonal if isinstance(entry, DiagonalGGNProposal) else dense
    beta = None if isinstance(entry.beta, str) else entry.beta
    shift = True if entry.shift is None else entry.shift
    made = curvature_proposal(matrix, task.params, prior, beta=beta, shift=shift, cutoff=cutoff)
    return _unshifted(made, task.params) if isinstance(made, Dense) and made.mean is None else made


def _unshifted(dense: Dense, params: PyTree) -> Dense:
    """A zero mean in place of none changes nothing, and one program then serves the rows with and without a shift."""
    return Dense(dense.cholesky, jax.tree.map(jnp.zeros_like, params))


def _unshifted_twin(entry: ProposalConfig, entries: Sequence[ProposalConfig], made: list[Proposal]) -> Dense | None:
    """Return the proposal from one made before that differs from it by the mean alone: the factor takes the time."""
    if not isinstance(entry, DenseGGNProposal) or entry.shift or isinstance(entry.beta, str):
        return None
    for other, known in zip(entries, made, strict=False):
        if isinstance(other, DenseGGNProposal) and other.beta == entry.beta and isinstance(known, Dense):
            return _unshifted(known, known.mean)
    return None


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float], on_progress: OnProgress) -> Iterator[None]:
    """Time a stage without rays, and report its beginning and its end."""
    began = time.perf_counter()
    on_progress(Progress(name, 0, 1, 0.0))
    yield
    seconds[name] = time.perf_counter() - began
    on_progress(Progress(name, 1, 1, seconds[name]))
