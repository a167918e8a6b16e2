"""Low-rank proposals where it is hard: many parameters, stretches of a millionth, transformations; exact volumes.

Mutations these catch: the stretch inverted, its determinant dropped, the projection in float32, a determinant that
trusts U to be orthonormal, the whitened mean doubled or turned round.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax import exact, tree
from volumejax.radial import radial

D, STIFF = 100_000, 50
CUTOFF, CURVATURE = 1e-2, 4.0


@pytest.fixture(scope="module")
def stiff():
    """Orthonormal rows over two leaves, a valley with 50 stiff directions along them, and its parameters."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(D, STIFF)))[0].T
    rows = {"u": jnp.asarray(basis[:, :60_000], jnp.float32).reshape(STIFF, 300, 200),
            "v": jnp.asarray(basis[:, 60_000:], jnp.float32)}  # fmt: skip
    params = jax.tree.map(lambda r: jnp.zeros(r.shape[1:]), rows)
    return Valley(rows), params


class Valley(eqx.Module):
    """½ h |Uθ|², summed in float64: with so many parameters a relative error of 1e-7 moves a ray by a hundredth nat."""

    rows: dict

    def __call__(self, params):
        with jax.enable_x64(True):
            along = sum(jnp.tensordot(tree.wide(self.rows[k]), tree.wide(params[k]), params[k].ndim) for k in params)
            return (0.5 * CURVATURE * jnp.sum(along**2)).astype(jnp.float32)


@pytest.mark.slow
def test_fifty_stiff_directions_among_1e5_are_exact(stiff):
    cost, params = stiff
    truth = exact.quadratic(np.full(STIFF, CURVATURE), cutoff=CUTOFF).log_mass
    pairs = vj.Eigenpairs(jnp.full(STIFF, CURVATURE), cost.rows, jnp.zeros(STIFF))
    proposal = vj.curvature_proposal(pairs, params, vj.Gaussian(1.0), cutoff=CUTOFF)
    for seed in range(3):
        estimate = vj.ray_volume(
            jax.random.key(seed),
            cost,
            params,
            vj.Gaussian(1.0),
            cutoff=CUTOFF,
            proposal=proposal,
            num_rays=48,
            audit_fraction=0.0,
        )
        assert estimate.std_error < 1.0, estimate.summary()
        assert abs(estimate.log_mass - truth) <= 4 * estimate.std_error, (seed, truth, estimate.summary())


def test_memory_is_that_of_the_factors(stiff):
    """No buffer of the compiled draw holds more than a few copies of the factors; D × D would be 40 GB."""
    cost, params = stiff
    proposal = vj.LowRankPrecision(1.0, cost.rows, params)
    compiled = jax.jit(lambda key: proposal.draw(key, params).direction).lower(jax.random.key(0)).compile()
    factors = 4 * D * STIFF
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * factors


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 1e6])
def test_any_stretch_keeps_the_density_of_its_draws(size):
    """Direction and density against the same map in float64. Factors of all sizes, some of them all but parallel."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(6, 40)) * np.logspace(0, 3, 6)[:, None]
    rows[5] = rows[4] * (1 + 1e-4 * rng.normal(size=40))
    factors = jnp.asarray(size * rows, jnp.float32)
    like, key = jnp.zeros(40), jax.random.key(3)
    z = np.asarray(tree.normal_like(key, like), np.float64)
    pull = rng.normal(size=40)
    for kind in (vj.LowRank, vj.LowRankPrecision):
        still = kind(1.0, factors)
        # A posterior's own mean, −ΣΛ(θ0 − m), is long where Σ is; that of a precision would be far away otherwise.
        proposal = still.shifted(pull if kind is vj.LowRank else still.apply_covariance(pull).astype(jnp.float32))
        draw = proposal.draw(key, like)
        basis, stretch, mean = (
            np.asarray(x, np.float64) for x in (proposal.basis, proposal.stretch, proposal.mean)
        )  # fmt: skip
        by = np.eye(40) + basis.T @ ((stretch - 1.0)[:, None] * basis)
        np.testing.assert_allclose(draw.direction, mean + by @ z, rtol=3e-6, atol=3e-6 * np.abs(mean + by @ z).max())
        white = np.linalg.solve(by, mean)
        with jax.enable_x64(True):
            truth = float(radial(40, (z + white) @ (z + white), (z + white) @ white, jnp.inf))
            claimed = float(draw.log_density + radial(40, draw.curvature, draw.slope, jnp.inf))
        truth += -0.5 * white @ white - np.linalg.slogdet(by)[1] - 20 * np.log(2 * np.pi)
        assert abs(claimed - truth) <= 1e-3


def test_the_map_is_symmetric_and_has_the_covariance():
    rng = np.random.default_rng(2)
    factors = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, 8), jnp.float32)
    proposal = vj.LowRank(scale, factors)
    rows, s = np.asarray(factors, np.float64), np.asarray(scale, np.float64)
    applied = [np.asarray(proposal.apply_covariance(e)) for e in jnp.eye(8)]
    np.testing.assert_allclose(applied, np.diag(s**2) + rows.T @ rows, atol=3e-6)


def test_a_zero_factor_changes_nothing():
    like = {"a": jnp.zeros((2, 3))}
    plain, padded = vj.Diagonal(0.7), vj.LowRank(0.7, {"a": jnp.zeros((2, 2, 3))})
    for a, b in zip(*(jax.tree.leaves(p.draw(jax.random.key(0), like)) for p in (plain, padded)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_it_may_be_made_inside_a_transformation_and_mapped():
    factors = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)

    def first(size):
        return vj.LowRankPrecision(1.0, size * factors, jnp.ones(5)).draw(jax.random.key(0), jnp.zeros(5))

    sizes = jnp.array([0.5, 2.0])
    mapped = jax.jit(jax.vmap(first))(sizes)
    for i, size in enumerate(sizes):
        alone = first(size)
        np.testing.assert_allclose(mapped.direction[i], alone.direction, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mapped.log_density[i], alone.log_density, rtol=1e-5)
