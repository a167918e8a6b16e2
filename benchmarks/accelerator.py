"""What an accelerator does with rays and chains: time against lanes, beside the plain batched work, and its rounding.

    python benchmarks/accelerator.py [--rays 2048] [--repeats 3]

Rays: `ray_volume` inside `jit` on two networks, beside the floor, the time of as many batched forward passes as it
executes. Chains: one leapfrog step of the tether's kernel on digits, beside one batched gradient. Rounding: matrix
products run at the accelerator's default precision unless the caller asks for more, which moves the boundary.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from probe import CUTOFF as PROBE_CUTOFF
from probe import SIZES
from probe import behaviour as probe_behaviour
from probe import make_params as probe_params
from rays import batched, clock, clock_many, num_batches
from rich.console import Console
from rich.table import Table

import volumejax as vj
from volumejax import tree
from volumejax.ensemble import Ensemble, Rung
from volumejax.frames import frame_of
from volumejax.kernels import hmc
from volumejax.metric import plain_metric
from volumejax.tasks.digits import digits_task

CONSOLE = Console(width=120)
STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rays", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lanes", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--chains", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    options = parser.parse_args()
    task = digits_task()
    inputs = jax.random.normal(jax.random.key(0), (256, SIZES[0]))
    large = probe_params(jax.random.key(0))
    questions = {
        "digits": (task.cost, task.params, vj.Gaussian(1.3975), 1e-2),
        "million": (probe_behaviour(large, inputs), large, vj.Gaussian(0.05), PROBE_CUTOFF),
    }
    trace_rays(questions, options)
    take_steps(questions["digits"], options)
    # The task's own network asks for full precision, whatever the caller says.
    cost = vj.kl_to_anchor(plain_apply, task.params, task.inputs)
    compare_rounding((cost, *questions["digits"][1:]))


def trace_rays(questions: dict[str, tuple], options: argparse.Namespace) -> None:
    """Print the time of rays against the number of lanes."""
    columns = ("network", "D", "lanes", "rays/s", "wall/floor", "masked", "MiB", "compile s")
    table = make_table("Rays", columns)
    for name, (cost, params, prior, cutoff) in questions.items():
        for lanes in options.lanes:
            run = functools.partial(
                vj.ray_volume, cost=cost, params=params, prior=prior, cutoff=cutoff, num_rays=options.rays,
                batch_size=lanes,
            )  # fmt: skip
            began = time.perf_counter()
            compiled = jax.jit(run).lower(jax.random.key(0)).compile()
            compiling = time.perf_counter() - began
            forward = batched(cost, params, lanes)
            walls, ratios = [], []
            for seed in range(options.repeats + 1):
                wall, estimate = clock(compiled, jax.random.key(seed))
                trace = jax.tree.map(np.asarray, estimate.trace)
                walls.append(wall)
                ratios.append(wall / clock_many(forward, num_batches(estimate, lanes)))
            masked = 1.0 - trace.evaluations.mean() / trace.executed.mean()
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
            table.add_row(
                name, f"{tree.size(params):,}", str(lanes), f"{options.rays / statistics.median(walls[1:]):,.0f}",
                f"{statistics.median(ratios[1:]):.2f}", f"{100 * masked:.0f} %", f"{memory:.0f}", f"{compiling:.0f}",
            )  # fmt: skip
    CONSOLE.print(table)


def take_steps(question: tuple, options: argparse.Namespace) -> None:
    """Print the time of a leapfrog step of all chains against their number, and that of the gradient alone."""
    cost, params, prior, cutoff = question
    with jax.enable_x64(True):
        ensemble = Ensemble(
            cost=cost, frame=frame_of(prior, params), cutoff=jnp.float64(cutoff), region=vj.Connected(),
            callers_x64=False,
        )  # fmt: skip
        leaves = len(jax.tree.leaves(params))
        rung = Rung(
            precision=jnp.float64(1e6), beta=jnp.float64(1e3), masses=jnp.full(leaves, 1e6, jnp.float64),
            step_size=jnp.float64(0.05), spread=jnp.float64(0.0), num_steps=np.int32(STEPS), num_moves=np.int32(1),
            stretch=jnp.zeros(2 * leaves, jnp.float64),
        )  # fmt: skip
    metric = plain_metric(params, turns=True)
    init, step = hmc(ensemble, rung, metric)

    @jax.jit
    def trajectories(key: Any, positions: Any) -> Any:
        return jax.vmap(step)(jax.random.split(key, len(positions.cost)), positions)[0]

    columns = ("chains", "µs/step", "µs/gradient and chain", "gradients/s", "step/floor")
    table = make_table(f"Chains on digits, trajectories of {STEPS} steps", columns)
    for chains in options.chains:
        noise = jax.vmap(lambda k: tree.normal_like(k, params))(jax.random.split(jax.random.key(1), chains))
        positions = jax.jit(jax.vmap(init))(jax.tree.map(lambda z: 1e-3 * z, noise))
        gradient = batched(jax.grad(cost), params, chains)
        seconds, floors = [], []
        for seed in range(options.repeats + 1):
            seconds.append(clock(trajectories, jax.random.key(seed), positions)[0] / (STEPS + 1))
            floors.append(clock_many(gradient, 50) / 50)
        each, floor = (statistics.median(values[1:]) for values in (seconds, floors))
        table.add_row(
            str(chains), f"{1e6 * each:,.0f}", f"{1e6 * each / chains:,.1f}", f"{chains / each:,.0f}",
            f"{each / floor:.2f}",
        )  # fmt: skip
    CONSOLE.print(table)


def compare_rounding(question: tuple) -> None:
    """Print what the precision of matrix products does to the log masses of the same 256 rays."""
    table = make_table("The same rays at two precisions of matrix products", ("precision", "mean log weight", "noise"))
    weights = []
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(precision):
            cost, params, prior, cutoff = question
            made = vj.ray_volume(jax.random.key(0), cost, params, prior, cutoff=cutoff, num_rays=256)
        weights.append(np.asarray(made.trace.log_weight))
        table.add_row(precision, f"{made.mean_log_weight:.2f}", f"{made.noise:.3f}")
    CONSOLE.print(table)
    off = np.abs(weights[0] - weights[1])
    CONSOLE.print(f"difference of a ray's log weight: median {np.median(off):.3f}, largest {off.max():.3f} nats")


def plain_apply(params: Any, inputs: jax.Array) -> jax.Array:
    """Return the logits of the digits network, in the precision that the caller asks for."""
    first, last = (params["layers"][i] for i in (0, 1))
    hidden = jax.nn.gelu(inputs @ first["kernel"] + first["bias"], approximate=True)
    return hidden @ last["kernel"] + last["bias"]


def make_table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=f"{title}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    main()
