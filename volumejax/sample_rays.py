r"""The ray from the anchor through a sample of the star: what it says, beyond the sample, of the region's mass.

The star holds each of its rays up to the wall. Along one, with t = 1 at the sample δ, the prior's density is known and
the cost is looked up:

.. math:: J(\epsilon) = \log \int_0^{t(\epsilon)} t^{D-1} e^{-\frac12 a t^2 |\delta|^2 - t\, b\cdot\delta} dt, \quad
          I_k = \log \int_0^{t(\epsilon)} t^{D-1} e^{-\frac12 a t^2 |\delta|^2 - t\, b\cdot\delta - U_k(t \delta)} dt

In place of where it stands on its ray a sample of a mixture of the ensembles k counts with the means over the ray:
samples need not be near the wall, where most of the mass is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp

from volumejax import tree
from volumejax.ensemble import Ensemble
from volumejax.radial import radial

__all__ = ["POINTS", "SampleRays", "look_along"]

Vector = NDArray[np.float64]

POINTS = 64
"""Places on a ray, equally far apart, at which the cost is looked up."""
_GROWTH, _FURTHEST = 1.1, 32.0
"""Factor by which the search for the wall goes on, and how far at most, in lengths of the sample."""
_SPENT = -60.0
"""Nats below its density at the sample from which on the prior leaves nothing of a ray."""
_NEAREST, _GRADED, _WIDEST = 1e-6, 180, 40.0
"""Distances from the wall, in log t, between nodes: the mass lies within 1/D of it."""
_EVEN = 0.35
"""And that of nodes evenly spread, in widths D^(−1/2) of what an ensemble has of a ray."""
_ARCH = 0.25
"""Nats, at most, by which the bend between two nodes changes what lies there."""
_HALVINGS = 24
"""Of the way between two places, for a crossing."""
_MOST = 4.0
"""Costs beyond that many cutoffs are taken for it: how high they are there nobody asks."""


def look_along(ensemble: Ensemble, displacement: PyTree) -> tuple[Float[Array, ""], Float[Array, "points"]]:
    """Return how far the ray through δ was followed, in lengths of δ, and the cost at `POINTS` places up to there.

    That is somewhat beyond where it first leaves the region, to the prior's own wall, or to where the prior leaves
    nothing. All float64; +inf for NaN.

    Args:
        ensemble: of the star.
        displacement: δ, inside.
    """
    frame = ensemble.frame
    with jax.enable_x64(True):
        square, pulled = tree.dot(displacement, displacement), frame.pulled(displacement)
        furthest = frame.exit(displacement)

        def goes_on(t: Array) -> Array:
            prior = 0.5 * frame.stiffness * square * (t * t - 1.0) + pulled * (t - 1.0)
            density = ensemble.dimension * jnp.log(t) - prior
            inside = ensemble.cost_at(displacement, t.astype(jnp.float32)) <= ensemble.cutoff
            return inside & (density > _SPENT) & (t < jnp.minimum(furthest, _FURTHEST))

        end = jax.lax.while_loop(goes_on, lambda t: _GROWTH * t, jnp.full((), _GROWTH, jnp.float64))
        # In float32, in which the cost will see it.
        end = jnp.minimum(end, furthest).astype(jnp.float32)
        fractions = end * (jnp.arange(1, POINTS + 1, dtype=jnp.float32) / jnp.float32(POINTS))
        costs = jax.lax.map(lambda t: ensemble.cost_at(displacement, t), fractions)
        return end.astype(jnp.float64), jnp.where(jnp.isnan(costs), jnp.inf, costs)


class SampleRays:
    """What the rays of a run are measured by; NumPy, float64.

    Args:
        ensemble: of the star, with a ridge.
        anchor_cost: C(θ0), nats.
        cutoffs: up to which masses are wanted, rising, the run's own the last.
        betas: what multiplies guide and ridge in each ensemble, shape (rungs, 2).
    """

    def __init__(self, ensemble: Ensemble, anchor_cost: float, cutoffs: Vector, betas: Vector) -> None:
        """Take from the ensemble what is needed on the host."""
        assert ensemble.ridge is not None
        self.dimension, self.precision, self.checks = ensemble.dimension, ensemble.frame.stiffness, ensemble.checks
        self.guides, self.eyes = ensemble.guides, ensemble.eyes
        self.share, self.sharpness = float(ensemble.ridge.share), float(ensemble.ridge.sharpness)
        self.anchor_cost, self.cutoffs, self.betas = anchor_cost, cutoffs, betas
        graded = np.geomspace(_NEAREST, _WIDEST, _GRADED)
        even = np.arange(0.0, 1.0, min(_EVEN / np.sqrt(self.dimension), 0.1))
        self._depths = np.unique(np.concatenate([even, graded]))[::-1]

    def columns(self, cutoffs: Vector) -> NDArray[np.intp]:
        """Return which of its cutoffs are nearest to these."""
        return np.argmin(np.abs(self.cutoffs - cutoffs[:, None]), axis=1)

    def integrals(self, ends: Vector, costs: Vector, squares: Vector, pulled: Vector) -> tuple[Vector, Vector]:
        """Return J for each chain and cutoff, shape (chains, cutoffs), and I for each ensemble, (chains, rungs).

        Args:
            ends: how far rays were followed, shape (chains,).
            costs: as found by `look_along`, shape (chains, points).
            squares: |δ|², shape (chains,).
            pulled: b·δ, likewise.
        """
        path = _Path(ends, costs, self.anchor_cost, _MOST * self.cutoffs[-1])
        walls = self._walls(path)
        a, b = (x[:, None] for x in (self.precision * squares, -pulled))
        masses = np.asarray(radial(self.dimension, a, b, walls))
        q = np.log(walls[:, -1:]) - self._depths
        t = np.exp(q)
        guide = np.mean([path(g * t) for g in self.guides], axis=0)
        steep = np.asarray(logsumexp([self.sharpness * path(f * t) for f in self.eyes], axis=0))
        ridge = self.share / self.sharpness * steep
        prior = self.dimension * q - 0.5 * a * t * t + b * t
        energies = np.einsum("kg,gcn->ckn", self.betas, np.stack([guide, ridge]))
        return masses, _log_integral(prior[:, None] - energies, q[:, None])

    def _walls(self, path: "_Path") -> Vector:
        """Return where, in lengths of δ, a checked place first exceeds each cutoff, or the end; (chains, cutoffs)."""
        fractions = np.arange(1, self.checks + 1) / self.checks

        def beyond(t: Vector) -> NDArray[np.bool_]:
            return path(t[..., None] * fractions).max(axis=-1) > self.cutoffs

        places = np.arange(POINTS + 1) / POINTS * path.ends[:, None]
        seen = beyond(places[..., None])
        first = np.maximum(np.argmax(seen, axis=1), 1)
        low, high = (np.take_along_axis(places, first - back, axis=1) for back in (1, 0))
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            out = beyond(middle)
            low, high = np.where(out, low, middle), np.where(out, middle, high)
        return np.where(seen.any(axis=1), low, path.ends[:, None])


class _Path:
    """The cost along rays, between the places where it was looked up."""

    def __init__(self, ends: Vector, costs: Vector, anchor_cost: float, most: float) -> None:
        self.ends = ends
        values = np.concatenate([np.full((len(costs), 1), anchor_cost), np.minimum(costs, most)], axis=1)
        self._pieces = CubicSpline(np.arange(POINTS + 1), values, axis=1).c

    def __call__(self, t: Vector) -> Vector:
        """Return C(t δ), shape (chains, ...) like t."""
        chains = np.arange(len(self.ends)).reshape(-1, *[1] * (t.ndim - 1))
        place = np.clip(t / self.ends[chains], 0.0, 1.0) * POINTS
        piece = np.minimum(place.astype(int), POINTS - 1)
        rest = place - piece
        a, b, c, d = (coefficient[piece, chains] for coefficient in self._pieces)
        return ((a * rest + b) * rest + c) * rest + d


def _log_integral(logs: Vector, x: Vector) -> Vector:
    """Return log ∫ e^logs dx along the last axis, between the points linear and corrected for what bends them."""
    steps, widths = np.diff(logs), np.diff(x)
    rises = np.maximum(np.abs(steps), 1e-9)
    bends = 2.0 * np.diff(steps / widths) / (widths[..., 1:] + widths[..., :-1])
    bends = np.concatenate([bends[..., :1], 0.5 * (bends[..., 1:] + bends[..., :-1]), bends[..., -1:]], axis=-1)
    # What is cut off from an arch by its chord, as a share of the integral.
    arch = np.clip(-bends * widths**2 / 12.0, -_ARCH, _ARCH)
    pieces = np.maximum(logs[..., :-1], logs[..., 1:]) + np.log(widths * -np.expm1(-rises) / rises) + arch
    return np.asarray(logsumexp(pieces, axis=-1))
