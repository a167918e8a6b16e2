"""The global mass against exact answers and brute force, and what it must refuse or admit.

Mutations these catch: a weight of the wrong sign, the final factor e^{βC} left out, norms dropped when particles are
drawn anew, a draw that is not in proportion to the weights, a pilot that goes into the estimate, prior draws of another
scale than the moves assume.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

import volumejax as vj
from volumejax import reference
from volumejax.models.mlp import mlp_apply, mlp_params
from volumejax.results import BoundKind, Kind

SEEDS = range(3)


def measure(problem, seed=0, **options):
    return vj.temper_volume(
        jax.random.key(seed), problem.cost, problem.prior, like=problem.params, cutoff=problem.cutoff, **options
    )


def trace_of(estimate):
    assert isinstance(estimate.trace, vj.IslandTrace)
    return estimate.trace


def curve_of(estimate):
    assert estimate.curve is not None
    return estimate.curve


def check(estimate, truth, cap=1.0, gap=2.0):
    assert estimate.kind == Kind.ESTIMATE, estimate.status
    assert abs(estimate.log_mass - truth) <= 4.0 * estimate.std_error
    assert estimate.std_error <= cap
    assert estimate.bound_kind == BoundKind.CERTIFIED
    assert truth - gap <= estimate.lower <= truth
    assert estimate.lower <= estimate.upper <= 0.0
    assert estimate.region == "global"


PROBLEMS = {
    "A, 20 scales": lambda: reference.quadratic(1 / np.arange(1, 21), cutoff=1e-3),
    "A, rank 5 of 50": lambda: reference.quadratic(np.r_[np.ones(5), np.zeros(45)], cutoff=1e-4),
    "C, in the box": lambda: reference.normal_crossing((1, 2), cutoff=1e-6),
    "C, Gaussian": lambda: reference.normal_crossing((1, 1), cutoff=1e-4, gaussian=True),
    "D, (3, 5)": lambda: reference.rank_one(3, 5, cutoff=1e-4),
    "E, (1, 1)": lambda: reference.tanh_neuron(1, 1, cutoff=1e-4),
    "E, (3, 5)": lambda: reference.tanh_neuron(3, 5, cutoff=1e-2),
    "E, (20, 20), over the entropy barrier": lambda: reference.tanh_neuron(20, 20, cutoff=1e-4),
    "H, Gaussian": lambda: reference.shell(3, cutoff=1e-2, gaussian=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_exact_answer_is_within_four_errors(name):
    problem = PROBLEMS[name]()
    for seed in SEEDS:
        check(measure(problem, seed, num_particles=1024), problem.log_mass, cap=0.6)


@pytest.mark.slow
def test_flat_priors_with_walls_give_the_share_of_the_ball_or_box():
    h = np.array([1.0, 4.0, 0.5, 2.0])
    ellipsoid = reference.ellipsoid(h, cutoff=0.1)
    ball_volume = 0.5 * 4 * np.log(np.pi) - np.log(2.0) + 4 * np.log(1.5)
    box, ball = vj.UniformBox(-2.0, jnp.full(4, 3.0)), vj.UniformBall(1.5, jnp.full(4, 0.01))
    for prior, log_volume in ((box, 4 * np.log(5.0)), (ball, ball_volume)):
        for seed in SEEDS:
            estimate = vj.temper_volume(
                jax.random.key(seed), ellipsoid.cost, prior, like=jnp.zeros(4), cutoff=0.1, num_particles=512
            )
            check(estimate, ellipsoid.log_mass - log_volume, cap=0.2)


TINY = (2, 3, 2)
INPUTS = jax.random.normal(jax.random.key(5), (24, 2))
LABELS = (INPUTS[:, 0] * INPUTS[:, 1] > 0).astype(jnp.int32)
TINY_COSTS = {
    "loss": (vj.loss(mlp_apply(TINY), INPUTS, LABELS), 0.4, 0.3),
    "errors": (vj.error_rate(mlp_apply(TINY), INPUTS, LABELS), 0.13, 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY_COSTS)
def test_a_tiny_network_is_guessed_as_often_as_brute_force_guesses_it(kind):
    cost, cutoff, cap = TINY_COSTS[kind]
    prior, like = vj.Gaussian(2.0), mlp_params(TINY, jax.random.key(0))
    batches, draws = 32, 2**14

    @jax.jit
    def passes(batch):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(9), batch), draws)
        return jnp.sum(jax.lax.map(lambda k: cost(prior.sample(k, like)) <= cutoff, keys, batch_size=256))

    found = sum(int(passes(batch)) for batch in range(batches))
    total = batches * draws
    truth, error = np.log(found / total), found**-0.5
    assert found >= 100, "too few to compare with"
    for seed in SEEDS:
        estimate = vj.temper_volume(jax.random.key(seed), cost, prior, like=like, cutoff=cutoff, num_particles=2048)
        assert abs(estimate.log_mass - truth) <= 3.0 * np.hypot(estimate.std_error, error), (truth, estimate.summary())
        assert estimate.std_error <= cap, estimate.summary()


@pytest.mark.slow
def test_errors_and_bounds_hold_over_two_hundred_seeds(of_seeds):
    problem = reference.normal_crossing((1, 1), cutoff=1e-3, gaussian=True)
    seen = of_seeds(lambda seed: measure(problem, seed, num_particles=256, effort=0.5), 200)
    deviations = np.array([(e.log_mass - problem.log_mass) / e.std_error for e in seen])
    assert 0.8 <= np.sqrt(np.mean(deviations**2)) <= 1.25
    assert np.mean([e.lower > problem.log_mass for e in seen]) <= 0.05
    assert np.mean([e.upper < problem.log_mass for e in seen]) <= 0.05 + 4.0 * np.sqrt(0.05 * 0.95 / 200)
    # What e^{log w} averages to is unbiased, whatever the spread of one run.
    ratios = np.exp([float(e.log_mass) - problem.log_mass for e in seen])
    assert abs(np.mean(ratios) - 1.0) <= 4.0 * np.std(ratios) / np.sqrt(200)


def test_the_curve_tells_every_cutoff_on_the_way():
    problem = reference.quadratic(np.ones(6), cutoff=1e-2)
    estimate = measure(problem, num_particles=512)
    exact = np.array([reference.quadratic(np.ones(6), cutoff=float(c)).log_mass for c in curve_of(estimate).cutoffs])
    assert np.all(np.abs(np.asarray(curve_of(estimate).log_mass) - exact) <= 4.0 * curve_of(estimate).std_error)
    assert np.all(curve_of(estimate).std_error <= 0.25)
    assert curve_of(estimate).log_mass[0] == estimate.log_mass
    assert np.all(np.diff(curve_of(estimate).cutoffs) > 0)


def test_the_upper_bound_is_clopper_and_pearsons():
    wide = vj.temper_volume(
        jax.random.key(0), lambda w: w @ w, vj.Gaussian(1.0), like=jnp.zeros(1), cutoff=0.05, num_particles=256
    )
    passing = int(np.sum(trace_of(wide).prior_costs <= 0.05))
    assert trace_of(wide).share_of_prior(0.05) == passing / 256
    assert binom.cdf(passing, 256, np.exp(wide.upper)) == pytest.approx(0.05, rel=1e-6)
    assert wide.lower < wide.log_mass < wide.upper < 0.0


def test_a_cost_that_is_always_met_has_mass_one():
    estimate = vj.temper_volume(
        jax.random.key(0), lambda w: 0.0 * jnp.sum(w), vj.Gaussian(1.0), like=jnp.ones(3), cutoff=1.0, num_particles=64
    )
    assert estimate.log_mass == pytest.approx(0.0, abs=1e-12)
    assert estimate.std_error == pytest.approx(0.0, abs=1e-12)
    assert estimate.upper == 0.0


def test_draws_without_a_cost_count_as_outside():
    def cost(w):
        return jnp.where(w[0] > 0.0, w[1] ** 2, jnp.nan)

    estimate = vj.temper_volume(
        jax.random.key(1), cost, vj.Gaussian(1.0), like=jnp.zeros(2), cutoff=1e-2, num_particles=512
    )
    truth = np.log(0.5 * 0.0796557)
    assert abs(estimate.log_mass - truth) <= 4.0 * estimate.std_error
    assert estimate.std_error < 0.3
    assert float(trace_of(estimate).non_finite) == pytest.approx(0.5, abs=0.1)
    assert "NaN or infinite cost" in estimate.status


def test_an_error_rate_of_exactly_the_cutoff_passes():
    # 0.2 in float32 exceeds 0.2: two wrong signs of ten must count.
    def errors(w):
        return jnp.mean((w > 0.0).astype(jnp.float32))

    for seed in SEEDS:
        estimate = vj.temper_volume(
            jax.random.key(seed), errors, vj.Gaussian(1.0), jnp.zeros(10), cutoff=0.2, num_particles=1024
        )
        truth = np.log(56 / 1024)
        assert abs(estimate.log_mass - truth) <= 4.0 * estimate.std_error
        assert estimate.std_error <= 0.2


def test_a_narrow_prior_far_from_zero_is_drawn_as_it_is():
    offset = jnp.float32(4096.0)

    def cost(w):
        return 0.5 * jnp.sum(((w - offset) / 0.01) ** 2)

    box = vj.UniformBox(4096.0 - 0.02, 4096.0 + 0.02)
    estimate = vj.temper_volume(jax.random.key(0), cost, box, jnp.zeros(1), cutoff=0.5, num_particles=256)
    # Parameters round to 1/2048: the draws lie on 41 points or so, which are those of the prior itself.
    assert abs(estimate.log_mass - np.log(0.5)) < 0.2
    assert np.all(np.isfinite(trace_of(estimate).acceptance)) and trace_of(estimate).acceptance.min() > 0.3


def test_minus_infinity_is_no_cost():
    def cost(w):
        return jnp.where(w[0] > 0.0, w[1] ** 2, -jnp.inf)

    estimate = vj.temper_volume(jax.random.key(0), cost, vj.Gaussian(1.0), jnp.zeros(2), cutoff=0.5, num_particles=256)
    assert np.log(0.5) - 1.5 < estimate.log_mass < np.log(0.5)
    assert 0.3 < float(trace_of(estimate).non_finite) < 0.7


def test_three_islands_are_no_estimate():
    problem = reference.quadratic(np.ones(3), cutoff=1e-2)
    first = next(
        vj.temper_stream(
            jax.random.key(0), problem.cost, problem.prior, problem.params, cutoff=0.01, num_particles=96, batch_size=3
        )
    )
    assert first.num_rays == 3 and first.kind == Kind.LOWER_BOUND
    assert "too few islands" in first.status


def test_islands_at_once_do_not_change_the_answer():
    problem = reference.quadratic(np.ones(3), cutoff=1e-2)
    one, other = (measure(problem, num_particles=96, num_islands=6, batch_size=size) for size in (6, 4))
    np.testing.assert_allclose(trace_of(one).betas, trace_of(other).betas, rtol=1e-4)
    np.testing.assert_allclose(trace_of(one).log_weights, trace_of(other).log_weights, atol=0.02)


def test_the_stream_keeps_what_is_done_and_a_keypress_returns_it():
    problem = reference.quadratic(np.ones(3), cutoff=1e-2)
    question = (jax.random.key(0), problem.cost, problem.prior)
    asked = functools.partial(vj.temper_stream, *question, like=problem.params, cutoff=0.01)
    steps = list(asked(num_particles=64, num_islands=8))
    assert [e.num_rays for e in steps] == [2, 4, 6, 8]
    assert "stopped with 25 % of the islands" in steps[0].status
    assert "stopped" not in steps[-1].status

    def interrupted(stage, share):
        if stage == "islands" and share > 0.6:
            raise KeyboardInterrupt

    kept = vj.temper_volume(
        *question, like=problem.params, cutoff=0.01, num_particles=64, num_islands=8, on_progress=interrupted
    )
    assert kept.num_rays == 4
    np.testing.assert_array_equal(trace_of(kept).log_weights, trace_of(steps[1]).log_weights)


def test_islands_that_contradict_each_other_are_not_an_estimate():
    # So few particles that the arms of the region are met by chance.
    estimate = measure(reference.tanh_neuron(20, 20, cutoff=1e-4), num_particles=64)
    assert estimate.kind == Kind.NOT_MIXED, estimate.summary()
    assert "not converged" in estimate.status
    assert "≥" in estimate.summary()
    assert estimate.lower < estimate.log_mass


def test_anchor_gives_the_prior_term():
    estimate = vj.temper_volume(
        jax.random.key(0), lambda w: jnp.sum((w - 1.0) ** 2), vj.Gaussian(1.0), like=jnp.zeros(2),
        cutoff=0.1, anchor=jnp.ones(2), num_particles=64,
    )  # fmt: skip
    assert estimate.prior_term == pytest.approx(-1.0)
    assert estimate.prior_term + estimate.volume_term == pytest.approx(float(estimate.log_mass))


def ball(w):
    return 0.5 * jnp.sum(w**2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": vj.Lebesgue()}, "needs a proper prior"),
        ({"prior": None}, "prior must be one such as"),
        ({"prior": vj.Gaussian}, "prior must be one such as"),
        ({"cutoff": -1.0}, "cutoff must be a positive"),
        ({"effort": 0.0}, "effort must be a positive"),
        ({"num_islands": 2}, "num_islands must be at least 4"),
        ({"num_particles": 20}, "at least two for each of 16 islands"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"anchor": jnp.zeros(3)}, "same structure and shapes"),
        ({"anchor": jnp.full(2, 5.0)}, "not within the cutoff"),
        ({"cost": lambda w: jnp.inf * (1.0 + jnp.sum(w**2))}, "every draw from the prior has a NaN or infinite cost"),
        ({"cost": lambda w: w}, "cost must return one scalar"),
        ({"like": jnp.arange(2)}, "not a real floating-point array"),
        ({"cost": lambda w: 1.0 + jnp.sum(w**2)}, "cutoff 0.1 is out of reach"),
        ({"prior": vj.Gaussian({"w": 1.0})}, "another structure"),
    ],
)
def test_bad_questions_get_one_line_with_the_remedy(options, message):
    asked = {"cost": ball, "prior": vj.Gaussian(1.0), "like": jnp.zeros(2), "cutoff": 0.1, "num_particles": 64}
    asked |= options
    with pytest.raises(ValueError, match=message) as caught:
        vj.temper_volume(jax.random.key(0), asked.pop("cost"), asked.pop("prior"), **asked)
    assert "\n" not in str(caught.value)


def test_the_cost_runs_in_the_callers_precision(own_number):
    """Numbers that a network makes by itself are float32 there unless the caller asked for more."""
    cost, seen = own_number
    vj.temper_volume(jax.random.key(0), cost, vj.Gaussian(1.0), like=jnp.zeros(2), cutoff=0.1, num_particles=128)
    assert set(seen) == {jnp.dtype("float32")}
