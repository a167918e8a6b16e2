"""A series of learning coefficients: deep linear networks at one or two temperatures, beside their exact values."""

import dataclasses
import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from volumejax import reference, tree
from volumejax.chains import LearningCoefficient
from volumejax.config import DeepLinearNetwork, LearningConfig
from volumejax.experiment import OnProgress, Progress
from volumejax.learning import Hamiltonian, learning_coefficient
from volumejax.priors import Gaussian
from volumejax.records import LEARNING, Row

__all__ = ["LearningSetting", "prepare_learning", "run_learning"]


@dataclasses.dataclass(frozen=True)
class LearningSetting:
    """The question with its numbers filled in.

    Attributes:
        config: what was asked for.
        seconds: wall time by stage; there are none before the chains.
    """

    config: LearningConfig
    seconds: dict[str, float]

    @property
    def num_rows(self) -> int:
        """Rows of the finished series."""
        return len(self.config.task.networks)

    def facts(self) -> dict[str, float | int | str]:
        """What a report says about the prior."""
        return {"sigma": self.config.prior.sigma}


def prepare_learning(config: LearningConfig) -> LearningSetting:
    """Return the setting for `run_learning`; nothing has to be trained."""
    return LearningSetting(config, {})


def run_learning(setting: LearningSetting, on_progress: OnProgress) -> Iterator[Row]:
    """Measure the learning coefficient of every network, and join two temperatures where m > 1.

    Args:
        setting: from `prepare_learning`.
        on_progress: called before and after every row.

    Yields:
        A row as soon as it is finished; on KeyboardInterrupt nothing more.
    """
    for network in setting.config.task.networks:
        began = time.perf_counter()
        on_progress(Progress(network.name, 0, 1, 0.0))
        try:
            row = _measure(network, setting.config)
        except KeyboardInterrupt:
            return
        seconds = time.perf_counter() - began
        on_progress(Progress(network.name, 1, 1, seconds))
        yield row.model_copy(update={"seconds": seconds})


def _measure(network: DeepLinearNetwork, config: LearningConfig) -> Row:
    problem = reference.deep_linear(network.widths, network.rank)
    sampler = Hamiltonian(num_chains=config.num_chains, num_draws=config.num_draws)
    found: list[LearningCoefficient] = [
        learning_coefficient(
            jax.random.key(2 * config.seed + i), problem.cost, problem.params, Gaussian(config.prior.sigma),
            beta=beta, sampler=sampler,
        )
        for i, beta in enumerate(sorted(config.betas))
    ]  # fmt: skip
    coldest = found[-1]
    quoted = coldest.without_logarithm(found[0]) if problem.multiplicity > 1 and len(found) > 1 else coldest
    estimate = {
        **coldest.to_dict(),
        "hot_value": float(found[0].value) if len(found) > 1 else math.nan,
        "hot_std_error": float(found[0].std_error) if len(found) > 1 else math.nan,
        "hot_status": found[0].status,
        "quoted_value": float(quoted.value),
        "quoted_std_error": float(quoted.std_error),
        "max_r_hat": max(float(np.asarray(x.r_hat)) for x in found),
        "learning_coefficient": problem.learning_coefficient,
        "multiplicity": problem.multiplicity,
        "half_dimension": 0.5 * tree.size(problem.params),
    }
    return Row(
        label=network.name,
        kind=LEARNING,
        seconds=0.0,
        estimate=estimate,
        chains={f"costs_{i}": np.asarray(x.costs) for i, x in enumerate(found)},
    )
