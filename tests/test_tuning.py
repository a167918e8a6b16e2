"""Proposals from moments and curvature, against the formulas in float64 NumPy.

Mutations these catch: Λ left out, the mean's sign, θ0 for θ0 − m, the damping under the power, diag(L) for L, ½ tr
forgotten in β.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from volumejax.eigenpairs import Eigenpairs
from volumejax.low_rank import LowRankPrecision
from volumejax.priors import Gaussian, Lebesgue, UniformBox
from volumejax.proposals import Dense, Diagonal
from volumejax.rays import ray_volume
from volumejax.tempering import CurvatureModel, tempered
from volumejax.tuning import adam_proposal, curvature_proposal, damped_proposal, matching_beta

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 0.25]]), "b": jnp.array([0.3, -0.1])}
SIGMA = {"w": 0.5, "b": jnp.array([2.0, 1.0])}
MEAN = {"w": jnp.full((2, 2), 0.25), "b": jnp.array([0.0, 1.0])}
DIAGONAL = {"w": jnp.array([[4.0, 0.0], [1.0, 100.0]]), "b": jnp.array([0.1, 7.0])}
# In the order of ravel_pytree: b before w.
THETA = np.array([0.3, -0.1, 1.0, -2.0, 0.5, 0.25])
CENTRE = np.array([0.0, 1.0, 0.25, 0.25, 0.25, 0.25])
LAMBDA = np.array([0.25, 1.0, 4.0, 4.0, 4.0, 4.0])
H = np.array([0.1, 7.0, 4.0, 0.0, 1.0, 100.0])


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def hessian(seed=0, rank=4):
    """A random positive semidefinite matrix."""
    factor = np.random.default_rng(seed).normal(size=(6, rank))
    return factor @ factor.T


def eigenpairs_of(matrix, rank=4):
    """The largest eigenpairs of a matrix in the order of ravel_pytree, as a pytree."""
    if not np.all(np.isfinite(matrix)):
        values, vectors = np.full(6, np.nan), np.full((6, 6), np.nan)
    else:
        values, vectors = np.linalg.eigh(matrix)
    rows = jnp.asarray(vectors[:, ::-1][:, :rank].T, jnp.float32)
    values = jnp.asarray(values[::-1][:rank], jnp.float32)
    return Eigenpairs(values, {"b": rows[:, :2], "w": rows[:, 2:].reshape(rank, 2, 2)}, jnp.zeros(rank))


PAIRS = eigenpairs_of(hessian())


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("beta", [0.0, 3.0, 1e5])
def test_the_diagonal_is_the_tempered_posterior(beta):
    proposal = curvature_proposal(DIAGONAL, PARAMS, Gaussian(SIGMA, MEAN), beta=beta)
    assert isinstance(proposal, Diagonal)
    proposal.check(PARAMS)
    covariance = 1.0 / (beta * H + LAMBDA)
    np.testing.assert_allclose(flat(proposal.scale) ** 2, covariance, rtol=1e-6)
    np.testing.assert_allclose(flat(proposal.mean), -covariance * LAMBDA * (THETA - CENTRE), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 3.0, 1e3])
def test_the_dense_proposal_is_the_tempered_posterior(beta):
    proposal = curvature_proposal(hessian(), PARAMS, Gaussian(SIGMA, MEAN), beta=beta)
    assert isinstance(proposal, Dense)
    proposal.check(PARAMS)
    covariance = np.linalg.inv(beta * hessian() + np.diag(LAMBDA))
    factor = np.asarray(proposal.cholesky, np.float64)
    assert np.array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(flat(proposal.mean), -covariance @ (LAMBDA * (THETA - CENTRE)), rtol=1e-5, atol=1e-6)


def test_a_diagonal_matrix_gives_the_diagonal_proposal():
    prior = Gaussian(SIGMA, MEAN)
    for choice in ({"beta": 3.0}, {"cutoff": 0.01}):
        diagonal = curvature_proposal(DIAGONAL, PARAMS, prior, **choice)
        dense = curvature_proposal(np.diag(H), PARAMS, prior, **choice)
        np.testing.assert_allclose(np.diag(dense.cholesky), flat(diagonal.scale), rtol=1e-6)
        assert np.count_nonzero(dense.cholesky) == 6
        np.testing.assert_allclose(flat(dense.mean), flat(diagonal.mean), rtol=1e-5)


@pytest.mark.parametrize("curvature", [DIAGONAL, hessian()], ids=["diagonal", "dense"])
def test_no_mean_without_a_shift_or_a_pull(curvature):
    assert curvature_proposal(curvature, PARAMS, Gaussian(SIGMA, MEAN), beta=1.0, shift=False).mean is None
    assert curvature_proposal(curvature, PARAMS, Gaussian(SIGMA, PARAMS), beta=1.0).mean is None
    shifted = curvature_proposal(curvature, PARAMS, Gaussian(SIGMA, MEAN), beta=1.0)
    unshifted = curvature_proposal(curvature, PARAMS, Gaussian(SIGMA, MEAN), beta=1.0, shift=False)
    for name in ("scale", "cholesky"):
        if hasattr(shifted, name):
            assert np.array_equal(flat(getattr(shifted, name)), flat(getattr(unshifted, name)))


def test_flat_priors_have_no_precision():
    positive = jax.tree.map(lambda h: h + 0.5, DIAGONAL)
    for prior in (Lebesgue(), UniformBox(-3.0, 3.0)):
        proposal = curvature_proposal(positive, PARAMS, prior, beta=2.0)
        assert proposal.mean is None
        np.testing.assert_allclose(flat(proposal.scale), 1 / np.sqrt(2 * (H + 0.5)), rtol=1e-6)
        dense = curvature_proposal(np.diag(H + 0.5), PARAMS, prior, beta=2.0)
        np.testing.assert_allclose(np.diag(dense.cholesky), 1 / np.sqrt(2 * (H + 0.5)), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 3.0, 1e3])
@pytest.mark.parametrize("shift", [True, False])
def test_eigenpairs_are_the_tempered_posterior(beta, shift):
    """Alone, with the rest of the diagonal, and with a diagonal below what they explain. Mutations: √λ for λ, the
    diagonal counted twice, μ without Σ's low-rank part."""
    prior = Gaussian(SIGMA, MEAN)
    explained = hessian()
    spare = np.array([0.0, 2.0, 1.0, 0.0, 5.0, 0.5])
    rest = {"b": jnp.asarray((np.diag(explained) + spare)[:2], jnp.float32),
            "w": jnp.asarray((np.diag(explained) + spare)[2:].reshape(2, 2), jnp.float32)}  # fmt: skip
    cases = [
        (curvature_proposal(PAIRS, PARAMS, prior, beta=beta, shift=shift), explained),
        (curvature_proposal(rest, PARAMS, prior, eigenpairs=PAIRS, beta=beta, shift=shift), explained + np.diag(spare)),
        (curvature_proposal(0.0, PARAMS, prior, eigenpairs=PAIRS, beta=beta, shift=shift), explained),
    ]
    for proposal, h in cases:
        assert isinstance(proposal, LowRankPrecision)
        proposal.check(PARAMS)
        covariance = np.linalg.inv(beta * h + np.diag(LAMBDA))
        applied = [flat(proposal.apply_covariance(unravelled(row))) for row in np.eye(6)]
        np.testing.assert_allclose(applied, covariance, rtol=1e-4, atol=3e-6)
        if shift:
            np.testing.assert_allclose(flat(proposal.mean), -covariance @ (LAMBDA * (THETA - CENTRE)), atol=1e-5)
        else:
            assert proposal.mean is None


