"""Metrics from gradients of Gaussians whose curvature is planted.

Mutations these catch: Qᵀ for Q on either side, the tether's share left in the curvature, β² for β, curvatures of the
wrong basis, masses for inverse masses in the unit of time, noise taken for structure, a leaf that is stiff as a whole
or coordinates without a force taken for an uneven curvature, a mean force or a mean displacement for stiffness.
"""

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from volumejax.metric import UNKNOWN, Rest, fit_metric, mass_power, plain_metric

ROWS, COLUMNS, SAMPLES = 20, 15, 4000
BETA, PRECISION = 50.0, 2.0


def orthogonal(rng, side):
    return np.linalg.qr(rng.normal(size=(side, side)))[0]


@pytest.fixture(scope="module")
def planted():
    """Slopes of C = ½ Σ h z² at settled positions, with z the coordinates in a hidden Kronecker basis."""
    rng = np.random.default_rng(0)
    p, q = orthogonal(rng, ROWS), orthogonal(rng, COLUMNS)
    h = np.outer(np.logspace(2, -2, ROWS), np.logspace(1, -1, COLUMNS))
    z = rng.normal(size=(SAMPLES, ROWS, COLUMNS)) / np.sqrt(PRECISION + BETA * h)
    slopes = np.einsum("ia,nab,jb->nij", p, h * z, q).astype(np.float32)
    return p, q, h, slopes


