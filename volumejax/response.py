r"""How the work of a step of the ladder answers to the ways in which maps move chains, and which maps leave it flat.

A map along ½ Σ p u makes the work of a step −dx of log a (−X + ½ Σ p B) dx, with X = ½ a|δ|² and
B = u·∇U − div u. Its variance is least where u·∇(X − ½ Σ p B) vanishes on average for each u, since by parts
Cov(B, f) = E u·∇f inside the region. Such means, over the coordinates of each chain, hardly scatter; the covariances
themselves, over a pilot's few chains, say next to nothing of a single leaf's share.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from numpy.typing import NDArray

from volumejax.ensemble import FIELDS, STRETCHES, Ensemble, Position, toll_share
from volumejax.functions import jit_ahead
from volumejax.metric import Metric

__all__ = ["Response", "flat_shares", "respond", "response_gradients"]

Vector = NDArray[np.float64]

_THERMAL = 1.0
"""Distance between two gradients from which a second derivative is taken, in standard deviations of the place along the
field."""
_FURTHEST = 3.0
"""Share of a free direction's stretch that a leaf may be given, either way: one grows while another shrinks."""
_AGREED = 2.0
"""Standard errors below which a mean over chains is taken for chance."""
_DIM = 0.02
"""Eigenvalue of the fields' scaled covariance below which a combination of them is not told from noise."""


class Response(NamedTuple):
    """Derivatives along the fields u, of each leaf: float32, fields as `Ensemble.fields` has them, then leaves."""

    gram: Any
    """u_j·∇B_k, shape (..., FIELDS · leaves, FIELDS · leaves)."""
    tether: Any
    """u_j·∇X, shape (..., FIELDS · leaves)."""
    cost: Any
    """u_j·∇βE, likewise."""


def _active_fields(ensemble: Ensemble) -> int:
    """Return how many of a leaf's fields, the first ones, are not zero."""
    return FIELDS if ensemble.slides else STRETCHES


def response_gradients(ensemble: Ensemble) -> int:
    """Return what a chain's responses cost."""
    return 2 * _active_fields(ensemble) * len(jax.tree.leaves(ensemble.frame.anchor)) + 1


@jit_ahead
def respond(
    ensemble: Ensemble, metric: Metric, positions: Position, stiffness: Array, precision: Array, beta: Array,
    batch_size: int | None,
) -> Response:  # fmt: skip
    """Return what each chain says where it stands.

    Args:
        ensemble: the target.
        metric: of the maps.
        positions: of the chains, leading axis.
        stiffness: one over each leaf's mean square, float32.
        precision: a, float32.
        beta: β, float32.
        batch_size: chains at once; None takes all.
    """
    share = jnp.asarray(toll_share(precision, beta) / beta, jnp.float32)

    def force(d: PyTree) -> list[Array]:
        """Return β∇(E + toll/β) in turned coordinates."""
        return [beta * g for g in jax.tree.leaves(metric.turned(ensemble.slope(d, share)[1]))]

    def one(d: PyTree) -> Response:
        treedef, place = jax.tree.structure(d), metric.turned(d)
        precisions = metric.precisions(stiffness, precision, beta, d)
        fields = ensemble.fields(metric, precisions, (precision, beta), place)
        leaves, means, softness = (jax.tree.leaves(x) for x in (place, precisions, ensemble.softness(precisions)))
        moves = [jnp.stack(of_leaf) for of_leaf in zip(*map(jax.tree.leaves, fields), strict=True)]
        rates = [jnp.stack([jnp.ones_like(w), w, *(FIELDS - STRETCHES) * [jnp.zeros_like(w)]]) for w in softness]
        felt, whole = force(d), [precision * x for x in leaves]
        if ensemble.frame.pull is not None:
            whole = [x + b for x, b in zip(whole, jax.tree.leaves(metric.turned(ensemble.frame.pull)), strict=True)]
        whole = [x + g for x, g in zip(whole, felt, strict=True)]

        def along(index: Array) -> tuple[Array, Array, Array]:
            kind, leaf = index // len(leaves), index % len(leaves)
            u = [jnp.where(i == leaf, moves[i][kind], 0.0) for i in range(len(leaves))]
            rate = [jnp.where(i == leaf, rates[i][kind], 0.0) for i in range(len(leaves))]
            scatter = sum(jnp.sum(p * x * x + r * r) for p, x, r in zip(means, u, rate, strict=True))
            step = _THERMAL / jnp.sqrt(jnp.maximum(scatter, 1e-30))
            tangent = metric.restored(treedef.unflatten(u))
            ends = [force(jax.tree.map(lambda x, t, s=s: x + s * step * t, d, tangent)) for s in (0.5, -0.5)]
            bend = [precision * x + (p - m) / step for x, p, m in zip(u, *ends, strict=True)]
            row = [
                jnp.sum(moves[i][k] * bend[i] + rates[i][k] * u[i] * whole[i])
                for k in range(FIELDS)
                for i in range(len(leaves))
            ]
            held, pushed = (
                jnp.sum(jnp.stack([jnp.sum(x * y) for x, y in zip(u, other, strict=True)])) for other in (leaves, felt)
            )
            return jnp.stack(row), precision * held, pushed

        rows = jax.lax.map(along, jnp.arange(_active_fields(ensemble) * len(leaves)))
        return Response(*(jnp.pad(x, ((0, FIELDS * len(leaves) - len(x)), *((0, 0),) * (x.ndim - 1))) for x in rows))

    return jax.lax.map(one, positions.displacement, batch_size=batch_size or len(positions.cost))


