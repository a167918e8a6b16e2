"""What the tether costs: standard error, gap of the lower bound and hysteresis against gradients and seconds.

Run with a list of problems, e.g. ``python benchmarks/tether.py reference digits``; ``--effort`` scales the work.
``calibration`` takes 200 seeds of three cheap problems instead and says how well their errors and bounds hold, ``gain``
eight seeds of three problems and says what escorts and Bennett's ratio save against integration along the ladder.
``mnist`` needs ``--mnist FOLDER`` with the IDX files of the training images and labels, packed with gzip or not.
"""

import argparse
import gzip
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import volumejax as vj
from volumejax import reference, tree
from volumejax.models.mlp import mlp_apply, mlp_params
from volumejax.parallel import local_mesh_for_both, use_every_core
from volumejax.tasks.digits import digits_task
from volumejax.tether import default_num_chains


class Job(NamedTuple):
    """A question, and its answer where it is known."""

    name: str
    cost: Callable
    params: object
    prior: object
    cutoff: float
    region: object
    truth: float | None


def of_reference(problem: reference.Reference) -> Job:
    return Job(
        problem.name, problem.cost, problem.params, problem.prior, problem.cutoff, vj.Connected(), problem.log_mass
    )


def read_idx(path: Path) -> np.ndarray:
    raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def mnist(folder: str) -> Job:
    """A 784-256-10 network of 203,530 parameters, trained on 512 images; the prior has the scale of its start."""
    images, labels = (
        read_idx(next(path for path in sorted(Path(folder).iterdir()) if f"train-{what}" in path.name))[:512]
        for what in ("images", "labels")
    )
    inputs, labels = jnp.asarray(images.reshape(512, -1) / 255.0, jnp.float32), jnp.asarray(labels, jnp.int32)
    features = (784, 256, 10)
    apply_fn, start = mlp_apply(features), mlp_params(features, jax.random.key(0))
    optimizer = optax.adam(1e-3)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry

            def loss(p):
                return optax.softmax_cross_entropy_with_integer_labels(apply_fn(p, inputs), labels).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=300)[0][0]

    params = train(start)
    wrong = float(vj.error_rate(apply_fn, inputs, labels)(params))
    sigma = float(np.sqrt(np.mean(np.concatenate([np.ravel(x) ** 2 for x in jax.tree.leaves(start)]))))
    print(f"MNIST: training error {wrong:.3f}, prior σ = {sigma:.4f}")
    return Job(
        "MNIST", vj.kl_to_anchor(apply_fn, params, inputs), params, vj.Gaussian(sigma), 1e-2, vj.Connected(), None
    )


def jobs(name: str, folder: str | None) -> list[Job]:
    if name == "reference":
        return [
            of_reference(reference.quadratic(np.ones(1000), cutoff=0.5)),
            of_reference(reference.tanh_neuron(3, 5, cutoff=1e-4)),
            of_reference(reference.shell(3, cutoff=1e-2)),
        ]
    if name == "large":
        return [of_reference(reference.quadratic(np.ones(d), cutoff=25.0)) for d in (10_000, 100_000, 1_000_000)]
    if name == "neuron":
        return [of_reference(reference.tanh_neuron(2400, 2410, cutoff=1e-2))]
    if name == "digits":
        task = digits_task()
        return [
            Job(
                f"digits, σ = {sigma:.3g}, {region.name}",
                task.cost,
                task.params,
                vj.Gaussian(sigma),
                1e-2,
                region,
                None,
            )
            for sigma in (task.rms, 1.3975)
            for region in (vj.Star(), vj.Connected())
        ]
    if name == "mnist":
        if folder is None:
            raise SystemExit("mnist needs --mnist FOLDER, where the IDX files are")
        return [mnist(folder)]
    raise SystemExit(
        f"unknown problem {name!r}; choose from calibration, gain, reference, large, neuron, digits, mnist"
    )


def runs(problem: reference.Reference, num_seeds: int, **options: Any) -> list[vj.VolumeEstimate]:
    return [
        vj.tether_volume(
            jax.random.key(seed), problem.cost, problem.params, problem.prior, cutoff=problem.cutoff, **options
        )
        for seed in range(num_seeds)
    ]