def test_a_hidden_basis_is_found(planted):
    p, q, h, slopes = planted
    metric = fit_metric([slopes], np.full(SAMPLES, BETA), PRECISION, turns=True)
    # Columns come in the order of rising moments, which is that of h from behind.
    found = np.asarray(metric.curvature[0])[::-1, ::-1]
    np.testing.assert_allclose(found, h, rtol=0.15, atol=2e-3)
    for have, want in ((metric.left[0], p), (metric.right[0], q)):
        np.testing.assert_allclose(np.abs(want.T @ np.asarray(have)[:, ::-1]), np.eye(len(want)), atol=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_long_side_the_leading_directions_come_first(side):
    """700 inputs of which twelve directions are stiff: these are found, and all is turned and restored."""
    rng = np.random.default_rng(9)
    basis, h = orthogonal(rng, 700), np.append(np.logspace(2, 0, 12), np.full(688, 1e-3))
    z = rng.normal(size=(400, 700, 5)) / np.sqrt(PRECISION + BETA * h[:, None])
    slopes = (basis @ (h[:, None] * z)).astype(np.float32)
    slopes = slopes if side == "left" else np.swapaxes(slopes, 1, 2)
    metric = fit_metric([slopes], np.full(400, BETA), PRECISION, turns=True)
    curvature = np.asarray(metric.curvature[0])
    curvature = np.sort(np.mean(curvature if side == "left" else curvature.T, axis=1))[::-1]
    # Drawn a little towards the many others.
    np.testing.assert_allclose(curvature[:12], h[:12], rtol=0.2)
    assert np.all(curvature[12:] < 0.05)
    there = metric.turned([jnp.asarray(slopes[0])])
    np.testing.assert_allclose(np.linalg.norm(there[0]), np.linalg.norm(slopes[0]), rtol=1e-5)
    np.testing.assert_allclose(metric.restored(there)[0], slopes[0], atol=1e-5 * np.abs(slopes[0]).max())
    long = getattr(metric, side)[0]
    assert long.vectors.shape == (700, 187)
    whole = np.eye(700) - long.vectors @ long.mixing @ long.vectors.T
    np.testing.assert_allclose(whole.T @ whole, np.eye(700), atol=1e-5)
    turned = whole.T @ slopes[0] if side == "left" else slopes[0] @ whole
    other = (metric.right if side == "left" else metric.left)[0]
    expected = turned @ other if side == "left" else np.asarray(other).T @ turned
    np.testing.assert_allclose(there[0], expected, atol=1e-5 * np.abs(slopes[0]).max())


def test_a_long_side_without_a_slope_is_turned_by_something_orthogonal():
    metric = fit_metric([np.zeros((400, 700, 5), np.float32)], np.ones(400), 1.0, turns=True)
    vector = [jnp.asarray(np.random.default_rng(0).normal(size=(700, 5)), jnp.float32)]
    np.testing.assert_allclose(metric.restored(metric.turned(vector))[0], vector[0], atol=1e-5)


def test_a_small_leaf_is_turned_as_a_whole():
    """Twelve coordinates in a basis that no two factors make."""
    rng = np.random.default_rng(4)
    w, h = orthogonal(rng, 12), np.logspace(2, -1, 12)

    def draw(basis, samples):
        z = rng.normal(size=(samples, 12)) / np.sqrt(PRECISION + BETA * h)
        return ((h * z) @ basis.T).reshape(samples, 4, 3).astype(np.float32)

    metric = fit_metric([draw(w, SAMPLES)], np.full(SAMPLES, BETA), PRECISION, turns=True)
    assert metric.left[0] is None
    np.testing.assert_allclose(np.ravel(metric.curvature[0])[::-1], h, rtol=0.15, atol=2e-3)
    np.testing.assert_allclose(np.abs(w.T @ np.asarray(metric.right[0])[:, ::-1]), np.eye(12), atol=0.1)
    slope = draw(w, 1)[0]
    there = metric.turned([jnp.asarray(slope)])[0]
    np.testing.assert_allclose(np.ravel(there), np.ravel(slope) @ np.asarray(metric.right[0]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metric.restored([there])[0], slope, atol=1e-5 * np.abs(slope).max())


def test_few_slopes_keep_a_small_leaf_to_the_factors():
    """Ten slopes of 64 coordinates: what their factors' basis leaves off the diagonal, and what their own does."""
    rng = np.random.default_rng(5)
    factors, h = np.kron(orthogonal(rng, 8), orthogonal(rng, 8)), np.kron(np.logspace(1, -1, 8), np.logspace(1, -1, 8))
    z = rng.normal(size=(10, 64)) / np.sqrt(PRECISION + BETA * h)
    slopes = ((h * z) @ factors.T).astype(np.float32)
    metric = fit_metric([slopes.reshape(10, 8, 8)], np.full(10, BETA), PRECISION, turns=True)
    force = (factors * (h**2 / (PRECISION + BETA * h))) @ factors.T
    off = lambda basis: 1.0 - np.sum(np.diag(basis.T @ force @ basis) ** 2) / np.sum(force**2)
    found, own = np.asarray(metric.right[0], float), np.linalg.eigh(slopes.T.astype(float) @ slopes)[1]
    np.testing.assert_allclose(found @ found.T, np.eye(64), atol=1e-5)
    assert off(found) < 0.5 * off(own)


@pytest.fixture(scope="module")
def leaning():
    """Slopes of C = ½ Σ h z², of the rest ½ a z² + b·z over β, and h: where b is large, C leans against it."""
    rng = np.random.default_rng(8)
    h = np.logspace(1, -3, 300).reshape(1, 300)
    pull, precisions = 20.0 * rng.normal(size=(1, 300)), PRECISION + BETA * h
    z = (rng.normal(size=(SAMPLES, 1, 300)) - pull / np.sqrt(precisions)) / np.sqrt(precisions)
    return (h * z).astype(np.float32), ((PRECISION * z + pull) / BETA).astype(np.float32), h


def test_a_cost_that_leans_against_the_prior_is_no_stiffer(leaning):
    slopes, others, h = leaning
    betas, confined = np.full(SAMPLES, BETA), BETA * h > PRECISION
    alone = fit_metric([slopes], betas, PRECISION, turns=False)
    whole = fit_metric([slopes], betas, PRECISION, turns=False, rest=Rest([others], PRECISION, np.ones(1)))
    found, polluted = (np.asarray(metric.curvature[0]) for metric in (whole, alone))
    np.testing.assert_allclose(found[confined], h[confined], rtol=0.3)
    assert np.median(polluted[confined] / h[confined]) > 2.0
    # What the noise of so many samples hides is not taken for stiffness.
    assert np.all(BETA * found[~confined] < 1.5 * PRECISION)


@pytest.mark.parametrize(
    ("lean", "wider", "factor"),
    [(1.0, 1.0, 1.0), (1.0, 3.0, 1.0), (1.0, 40.0, 0.1), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 1 / 40.0, None)],
)
def test_masses_are_the_mean_precision_but_where_a_leaf_has_changed(leaning, lean, wider, factor):
    """Its mean square holds that of the mean, which says nothing of how stiff it is but sets how far there is to go.

    The leaf leans as where the metric was fitted, by the root of that, or no more. Where it is narrower still, all but
    a factor of four is made up for.
    """
    slopes, others, _ = leaning
    squares = np.array([200.0])
    metric = fit_metric(
        [slopes], np.full(SAMPLES, BETA), PRECISION, turns=False, rest=Rest([others], PRECISION, squares)
    )
    state = jnp.float32(PRECISION), jnp.float32(BETA), [jnp.zeros((1, 300))]
    excess = np.asarray(metric.excess)
    assert excess > 100.0
    squares *= wider * excess ** (lean - 1.0)
    (masses,) = metric.masses(jnp.asarray(1.0 / squares, jnp.float32), *state)
    expected = PRECISION + 0.1 / squares + BETA * np.asarray(metric.curvature[0])
    # The floor of a tenth of its stiffness, as its spread tells it, counts for its width.
    unit = np.mean(1.0 / expected) / squares
    factor = unit / 4.0 if factor is None else factor
    assert wider >= 1.0 or factor > 1.4
    np.testing.assert_allclose(masses, factor * unit * expected, rtol=0.01)


def uneven(spread, samples=4000):
    """Slopes whose variance k is log-normal over places, each coordinate by itself: E k² / (E k)² = e^{spread²}."""
    rng = np.random.default_rng(6)
    scale = np.exp(0.5 * spread * rng.normal(size=(samples, ROWS, COLUMNS)))
    return (scale * rng.normal(size=scale.shape)).astype(np.float32)


def unevenness_of(*slopes, settled=True):
    betas = np.full(len(slopes[0]), BETA)
    return float(fit_metric(list(slopes), betas, PRECISION, turns=False, settled=settled).unevenness)


@pytest.mark.parametrize(("spread", "power"), [(0.0, 1.0), (0.4, 1.0), (0.6, 2.25 - np.exp(0.36)), (1.5, 0.5)])
def test_masses_follow_an_uneven_curvature_less(spread, power):
    # A coordinate is a part of the leaf of 300 that its forces are set against, which takes 3 per cent of the ratio.
    np.testing.assert_allclose(mass_power(unevenness_of(uneven(spread))), power, rtol=0.06)
    np.testing.assert_allclose(unevenness_of(uneven(spread), settled=False), UNKNOWN)
    assert mass_power(UNKNOWN) == 1.0


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.6])
def test_unevenness_is_the_relative_variance_of_the_curvature(spread):
    np.testing.assert_allclose(1.0 + unevenness_of(uneven(spread)), np.exp(spread**2), rtol=0.05)