@pytest.mark.parametrize("cutoff", [1e-3, 0.3])
def test_eigenpairs_match_the_cutoff_as_the_whole_matrix_does(cutoff):
    prior = Gaussian(SIGMA, MEAN)
    for shift in (True, False):
        dense = curvature_proposal(hessian(), PARAMS, prior, cutoff=cutoff, shift=shift)
        pairs = curvature_proposal(PAIRS, PARAMS, prior, cutoff=cutoff, shift=shift)
        covariance = np.asarray(dense.cholesky, np.float64) @ np.asarray(dense.cholesky, np.float64).T
        applied = [flat(pairs.apply_covariance(unravelled(row))) for row in np.eye(6)]
        np.testing.assert_allclose(applied, covariance, rtol=1e-3, atol=1e-5)


def unravelled(row):
    row = jnp.asarray(row, jnp.float32)
    return {"b": row[:2], "w": row[2:].reshape(2, 2)}


def test_one_parameter_and_square_parameters():
    """A D × D array is a matrix, unless it is shaped like the parameters themselves."""
    prior = Gaussian(1.0)
    assert isinstance(curvature_proposal(jnp.full((1, 1), 3.0), jnp.zeros(1), prior, beta=1.0), Dense)
    assert isinstance(curvature_proposal(jnp.full((1, 1), 3.0), jnp.zeros((1, 1)), prior, beta=1.0), Diagonal)
    assert isinstance(curvature_proposal(jnp.ones((2, 2)), jnp.zeros((2, 2)), prior, beta=1.0), Diagonal)
    assert isinstance(curvature_proposal(jnp.eye(4), jnp.zeros((2, 2)), prior, beta=1.0), Dense)
    assert isinstance(curvature_proposal(2.0, PARAMS, prior, beta=1.0), Diagonal)


