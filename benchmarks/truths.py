"""What chains say of problems whose answer is known: a row for each, over some seeds.

Run as ``python benchmarks/truths.py``; ``--only`` takes a pattern, ``--effort`` scales the work. Of each row the error
over SE of every seed, the largest SE and what is asked of it, how far bounds lie below the truth, and the longest run.
"""

import argparse
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np

import volumejax as vj
from volumejax import reference
from volumejax.results import Kind


class Truth(NamedTuple):
    """A question to chains and its answer."""

    name: str
    problem: reference.Reference
    region: Any
    prior: Any
    log_mass: float


def of(letter: str, problem: reference.Reference, *, label: str = "", star: bool = False, prior: Any = None) -> Truth:
    """Return the question for all of the region or its star, under its own prior or a flat one that holds all of it."""
    truth = problem.star_log_mass if star else problem.log_mass
    if prior is not None:
        label, truth = type(prior).__name__, truth + float(prior.log_density(problem.params))
    what = [letter, problem.name, f"ε = {problem.cutoff:g}", label, "star" if star else ""]
    region = vj.Star() if star else vj.Connected()
    return Truth(", ".join(part for part in what if part), problem, region, prior or problem.prior, truth)


def rows() -> list[Truth]:
    falling, spread, few = 1.0 / np.arange(1, 21), np.logspace(-3, 2, 100), np.append(np.ones(5), np.zeros(45))
    four, deep = np.array([1.0, 4.0, 0.5, 2.0]), (1e-2, 1e-4, 1e-6)
    powers, sizes = ((1, 1), (1, 2), (2, 2), (1, 1, 1)), ((1, 1), (3, 5), (20, 20), (50, 10))
    box, ball = vj.UniformBox(-5.0, 5.0), vj.UniformBall(5.0)
    return [
        of("A", reference.quadratic(np.ones(10), cutoff=0.01)),
        *(of("A", reference.quadratic(falling, cutoff=e), label="h = 1/i") for e in (1e-3, 1e-2, 1e-1, 1.0)),
        *(of("A", reference.quadratic(few, cutoff=e), label="rank 5") for e in deep),
        of("A", reference.quadratic(spread, cutoff=0.01), label="five decades"),
        of("A", reference.quadratic(spread, cutoff=0.01, sigma=0.3, minimum=0.2), label="σ = 0.3, a = 0.2"),
        of("A", reference.quadratic(falling, cutoff=0.1, sigma=2.0, minimum=1.0), label="σ = 2, a = 1"),
        of("A", reference.quadratic(np.ones(1000), cutoff=0.5)),
        *(of("B", reference.ellipsoid(h, cutoff=0.01), prior=prior) for h in (four, spread) for prior in (box, ball)),
        of("B", reference.ellipsoid(np.ones(1000), cutoff=0.01), prior=vj.UniformBox(-1.0, 1.0)),
        *(of("C", reference.normal_crossing(k, cutoff=e, gaussian=True), label="Gaussian")
          for k in powers for e in deep),
        *(of("C", reference.normal_crossing(k, cutoff=e), label="uniform") for k in powers for e in deep[::2]),
        *(of("D", reference.rank_one(*size, cutoff=e)) for size in ((3, 5), (4, 4)) for e in deep),
        *(of("E", reference.tanh_neuron(*size, cutoff=e)) for size in sizes for e in deep),
        *(of("H", reference.shell(d, cutoff=1e-2), star=star) for d in (3, 10) for star in (False, True)),
        *(of("H", reference.shell(d, cutoff=1e-2, gaussian=True), label="Gaussian", star=star)
          for d in (3, 10) for star in (False, True)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the rows those that this matches")
    arguments = parser.parse_args()
    print("| problem | exact | error/SE | SE | allowed | bound below the truth by | status | s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in (row for row in rows() if re.search(arguments.only, row.name)):
        made, took = [], []
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            began = time.perf_counter()
            made.append(
                vj.tether_volume(
                    jax.random.key(seed), row.problem.cost, row.problem.params, row.prior, cutoff=row.problem.cutoff,
                    region=row.region, effort=arguments.effort,
                )
            )  # fmt: skip
            took.append(time.perf_counter() - began)
        errors = [(float(e.log_mass) - row.log_mass) / float(e.std_error) for e in made]
        cells = (
            row.name, f"{row.log_mass:.4f}", ", ".join(f"{error:.2f}" for error in errors),
            f"{max(float(e.std_error) for e in made):.2g}", f"{max(0.5, 0.005 * abs(row.log_mass)):.2g}",
            ", ".join(f"{row.log_mass - float(e.lower):.1f}" for e in made),
            ", ".join("ok" if e.kind == Kind.ESTIMATE else "not mixed" for e in made), f"{max(took):.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
