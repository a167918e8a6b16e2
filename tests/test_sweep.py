"""Tuned proposals: chosen by the mean on pilot rays, measured on fresh ones, right or a bound on known volumes.

Mutations these catch: the maximum or the log mean exp in place of the mean, pilot rays that count, a candidate built
otherwise than the proposal returned, β in the unit of the curvature left unscaled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import volumejax as vj
from volumejax import reference
from volumejax.sweep import Sweep
from volumejax.tasks.digits import digits_task

H = np.logspace(-2, 3, 12)


def tune(problem, key=0, curvature=None, **options):
    curvature = problem.curvature if curvature is None else curvature
    settings = {"num_pilot_rays": 16, "num_rays": 256, **options}
    return vj.tune_proposal(
        jax.random.key(key), problem.cost, problem.params, problem.prior, cutoff=problem.cutoff, curvature=curvature,
        **settings,
    )  # fmt: skip


def agrees(estimate, truth):
    """Within 4 SE of the truth with SE ≤ 0.5, or labelled a bound and below it."""
    if vj.Kind(int(estimate.kind)) is vj.Kind.ESTIMATE:
        return estimate.std_error <= 0.5 and abs(estimate.log_mass - truth) <= 4 * estimate.std_error
    return truth - 6.0 <= estimate.lower <= truth


GIVEN = {"exponents": (0.5,), "dampings": (0.0, 0.1)}
FAMILIES = {
    "A": (reference.quadratic(H, cutoff=1.0, minimum=1.0), None, GIVEN),
    "B": (reference.ellipsoid(np.logspace(-3, 2, 100), cutoff=0.01), None, {"exponents": (0.4, 0.5), "dampings": None}),
    "D": (reference.rank_one(3, 5, cutoff=1e-2), 1.0, GIVEN),
    "E": (reference.tanh_neuron(3, 5, cutoff=1e-2), 1.0, GIVEN),
}
SETTLED = {"A", "B"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_known_volumes(family):
    problem, curvature, options = FAMILIES[family]
    tuned = tune(problem, curvature=curvature, **options)
    for seed in range(3):
        estimate = tuned.estimate if seed == 0 else vj.ray_volume(
            jax.random.key(100 + seed), problem.cost, problem.params, problem.prior, cutoff=problem.cutoff,
            proposal=tuned.proposal, num_rays=256,
        )  # fmt: skip
        assert agrees(estimate, problem.star_log_mass), (problem.star_log_mass, estimate.summary())
        if family in SETTLED:
            assert vj.Kind(int(estimate.kind)) is vj.Kind.ESTIMATE


@pytest.fixture(scope="module")
def tuned():
    """A curvature in the wrong unit and bent: its square root power is what fits."""
    problem = reference.quadratic(H, cutoff=1e-2)
    bent = jnp.asarray(1e-5 * H**2, jnp.float32)
    return problem, tune(problem, curvature=bent, exponents=(0.25, 0.5), dampings=(0.0, 1.0), num_rays=128)


def test_it_finds_the_unit_and_the_power(tuned):
    problem, found = tuned
    assert found.choice["exponent"] == 0.25 and found.choice["damping"] == 0.0
    # The matching β of the true curvature is about D/2ε; h is √1e-5 of it here.
    assert 0.1 < found.choice["beta"] * np.sqrt(1e-5) / (len(H) / (2 * problem.cutoff)) < 10
    assert agrees(found.estimate, problem.log_mass)


def test_the_winner_has_the_largest_mean_and_is_the_proposal_returned(tuned):
    problem, found = tuned
    sweep = found.sweep
    assert sweep.mean_log_weight[sweep.best] == np.max(sweep.log_weights.mean(axis=1))
    assert len(sweep.beta) == len(sweep.exponent) == len(sweep.damping) == len(sweep.shift) == len(sweep.log_weights)
    assert {True, False} == set(sweep.shift.tolist()) and sweep.log_weights.shape[1] == 16
    # The pilot's key and draws again, by the front door.
    pilot = vj.ray_volume(
        jax.random.fold_in(jax.random.key(0), 0), problem.cost, problem.params, problem.prior, cutoff=problem.cutoff,
        proposal=found.proposal, num_rays=16, audit_fraction=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(pilot.trace.log_weight, sweep.log_weights[sweep.best], atol=0.1)
    assert np.isfinite(sweep.std_error[sweep.best])


def test_a_second_round_looks_between_the_candidates_of_the_first():
    """The power that fits is 0.4, and only what was left open is refined. Mutations: no second round, β not moved with
    the exponent, the first round's best lost."""
    problem = reference.quadratic(H, cutoff=1e-2)
    bent = jnp.asarray(1e-5 * H**1.25, jnp.float32)
    found = tune(problem, curvature=bent, dampings=(0.0,), num_rays=64)
    assert abs(found.choice["exponent"] - 0.4) < 1e-6 and set(found.sweep.damping.tolist()) == {0.0}
    first = tune(problem, curvature=bent, exponents=(0.3, 0.5), dampings=(0.0,), num_rays=64).sweep
    assert set(first.exponent.tolist()) == {0.3, 0.5}
    assert found.sweep.mean_log_weight.max() > first.mean_log_weight.max()
    rows = np.stack([found.sweep.beta, found.sweep.exponent, found.sweep.damping, found.sweep.shift], 1)
    assert len(np.unique(rows, axis=0)) == len(rows) <= 40
    finer = rows[~np.isin(rows[:, 1], (0.3, 0.5))]
    levels = np.log10([beta * np.mean(np.asarray(bent, np.float64) ** (2 * power)) for beta, power, _, _ in finer])
    np.testing.assert_allclose(levels, levels[1] + np.tile([-0.5, 0.0, 0.5], 2), atol=1e-4)
    given = tune(problem, curvature=bent, betas=(1.0, 10.0), exponents=(0.3,), dampings=(0.0,), num_rays=64).sweep
    assert set(given.beta.tolist()) == {1.0, 10.0} and len(given.beta) == 4


