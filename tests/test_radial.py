"""The radial integral against mpmath, closed forms and its own derivatives.

Mutations these catch: D for D−1 in the exponent, the linear term dropped at an inner mode, log1p(x) − x by
subtraction, a window that ends after 20 nats instead of 40, one Gauss–Legendre panel instead of three.
"""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.special import gammaln

from volumejax import radial as vr
from volumejax.radial import radial_mode


def radial(*arguments):
    """On the host results are float64 outside enable_x64, which NumPy keeps and jax.numpy would round."""
    value = vr.radial(*arguments)
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value)


DIMENSIONS = [1, 2, 3, 10, 10**3, 10**6, 10**9, 10**12]
RATIOS = [1e-6, 1e-4, 1e-2, 0.1, 0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 1.5, 2.0, 5.0, 10.0, 100.0, 1e3, np.inf]


@functools.cache
def gauss_legendre(order=24):
    """Nodes and weights to the working precision of mpmath, by Newton's method on the Legendre polynomial."""
    nodes, weights = [], []
    for guess in np.polynomial.legendre.leggauss(order)[0]:
        x = mp.mpf(float(guess))
        for _ in range(4):
            before, now = mp.mpf(1), x
            for k in range(2, order + 1):
                before, now = now, ((2 * k - 1) * x * now - (k - 1) * before) / k
            slope = order * (x * now - before) / (x * x - 1)
            x -= now / slope
        nodes.append(x)
        weights.append(2 / ((1 - x * x) * slope * slope))
    return nodes, weights


def exact(D, a, b, R):
    """log ∫_0^R r^{D−1} exp(−a r²/2 + b r) dr by composite quadrature around the peak, in 40 digits."""
    with mp.workdps(40):
        n, a, b, R = mp.mpf(D - 1), mp.mpf(a), mp.mpf(b), mp.mpf(R)
        exponent = lambda r: (n * mp.log(r) if n else 0) - a * r * r / 2 + b * r
        if a == 0:
            mode = n / -b if b < 0 else mp.inf
        else:
            mode = max((b + mp.sqrt(b * b + 4 * a * n)) / (2 * a), mp.mpf(0))
        peak = min(mode, R)
        slope = (n / peak if n else 0) - a * peak + b
        curvature = (n / peak**2 if n else 0) + a
        scales = [1 / x for x in (abs(slope), mp.sqrt(curvature)) if x > 0]
        width = min(scales) if scales else peak
        steps = [mp.mpf(x) for x in (0, 0.5, 1, 2, 4, 8, 15, 30, 60, 100)]
        cuts = sorted({max(peak - width * s, mp.mpf(0)) for s in steps} | {min(peak + width * s, R) for s in steps})
        top = exponent(peak) if peak > 0 else mp.mpf(0)
        total = mp.mpf(0)
        for low, high in itertools.pairwise(cuts):
            half = (high - low) / 2
            for x, w in zip(*gauss_legendre(), strict=False):
                total += w * half * mp.exp(exponent(low + half * (1 + x)) - top)
        return top + mp.log(total)


def peak_of(D, a, b):
    """The peak of the integrand in log r, which is positive in every dimension."""
    if a == 0:
        return D / -b if b < 0 else 1.0
    root = np.hypot(b, 2.0 * np.sqrt(a * D))
    return (b + root) / (2 * a) if b >= 0 else 2 * D / (root - b)


def grid(D):
    """Arguments (a, b, R) around the peak, of both signs of b, weak and strong."""
    rows = []
    for a in (1.0, 3e5, 1e-8, 0.0):
        unit = np.sqrt(D * a) if a > 0 else np.sqrt(D)
        for strength in (0.0, 1e-3, 1.0, -1e-3, -1.0, -50.0) if a == 0 else (0.0, 1e-3, -1e-3, 1.0, -1.0, 50.0, -50.0):
            b = strength * unit
            if a == 0 and b > 0:
                continue
            for ratio in RATIOS:
                if np.isfinite(ratio) or a > 0 or b < 0:
                    rows.append((a, b, ratio * peak_of(D, a, b)))
    return rows


def test_the_grid_has_two_thousand_points():
    assert sum(len(grid(D)) for D in DIMENSIONS) >= 2_000


@pytest.mark.slow
@pytest.mark.parametrize("D", DIMENSIONS)
def test_agrees_with_mpmath(D):
    a, b, R = np.array(grid(D)).T
    got = np.asarray(radial(float(D), a, b, R))
    truth = [exact(D, *row) for row in grid(D)]
    error = np.array([abs(float(mp.mpf(float(x)) - y)) for x, y in zip(got, truth, strict=False)])
    rho = np.minimum(R, [peak_of(D, *row[:2]) for row in grid(D)])
    bound = 16 * 2.0**-53 * (D * (1 + np.abs(np.log(rho))) + a * rho**2 + np.abs(b) * rho)
    assert np.all(error <= bound), (error / bound).max()