def test_coordinates_that_the_cost_leaves_free_do_not_tell_how_uneven_it_is():
    """A leaf whose forces are rare and far below the tether's."""
    rng = np.random.default_rng(7)
    rare = rng.uniform(size=(1000, 30, 30)) < 0.01
    idle = (1e-4 * rare * rng.normal(size=rare.shape)).astype(np.float32)
    assert abs(unevenness_of(uneven(0.0, 1000), idle)) < 0.02
    assert unevenness_of(uneven(0.0, 1000), 1e6 * idle) > 1.0


def test_a_leaf_that_is_stiff_or_soft_as_a_whole_is_not_uneven():
    scale = np.exp(np.random.default_rng(8).normal(size=(1000, 1, 1))).astype(np.float32)
    assert abs(unevenness_of(scale * uneven(0.0, 1000))) < 0.05


@pytest.mark.parametrize("power", [1.0, 0.7, 0.5])
def test_masses_of_any_power_leave_chains_as_far_to_go(planted, power):
    *_, slopes = planted
    metric = fit_metric([slopes], np.full(SAMPLES, BETA), PRECISION, turns=True)
    metric = eqx.tree_at(lambda m: m.unevenness, metric, jnp.float32(1.0 + UNKNOWN - power))
    scene = (jnp.ones(1), jnp.float32(PRECISION), jnp.float32(BETA), [slopes[0]])
    (masses,), (precisions,) = metric.masses(*scene), metric.precisions(*scene)
    np.testing.assert_allclose(np.sum(1.0 / masses), np.sum(1.0 / precisions), rtol=1e-4)
    ratio = masses / precisions**power
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_turning_and_restoring_cancel(planted):
    *_, slopes = planted
    metric = fit_metric([slopes], np.full(SAMPLES, BETA), PRECISION, turns=True)
    there = metric.turned([jnp.asarray(slopes[0])])
    np.testing.assert_allclose(metric.restored(there)[0], slopes[0], atol=1e-5 * np.abs(slopes[0]).max())
    expected = np.asarray(metric.left[0]).T @ slopes[0] @ np.asarray(metric.right[0])
    np.testing.assert_allclose(there[0], expected, rtol=1e-4, atol=1e-5 * np.abs(slopes[0]).max())


def test_without_turns_the_axes_stay(planted):
    *_, slopes = planted
    metric = fit_metric([slopes], np.full(SAMPLES, BETA), PRECISION, turns=False)
    assert metric.left == metric.right == [None]
    there = jnp.asarray(slopes[0])
    assert metric.turned([there])[0] is there
    # The diagonal is that of the mean curvature in the parameters' own axes, up to what the tether hides.
    assert np.all(metric.curvature[0] > 0.0)


@pytest.mark.parametrize("scale", [1e-12, 1e10])
def test_steep_and_shallow_costs_have_a_curvature(scale, planted):
    """Of forces whose squares a short float does not hold."""
    *_, slopes = planted
    curvature = fit_metric([np.float32(scale) * slopes[:50]], np.full(50, BETA), PRECISION, turns=True).curvature[0]
    assert np.all(np.isfinite(curvature)) and np.all(np.asarray(curvature) > 0.0)