def test_fresh_rays_are_not_the_pilot_rays(tuned):
    _, found = tuned
    best = found.sweep.log_weights[found.sweep.best]
    assert found.estimate.num_rays == 128
    assert not np.isin(np.asarray(found.estimate.trace.log_weight, np.float32), best.astype(np.float32)).any()


def test_the_mean_decides_and_not_the_maximum():
    """The first candidate has the largest ray and the largest log mean exp, the second the largest mean."""
    two = np.zeros(2)
    sweep = Sweep(two, two, two, two > 0, np.array([[0.0, -90.0, -90.0], [-30.0, -31.0, -32.0]]))
    assert sweep.best == 1
    lost = Sweep(two, two, two, two > 0, np.array([[0.0, -np.inf, 0.0], [-30.0, -31.0, np.nan]]))
    assert lost.best == 0 and lost.mean_log_weight[0] == -np.inf and lost.std_error[0] == np.inf


@pytest.mark.slow
def test_on_digits_low_rank_beats_adam_beats_naive():
    """At the paper's σ, around the choices of the full sweep (configs/digits_sweeps.yaml has all of it)."""
    task = digits_task(0)
    prior, moments = vj.Gaussian(1.3975), vj.second_moments(task.opt_state, task.params)
    question = (task.cost, task.params, prior)
    diagonal = vj.diagonal_ggn(task.apply_fn, task.params, task.inputs)
    product = vj.ggn_product(task.apply_fn, task.params, task.inputs, batch_size=None)
    pairs = vj.top_eigenpairs(jax.random.key(0), product, task.params, rank=60)
    options = {"cutoff": 1e-2, "num_pilot_rays": 8, "num_rays": 64, "shifts": (False,)}
    naive = vj.ray_volume(jax.random.key(2), *question, cutoff=1e-2, num_rays=64, proposal=vj.Diagonal(1.0)).to_dict()
    adam = vj.tune_proposal(
        jax.random.key(0),
        *question,
        curvature=moments,
        betas=(1e7, 4e7),
        exponents=(0.35,),
        dampings=(2e-3,),
        **options,
    ).estimate.to_dict()
    stiff = vj.tune_proposal(
        jax.random.key(0), *question, curvature=diagonal, eigenpairs=pairs, betas=(7e3, 2.3e4), exponents=(0.5,),
        dampings=(0.0, 2.6e-3), **options,
    ).estimate.to_dict()  # fmt: skip
    for worse, better, gap in ((naive, adam, 3000), (adam, stiff, 600)):
        error = np.hypot(worse["std_log_weight"], better["std_log_weight"]) / 8
        assert error < 150 and better["mean_log_weight"] - worse["mean_log_weight"] > gap - 4 * error > 0
        assert better["kind"] == "lower_bound" and better["lower"] > worse["lower"]


def test_the_mean_wins_where_the_cutoff_is_large():
    """Rays from far off the prior's centre must point home: the shift is chosen, and the whole prior is found."""
    problem = reference.quadratic(np.ones(12), cutoff=1e4, minimum=3.0)
    found = tune(problem, betas=(0.0, 1e-3), exponents=(0.5,), dampings=(0.0,), num_rays=64)
    assert found.choice["shift"] and abs(found.estimate.log_mass - problem.log_mass) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pilot_rays": 1}, "num_pilot_rays must be at least 2, got 1"),
        ({"curvature": jnp.full(12, -1.0)}, "negative or NaN entries"),
        ({"curvature": jnp.ones(3)}, "has shape"),
        ({"curvature": optax.adam(0.1).init(jnp.zeros(12))}, r"state of an optimizer; pass second_moments\("),
        ({"exponents": ()}, "exponents is empty; give it at least one value"),
        ({"exponents": (-0.5,)}, r"exponents must be finite and not negative, got \(-0.5,\)"),
        ({"dampings": (-1.0,)}, "dampings must be finite and not negative"),
    ],
)
def test_misuse(options, message):
    problem = reference.quadratic(H, cutoff=1e-2)
    with pytest.raises(ValueError, match=message):
        tune(problem, **options)


def test_a_flat_prior_needs_a_width():
    with pytest.raises(ValueError, match=r"has no candidate: .* under a flat prior a positive damping"):
        tune(reference.ellipsoid(np.ones(3), cutoff=1.0), curvature=0.0, betas=(1.0,), dampings=(0.0,))