def test_half_precision_parameters():
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for curvature in (DIAGONAL, hessian()):
        proposal = curvature_proposal(curvature, halves, Gaussian(0.5), beta=1.0)
        proposal.check(halves)
        assert {leaf.dtype for leaf in jax.tree.leaves(proposal)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dimension", [1, 2, 100])
@pytest.mark.parametrize("cutoff", [1e-6, 0.01, 3.0])
def test_the_matching_temperature_of_a_flat_prior(dimension, cutoff):
    """The Gaussian with β = (D+2)/2ε has the covariance of the ellipsoid, 2ε/(D+2)·H⁻¹."""
    h = np.logspace(-3, 2, dimension)
    truth = (dimension + 2) / (2 * cutoff)
    assert np.isclose(matching_beta(h, np.zeros(dimension), cutoff), truth, rtol=1e-9)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dimension, dimension)))
    assert np.isclose(matching_beta((q * h) @ q.T, np.zeros(dimension), cutoff), truth, rtol=1e-9)
    proposal = curvature_proposal(jnp.asarray(h, jnp.float32), jnp.zeros(dimension), Lebesgue(), cutoff=cutoff)
    np.testing.assert_allclose(np.asarray(proposal.scale) ** 2, 2 * cutoff / (dimension + 2) / h, rtol=1e-5)


def brute_force(h, precision, cutoff):
    """The root of ½ tr H(βH+Λ)⁻¹ + 1/β = ε by bisection over thirty decades."""
    matrix, weight = (np.diag(h) if h.ndim == 1 else h), np.diag(precision)

    def excess(log10_beta):
        beta = 10.0**log10_beta
        return 0.5 * np.trace(np.linalg.solve(beta * matrix + weight, matrix)) + 1 / beta - cutoff

    return 10 ** scipy.optimize.bisect(excess, -15, 15, xtol=1e-12)


@pytest.mark.parametrize("cutoff", [1e-4, 0.03, 5.0, 1e3])
@pytest.mark.parametrize("h", [H, hessian(), np.zeros(6)], ids=["diagonal", "dense", "nothing"])
def test_the_matching_temperature_against_brute_force(h, cutoff):
    assert np.isclose(matching_beta(h, LAMBDA, cutoff), brute_force(h, LAMBDA, cutoff), rtol=1e-8)


