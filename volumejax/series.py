"""A series: the same question at several steps of the training, at several cutoffs, with proposals tuned for each."""

import dataclasses
import itertools
import time
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import PyTree

from volumejax import curvature, eigenpairs
from volumejax.config import AdamProposal, Config, DenseGGNProposal, DiagonalGGNProposal, TunedProposal
from volumejax.experiment import (
    OnProgress,
    Progress,
    ProposalConfig,
    Setting,
    build_proposal,
    make_row,
    sigma_of,
    stage,
)
from volumejax.optax_moments import second_moments
from volumejax.priors import Gaussian
from volumejax.rays import ray_volume
from volumejax.records import Row
from volumejax.results import VolumeEstimate
from volumejax.sweep import fresh_key, tune_proposal
from volumejax.tasks.digits import Task, digits_checkpoints, log_spaced_steps

__all__ = ["SeriesSetting", "prepare_series", "run_series"]


@dataclasses.dataclass(frozen=True)
class SeriesSetting(Setting):
    """A setting with all the networks of a series; `task` is the last of them.

    Attributes:
        steps: of the training, one for each network.
        tasks: the networks.
    """

    steps: tuple[int, ...]
    tasks: tuple[Task, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the finished series."""
        entries = [_has_moments(entry, step) for step in self.steps for entry in self.config.proposals]
        return sum(entries) * len(self.config.cutoffs or (self.config.cutoff,))


def _has_moments(entry: object, step: int) -> bool:
    """Return whether the entry can be asked at that step: not before the optimizer has moments, if it needs them."""
    return step > 0 or not (isinstance(entry, AdamProposal) or getattr(entry, "curvature", "") == "adam")


def prepare_series(config: Config, on_progress: OnProgress) -> SeriesSetting:
    """Train the network and keep it at log-spaced steps.

    Args:
        config: the experiment; the prior is the same at all steps, `rms` the one of the last.
        on_progress: called as the stage begins and ends.
    """
    seconds: dict[str, float] = {}
    with stage("training", seconds, on_progress):
        epochs = config.task.num_epochs
        steps = log_spaced_steps(config.checkpoints or 2, epochs)
        tasks = digits_checkpoints(steps[:-1], config.task.seed, num_epochs=epochs)
    if config.checkpoints is None:
        steps, tasks = steps[-1:], tasks[-1:]
    prior = Gaussian(sigma_of(config, tasks[-1]))
    return SeriesSetting(config, tasks[-1], prior, (), seconds, tuple(steps), tuple(tasks))


def run_series(setting: SeriesSetting, on_progress: OnProgress) -> Iterator[Row]:
    """Measure every network at every cutoff with every proposal.

    Args:
        setting: from `prepare_series`.
        on_progress: called before and after every row.

    Yields:
        A row as soon as it is finished; on KeyboardInterrupt nothing more. A network at step 0, whose optimizer has no
        moments, has no rows that need them.
    """
    config = setting.config
    for step, task in zip(setting.steps, setting.tasks, strict=True):
        known = _Curvatures(task)
        for cutoff, entry in itertools.product(config.cutoffs or (config.cutoff,), config.proposals):
            if not _has_moments(entry, step):
                continue
            position = {"step": float(step)} if config.checkpoints is not None else {}
            position |= {"cutoff": cutoff} if config.cutoffs else {}
            settings = {name: getattr(entry, name, None) for name in ("damping", "exponent")}
            position |= {name: float(value) for name, value in settings.items() if value is not None}
            label = entry.name + "".join(
                f", {name}{value:g}"
                for name, value in (("step ", position.get("step")), ("ε=", position.get("cutoff")))
                if value is not None
            )
            began = time.perf_counter()
            on_progress(Progress(label, 0, config.num_rays, 0.0))
            try:
                estimate, choice, sweep = _measure(entry, known, setting, cutoff)
            except KeyboardInterrupt:
                return
            seconds = time.perf_counter() - began
            on_progress(Progress(label, config.num_rays, config.num_rays, seconds, estimate))
            row = make_row(entry, estimate, seconds, config.num_rays)
            yield row.model_copy(update={"label": label, "position": {**position, **choice}, "sweep": sweep})


class _Curvatures:
    """What is known of one network, computed when it is first asked for."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._diagonal: PyTree | None = None
        self._pairs: dict[int, eigenpairs.Eigenpairs] = {}

    def diagonal(self) -> PyTree:
        """The diagonal GGN."""
        if self._diagonal is None:
            self._diagonal = curvature.diagonal_ggn(self.task.apply_fn, self.task.params, self.task.inputs)
        return self._diagonal

    def pairs(self, rank: int) -> eigenpairs.Eigenpairs | None:
        """The largest eigenpairs of the GGN; None for rank 0."""
        if rank and rank not in self._pairs:
            product = curvature.ggn_product(self.task.apply_fn, self.task.params, self.task.inputs, batch_size=None)
            self._pairs[rank] = eigenpairs.top_eigenpairs(jax.random.key(0), product, self.task.params, rank=rank)
        return self._pairs.get(rank)


def _measure(
    entry: ProposalConfig, known: _Curvatures, setting: SeriesSetting, cutoff: float
) -> tuple[VolumeEstimate, dict[str, float], dict[str, np.ndarray]]:
    """Return the estimate of one row, and what a tuned proposal has chosen, and from what."""
    config, task = setting.config, known.task
    key, question = jax.random.key(config.seed), (task.cost, task.params, setting.prior)
    options = {
        "cutoff": cutoff, "num_rays": config.num_rays, "tolerance": config.tolerance,
        "audit_fraction": config.audit_fraction,
    }  # fmt: skip
    if isinstance(entry, TunedProposal):
        adam = entry.curvature == "adam"
        tuned = tune_proposal(
            key, *question, **options,
            curvature=second_moments(task.opt_state, task.params) if adam else known.diagonal(),
            eigenpairs=known.pairs(entry.rank), exponents=entry.exponents, num_pilot_rays=entry.num_pilot_rays,
        )  # fmt: skip
        candidates = ("beta", "exponent", "damping", "shift", "mean_log_weight", "std_error")
        sweep = {name: np.asarray(getattr(tuned.sweep, name)) for name in candidates}
        return tuned.estimate, {name: float(value) for name, value in tuned.choice.items()}, sweep
    dense = isinstance(entry, DenseGGNProposal)
    proposal = build_proposal(
        entry, task, setting.prior,
        known.diagonal() if isinstance(entry, DiagonalGGNProposal) else None,
        curvature.dense_ggn(task.apply_fn, task.params, task.inputs) if dense else None,
        cutoff=cutoff,
    )  # fmt: skip
    # The draws of the tuned rows' fresh rays, so that rows differ by their proposals alone.
    return ray_volume(fresh_key(key), *question, proposal=proposal, **options), {}, {}
