"""The quadratic model: exact on quadratics, a bracket with an error by Lanczos, and never a bound.

Mutations these catch: a prior's offset left out or not rotated, whitening on one side only, noise eigenvalues counted
as curvature, the Gauss–Radau node on the wrong side, a log det without its unit, probes' weights not scaled to D.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax import exact, reference, tails
from volumejax.lanczos import lanczos
from volumejax.spectrum import gauss, gauss_radau

HARMONIC = 1.0 / np.arange(1, 21)


class Mirrored(eqx.Module):
    """½ Σ hᵢ(Rw)ᵢ² with a reflection R, so that no curvature lies along an axis."""

    h: jax.Array
    normal: jax.Array

    def reflect(self, w):
        return w - 2.0 * self.normal * jnp.dot(self.normal, w, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, w):
        return 0.5 * jnp.sum(self.h * jnp.square(self.reflect(w)))


def mirrored(h, seed=1):
    normal = jax.random.normal(jax.random.key(seed), np.shape(h))
    return Mirrored(jnp.asarray(h, jnp.float32), normal / jnp.linalg.norm(normal))


def measure(problem, seed=0, **options):
    return vj.laplace_volume(
        jax.random.key(seed), problem.cost, problem.params, problem.prior, cutoff=problem.cutoff, **options
    )


@pytest.mark.parametrize(
    "problem",
    [
        reference.quadratic(np.ones(10), cutoff=0.01),
        *(reference.quadratic(HARMONIC, cutoff=c) for c in (1e-3, 1e-2, 1e-1, 1.0)),
        *(reference.quadratic(np.repeat([1.0, 0.0], [5, 45]), cutoff=c) for c in (1e-6, 1e-4, 1e-2)),
        reference.quadratic(HARMONIC, cutoff=1e-2, sigma=0.7, minimum=0.4),
        reference.ellipsoid(np.logspace(-3, 2, 100), cutoff=0.01),
    ],
    ids=lambda problem: f"{problem.name}, {problem.cutoff}",
)
def test_dense_is_exact_on_families_a_and_b(problem):
    estimate = measure(problem)
    assert abs(estimate.log_mass - problem.log_mass) <= 1e-6
    assert estimate.std_error == 0.0
    assert estimate.kind == vj.Kind.MODEL and estimate.bound_kind == vj.BoundKind.NONE
    assert estimate.lower == -np.inf and estimate.upper == (0.0 if problem.prior.proper else np.inf)
    assert abs(estimate.prior_term + estimate.volume_term - estimate.log_mass) <= 1e-9
    assert "no bound" in estimate.status and "quadratic model" in estimate.summary()


@pytest.mark.slow
def test_dense_at_a_thousand_dimensions():
    problem = reference.quadratic(np.ones(1000), cutoff=0.5)
    assert abs(measure(problem, spectrum=vj.DenseSpectrum()).log_mass - problem.log_mass) <= 1e-6


@pytest.mark.parametrize("spectrum", [vj.DenseSpectrum(), vj.LanczosSpectrum(num_steps=30)], ids=["dense", "Lanczos"])
def test_prior_with_scales_and_an_offset_along_turned_axes(spectrum):
    """Against the exact tail of a quadratic that is built here, from its matrix in float64."""
    h, cost = np.logspace(-1, 1, 30), mirrored(np.logspace(-1, 1, 30))
    generator = np.random.default_rng(0)
    sigma = {"a": 0.8, "b": generator.uniform(0.5, 1.5, (4, 5)).astype(np.float32)}
    params = {"a": jnp.asarray(generator.normal(size=10), jnp.float32), "b": jnp.full((4, 5), 0.3)}
    mean = jax.tree.map(lambda x: x + 0.4, params)

    def whole(w):
        flat = jnp.concatenate([w["a"], w["b"].ravel()]) - jnp.concatenate([params["a"], params["b"].ravel()])
        return cost(flat)

    mirror = np.eye(30) - 2.0 * np.outer(np.float64(cost.normal), np.float64(cost.normal))
    scale = np.concatenate([np.full(10, np.float64(np.float32(0.8))), np.float64(sigma["b"]).ravel()])
    values, vectors = np.linalg.eigh(scale[:, None] * (mirror * h @ mirror) * scale)
    truth = tails.weighted_chi_square(values, np.square(vectors.T @ (-0.4 / scale)), 2 * 0.5).log_mass
    prior = vj.Gaussian(sigma, mean=mean)
    estimate = vj.laplace_volume(jax.random.key(0), whole, params, prior, cutoff=0.5, spectrum=spectrum)
    if isinstance(spectrum, vj.DenseSpectrum):
        assert abs(estimate.log_mass - truth) <= 1e-4
    else:
        assert abs(estimate.log_mass - truth) <= 4.0 * estimate.std_error
        assert estimate.std_error <= 3.0


def test_flat_directions_of_a_turned_quadratic_stay_flat():
    h = np.repeat([1.0, 0.0], [5, 45])
    for spectrum in (vj.DenseSpectrum(), vj.LanczosSpectrum(num_steps=20)):
        estimate = vj.laplace_volume(
            jax.random.key(0), mirrored(h), jnp.zeros(50), vj.Gaussian(1.0), cutoff=1e-6, spectrum=spectrum
        )
        assert abs(estimate.log_mass - -35.739751) <= 4.0 * estimate.std_error + 1e-3
        flat = vj.laplace_volume(
            jax.random.key(0), mirrored(h), jnp.zeros(50), vj.Lebesgue(), cutoff=1e-6, spectrum=spectrum
        )
        assert flat.log_mass == np.inf and "proper prior" in flat.status


@pytest.mark.parametrize("spectrum", [vj.DenseSpectrum(), vj.LanczosSpectrum(num_probes=2, num_steps=3)])
def test_a_gradient_that_the_model_leaves_out_is_told(spectrum):
    h = jnp.array([10.0, 1.0, 0.1])
    for shift in (0.0, 0.03):
        anchor = jnp.full(3, shift)
        estimate = vj.laplace_volume(
            jax.random.key(0),
            lambda w: 0.5 * jnp.sum(h * w**2),
            anchor,
            vj.Gaussian(1.0),
            cutoff=0.01,
            spectrum=spectrum,
        )
        assert ("along its gradient" in estimate.status) == (shift > 0.0)
        # One step down the gradient: ½ (Σh²)²/Σh³ · shift², of what the cost leaves of the cutoff.
        left = 0.01 - 0.5 * 11.1 * shift**2
        assert np.isclose(estimate.trace.descent, 0.5 * 101.01**2 / 1001.001 * shift**2 / left, rtol=1e-4)
    steps = lambda w: jnp.mean((w > 1.0).astype(jnp.float32))
    flat = vj.laplace_volume(jax.random.key(0), steps, jnp.zeros(3), vj.Gaussian(1.0), cutoff=0.2, spectrum=spectrum)
    assert "no curvature at all" in flat.status


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("floor", [None, 0.0999])
def test_log_det_bracket_at_ten_thousand_dimensions(seed, floor):
    h = np.logspace(-1, 2, 10_000)
    truth = float(np.log(h).sum())
    spectrum = vj.LanczosSpectrum(num_probes=4, num_steps=80, floor=floor)
    estimate = vj.laplace_volume(
        jax.random.key(seed), mirrored(h), jnp.zeros(10_000), vj.Lebesgue(), cutoff=0.01, spectrum=spectrum
    )
    low, high = estimate.trace.log_det
    error = 2.0 * float(estimate.trace.probe_error)
    assert low <= high and high - low <= 1e-3 * truth
    assert low - 3.0 * error <= truth <= high + 3.0 * error and error <= 0.015 * truth
    answer = exact.ellipsoid(h, cutoff=0.01).log_mass
    assert abs(estimate.log_mass - answer) <= 4.0 * estimate.std_error
    assert estimate.trace.bracket[0] <= estimate.log_mass <= estimate.trace.bracket[1]


@pytest.mark.parametrize("num_steps", [30, 80])
@pytest.mark.parametrize("floor", [None, 0.0999])
def test_a_width_that_few_steps_leave_is_shown(num_steps, floor):
    h = np.logspace(-1, 4, 10_000)
    truth = float(np.log(h).sum())
    spectrum = vj.LanczosSpectrum(num_probes=2, num_steps=num_steps, floor=floor)
    estimate = vj.laplace_volume(
        jax.random.key(0), mirrored(h), jnp.zeros(10_000), vj.Lebesgue(), cutoff=0.01, spectrum=spectrum
    )
    low, high = estimate.trace.log_det
    assert low <= truth <= high and high - low >= 0.02 * truth
    assert estimate.std_error >= 0.25 * (high - low)
    assert "more steps" in estimate.status


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_lanczos_under_a_gaussian_prior(offset):
    h = np.logspace(-1, 2, 3000)
    cost = mirrored(h)
    minimum = np.asarray(cost.reflect(jnp.full(3000, offset)), np.float64)
    truth = exact.quadratic(h, cutoff=30.0, sigma=0.5, minimum=minimum).log_mass
    for seed in range(3):
        estimate = vj.laplace_volume(
            jax.random.key(seed), cost, jnp.zeros(3000), vj.Gaussian(0.5, mean=jnp.full(3000, offset)), cutoff=30.0
        )
        assert abs(estimate.log_mass - truth) <= 4.0 * estimate.std_error
        assert estimate.std_error <= 0.01 * abs(truth)
        assert np.ptp(estimate.trace.bracket) <= 1.0


def test_probes_errors_are_honest():
    """Root mean square of the deviations over their errors. Mutation caught: the variance without its factor of 2."""
    h = np.logspace(-1, 1, 200)
    cost, truth = mirrored(h), exact.ellipsoid(h, cutoff=0.01).log_mass
    spectrum = vj.LanczosSpectrum(num_probes=4, num_steps=25)
    scores = []
    for seed in range(100):
        estimate = vj.laplace_volume(
            jax.random.key(seed), cost, jnp.zeros(200), vj.Lebesgue(), cutoff=0.01, spectrum=spectrum
        )
        scores.append((estimate.log_mass - truth) / estimate.std_error)
    assert 0.8 <= np.sqrt(np.mean(np.square(scores))) <= 1.25


def test_rules_bracket_and_lanczos_ends_where_the_space_ends():
    h = np.repeat([1.0, 2.0, 5.0], 20)
    run = lanczos(mirrored_product(h), jax.random.normal(jax.random.key(0), (60,)), 30)
    assert len(run.diagonal) == 3 and run.residual == 0.0
    assert np.allclose(gauss(run).nodes, [1.0, 2.0, 5.0], atol=1e-5)
    h = np.linspace(1.0, 9.0, 60)
    run = lanczos(mirrored_product(h), jax.random.normal(jax.random.key(0), (60,)), 4)
    whole = lanczos(mirrored_product(h), jax.random.normal(jax.random.key(0), (60,)), 60)
    for rule in (gauss(run), gauss_radau(run, 0.9)):
        assert abs(rule.weights.sum() - 1.0) <= 1e-12
        # Exact for polynomials up to degree 7.
        want, got = (r.weights @ r.nodes**6 for r in (gauss(whole), rule))
        assert abs(got / want - 1.0) <= 1e-4
    low, exactly, high = (r.weights @ np.log(r.nodes) for r in (gauss_radau(run, 0.9), gauss(whole), gauss(run)))
    assert low < exactly < high


def mirrored_product(h):
    return jax.grad(mirrored(h))


def test_a_given_product_replaces_the_hessian():
    cost = lambda w: jnp.sum(jnp.cos(w["a"])) - 3.0
    params = {"a": jnp.zeros(3)}
    hessian = vj.laplace_volume(jax.random.key(0), cost, params, vj.Gaussian(1.0), cutoff=0.1)
    assert hessian.trace.negative == -1.0 and "no minimum" in hessian.status and hessian.log_mass == 0.0
    given = vj.laplace_volume(jax.random.key(0), cost, params, vj.Gaussian(2.0), cutoff=0.1, product=lambda v: v)
    assert abs(given.log_mass - exact.quadratic(np.ones(3), cutoff=0.1, sigma=2.0).log_mass) <= 1e-6


def test_results_can_be_logged():
    estimate = measure(reference.quadratic(HARMONIC, cutoff=0.1), spectrum=vj.LanczosSpectrum(num_steps=30))
    flat = estimate.to_dict()
    assert flat["kind"] == "model" and flat["bound_kind"] == "none" and flat["num_rays"] == 8
    assert estimate.evaluations == int(estimate.trace.products) > 8
    tree = pytest.importorskip("xarray") and estimate.to_datatree()
    assert set(tree["trace"].data_vars) == {"nodes", "counts", "bracket", "log_det"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q: vj.laplace_volume(*q, vj.UniformBox(-1.0, 1.0), cutoff=0.1), "knows no walls"),
        (lambda q: vj.laplace_volume(*q, vj.Gaussian(1.0), cutoff=-1.0), "positive, finite number"),
        (lambda q: vj.laplace_volume(*q, vj.Gaussian, cutoff=0.1), "got the class Gaussian, not an instance of it"),
        (lambda _: vj.LanczosSpectrum(num_probes=0), "a probe and a step"),
        (lambda _: vj.LanczosSpectrum(floor=-1.0), "floor must be"),
        (lambda _: vj.DenseSpectrum(batch_size=0), "at least 1"),
    ],
)
def test_misuse_names_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call((jax.random.key(0), lambda w: jnp.sum(w**2), jnp.zeros(3)))
