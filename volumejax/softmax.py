"""Per-position measures of behaviour on logits, last axis classes: exact near the anchor, finite far from it.

Every measure has the signature `measure(logits, anchor_logits, labels)`; the ones that need no anchor or no
labels get None there. Logits are float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["cross_entropy", "divergence", "is_wrong", "label_gap"]

Logits = Float[Array, "*positions classes"]
Labels = Int[Array, "*positions"]
Nats = Float[Array, "*positions"]


def divergence(logits: Logits, anchor_logits: Logits, labels: Labels | None) -> Nats:
    r"""Return KL(p0 ‖ p) = Σ p0 (e^d − 1 − d) with d = log p − log p0, in nats.

    All terms are non-negative, so nothing cancels; a relative error of the normaliser enters squared. A class
    at −inf at the anchor adds its p; a class at −inf only in `logits` makes the result infinite. The anchor's
    logits are constants: no derivative is taken through them.
    """
    del labels
    return _divergence(logits, jax.lax.stop_gradient(anchor_logits))


@jax.custom_jvp
def _divergence(logits: Logits, anchor_logits: Logits) -> Nats:
    return _divergence_and_slope(logits, anchor_logits)[0]


@_divergence.defjvp
def _divergence_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """The derivative by the logits is p − p0: far cheaper than going back through the series."""
    value, slope = _divergence_and_slope(*primals)
    return value, jnp.sum(slope * tangents[0], axis=-1)


def _divergence_and_slope(logits: Array, anchor_logits: Array) -> tuple[Array, Array]:
    log_p0, log_p, log_ratio = _log_ratio(logits, anchor_logits)
    p0, p, absent = jnp.exp(log_p0), jnp.exp(log_p), jnp.isneginf(log_p0)
    log_ratio = jnp.where(absent, 0.0, log_ratio)
    near = (jnp.abs(log_ratio) < 0.5) & ~absent
    series = _expm1_excess_series(jnp.where(near, log_ratio, 0.0))
    # Away from 0 the sum is p − p0 − p0·d: p0·e^d could overflow, and exp is several times faster than expm1.
    value = jnp.sum(jnp.where(near, p0 * series, p - p0 * (1.0 + log_ratio)), axis=-1)
    # p0·(e^d − 1) keeps the digits of a small difference; the series is the one of the value.
    return value, jnp.where(near, p0 * (log_ratio + series), p - p0)


def label_gap(logits: Logits, anchor_logits: Logits, labels: Labels) -> Nats:
    """Return log p0(label) − log p(label), in nats; NaN where the label is no class."""
    return -_at_label(_log_ratio(logits, anchor_logits)[2], labels)


def cross_entropy(logits: Logits, anchor_logits: Logits | None, labels: Labels) -> Nats:
    """Return −log p(label), in nats; NaN where the label is no class.

    Computed as log(1 + Σ_{k≠label} e^{z_k − z_label}), which keeps its digits where it is tiny.
    """
    del anchor_logits
    margins = logits - _at_label(logits, labels)[..., None]
    is_label = _classes(logits) == labels[..., None]
    return jax.nn.softplus(jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, margins), axis=-1))


def is_wrong(logits: Logits, anchor_logits: Logits | None, labels: Labels) -> Nats:
    """Return 1 where the label is not the first largest logit, else 0; NaN where a logit is, or as above."""
    del anchor_logits
    # argmax and the comparison would turn a NaN logit or an illegal label into an ordinary error.
    suspect = jnp.isnan(jnp.max(logits, axis=-1)) | jnp.isnan(_at_label(logits, labels))
    wrong = (jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) != labels).astype(jnp.float32)
    return jnp.where(suspect, jnp.nan, wrong)


def _log_ratio(logits: Array, anchor_logits: Array) -> tuple[Array, Array, Array]:
    """Return log p0, log p and log p − log p0; the last is exactly 0 where all logits agree.

    Small changes are measured on the differences of logits, which are exact, large ones on log p itself.
    """
    anchor_logits = anchor_logits.astype(jnp.float32)
    log_p0, log_p = jax.nn.log_softmax(anchor_logits), jax.nn.log_softmax(logits)
    absent = jnp.isneginf(anchor_logits)
    shift = jnp.where(absent & jnp.isneginf(logits), 0.0, logits - anchor_logits)
    # Softmax ignores a common shift, so the gradient may ignore it too. (A gather would be slow under vmap.)
    top = jax.lax.argmax(anchor_logits, anchor_logits.ndim - 1, jnp.int32)
    is_top = _classes(anchor_logits) == top[..., None]
    common = jnp.sum(jnp.where(is_top, shift, 0.0), axis=-1, keepdims=True)
    shift = shift - jnp.where(absent, 0.0, jax.lax.stop_gradient(common))
    small = jnp.max(jnp.abs(shift), axis=-1, keepdims=True) < 0.5
    shift = jnp.where(small, shift, 0.0)
    # In this order: where the factor that a batch shares stands in front, jaxlib 0.10.2 for CPU (its YNNPACK fusions)
    # gets the sum wrong that is then subtracted, and costs come out up to twice too large.
    growth = jnp.sum(jnp.expm1(shift) * jnp.exp(log_p0), axis=-1, keepdims=True)
    return log_p0, log_p, jnp.where(small & ~absent, shift - jnp.log1p(growth), log_p - log_p0)


def _expm1_excess_series(x: Array) -> Array:
    """Return e^x − 1 − x for |x| < 0.5, to float32 accuracy."""
    series = jnp.full_like(x, 1.0 / math.factorial(9))
    for order in range(8, 1, -1):
        series = 1.0 / math.factorial(order) + x * series
    return x * x * series


def _at_label(values: Array, labels: Array) -> Array:
    """Return values[..., label], NaN where the label is no class."""
    legal = (labels >= 0) & (labels < values.shape[-1])
    is_label = _classes(values) == labels[..., None]
    return jnp.where(legal, jnp.sum(jnp.where(is_label, values, 0.0), axis=-1), jnp.nan)


def _classes(logits: Array) -> Array:
    """Return the class numbers, with as many axes as `logits`."""
    return jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * (logits.ndim - 1) + (-1,))