@pytest.mark.parametrize("samples", [12, 200])
def test_equal_curvatures_stay_nearly_equal(samples):
    slopes = np.random.default_rng(1).normal(size=(samples, 300)).astype(np.float32)
    curvature = np.asarray(fit_metric([slopes], np.ones(samples), 1.0, turns=True).curvature[0])
    assert np.std(curvature) < 0.15 * np.mean(curvature)


def test_the_unit_of_time_is_the_width_that_was_seen():
    """Σ 1/m over all leaves is Σ 1/stiffness while these agree with the curvatures to a factor of four."""
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(7)}
    rng = np.random.default_rng(2)
    slopes = [rng.normal(size=(50, 3, 2)).astype(np.float32), 10.0 * rng.normal(size=(50, 7)).astype(np.float32)]
    metric = fit_metric(slopes, np.full(50, 3.0), 1.0, turns=True)
    seen = [1.0 / float(np.mean(1.0 / (1.0 + 3.0 * np.asarray(c)))) for c in metric.curvature]
    stiffness = jnp.array([1.5 * seen[0], 0.6 * seen[1]], jnp.float32)
    at = lambda beta: metric.masses(stiffness, jnp.float32(1.0), jnp.float32(beta), params)
    masses = at(3.0)
    assert masses["a"].shape == (3, 2) and masses["b"].shape == (7,)
    inverse = sum(float(jnp.sum(1.0 / m)) for m in masses.values())
    assert inverse == pytest.approx(6 / float(stiffness[0]) + 7 / float(stiffness[1]), rel=1e-4)
    # Where β is higher all are heavier, the stiff ones in proportion.
    ratio = np.asarray(at(300.0)["b"] / masses["b"])
    assert np.all(ratio > 30.0) and np.all(ratio < 100.0)


def test_a_leaf_far_from_its_curvature_is_rescaled():
    """A leaf a hundred times narrower than where the metric was fitted; within a factor of four nothing happens."""
    params = {"a": jnp.zeros(1000), "b": jnp.zeros(10)}
    metric = plain_metric(params, turns=False)
    at = lambda narrow: metric.masses(
        jnp.array([1.0, narrow], jnp.float32), jnp.float32(10.0), jnp.float32(1.0), params
    )
    ratio = lambda narrow: float(at(narrow)["b"][0] / at(narrow)["a"][0])
    assert ratio(3.0) == pytest.approx(1.0, rel=0.05)
    assert ratio(400.0) == pytest.approx(100.0, rel=0.1)
    assert ratio(1 / 3) == pytest.approx(1.0, rel=0.05)
    assert ratio(1 / 1000) < 1 / 50


def test_the_plain_metric_has_the_structure_of_a_fitted_one():
    params = {
        "a": jnp.zeros((3, 2)),
        "b": jnp.zeros(7),
        "c": jnp.zeros(()),
        "d": jnp.zeros((600, 2)),
        "e": jnp.zeros(400),
        "f": jnp.zeros((20_000, 2)),
    }
    slopes = [np.ones((20, *x.shape), np.float32) for x in params.values()]
    fitted, plain = fit_metric(slopes, np.ones(20), 1.0, turns=True), plain_metric(params, turns=True)
    assert jax.tree.structure(fitted) == jax.tree.structure(plain)
    assert [x.shape for x in jax.tree.leaves(fitted)] == [x.shape for x in jax.tree.leaves(plain)]
    assert plain.left[3].vectors.shape == (600, 218) and plain.right[4] is None and plain.right[1] is not None
    assert plain.left[5] is None
    masses = plain.masses(jnp.full(6, 2.0), jnp.float32(3.0), jnp.float32(1.0), params)
    assert all(np.allclose(m, 2.0) for m in masses.values())


@hypothesis.given(
    rows=st.integers(1, 4), columns=st.integers(1, 4), samples=st.integers(1, 30),
    scale=st.sampled_from([0.0, 1e-6, 1e6]), broken=st.booleans(),
)  # fmt: skip
def test_any_slopes_give_finite_positive_masses(rows, columns, samples, scale, broken):
    slopes = scale * np.random.default_rng(3).normal(size=(samples, rows, columns)).astype(np.float32)
    if broken:
        slopes[0, 0, 0] = np.nan
    metric = fit_metric([slopes], np.full(samples, 7.0), 1.0, turns=True)
    (masses,) = metric.masses(jnp.ones(1), jnp.float32(1.0), jnp.float32(7.0), [jnp.zeros((rows, columns))])
    assert np.all(np.isfinite(masses)) and np.all(np.asarray(masses) > 0.0)
