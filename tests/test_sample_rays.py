"""Rays of samples against closed forms and brute quadrature.

Mutations these catch: a ray that jumps a barrier, a sample behind one that counts, the ridge at the guide's places, β
of the guide for that of the ridge, the prior's pull with the wrong sign, t^D for t^(D−1) dt, the prior's own wall
forgotten, a wall that makes the spline ring.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.ensemble import ensemble_of, with_bulges, with_ridge
from volumejax.frames import frame_of
from volumejax.priors import Gaussian, UniformBall, UniformBox
from volumejax.regions import Star
from volumejax.sample_rays import POINTS, SampleRays, look_along

CUTOFF = 0.1


def star(cost, anchor, prior, bulges=(0.7,), cutoff=CUTOFF):
    plain = ensemble_of(cost, frame_of(prior, anchor), cutoff=cutoff, region=Star(16))
    return with_ridge(with_bulges(plain, bulges), 0.0, 1.4)


def humped(x):
    """3 s² but for a hump on the first axis, where s is near 0.1, which rises beyond CUTOFF."""
    return 3.0 * jnp.sum(x**2) + 0.09 * jnp.exp(-300.0 * jnp.sum((x - jnp.array([0.1, 0.0, 0.0])) ** 2))


def along(ensemble, *points):
    """What a record holds of chains that stand there."""
    displacements = jnp.asarray(points, jnp.float32)
    ends, costs = (np.asarray(x) for x in jax.vmap(lambda d: look_along(ensemble, d))(displacements))
    pulled = np.asarray(jax.vmap(ensemble.frame.pulled)(displacements))
    return ends, costs, np.sum(np.square(np.asarray(displacements, float)), axis=1), pulled


@pytest.mark.parametrize("length", [1e-3, 0.1, 0.9, 1.0])
def test_a_ray_goes_to_the_wall(length):
    """To a cost of CUTOFF at t = 1/length, or as far as anybody looks."""
    ensemble = star(lambda x: CUTOFF * jnp.sum(x**2), jnp.zeros(3), Gaussian(1.0))
    (end,), (costs,), *_ = along(ensemble, [length, 0.0, 0.0])
    np.testing.assert_allclose(end, min(1.0 / length, 35.2), rtol=1e-6 if length > 0.01 else 0.1)
    np.testing.assert_allclose(costs, CUTOFF * (length * end * np.arange(1, POINTS + 1) / POINTS) ** 2, rtol=1e-5)


def test_a_ray_ends_where_the_prior_does_and_nan_is_a_wall():
    flat = lambda x: 0.0 * jnp.sum(x)
    for prior, expected in ((UniformBox(-1.0, 3.0), 4.0), (UniformBall(1.0), 1.0 / np.sqrt(0.3125))):
        ensemble = star(flat, jnp.zeros(5), prior)
        (end,), *_ = along(ensemble, np.array([-0.25, 0.5, 0.0, 0.0, 0.0]) / np.asarray(ensemble.frame.scale))
        np.testing.assert_allclose(end, expected, rtol=1e-6)
    # Of two dimensions a prior leaves e⁻⁶⁰ of its density at 11 standard deviations.
    ensemble = star(flat, jnp.zeros(2), Gaussian(1.0))
    assert 10.0 < along(ensemble, [1.0, 0.0])[0][0] < 14.0
    # The cost has 0.03 of CUTOFF there.
    torn = star(lambda x: jnp.where(x[0] > 0.5, jnp.nan, jnp.sum(x**2) / 100.0), jnp.zeros(2), Gaussian(1.0))
    seen = along(torn, [0.25, 0.0])
    np.testing.assert_allclose(seen[0], 2.0, rtol=1e-6)
    mass, densities = SampleRays(torn, 0.0, np.array([[0.0, 0.0], [20.0, 0.0]])).integrals(*seen)
    expected = by_hand(torn, np.array([[0.0, 0.0], [20.0, 0.0]]), np.array([0.25, 0.0]), 2.0)
    np.testing.assert_allclose([mass[0], *densities[0]], expected, atol=1e-3)


def by_hand(ensemble, betas, point, wall):
    """J and I on a grid of a hundred thousand points in t, of the cost itself."""
    t = np.linspace(0.0, wall, 100_001)[1:]
    places = jnp.asarray(np.outer(t, point) * np.asarray(ensemble.frame.scale), jnp.float32)
    cost = np.asarray(jax.vmap(ensemble.cost)(places), float)
    at = lambda fraction: np.interp(fraction * t, t, cost, left=0.0)
    guide = np.mean([at(g) for g in ensemble.guides], axis=0)
    sharpness = float(ensemble.ridge.sharpness)
    ridge = float(ensemble.ridge.share) / sharpness * np.log(sum(np.exp(sharpness * at(f)) for f in ensemble.eyes))
    pull = 0.0 if ensemble.frame.pull is None else np.sum(np.asarray(ensemble.frame.pull) * point)
    prior = (len(point) - 1) * np.log(t) - 0.5 * ensemble.frame.stiffness * np.sum(point**2) * t**2 - pull * t
    inside = np.cumsum(cost > CUTOFF) == 0
    energies = [0.0, *(guide * b + ridge * c for b, c in betas)]
    return [np.log(np.sum(inside * np.exp(prior - energy)) * (t[1] - t[0])) for energy in energies]


@pytest.mark.parametrize("prior", [Gaussian(0.5, jnp.array([0.3, -0.2, 0.1])), UniformBox(-0.16, 0.16)])
def test_integrals_along_rays_against_brute_quadrature(prior):
    """The second point is on the far side of a hump; the box cuts off the last ray but one."""
    ensemble = star(humped, jnp.zeros(3), prior, bulges=(0.5, 0.3))
    betas = np.array([[60.0, 0.0], [30.0, 30.0], [0.0, 60.0], [0.0, 20.0]])
    rays, unit = SampleRays(ensemble, 0.0, betas), np.asarray(ensemble.frame.scale)
    points = np.array([[0.05, 0.0, 0.0], [0.15, 0.0, 0.0], [0.0, 0.15, -0.02], [-0.05, -0.07, 0.03]]) / unit
    seen = along(ensemble, *points)
    mass, densities = rays.integrals(*seen)
    assert np.isneginf(mass[1]) and np.isfinite(densities).all()
    for chain in (0, 2, 3):
        expected = by_hand(ensemble, betas, points[chain], min(float(seen[0][chain]), 3.0))
        np.testing.assert_allclose([mass[chain], *densities[chain]], expected, atol=2e-3)
    assert (seen[0][2] < 1.1) == isinstance(prior, UniformBox)


@pytest.mark.parametrize("dimension", [1, 10, 5000, 100_000])
def test_in_many_dimensions_too(dimension):
    """Of ½ h |δ|² J is closed, and I nearly so: guide and ridge are that cost but for factors."""
    stiff = 0.5 * dimension / CUTOFF
    ensemble = star(lambda x: stiff * jnp.sum(x**2) / dimension, jnp.zeros(dimension), UniformBall(1e3), bulges=())
    # In units of the ball's own width.
    wall = np.sqrt(CUTOFF * dimension / stiff) / float(ensemble.frame.scale)
    betas = np.array([0.0, 0.5, 1.0, 3.0]) * stiff
    rays = SampleRays(ensemble, 0.0, np.stack([betas, 0.0 * betas], axis=1))
    depths = np.array([0.05, 0.3, 0.9, 0.99])
    points = np.outer(depths * wall, np.full(dimension, 1.0 / np.sqrt(dimension)))
    mass, densities = rays.integrals(*along(ensemble, *points))
    # With t = s/depth, ∫ t^(D−1) dt up to the wall is depth^(−D)/D.
    log = -dimension * np.log(depths) - np.log(dimension)
    # What is left is the rounding of the costs.
    near = 2e-3 + 3e-7 * dimension
    np.testing.assert_allclose(mass, log, atol=near)
    s = np.exp(np.linspace(-2.0 - 40.0 / dimension, 0.0, 400_001))
    for beta, found in zip(betas, densities.T, strict=True):
        logs = dimension * np.log(s) - beta * CUTOFF * s**2
        expected = np.log(np.trapezoid(np.exp(logs - logs.max()), np.log(s))) + logs.max() - dimension * np.log(depths)
        np.testing.assert_allclose(found, expected, atol=near)