@pytest.mark.parametrize("D", DIMENSIONS)
def test_gradients_have_their_closed_forms(D):
    with jax.enable_x64(True):
        f = lambda a, b, R: radial(float(D), a, b, R)
        # No exponent: D log R − log D.
        assert np.isclose(jax.grad(f, 2)(0.0, 0.0, 2.5), D / 2.5, rtol=1e-9, atol=0)
        # Gaussian over the whole line: E r² = D/a, E r = √(2/a) Γ((D+1)/2)/Γ(D/2).
        assert np.isclose(jax.grad(f, 0)(0.3, 0.0, jnp.inf), -D / 0.6, rtol=1e-9, atol=0)
        mean = np.sqrt(2 / 0.3) * np.exp(float(mp.loggamma(mp.mpf(D + 1) / 2) - mp.loggamma(mp.mpf(D) / 2)))
        if D <= 10**6:  # beyond, the gamma functions themselves lose the nine digits in float64
            assert np.isclose(jax.grad(f, 1)(0.3, 0.0, jnp.inf), mean, rtol=1e-9, atol=0)
        # Exponential: Γ(D)/|b|^D.
        assert np.isclose(jax.grad(f, 1)(0.0, -2.0, jnp.inf), D / 2.0, rtol=1e-9, atol=0)
        assert jax.grad(f, 2)(1.0, -2.0, jnp.inf) == 0.0


@pytest.mark.parametrize("D", [1, 3, 1000])
@pytest.mark.parametrize("b", [-3.0, 0.0, 2.0])
def test_gradients_agree_with_differences(D, b):
    with jax.enable_x64(True):
        at, h = (0.7, b, 1.1 * np.sqrt(D / 0.7)), 1e-5
        got = jax.grad(lambda x: radial(D, *x))(tuple(map(jnp.float64, at)))
        for i in range(3):
            step = np.eye(3)[i] * h * max(abs(at[i]), 1.0)
            slope = (radial(D, *(np.add(at, step))) - radial(D, *(np.subtract(at, step)))) / (2 * step[i])
            assert np.isclose(got[i], slope, rtol=1e-6)


def test_limits():
    assert radial(5, 1.0, 0.0, 0.0) == -jnp.inf
    assert radial(5, 0.0, 0.0, jnp.inf) == jnp.inf
    assert radial(5, 0.0, 1.0, jnp.inf) == jnp.inf
    assert np.isclose(radial(5, 0.0, -2.0, jnp.inf), gammaln(5) - 5 * np.log(2))
    assert np.all(
        np.isnan(radial(jnp.array([0.5, 5, 5, 5]), jnp.array([1.0, -1, 1, jnp.nan]), 0.0, jnp.array([1.0, 1, -1, 1])))
    )
    for extreme in (1e-300, 1e150, 1e300):
        assert np.isfinite(radial(10, 1.0, 0.0, extreme))
        assert np.isfinite(radial(10, 0.0, -extreme, 1.0))
    assert float(radial_mode(1, 1.0, -1.0)) == 0.0
    assert float(radial_mode(2, 0.0, 1.0)) == np.inf


def test_float32_arguments_are_promoted():
    small = radial(jnp.float32(1e6), jnp.float32(1.0), jnp.float32(0.5), jnp.float32(900.0))
    assert small.dtype == jnp.float64
    assert small == radial(1e6, 1.0, 0.5, 900.0)


def test_maps_and_slope():
    R = jnp.array([0.5, 3.0, 40.0])
    each = np.stack([radial(7, 1.0, 0.5, r) for r in R])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda r: radial(7, 1.0, 0.5, r)))(R), each, rtol=1e-14)
    value, slope = vr.radial_and_slope(7, 1.0, 0.5, R)
    with jax.enable_x64(True):
        by_grad = jax.vmap(jax.grad(lambda r: radial(7, 1.0, 0.5, r)))(R.astype(jnp.float64)) * R
    np.testing.assert_allclose(value, each, rtol=1e-14)
    np.testing.assert_allclose(slope, by_grad, rtol=1e-12)
    assert float(vr.radial_and_slope(7, 1.0, 0.5, 0.0)[1]) == 7.0
    assert float(vr.radial_and_slope(7, 1.0, 0.5, jnp.inf)[1]) == 0.0


@hypothesis.given(
    D=st.integers(1, 10**9),
    a=st.floats(0.0, 1e6),
    b=st.floats(-1e4, 1e4),
    R=st.floats(0.0, 1e6) | st.just(np.inf),
)
def test_never_nan_and_monotone_in_the_limit(D, a, b, R):
    value, more = radial(D, a, b, R), radial(D, a, b, 1.5 * R)
    assert not np.isnan(value)
    scale = D * 20 + abs(b) * min(R, 1e6) + 1
    assert more >= value - 1e-12 * scale
