"""Which chains learn most from a gradient: the tether's own moves beside blackjax's adjusted MCLMC and plain masses.

    python benchmarks/kernels.py [--gradients 12000] [--sigma rms]

Four chains start where the pilot's chains ended, on the last rung of the digits network (connected region, κ = 0),
where most of a run's time goes. Masses and lengths of trajectories are the library's, and others. Friction is the
squared standard error of ½|δ|², the integrand of the free energy, times the gradients spent: the less, the more a
gradient tells. MCLMC runs in the same turned and scaled coordinates, at the acceptance that its authors advise, 0.9,
and without the wall, which chains at this β seldom meet.

Reference: Robnik, De Luca, Silverstein & Seljak 2023 (JMLR 24), and Metropolis-adjusted Microcanonical HMC, 2025.
"""

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import volumejax as vj
from volumejax import tree
from volumejax.diagnostics import chain_mean
from volumejax.ensemble import FIELDS, Ensemble, Position, Rung, ensemble_of
from volumejax.frames import frame_of
from volumejax.kernels import hmc
from volumejax.ladder import trajectory_length
from volumejax.metric import UNKNOWN, Metric, plain_metric
from volumejax.parallel import Launcher, local_mesh, use_every_core
from volumejax.pilot import Pilot, fly
from volumejax.shear import find_shear
from volumejax.tasks.digits import digits_task

