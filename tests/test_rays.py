"""The ray estimator on problems whose answers are known, and its contract: purity, resume, data not exceptions.

Mutations these catch: the Jacobian r^{D−1} dropped, the sign of the prior's slope flipped, the proposal's density
without its determinant, the shift of the mean left out of the density, rays weighted by the outer end of the bracket.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax import reference
from volumejax.results import BoundKind, Kind, Status
from volumejax.tuning import matching_beta

SEEDS = [0, 1, 2]
HARMONIC = 1.0 / np.arange(1, 21)
RANK_FIVE = np.r_[np.ones(5), np.zeros(45)]


def matched(problem, **options):
    return vj.curvature_proposal(problem.curvature, problem.params, problem.prior, cutoff=problem.cutoff, **options)


def measure(problem, seed, num_rays=2000, **options):
    return vj.ray_volume(
        jax.random.key(seed), problem.cost, problem.params, problem.prior,
        cutoff=problem.cutoff, num_rays=num_rays, **options,
    )  # fmt: skip


def check_claim(estimate, truth):
    """An estimate is right within four standard errors; a bound is below; `lower` is below in either case."""
    assert float(estimate.lower) < truth
    if Kind(int(estimate.kind)) is Kind.ESTIMATE:
        assert abs(float(estimate.log_mass) - truth) <= 4 * float(estimate.std_error)
    else:
        assert np.isposinf(estimate.std_error)


FULL_RANK = [
    *(reference.quadratic(np.ones(10), cutoff=0.01), reference.quadratic(np.ones(1000), cutoff=0.5)),
    *(reference.quadratic(HARMONIC, cutoff=cutoff) for cutoff in (1e-3, 1e-2, 1e-1, 1.0)),
    reference.ellipsoid(np.logspace(-3, 2, 100), cutoff=0.01),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", FULL_RANK, ids=lambda p: f"{p.name}, {p.cutoff}")
def test_full_rank_quadratics_with_the_matching_proposal(problem):
    for seed in SEEDS:
        estimate = measure(problem, seed, proposal=matched(problem))
        check_claim(estimate, problem.star_log_mass)
        assert estimate.kind == Kind.ESTIMATE
        assert estimate.std_log_weight <= 0.15
        assert estimate.std_error <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", [1e-6, 1e-4, 1e-2])
def test_low_rank_quadratics_with_the_matching_proposal(cutoff):
    problem = reference.quadratic(RANK_FIVE, cutoff=cutoff)
    for seed in SEEDS:
        estimate = measure(problem, seed, proposal=matched(problem))
        check_claim(estimate, problem.star_log_mass)
        assert estimate.kind == Kind.ESTIMATE
        assert estimate.ess >= 0.5 * 2000
        assert estimate.std_error <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["diagonal", "dense"])
def test_a_minimum_away_from_the_priors_mean(proposal):
    problem = reference.quadratic(HARMONIC, cutoff=0.3, sigma=0.7, minimum=0.8)
    curvature = problem.curvature if proposal == "diagonal" else jnp.diag(jnp.asarray(HARMONIC, jnp.float32))
    directions = vj.curvature_proposal(curvature, problem.params, problem.prior, cutoff=0.3)
    assert directions.mean is not None
    for seed in SEEDS:
        estimate = measure(problem, seed, proposal=directions)
        check_claim(estimate, problem.star_log_mass)
        assert estimate.std_error <= 0.05
        assert np.isclose(estimate.prior_term, -0.5 * 20 * (0.8 / 0.7) ** 2, rtol=1e-6)
        assert np.isclose(estimate.prior_term + estimate.volume_term, estimate.log_mass)


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", [200.0, 400.0])
def test_the_shift_counts_in_the_choice_of_temperature(cutoff):
    problem = reference.quadratic(np.ones(1000), cutoff=cutoff, minimum=1.0)
    for seed in SEEDS:
        estimate = measure(problem, seed, num_rays=500, proposal=matched(problem))
        check_claim(estimate, problem.star_log_mass)
        assert estimate.kind == Kind.ESTIMATE
        assert estimate.std_log_weight <= 0.15


@pytest.mark.slow
def test_isotropic_rays_on_an_ellipsoid_are_labelled_a_bound():
    problem = FULL_RANK[-1]
    for seed in SEEDS:
        estimate = measure(problem, seed, num_rays=4000)
        assert estimate.kind == Kind.LOWER_BOUND and np.isposinf(estimate.std_error)
        assert float(estimate.lower) < problem.log_mass - 50
        assert "lower bound" in estimate.status


NONLINEAR = [
    *(reference.rank_one(3, 5, cutoff=1e-2), reference.rank_one(4, 4, cutoff=1e-2)),
    *(reference.tanh_neuron(m, n, cutoff=1e-2) for m, n in ((1, 1), (3, 5), (20, 20))),
    *(reference.shell(3, cutoff=1e-2), reference.shell(10, cutoff=1e-2)),
    reference.shell(3, cutoff=1e-2, gaussian=True),
    *(reference.normal_crossing((1, 1), cutoff=1e-2), reference.normal_crossing((1, 1), cutoff=1e-2, gaussian=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", NONLINEAR, ids=lambda p: f"{p.name}, {type(p.prior).__name__}")
def test_nonlinear_problems_by_isotropic_rays(problem):
    for seed in SEEDS:
        estimate = measure(problem, seed)
        check_claim(estimate, problem.star_log_mass)
        assert not estimate.std_error <= 0.0
        if estimate.kind == Kind.ESTIMATE:
            assert estimate.std_error <= 0.12


@pytest.mark.slow
def test_rays_see_the_star_of_a_shell_and_not_the_shell():
    problem = reference.shell(3, cutoff=1e-2)
    estimate = measure(problem, 3, num_rays=20_000)
    assert abs(estimate.log_mass - problem.star_log_mass) < 0.15
    assert estimate.log_mass < problem.log_mass - 2.0
    assert estimate.region == "star"


@pytest.mark.slow
def test_a_million_parameters():
    problem = reference.quadratic(np.ones(10**6), cutoff=25.0)
    estimate = measure(problem, 0, num_rays=48)
    assert abs(estimate.log_mass - -4451776.256) < 2.0
    exact_radius = np.sqrt(2 * 25.0)
    assert np.max(np.abs(1e6 * np.log(estimate.trace.radius / exact_radius))) < 0.1
    assert np.all(estimate.trace.status == Status.CONVERGED)
    assert estimate.noise < 0.1


def test_the_whole_prior():
    # Anchor at its typical distance from the prior's mean, and a cutoff that nothing exceeds.
    D, sigma = 1000, 0.4
    params = sigma * jnp.sqrt(D) * jnp.eye(D)[0]
    cost = lambda w: 0.5 * jnp.mean(jnp.square(w - params))
    prior = vj.Gaussian(sigma)
    home = vj.curvature_proposal(jnp.zeros(D), params, prior, beta=0.0)
    estimate = vj.ray_volume(jax.random.key(0), cost, params, prior, cutoff=1e6, proposal=home)
    assert np.max(np.abs(estimate.trace.log_weight)) < 0.01
    assert estimate.kind == Kind.ESTIMATE and np.all(estimate.trace.status == Status.NEVER_CROSSES)
    assert np.all(np.isposinf(estimate.trace.radius))
    blind = vj.ray_volume(jax.random.key(0), cost, params, prior, cutoff=1e6)
    assert blind.kind == Kind.LOWER_BOUND and blind.log_mass < -300 and blind.lower < 0


def repeat(problem, proposal, num_rays, seed):
    """200 independent estimates in one program: (log mass, standard error, lower)."""

    def once(key):
        estimate = vj.ray_volume(
            key, problem.cost, problem.params, problem.prior,
            cutoff=problem.cutoff, proposal=proposal, num_rays=num_rays, batch_size=num_rays,
        )  # fmt: skip
        return estimate.log_mass, estimate.std_error, estimate.lower

    keys = jax.random.split(jax.random.key(seed), 200)
    return map(np.asarray, jax.jit(lambda keys: jax.lax.map(once, keys))(keys))


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem", [reference.quadratic(RANK_FIVE, cutoff=1e-2), reference.quadratic(HARMONIC, cutoff=1.0)]
)
def test_calibration(problem):
    # A little off the best temperature, so that the weights have a spread to be calibrated.
    best = matching_beta(np.asarray(problem.curvature, float), np.ones(problem.params.size), problem.cutoff)
    proposal = vj.curvature_proposal(problem.curvature, problem.params, problem.prior, beta=0.7 * best)
    log_mass, std_error, lower = repeat(problem, proposal, 200, seed=5)
    z = (log_mass - problem.star_log_mass) / std_error
    assert 0.8 <= np.sqrt(np.mean(z**2)) <= 1.25
    assert np.max(std_error) < 0.3
    assert np.mean(lower > problem.star_log_mass) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("problem", [reference.rank_one(3, 5, cutoff=1e-2), reference.tanh_neuron(3, 5, cutoff=1e-2)])
def test_the_lower_bound_holds_where_the_tail_is_heavy(problem):
    _, _, lower = repeat(problem, vj.Isotropic(), 200, seed=6)
    assert np.mean(lower > problem.star_log_mass) <= 0.05
    assert np.median(lower) > problem.star_log_mass - 4.0


def ball(w):
    return 0.5 * jnp.sum(w**2)


ANCHOR = jnp.zeros(10)
UNIT = vj.Gaussian(1.0)


def test_batch_size_chunks_and_resume_do_not_matter():
    key, shape = jax.random.key(7), dict(cutoff=0.5, num_rays=70, audit_fraction=0.1)
    cost = lambda w: ball(w) + 0.3 * jnp.sin(3 * w[0]) ** 2
    whole = vj.ray_volume(key, cost, ANCHOR, UNIT, batch_size=64, **shape)
    for batch_size in (1, 7):
        other = vj.ray_volume(key, cost, ANCHOR, UNIT, batch_size=batch_size, **shape)
        np.testing.assert_allclose(other.trace.log_weight, whole.trace.log_weight, rtol=0, atol=0.01)
        np.testing.assert_array_equal(other.trace.audited, whole.trace.audited)
    steps = list(vj.ray_stream(key, cost, ANCHOR, UNIT, chunk_size=32, **shape))
    assert [step.num_rays for step in steps] == [32, 64, 70]
    np.testing.assert_allclose(steps[-1].log_mass, whole.log_mass, rtol=1e-9)
    np.testing.assert_array_equal(steps[-1].trace.audited, whole.trace.audited)
    resumed = list(vj.ray_stream(key, cost, ANCHOR, UNIT, chunk_size=32, resume=steps[0].trace, **shape))
    np.testing.assert_array_equal(resumed[-1].trace.log_weight, steps[-1].trace.log_weight)
    finished = list(vj.ray_stream(key, cost, ANCHOR, UNIT, chunk_size=32, resume=steps[-1].trace, **shape))
    assert len(finished) == 1 and finished[0].log_mass == steps[-1].log_mass


def test_in_a_jitted_loop():
    def step(anchor, key):
        estimate = vj.ray_volume(key, ball, anchor, UNIT, cutoff=0.5, num_rays=32)
        return 0.5 * anchor, (estimate.log_mass, estimate.prior_term, estimate.kind)

    start = 0.1 * jnp.ones(10)
    keys = jax.random.split(jax.random.key(0), 3)
    _, (log_mass, prior_term, _) = jax.jit(lambda x: jax.lax.scan(step, x, keys))(start)
    assert log_mass.dtype == jnp.float32
    np.testing.assert_allclose(prior_term, [-0.05, -0.0125, -0.003125], rtol=1e-5)
    outside = vj.ray_volume(keys[0], ball, start, UNIT, cutoff=0.5, num_rays=32)
    assert outside.log_mass.dtype == np.float64
    np.testing.assert_allclose(log_mass[0], outside.log_mass, rtol=1e-6)


def test_one_program_serves_all_cutoffs_and_anchors():
    traces = []

    def cost(w):
        traces.append(1)
        return ball(w)

    key = jax.random.key(0)
    vj.ray_volume(key, cost, ANCHOR, UNIT, cutoff=0.5, num_rays=8)
    before = len(traces)
    vj.ray_volume(key, cost, ANCHOR + 0.01, UNIT, cutoff=0.25, tolerance=0.05, num_rays=8)
    assert len(traces) - before <= 1  # the shape check, nothing compiled


def test_the_callers_precision_is_kept():
    seen = []

    def cost(w):
        seen.append((w.dtype, jnp.zeros(()).dtype))
        return ball(w)

    vj.ray_volume(jax.random.key(0), cost, ANCHOR, UNIT, cutoff=0.5, num_rays=4)
    assert set(seen) == {(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))}
    with jax.enable_x64(True):
        estimate = vj.ray_volume(jax.random.key(0), ball, ANCHOR.astype(jnp.float64), UNIT, cutoff=0.5, num_rays=4)
    assert np.isfinite(estimate.log_mass)


@pytest.mark.parametrize(
    "name, cost, cutoff, status",
    [
        ("nan", lambda w: jnp.where(ball(w) < 0.1, ball(w), jnp.nan), 0.5, Status.NON_FINITE),
        ("inf", lambda w: jnp.where(ball(w) < 0.1, ball(w), jnp.inf), 0.5, Status.NON_FINITE),
        ("never", lambda w: 0.1 * jnp.tanh(ball(w)), 0.5, Status.NEVER_CROSSES),
        ("zero", lambda w: 0.0 * ball(w), 0.5, Status.NEVER_CROSSES),
        ("noise", lambda w: ball(w) + 1e-7 * jnp.sin(1e12 * jnp.sum(w)), 1e-7, Status.NOISE_LIMITED),
        ("wall", lambda w: jnp.where(jnp.any(w != 0.0), 1.0, 0.0), 0.5, Status.NEVER_INSIDE),
        ("negative", lambda w: ball(w) - 1e-9, 0.5, Status.CONVERGED),
    ],
)
def test_trouble_is_data_per_ray(name, cost, cutoff, status):
    estimate = vj.ray_volume(jax.random.key(0), cost, ANCHOR, UNIT, cutoff=cutoff, num_rays=24)
    assert np.mean(estimate.trace.status == status) > 0.5, estimate.counts
    assert not np.isnan(estimate.log_mass)
    if name in ("never", "zero"):
        assert np.isclose(estimate.log_mass, 0.0, atol=1e-3)
    if name in ("nan", "inf"):
        np.testing.assert_allclose(estimate.trace.radius, np.sqrt(0.2), rtol=0.02)
    if name == "wall":
        assert np.isneginf(estimate.log_mass) and estimate.kind == Kind.LOWER_BOUND


def test_an_unbounded_region_under_an_improper_prior_is_infinite_and_says_so():
    estimate = vj.ray_volume(jax.random.key(0), lambda w: jnp.zeros(()), ANCHOR, vj.Lebesgue(), cutoff=0.5, num_rays=8)
    assert np.isposinf(estimate.log_mass) and "proper prior" in estimate.status
    assert np.isneginf(estimate.lower) and estimate.bound_kind == BoundKind.NONE


def test_an_anchor_outside_its_region_has_no_volume_under_a_trace():
    with pytest.raises(ValueError, match="not within the cutoff"):
        vj.ray_volume(jax.random.key(0), ball, ANCHOR + 1.0, UNIT, cutoff=0.5)
    run = jax.jit(lambda w: vj.ray_volume(jax.random.key(0), ball, w, UNIT, cutoff=0.5, num_rays=32).log_mass)
    assert np.isneginf(run(ANCHOR + 1.0)) and np.isneginf(run(ANCHOR + jnp.nan)) and np.isfinite(run(ANCHOR))


def test_the_audit_finds_a_thin_wall_and_says_what_to_do():
    # A shell of high cost at a tenth of the radius, thinner than an expansion step.
    cost = lambda w: ball(w) + jnp.where(jnp.abs(jnp.linalg.norm(w) - 0.1) < 0.006, 10.0, 0.0)
    options = dict(cutoff=0.5, num_rays=60)
    sampled = vj.ray_volume(jax.random.key(0), cost, ANCHOR, UNIT, audit_fraction=0.1, **options)
    assert sampled.violation_rate > 0.1
    assert sampled.bound_kind == BoundKind.NONE and "audit_fraction=1" in sampled.status
    assert np.isneginf(sampled.lower) and sampled.kind == Kind.LOWER_BOUND
    everything = vj.ray_volume(jax.random.key(0), cost, ANCHOR, UNIT, audit_fraction=1.0, **options)
    assert everything.bound_kind == BoundKind.CERTIFIED
    cut = everything.trace.status == Status.NON_MONOTONE
    assert np.array_equal(cut, everything.trace.violated) and cut.sum() > 6
    np.testing.assert_allclose(everything.trace.radius[cut], 0.094, rtol=0.02)
    unaudited = vj.ray_volume(jax.random.key(0), cost, ANCHOR, UNIT, audit_fraction=0.0, **options)
    assert not np.any(unaudited.trace.audited) and np.isnan(unaudited.violation_rate)
    assert unaudited.bound_kind == BoundKind.NONE and np.isneginf(unaudited.lower)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(num_rays=0), "num_rays must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(audit_fraction=1.5), "audit_fraction must lie between 0 and 1"),
        (dict(tolerance=0.0), "tolerance must be a positive number of nats"),
        (dict(cutoff=-1.0), "cutoff must be a positive"),
        (dict(proposal=vj.Diagonal(jnp.ones(9))), "Diagonal scale"),
        (dict(proposal=vj.Dense(jnp.eye(9))), "there are 10 parameters"),
        (dict(proposal=vj.Isotropic), "proposal must be .*, got the class Isotropic, not an instance of it; call"),
        (dict(proposal=vj.adam_proposal), "proposal must be one such as .*, got function; call what makes it"),
    ],
)
def test_misuse_is_refused_with_a_remedy(options, words):
    with pytest.raises(ValueError, match=words):
        vj.ray_volume(jax.random.key(0), ball, ANCHOR, UNIT, **{"cutoff": 0.5, **options})
    with pytest.raises(ValueError, match=words):
        vj.ray_stream(jax.random.key(0), ball, ANCHOR, UNIT, **{"cutoff": 0.5, **options})