def flat_shares(grams: NDArray[np.floating], slopes: NDArray[np.floating], *, slides: bool = True) -> Vector:
    """Return the shares p that flatten a work on average.

    One share for all is found first, and one for their slide; then the leaves part from it, soft coordinates from stiff
    ones, and the slides of the leaves, as far as their responses tell them apart and the chains agree.

    Args:
        grams: u_j·∇B_k of each chain, shape (chains, FIELDS · leaves, FIELDS · leaves).
        slopes: u_j·∇ of what the work is without a map, shape (chains, FIELDS · leaves).
        slides: False keeps the shares of all slides at zero.
    """
    count = slopes.shape[1]
    leaves = count // FIELDS
    known = np.isfinite(grams).all(axis=(1, 2)) & np.isfinite(slopes).all(axis=1)
    if not known.any():
        return np.zeros(count)
    grams, slopes = (values[known].astype(np.float64) for values in (grams, slopes))
    gram = grams.mean(axis=0)
    scale = np.sqrt(np.maximum(np.diag(gram), 0.0))
    free = scale > 0.0
    free[STRETCHES * leaves :] &= slides
    weights = np.divide(1.0, scale, out=np.zeros(count), where=free)
    together = np.zeros((count, 2))
    # A leaf whose own curvature came out negative goes with the others.
    together[:leaves, 0] = np.diag(gram)[:leaves] != 0.0
    together[STRETCHES * leaves : (STRETCHES + 1) * leaves, 1] = free[STRETCHES * leaves : (STRETCHES + 1) * leaves]
    together = together[:, together.any(axis=0)]
    slope = together.T @ slopes.mean(axis=0)
    shares = together @ np.linalg.lstsq(together.T @ gram @ together, slope, rcond=1e-9)[0]
    values, vectors = np.linalg.eigh(weights[:, None] * (0.5 * (gram + gram.T)) * weights)
    rest = ((slopes - grams @ shares) * weights) @ vectors
    mean, trust = rest.mean(axis=0), np.where(values > 0.0, values / (np.square(values) + _DIM**2), 0.0)
    if len(rest) > 1:
        chance = np.square(_AGREED) * np.var(rest, axis=0, ddof=1) / len(rest)
        trust *= np.maximum(1.0 - chance / np.maximum(np.square(mean), 1e-300), 0.0)
    shares = 2.0 * (shares + weights * (vectors @ (trust * mean)))
    shares[: STRETCHES * leaves] = np.clip(shares[: STRETCHES * leaves], -_FURTHEST, _FURTHEST)
    return shares
