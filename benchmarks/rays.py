"""What a ray costs: evaluations, time over the bare forward pass, memory; beside the field's plain bisection.

    python benchmarks/rays.py [--rays 512] [--repeats 3]

Evaluations are counted per ray, the audit and the scouts apart. A lane that has found its crossing waits for the
slowest of its batch: "executed" counts what ran meanwhile, "masked" is its share. The floor is the time of the same
number of batched forward passes with nothing around them; wall over floor is measured with floor and run taken in turn.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import volumejax as vj
from volumejax.parallel import default_batch_size
from volumejax.tasks.digits import digits_task

CUTOFF = 1e-2
TOLERANCE = 0.1
DIMENSION = 4810
PRIOR = vj.Gaussian(1.3975)


class Row(NamedTuple):
    """One line of the table; times in seconds."""

    name: str
    median: float
    needed: float
    executed: float
    other: float
    seconds: float
    floor: float
    megabytes: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rays", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    task = digits_task(0)
    lanes = default_batch_size(ravel_pytree(task.params)[0].size)
    curvature = vj.diagonal_ggn(task.apply_fn, task.params, task.inputs)
    proposals = {
        "isotropic": vj.Isotropic(),
        "Adam, damping 1e-3": vj.damped_proposal(
            vj.second_moments(task.opt_state, task.params), task.params, damping=1e-3
        ),
        "diagonal GGN, β = 2e4": vj.curvature_proposal(curvature, task.params, PRIOR, beta=2e4, shift=False),
    }
    rows = [
        measure_rays(name, task, proposal, options.rays, options.repeats, lanes) for name, proposal in proposals.items()
    ]
    rows += [
        measure_bisection("bisection, |C/ε − 1| ≤ 1 %", task, within_one_percent, options, lanes),
        measure_bisection("bisection, 0.1 nat", task, within_tolerance, options, lanes),
    ]
    show(rows, options.rays, lanes)


def measure_rays(name: str, task: Any, proposal: Any, num_rays: int, repeats: int, lanes: int) -> Row:
    """Time `ray_volume` against its floor."""

    def run(key: jax.Array) -> vj.VolumeEstimate:
        return vj.ray_volume(
            key, task.cost, task.params, PRIOR, cutoff=CUTOFF, proposal=proposal, num_rays=num_rays,
            tolerance=TOLERANCE, batch_size=lanes,
        )  # fmt: skip

    compiled = jax.jit(run).lower(jax.random.key(0)).compile()
    forward = batched(task.cost, task.params, lanes)
    walls, floors = [], []
    for seed in range(repeats + 1):
        wall, estimate = clock(compiled, jax.random.key(seed))
        trace = jax.tree.map(np.asarray, estimate.trace)
        walls.append(wall)
        floors.append(clock_many(forward, num_batches(estimate, lanes)))
    other = float(trace.audit_evaluations.sum() + estimate.scout_evaluations) / num_rays
    ratio = np.median(np.divide(walls, floors)[1:])
    seconds = float(np.median(walls[1:]))
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    counts = trace.evaluations
    return Row(name, np.median(counts), counts.mean(), trace.executed.mean(), other, seconds, seconds / ratio, memory)


def measure_bisection(name: str, task: Any, settled: Callable, options: argparse.Namespace, lanes: int) -> Row:
    """Time the plain search: start at r = 1, double until outside, bisect until settled."""
    params, unravel = ravel_pytree(task.params)

    def one(key: jax.Array) -> jax.Array:
        y = jax.random.normal(key, params.shape)
        u = y / jnp.linalg.norm(y)

        def step(state: tuple) -> tuple:
            r, low, high, _, count = state
            ratio = task.cost(unravel(params + r * u)) / CUTOFF
            low, high = jnp.where(ratio <= 1, r, low), jnp.where(ratio > 1, r, high)
            guess = jnp.where(jnp.isinf(high), 2 * r, 0.5 * (low + high))
            return guess, low, high, ratio, count + 1

        def open_(state: tuple) -> jax.Array:
            _, low, high, ratio, count = state
            return ~(jnp.isfinite(high) & (low > 0) & settled(low, high, ratio)) & (count < 100)

        start = (jnp.float32(1), jnp.float32(0), jnp.float32(jnp.inf), jnp.float32(0), jnp.int32(0))
        return jax.lax.while_loop(open_, step, start)[-1]

    def run(key: jax.Array) -> jax.Array:
        return jax.lax.map(one, jax.random.split(key, options.rays), batch_size=lanes)

    compiled = jax.jit(run).lower(jax.random.key(0)).compile()
    forward = batched(task.cost, task.params, lanes)
    walls, floors = [], []
    for seed in range(options.repeats + 1):
        wall, counts = clock(compiled, jax.random.key(seed))
        executed = np.maximum.reduceat(np.asarray(counts), np.arange(0, options.rays, lanes))
        walls.append(wall)
        floors.append(clock_many(forward, int(executed.sum())))
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    seconds = float(np.median(walls[1:]))
    ratio = np.median(np.divide(walls, floors)[1:])
    return Row(name, np.median(counts), counts.mean(), executed.mean(), 0.0, seconds, seconds / ratio, memory)


def within_one_percent(low: jax.Array, high: jax.Array, ratio: jax.Array) -> jax.Array:
    """The field's stopping rule, on the cost."""
    del low, high
    return jnp.abs(ratio - 1) <= 0.01


def within_tolerance(low: jax.Array, high: jax.Array, ratio: jax.Array) -> jax.Array:
    """Our stopping rule, on the volume."""
    del ratio
    return DIMENSION * jnp.log(high / low) <= TOLERANCE


def num_batches(estimate: vj.VolumeEstimate, lanes: int) -> int:
    """Return how many batched forward passes the rays, their audit and their scouts took."""
    trace = jax.tree.map(np.asarray, estimate.trace)
    audits = -(-int(trace.audited.sum()) // lanes)
    rays = trace.executed[::lanes].sum() + trace.audit_evaluations.max() * audits
    return int(rays + estimate.scout_evaluations / 8)


def batched(function: Callable, params: Any, lanes: int) -> Callable[[], Any]:
    """Return `function` over parameters that are there already, compiled."""
    stacked = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(jax.random.key(9), (lanes, *x.shape)), params)
    compiled = jax.jit(jax.vmap(function)).lower(stacked).compile()
    return lambda: compiled(stacked)


def clock(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Return seconds and result."""
    start = time.perf_counter()
    out = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, out


def clock_many(function: Callable, times: int) -> float:
    """Return the seconds that `times` calls take, one after the other."""
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(function())
    return time.perf_counter() - start


def show(rows: list[Row], num_rays: int, lanes: int) -> None:
    """Print the table."""
    table = Table(
        title=f"digits, D = 4,810, {num_rays} rays, {lanes} lanes, cutoff {CUTOFF} nats, {jax.devices()[0].device_kind}"
    )
    for column in (
        "search",
        "median",
        "evals/ray",
        "executed",
        "masked",
        "audit+scouts",
        "ms/ray",
        "wall/floor",
        "MiB",
    ):
        table.add_column(column, justify="left" if column == "search" else "right")
    for row in rows:
        masked = 1 - row.needed / row.executed
        table.add_row(
            row.name, f"{row.median:.0f}", f"{row.needed:.2f}", f"{row.executed:.2f}", f"{100 * masked:.0f} %",
            f"{row.other:.2f}", f"{1e3 * row.seconds / num_rays:.2f}", f"{row.seconds / row.floor:.2f}",
            f"{row.megabytes:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