@hypothesis.given(
    hnp.arrays(np.float64, 6, elements=st.floats(0.0, 1e4)),
    hnp.arrays(np.float64, 6, elements=st.floats(1e-4, 1e4)),
    st.floats(1e-8, 1e4),
)
def test_the_matching_temperature_solves_its_equation(h, precision, cutoff):
    beta = matching_beta(h, precision, cutoff)
    assert np.isclose(0.5 * np.sum(h / (beta * h + precision)) + 1 / beta, cutoff, rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 0.25])
def test_the_papers_form(exponent):
    proposal = damped_proposal(DIAGONAL, PARAMS, damping=0.01, exponent=exponent)
    np.testing.assert_allclose(flat(proposal.scale), 1 / (H**exponent + 0.01), rtol=1e-5)
    assert proposal.mean is None
    assert flat(proposal.scale).max() <= 100.0


def test_adam_moments_are_bias_corrected():
    optimizer = optax.adam(1e-2, b2=0.9)
    # Adam's own step counter mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(DIAGONAL, optimizer.init(PARAMS))
    prior = Gaussian(SIGMA, MEAN)
    proposal = adam_proposal(state, PARAMS, prior, beta=3.0, damping=0.1, exponent=0.4, gradient_batch=2, b2=0.9)
    covariance = 1.0 / (3.0 * 2 * (H**0.8 + 0.1) ** 2 + LAMBDA)
    np.testing.assert_allclose(flat(proposal.scale) ** 2, covariance, rtol=1e-5)
    np.testing.assert_allclose(flat(proposal.mean), -covariance * LAMBDA * (THETA - CENTRE), rtol=1e-5)
    assert adam_proposal(state, PARAMS, prior, cutoff=0.1, shift=False).mean is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: damped_proposal(DIAGONAL, PARAMS, damping=0.0), "damping must be positive, got 0.0; it bounds"),
        (lambda: damped_proposal(DIAGONAL, PARAMS, damping=float("nan")), "damping must be positive"),
        (
            lambda: damped_proposal({"w": -1.0, "b": 0.0}, PARAMS, damping=0.1),
            r"curvature\['w'\] has negative or NaN entries; take the GGN",
        ),
        (lambda: damped_proposal({"w": 1.0}, PARAMS, damping=0.1), "curvature is a pytree of another structure"),
        (
            lambda: damped_proposal({"w": 1.0, "b": jnp.ones(3)}, PARAMS, damping=0.1),
            r"curvature\['b'\] has shape \(3,\)",
        ),
        (lambda: curvature_proposal(DIAGONAL, PARAMS, Gaussian(1.0)), "either beta or cutoff; pass the cutoff"),
        (
            lambda: curvature_proposal(DIAGONAL, PARAMS, Gaussian(1.0), cutoff=0.0),
            "cutoff must be a positive number of nats",
        ),
        (
            lambda: curvature_proposal(DIAGONAL, PARAMS, Lebesgue(), beta=1.0),
            "not positive; raise beta or use a proper prior",
        ),
        (lambda: curvature_proposal(hessian(), PARAMS, Lebesgue(), beta=1.0), "not positive definite; .* proper prior"),
        (lambda: curvature_proposal(-hessian(), PARAMS, Gaussian(9.0), beta=1.0), "not positive definite"),
        (
            lambda: curvature_proposal(np.full((6, 6), np.nan), PARAMS, Gaussian(1.0), beta=1.0),
            "NaN or infinite entries",
        ),
        (
            lambda: curvature_proposal(np.full((6, 6), np.nan), PARAMS, Gaussian(1.0), cutoff=0.1),
            "NaN or infinite entries",
        ),
        (
            lambda: curvature_proposal({"w": jnp.inf, "b": 1.0}, PARAMS, Gaussian(1.0), beta=1.0),
            "NaN or infinite entries",
        ),
        (lambda: curvature_proposal(DIAGONAL, PARAMS, Gaussian(1.0), beta=-1.0), "not positive"),
        (
            lambda: curvature_proposal(np.eye(5), PARAMS, Gaussian(1.0), beta=1.0),
            r"shape \(5, 5\), but there are 6 parameters",
        ),
        (
            lambda: curvature_proposal(np.ones(6), PARAMS, Gaussian(1.0), beta=1.0),
            "curvature is a pytree of another structure",
        ),
        (lambda: curvature_proposal(DIAGONAL, PARAMS, Gaussian({"w": 1.0}), beta=1.0), "Gaussian sigma"),
        (lambda: adam_proposal(optax.sgd(0.1).init(PARAMS), PARAMS, Gaussian(1.0), beta=1.0), "Adam"),
        (lambda: adam_proposal(None, PARAMS, Gaussian(1.0), beta=1.0, damping=-0.1), "damping must not be negative"),
        (lambda: adam_proposal(None, PARAMS, Gaussian(1.0), beta=1.0, gradient_batch=0), "gradient_batch must be at"),
        (lambda: curvature_proposal(hessian(), PARAMS, Gaussian(1.0), beta=1.0, eigenpairs=PAIRS), "holds its eigenp"),
        (lambda: curvature_proposal(PAIRS, PARAMS, Gaussian(1.0), beta=1.0, eigenpairs=PAIRS), "given twice"),
        (
            lambda: curvature_proposal(1e-3, PARAMS, Gaussian(1.0), beta=1.0, eigenpairs=PAIRS),
            "the eigenpairs explain .* of a curvature whose diagonal sums to .*: they are not of one and the same",
        ),
        (lambda: curvature_proposal(PAIRS, PARAMS, Lebesgue(), beta=1.0), "not positive; raise beta or use a proper"),
        (lambda: curvature_proposal(PAIRS, PARAMS["w"], Gaussian(1.0), beta=1.0), "vectors of eigenpairs do not have"),
        (
            lambda: curvature_proposal(eigenpairs_of(np.full((6, 6), np.nan)), PARAMS, Gaussian(1.0), beta=1.0),
            "NaN or infinite entries",
        ),
    ],
)
def test_misuse_is_refused_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def at_no_temperature():
    """Proposals of every kind and source at β = 0, which are the prior's own Gaussian seen from the anchor."""
    prior = Gaussian(SIGMA, MEAN)
    optimizer = optax.adam(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.update(PARAMS, optimizer.init(PARAMS))[1]
    return {
        "adam": adam_proposal(state, PARAMS, prior, beta=0.0),
        "diagonal": curvature_proposal(DIAGONAL, PARAMS, prior, beta=0.0),
        "dense": curvature_proposal(hessian(), PARAMS, prior, beta=0.0),
        "low rank": curvature_proposal(0.0, PARAMS, prior, eigenpairs=PAIRS, beta=0.0),
        "in the sweep": tempered(CurvatureModel(DIAGONAL, PAIRS.values, PAIRS.vectors), PARAMS, prior, 0.0, 1.0),
    }


def nearly_flat(params):
    return 1e-9 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["adam", "diagonal", "dense", "low rank", "in the sweep"])
def test_without_temperature_and_cutoff_every_ray_weighs_one(name):
    """Every ray stays inside for ever and its proposal is its prior: log w = 0. Mutations: the mean left out or with
    the other sign, σ for σ², the prior's mean forgotten."""
    prior, proposal = Gaussian(SIGMA, MEAN), at_no_temperature()[name]
    estimate = ray_volume(jax.random.key(1), nearly_flat, PARAMS, prior, cutoff=1e30, proposal=proposal, num_rays=64)
    assert np.all(np.isposinf(estimate.trace.radius))
    np.testing.assert_allclose(estimate.trace.log_weight, 0.0, atol=1e-4)
    assert abs(float(estimate.log_mass)) < 1e-4 and float(estimate.std_error) < 1e-4