def calibrate(chains: int | None, num_seeds: int = 200) -> None:
    """Print how estimates scatter against their errors, and how often the bound lies above the truth."""
    print("| problem | seeds | rms of (estimate − truth)/SE | mean | bound violated | other kinds | SE | s each |")
    print("|---|---|---|---|---|---|---|---|")
    for problem, effort in (
        (reference.quadratic(np.ones(4), cutoff=0.05), 0.01),
        (reference.tanh_neuron(1, 1, cutoff=1e-2), 0.01),
        (reference.rank_one(3, 5, cutoff=1e-2), 0.02),
    ):
        began = time.perf_counter()
        made = runs(problem, num_seeds, effort=effort, decades=0.5, num_chains=chains)
        seconds = (time.perf_counter() - began) / num_seeds
        claimed = [e for e in made if e.kind == vj.Kind.ESTIMATE]
        off = np.array([(e.log_mass - problem.log_mass) / e.std_error for e in claimed])
        violated = np.mean([e.lower > problem.log_mass for e in made])
        error = np.median([e.std_error for e in claimed])
        cells = (
            problem.name, f"{num_seeds}", f"{np.sqrt(np.mean(off**2)):.2f}", f"{np.mean(off):+.2f}", f"{violated:.3f}",
            f"{num_seeds - len(claimed)}", f"{error:.2f}", f"{seconds:.1f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def compare(chains: int | None, num_seeds: int = 8) -> None:
    """Print root mean square errors of three readings of the same runs, and how far the bound lies below the truth."""
    print("| problem | escort | Bennett's ratio | integrated | with the virial | bound below the truth | not mixed |")
    print("|---|---|---|---|---|---|---|")
    for problem, effort in (
        (reference.quadratic(np.ones(1000), cutoff=0.5), 0.05),
        (reference.quadratic(1 / np.arange(1, 101), cutoff=1e-3), 0.03),
        (reference.tanh_neuron(3, 5, cutoff=1e-4), 0.03),
    ):
        for escort in (1.0, 0.0):
            made = runs(problem, num_seeds, effort=effort, escort=escort, decades=0.0, num_chains=chains)
            off = np.array([(e.log_mass, e.trace.integrated, e.trace.integrated_virial) for e in made], float)
            errors = np.sqrt(np.mean((off - problem.log_mass) ** 2, axis=0))
            below = np.mean([problem.log_mass - e.lower for e in made])
            cells = (problem.name, f"{escort:g}", *(f"{x:.2f}" for x in (*errors, below)),
                     f"{sum(e.kind != vj.Kind.ESTIMATE for e in made)} of {num_seeds}")  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


STUDIES = {"calibration": calibrate, "gain": compare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="+")
    parser.add_argument("--effort", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, help="of each pass; by default as many as the library chooses")
    parser.add_argument("--beta-factor", type=float, default=1.0, help="multiplies the automatic inverse temperature")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="of the problems those that this matches: 'D=10000$'"
    )
    parser.add_argument("--escort", type=float, nargs="+", default=[1.0], help="0 for plain weights")
    parser.add_argument(
        "--decades", type=float, default=2.0, help="that the curve reaches below the cutoff; 0 for none"
    )
    parser.add_argument("--mnist", metavar="FOLDER", help="where the IDX files are")
    arguments = parser.parse_args()
    # As the command-line program does: each core is a device, over which chains are spread.
    use_every_core()
    for name, study in STUDIES.items():
        if name in arguments.problems:
            study(arguments.chains)
    problems = [name for name in arguments.problems if name not in STUDIES]
    if not problems:
        return
    print(
        "| problem | effort | escort | log mass | lower | cooling | heating | integrated | kind | gradients | s | off |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    chosen = [job for name in problems for job in jobs(name, arguments.mnist) if re.search(arguments.only, job.name)]
    for job in chosen:
        chains = arguments.chains or default_num_chains(tree.size(job.params))
        for effort in arguments.effort:
            for escort in arguments.escort:
                began = time.perf_counter()
                made = vj.tether_volume(
                    jax.random.key(arguments.seed), job.cost, job.params, job.prior,
                    cutoff=job.cutoff, region=job.region, effort=effort, escort=escort, num_chains=chains,
                    beta_factor=arguments.beta_factor, decades=arguments.decades, mesh=local_mesh_for_both(chains),
                )  # fmt: skip
                off = "" if job.truth is None else f"{float(made.log_mass) - job.truth:+.2f}"
                cells = (
                    job.name, f"{effort:g}", f"{escort:g}", f"{float(made.log_mass):.2f} ± {float(made.std_error):.2g}",
                    f"{float(made.lower):.2f}", f"{made.hysteresis[0]:.2f}", f"{made.hysteresis[1]:.2f}",
                    f"{float(made.trace.integrated):.2f}", vj.Kind(int(made.kind)).name.lower(),
                    f"{made.trace.num_chains} × {int(made.trace.gradients):,}", f"{time.perf_counter() - began:.0f}",
                    off,
                )  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
