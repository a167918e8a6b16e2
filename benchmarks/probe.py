"""What the volume probe adds to a training step: 64 rays every 100 steps on a network of a million parameters.

    python benchmarks/probe.py [--rays 64] [--lanes 8] [--examples 256] [--repeats 3] [--adam]

The probe runs inside the jitted train step. Its time is that of a step with a probe less that of one without. The
floor is the time of the work that it executes, measured apart and in turn: every evaluation that ran, idle lanes
included, as a plain batched forward pass on parameters that are there already, and every direction drawn as such. On a
machine that others use too, trust the ratio in CPU time.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import volumejax as vj
from volumejax import tree

SIZES = (784, 700, 640, 10)
DIMENSION = sum(a * b + b for a, b in itertools.pairwise(SIZES))
EVERY = 100
CUTOFF = 1e-2
NUM_SCOUTS = 8


class Work(NamedTuple):
    """What one probe runs, in lanes: evaluations that its rays need, those that run, and directions drawn."""

    needed: float
    executed: float
    drawn: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rays", type=int, default=64)
    parser.add_argument("--lanes", type=int, nargs="+", default=[8])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adam", action="store_true", help="propose from Adam's moments instead of isotropically")
    options = parser.parse_args()
    table = Table(
        title=f"{DIMENSION:,} parameters, {options.examples} examples, "
        f"{options.rays} rays every {EVERY} steps, {jax.devices()[0].device_kind}"
    )
    for column in ("proposal", "lanes", "needed", "executed", "drawn", "step ms", "probe s", "forward ms", "draw ms",
                   "probe/floor", "in CPU time", "probe/step"):  # fmt: skip
        table.add_column(column, justify="left" if column == "proposal" else "right")
    proposal = functools.partial(vj.adam_proposal, beta=1e4) if options.adam else vj.Isotropic()
    for lanes in options.lanes:
        table.add_row("Adam" if options.adam else "isotropic", str(lanes), *measure(proposal, lanes, options))
    Console(width=140).print(table)


def measure(proposal: Any, lanes: int, options: argparse.Namespace) -> list[str]:
    """Return one row of the table."""
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (options.examples, SIZES[0]))
    labels = jax.random.randint(key, (options.examples,), 0, SIZES[-1])
    optimizer = optax.adam(1e-3)
    probe = vj.VolumeProbe(
        behaviour, vj.Gaussian(0.05), CUTOFF, every=EVERY, proposal=proposal, num_rays=options.rays, batch_size=lanes
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, count: jax.Array) -> tuple[Any, Any, dict]:
        gradient = jax.grad(
            lambda p: optax.softmax_cross_entropy_with_integer_labels(apply_fn(p, inputs), labels).mean()
        )(params)
        metrics = probe(key, count, params, inputs, state)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, metrics

    params = make_params(key)
    state = optimizer.init(params)
    for i in range(1, 21):
        params, state, _ = step(params, state, jnp.int32(i))
    work = count_work(probe, key, params, inputs, state, lanes)
    forward, draw = forward_pass(inputs, params, lanes), drawing(params, lanes)
    batches = min(round(work.executed / lanes), 16)
    rows = []
    for _ in range(options.repeats + 1):
        copies = jax.block_until_ready([jax.tree.map(jnp.copy, (params, state)) for _ in range(11)])
        with_probe = clock(lambda both=copies[0]: step(*both, jnp.int32(0)))
        without = clock(lambda others=copies[1:]: [step(*both, jnp.int32(1)) for both in others]) / 10
        forwards = clock(lambda: [jax.block_until_ready(forward()) for _ in range(batches)]) / batches / lanes
        draws = clock(lambda: [jax.block_until_ready(draw()) for _ in range(4)]) / 4 / lanes
        rows.append((with_probe - without, without, forwards, draws))
    times = np.array(rows[1:])
    probe_time, step_time, forward_time, draw_time = np.median(times[..., 0], axis=0)
    ratios = times[:, 0] / (work.executed * times[:, 2] + work.drawn * times[:, 3])
    return [
        f"{work.needed:.0f}", f"{work.executed:.0f}", f"{work.drawn:.0f}", f"{1e3 * step_time:.1f}",
        f"{probe_time:.2f}", f"{1e3 * forward_time:.2f}", f"{1e3 * draw_time:.2f}",
        *(f"{np.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios.T), f"{probe_time / EVERY / step_time:.2f}",
    ]  # fmt: skip


def count_work(probe: vj.VolumeProbe, key: Any, params: Any, inputs: Any, state: Any, lanes: int) -> Work:
    """Count one probe's work, from the same rays."""
    proposal = probe.proposal
    if not hasattr(proposal, "draw"):
        proposal = proposal(state, params, probe.prior)
    estimate = vj.ray_volume(
        jax.random.fold_in(key, 0), behaviour(params, inputs), params, probe.prior,
        cutoff=CUTOFF, proposal=proposal, num_rays=probe.num_rays, batch_size=lanes,
    )  # fmt: skip
    trace = cast(vj.RayBatch, estimate.trace)
    chunks = -(-probe.num_rays // lanes)
    audits = -(-int(trace.audited.sum()) // lanes)
    scouts = -(-NUM_SCOUTS // lanes)
    # Of the scouts only the sum is known; their slowest, which all lanes wait for, takes at least the mean.
    batches = (
        trace.executed[::lanes].sum()
        + audits * trace.audit_evaluations.max()
        + scouts * estimate.scout_evaluations / NUM_SCOUTS
    )
    return Work(estimate.evaluations, float(batches) * lanes, lanes * (chunks + audits + 2 * scouts))


def apply_fn(params: Any, inputs: jax.Array) -> jax.Array:
    """Return the logits."""
    for layer in params[:-1]:
        inputs = jax.nn.gelu(inputs @ layer["w"] + layer["b"])
    return inputs @ params[-1]["w"] + params[-1]["b"]


def behaviour(anchor: Any, inputs: jax.Array) -> Callable:
    """Return the KL divergence from the anchor."""
    return vj.kl_to_anchor(apply_fn, anchor, inputs)


def make_params(key: Any) -> list:
    """Draw the network."""
    shapes = list(itertools.pairwise(SIZES))
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def forward_pass(inputs: Any, params: Any, lanes: int) -> Callable[[], Any]:
    """Return the cost on a batch of parameters, compiled."""
    stacked = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(jax.random.key(9), (lanes, *x.shape)), params)
    compiled = jax.jit(jax.vmap(behaviour(params, inputs))).lower(stacked).compile()
    return lambda: compiled(stacked)


def drawing(params: Any, lanes: int) -> Callable[[], Any]:
    """Return the drawing of a batch of directions, compiled."""
    keys = jax.random.split(jax.random.key(9), lanes)
    compiled = jax.jit(jax.vmap(lambda key: tree.normal_like(key, params))).lower(keys).compile()
    return lambda: compiled(keys)


def clock(function: Callable[[], Any]) -> np.ndarray:
    """Return the seconds that a call takes, on the wall and on the processors together."""
    start = np.array([time.perf_counter(), time.process_time()])
    jax.block_until_ready(function())
    return np.array([time.perf_counter(), time.process_time()]) - start


if __name__ == "__main__":
    main()
