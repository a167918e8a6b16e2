"""Measures on logits against float64 formulas: tiny changes, huge logits, missing classes, gradients."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from volumejax.softmax import cross_entropy, divergence, is_wrong, label_gap


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl64(anchor_logits, logits):
    log_p0, log_p = log_softmax64(anchor_logits), log_softmax64(logits)
    return np.sum(np.exp(log_p0) * (log_p0 - log_p), axis=-1)


def kl(anchor_logits, logits):
    return divergence(jnp.asarray(logits), jnp.asarray(anchor_logits), None)


def kl_gradient(anchor_logits, logits):
    return jax.grad(lambda z: jnp.sum(kl(anchor_logits, z)))(jnp.asarray(logits))


def signs(size):
    """Every pair of three logits in {−size, 0, size}, as two arrays with shape [729, 3]."""
    grid = size * np.array(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3), np.float32).reshape(3, -1).T
    return np.repeat(grid, len(grid), 0), np.tile(grid, (len(grid), 1))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), log_spread=st.floats(-2.0, 3.0), log_change=st.floats(-4.0, 4.0))
def test_divergence_equals_the_textbook(seed, log_spread, log_change):
    rng = np.random.default_rng(seed)
    anchor_logits = rng.normal(scale=np.exp(log_spread), size=(20, 7)).astype(np.float32)
    logits = (anchor_logits + rng.normal(scale=np.exp(log_change), size=(20, 7))).astype(np.float32)
    value, truth = kl(anchor_logits, logits), kl64(anchor_logits, logits)
    assert np.all(np.asarray(value) >= 0.0)
    np.testing.assert_allclose(np.mean(value), np.mean(truth), rtol=2e-5)


@pytest.mark.parametrize("common_shift", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_tiny_divergences_keep_their_digits(seed, common_shift):
    rng = np.random.default_rng(seed)
    anchor_logits = rng.normal(scale=0.5, size=(20, 10)).astype(np.float32)
    logits = (anchor_logits + common_shift + 1.4e-5 * rng.normal(size=(20, 10))).astype(np.float32)
    truth = np.mean(kl64(anchor_logits, logits))
    assert 3e-11 < truth < 3e-10
    assert abs(np.mean(kl(anchor_logits, logits)) / truth - 1.0) < 1e-3


@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_huge_logits_stay_finite_and_right(size):
    anchor_logits, logits = signs(size)
    np.testing.assert_allclose(kl(anchor_logits, logits), kl64(anchor_logits, logits), rtol=1e-5, atol=1e-6)
    exact = np.exp(log_softmax64(logits)) - np.exp(log_softmax64(anchor_logits))
    np.testing.assert_allclose(kl_gradient(anchor_logits, logits), exact, atol=1e-6)


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_logits_at_the_end_of_float32_never_look_close(size):
    anchor_logits, logits = signs(size)
    value = np.asarray(kl(anchor_logits, logits))
    winners, anchor_winners = (z == z.max(-1, keepdims=True) for z in (logits, anchor_logits))
    differ = np.any(winners != anchor_winners, axis=-1)
    assert not np.any(value[differ] < 0.1)


@pytest.mark.parametrize("scale", [1e-4, 0.3, 30.0])
def test_the_gradient_is_p_minus_p0(scale):
    rng = np.random.default_rng(1)
    anchor_logits = rng.normal(size=(60, 5)).astype(np.float32)
    logits = (anchor_logits + scale * rng.normal(size=(60, 5))).astype(np.float32)
    exact = np.exp(log_softmax64(logits)) - np.exp(log_softmax64(anchor_logits))
    error = np.abs(kl_gradient(anchor_logits, logits) - exact)
    assert np.max(error) < 1e-5 * np.max(np.abs(exact)) + 1e-7 * min(scale, 1.0)


def test_the_hessian_is_the_fisher_information():
    logits = jnp.array([1.0, -0.5, 0.3])
    hessian = jax.jit(jax.hessian(lambda z: kl(logits, z)))
    for moved in (logits, logits + jnp.array([0.3, -0.1, 0.0]), logits + jnp.array([2.0, -1.0, 0.0])):
        p = np.exp(log_softmax64(moved))
        np.testing.assert_allclose(hessian(moved), np.diag(p) - np.outer(p, p), atol=1e-6)


def test_infinite_and_missing_classes():
    assert kl([[0.0, 1.0, 2.0]], [[0.0, -jnp.inf, 2.0]]) == jnp.inf
    missing, moved = np.array([[0.0, 1.0, -np.inf]], np.float32), np.array([[0.2, 0.8, -np.inf]], np.float32)
    np.testing.assert_allclose(kl(missing, moved), kl64(missing[:, :2], moved[:, :2]), rtol=1e-5)
    assert np.all(np.isfinite(kl_gradient(missing, moved)))
    returned = jnp.array([[0.5, 0.7, 0.2]])
    np.testing.assert_allclose(kl(missing, returned), kl64([[0.0, 1.0, -1e3]], returned), rtol=1e-5)
    label = jnp.array([2])
    assert np.isnan(label_gap(jnp.asarray(moved), jnp.asarray(missing), label))
    assert label_gap(returned, jnp.asarray(missing), label) == -jnp.inf


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_plus_infinity_give_nan(value, place):
    logits, zero = jnp.zeros((1, 3)).at[0, place].set(value), jnp.zeros((1, 3))
    label = jnp.array([0])
    assert np.isnan(divergence(logits, zero, None))
    assert np.isnan(label_gap(logits, zero, label))
    if np.isnan(value):
        assert np.isnan(cross_entropy(logits, None, label)) and np.isnan(is_wrong(logits, None, label))


def test_cross_entropy_equals_the_textbook_and_keeps_small_losses():
    rng = np.random.default_rng(8)
    logits = rng.normal(scale=3.0, size=(5, 4, 6)).astype(np.float32)
    labels = rng.integers(0, 6, size=(5, 4))
    truth = -np.take_along_axis(log_softmax64(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), None, jnp.asarray(labels)), truth, rtol=1e-5)
    sure = cross_entropy(jnp.array([20.0, 0.0]), None, jnp.array(0))
    np.testing.assert_allclose(sure, np.exp(-20.0), rtol=1e-5)
    assert cross_entropy(jnp.array([-jnp.inf, 0.0]), None, jnp.array(0)) == jnp.inf


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 3.0])
def test_label_gap_is_exact_near_the_anchor(scale):
    rng = np.random.default_rng(9)
    anchor_logits = rng.normal(scale=0.5, size=(50, 6)).astype(np.float32)
    logits = (anchor_logits + scale * rng.normal(size=(50, 6))).astype(np.float32)
    labels = rng.integers(0, 6, size=50)
    change = log_softmax64(anchor_logits) - log_softmax64(logits)
    truth = np.take_along_axis(change, labels[:, None], -1)[:, 0]
    gap = label_gap(jnp.asarray(logits), jnp.asarray(anchor_logits), jnp.asarray(labels))
    np.testing.assert_allclose(gap, truth, rtol=1e-5, atol=1e-6 * scale)


def test_is_wrong_breaks_ties_by_the_first_class():
    logits = jnp.array([[2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert is_wrong(logits, None, jnp.array([0, 0, 1, 0])).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_out_of_range_give_nan(label):
    logits, label = jnp.zeros((1, 3)), jnp.array([label])
    for measure in (cross_entropy, is_wrong, label_gap):
        assert np.isnan(measure(logits, jnp.zeros((1, 3)), label))


def plain_kl(logits, anchor_logits):
    """The textbook in float64, for autodiff."""
    log_p0, log_p = jax.nn.log_softmax(anchor_logits), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)


@pytest.mark.parametrize("scale", [1e-3, 0.2, 3.0])
def test_derivatives_are_those_of_the_textbook(scale):
    """First by both modes and second, on either side of where the series ends."""
    rng = np.random.default_rng(4)
    anchor_logits = rng.normal(size=5).astype(np.float32)
    logits = (anchor_logits + scale * rng.normal(size=5)).astype(np.float32)
    of = lambda z: kl(anchor_logits, z)
    first, forward, second = jax.jit(lambda z: (jax.grad(of)(z), jax.jacfwd(of)(z), jax.hessian(of)(z)))(logits)
    with jax.enable_x64(True):
        wide, wide_anchor = jnp.asarray(logits, jnp.float64), jnp.asarray(anchor_logits, jnp.float64)
        exact = [np.asarray(d(plain_kl)(wide, wide_anchor)) for d in (jax.grad, jax.hessian)]
    tolerance = 2e-6 * np.max(np.abs(exact[0])) + 1e-10
    np.testing.assert_allclose(first, exact[0], atol=tolerance)
    np.testing.assert_allclose(forward, exact[0], atol=tolerance)
    np.testing.assert_allclose(second, exact[1], atol=2e-6)


def test_the_gradient_at_the_anchor_is_exactly_zero():
    logits = np.random.default_rng(5).normal(scale=7.0, size=(40, 9)).astype(np.float32)
    assert not np.any(kl_gradient(logits, logits))
    assert not np.any(kl(logits, logits))


def test_gradients_are_finite_where_a_class_is_missing():
    """At the anchor, in both, and in the logits alone, where the value is infinite."""
    gone, there = np.array([0.0, 1.0, -np.inf], np.float32), np.array([0.2, 0.8, -0.3], np.float32)
    p, p0 = (np.exp(log_softmax64(z)) for z in (there, gone))
    np.testing.assert_allclose(kl_gradient(gone, there), p - p0, atol=1e-6)
    np.testing.assert_allclose(kl_gradient(gone, gone + 0.0), 0.0, atol=1e-7)
    assert np.all(np.isfinite(kl_gradient(there, gone)))


def test_no_derivative_is_taken_through_the_anchor():
    logits, anchor_logits = jnp.array([0.0, 1.0, -1.0]), jnp.array([0.5, 0.2, -2.0])
    assert not np.any(jax.grad(lambda z: divergence(logits, z, None))(anchor_logits))


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_divergences_of_a_batch_in_a_loop_equal_the_textbook(lanes):
    """jaxlib 0.10.2 for CPU doubles them where the anchor is shared and the sum over classes begins with its factor."""
    rng = np.random.default_rng(lanes)
    anchor_logits = jnp.asarray(rng.normal(scale=3.0, size=(1024, 10)), jnp.float32)
    logits = anchor_logits[None] + jnp.asarray(rng.normal(scale=0.05, size=(lanes, 1024, 10)), jnp.float32)

    @jax.jit
    def twice(logits, anchor_logits):
        def body(carry):
            count, last = carry
            cost = lambda z: jnp.mean(divergence(z + 0.0 * jnp.sum(last), anchor_logits, None))
            return count + 1, jax.vmap(cost)(logits)

        return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, jnp.zeros(lanes)))[1]

    log_p, log_p0 = log_softmax64(logits), log_softmax64(anchor_logits)[None]
    change = log_p - log_p0
    exact = np.mean(np.sum(np.exp(log_p0) * (np.expm1(change) - change), axis=-1), axis=-1)
    np.testing.assert_allclose(twice(logits, anchor_logits), exact, rtol=1e-5)