CHAINS = 4
MASSES_AND_LENGTHS = ((1.0, 1.0), (1.0, 0.5), (1.0, 2.0), (1.0, 4.0), (0.75, 1.0), (0.5, 1.0), (0.5, 0.5), (0.25, 1.0))
"""Powers of the mean precision, and shares of the library's length for the first."""
TARGETS = {"own": 0.75, "MCLMC": 0.9}
_TUNING = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", type=int, default=12_000, help="of each chain and kernel")
    parser.add_argument("--sigma", default="rms")
    options = parser.parse_args()
    use_every_core()
    from blackjax.mcmc import integrators  # which uses JAX, after which it is too late for devices

    task = digits_task()
    sigma = task.rms if options.sigma == "rms" else float(options.sigma)
    shear = find_shear(task.cost, task.params, [])
    ensemble = ensemble_of(task.cost, frame_of(vj.Gaussian(sigma), task.params), cutoff=1e-2, shear=shear)
    pilot = fly(
        ensemble, jax.random.key(0), chains=CHAINS, budget=15_600.0, anchor_cost=0.0, beta_factor=1.0,
        batch_size=None, launchers=[Launcher(local_mesh(CHAINS))], on_progress=lambda _: None,
    )  # fmt: skip
    survey = pilot.survey
    length = float(trajectory_length(survey.confined[-1:], survey.confined[-1], UNKNOWN)[0])
    plain = plain_metric(task.params, turns=True)
    velocity_verlet, mclachlan = integrators.isokinetic_velocity_verlet, integrators.isokinetic_mclachlan
    jobs = [
        *((f"own, power {power:g}", own, share, with_power(pilot, power)) for power, share in MASSES_AND_LENGTHS),
        ("own, one mass a leaf", own, 1.0, plain),
        *(("MCLMC, leapfrog", mclmc, share, (velocity_verlet, 1)) for share in (1.0, 2.0)),
        *(("MCLMC, McLachlan", mclmc, share, (mclachlan, 2)) for share in (1.0, 2.0)),
    ]
    print(f"digits, σ = {sigma:.4g}, last rung, {CHAINS} chains of {options.gradients:,} gradients")
    print("| kernel | length | step | acceptance | ½δ² | R-hat | friction | against the first |")
    print("|---|---|---|---|---|---|---|---|")
    first = None
    for name, kernel, share, how in jobs:
        step, acceptance, draws, gradients = kernel(ensemble, pilot, how, share * length, options.gradients)
        known = chain_mean(draws)
        friction = known.std_error**2 * gradients * CHAINS
        first = first or friction
        cells = (
            name, f"{share * length:.1f}", f"{step:.3g}", f"{acceptance:.2f}",
            f"{known.mean:.0f} ± {known.std_error:.0f}", f"{known.r_hat:.2f}", f"{friction:.2g}",
            f"{friction / first:.2f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def with_power(pilot: Pilot, power: float) -> Metric:
    """Return the metric whose masses are that power of the mean precisions a + βc."""
    return eqx.tree_at(lambda metric: metric.unevenness, pilot.metric, jnp.float32(1.0 + UNKNOWN - power))


def own(ensemble: Ensemble, pilot: Pilot, metric: Metric, length: float, gradients: int) -> tuple:
    """Run the library's kernel."""
    survey = pilot.survey
    with jax.enable_x64(True):
        rung = Rung(
            precision=jnp.float64(np.exp(survey.x[-1])), beta=jnp.float64(survey.beta),
            masses=jnp.asarray(1.0 / survey.leaf_variance[-1], jnp.float64), step_size=jnp.float64(1.0),
            spread=jnp.float64(0.0), num_steps=np.int32(1), num_moves=np.int32(1),
            stretch=jnp.zeros(FIELDS * len(survey.leaf_sizes), jnp.float64),
        )  # fmt: skip
    _, step = hmc(ensemble, rung, metric)

    def move(key: Any, position: Position, num_steps: Any, size: Any) -> tuple:
        position, info = step(key, position, num_steps, size)
        return position, half_square(position.displacement), info.acceptance

    return drive(move, pilot.ends, length, TARGETS["own"], 1, gradients, float(survey.step_size[-1]))


def mclmc(ensemble: Ensemble, pilot: Pilot, how: tuple[Any, int], length: float, gradients: int) -> tuple:
    """Run blackjax's adjusted MCLMC in coordinates in which the mean curvature is the same in all directions."""
    import blackjax

    (integrator, price), survey, metric = how, pilot.survey, pilot.metric
    a, beta = np.float32(np.exp(survey.x[-1])), np.float32(survey.beta)
    like = ensemble.frame.anchor
    masses = metric.masses(jnp.asarray(1.0 / survey.leaf_variance[-1], jnp.float32), a, beta, like)
    kernel = blackjax.adjusted_mclmc_dynamic.build_kernel(integration_steps_fn=lambda _, n: n, integrator=integrator)
    speed = np.sqrt(ensemble.dimension)

    def displacement(z: Any) -> Any:
        return metric.restored(jax.tree.map(lambda x, m: x / jnp.sqrt(m), z, masses))

    def log_density(z: Any) -> Any:
        return -ensemble.potential(ensemble.position(displacement(z)), a, beta).astype(jnp.float32)

    def move(key: Any, state: Any, num_steps: Any, size: Any) -> tuple:
        size = jnp.asarray(size, jnp.float32) * speed
        state, info = kernel(key, state, log_density, size, integration_steps_params=(num_steps,))
        return state, half_square(displacement(state.position)), info.acceptance_rate

    def begin(d: Any, key: Any) -> Any:
        z = jax.tree.map(lambda x, m: x * jnp.sqrt(m), metric.turned(d), masses)
        return blackjax.mcmc.adjusted_mclmc_dynamic.init(z, log_density, key)

    starts = jax.jit(jax.vmap(begin))(pilot.ends.displacement, jax.random.split(jax.random.key(5), CHAINS))
    return drive(move, starts, length, TARGETS["MCLMC"], price, gradients, 0.5 * float(survey.step_size[-1]))


def half_square(displacement: Any) -> Any:
    """Return ½|δ|² in float64."""
    with jax.enable_x64(True):
        return 0.5 * tree.dot(displacement, displacement)


def drive(
    move: Callable, states: Any, length: float, target: float, price: int, gradients: int, size: float
) -> tuple[float, float, np.ndarray, int]:
    """Tune the step, then move for so many gradients; lengths vary between a half and one and a half.

    Returns:
        Step, mean acceptance, ½|δ|² of shape (chains, moves), and the gradients of each chain.
    """

    @jax.jit
    def visit(key: Any, states: Any, num_steps: Any, size: Any) -> tuple:
        return jax.vmap(lambda k, s: move(k, s, num_steps, size))(jax.random.split(key, CHAINS), states)

    shares = np.random.default_rng(0).uniform(0.5, 1.5, 100_000)
    key, spent, draws, rates, count = jax.random.key(7), 0, [], [], 0
    while spent < gradients:
        num_steps = max(round(shares[count] * length / size), 1)
        states, squares, acceptance = visit(jax.random.fold_in(key, count), states, num_steps, size)
        rate = float(np.nanmean(acceptance))
        count += 1
        if count <= _TUNING:
            size *= float(np.exp(0.7 * (rate - target)))
            continue
        draws.append(np.asarray(squares))
        rates.append(rate)
        spent += price * num_steps + 1
    return size, float(np.mean(rates)), np.stack(draws, axis=1), spent


if __name__ == "__main__":
    main()
