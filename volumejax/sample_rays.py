r"""The ray from the anchor through a sample of the star: what it says, beyond the sample, of the region's mass.

The star holds each of its rays up to the wall. Along one, with t = 1 at the sample δ and the wall at w, the prior's
density is known and the cost is looked up:

.. math:: J = \log \int_0^w t^{D-1} e^{-\frac12 a t^2 |\delta|^2 - t\, b\cdot\delta} dt, \qquad
          I_k = \log \int_0^w t^{D-1} e^{-\frac12 a t^2 |\delta|^2 - t\, b\cdot\delta - U_k(t \delta)} dt

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
from volumejax.free_energy import log_pieces

__all__ = ["POINTS", "SampleRays", "look_along"]

Vector = NDArray[np.float64]

POINTS = 64
"""Places on a ray, equally far apart, at which the cost is looked up."""
_GROWTH, _FURTHEST, _HALVINGS = 1.1, 32.0, 20
"""Factor by which the search for the wall goes on, how far at most, in lengths of the sample, and how often the last
step is halved."""
_SPENT = -60.0
"""Nats below its density at the sample from which on the prior leaves nothing of a ray."""
_GRADED = np.geomspace(1e-6, 40.0, 180)
"""Distances from the wall, in log t, at which integrands are taken: the mass lies within 1/D of it."""
_EVEN, _DEEP = 0.35, 1.0
"""More of them are evenly spread, that many widths D^(−1/2) of an ensemble apart, down to this distance."""
_ARCH = 0.25
"""Nats, at most, by which the bend between two of them changes what lies there."""
_BEHIND = 1e-3
"""A sample this share of its length beyond the wall is on the far side of a barrier, and no part of the star."""
_MOST = 4.0
"""Times the room below the cutoff, beyond which nobody asks how high a cost is."""


def look_along(ensemble: Ensemble, displacement: PyTree) -> tuple[Float[Array, ""], Float[Array, "points"]]:
    """Return how far the ray through δ goes, in lengths of δ, and the cost at `POINTS` places up to there.

    It goes to the region's wall, to the prior's own, or to where the prior leaves nothing. All float64; +inf for NaN.

    Args:
        ensemble: of the star.
        displacement: δ, inside.
    """
    frame = ensemble.frame
    with jax.enable_x64(True):
        square, pulled = tree.dot(displacement, displacement), frame.pulled(displacement)
        furthest = jnp.minimum(frame.exit(displacement), _FURTHEST)

        def inside(t: Array) -> Array:
            return ensemble.cost_at(displacement, t.astype(jnp.float32)) <= ensemble.cutoff

        def goes_on(t: Array) -> Array:
            prior = 0.5 * frame.stiffness * square * (t * t - 1.0) + pulled * (t - 1.0)
            density = ensemble.dimension * jnp.log(t) - prior
            return (t < furthest) & (density > _SPENT) & inside(t)

        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            is_inside = inside(middle)
            return jnp.where(is_inside, middle, low), jnp.where(is_inside, high, middle)

        high = jax.lax.while_loop(goes_on, lambda t: _GROWTH * t, jnp.full((), _GROWTH, jnp.float64))
        high = jnp.minimum(high, furthest)
        low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (high / _GROWTH, high))
        # In float32, in which the cost will see it.
        end = jnp.where(inside(high), high, low).astype(jnp.float32)
        fractions = end * (jnp.arange(1, POINTS + 1, dtype=jnp.float32) / jnp.float32(POINTS))
        costs = jax.lax.map(lambda t: ensemble.cost_at(displacement, t), fractions)
        return end.astype(jnp.float64), jnp.where(jnp.isnan(costs), jnp.inf, costs)


class SampleRays:
    """The two integrals along rays, for the ensembles of a run; NumPy, float64.

    Args:
        ensemble: of the star, with a ridge.
        anchor_cost: C(θ0), nats.
        betas: what multiplies guide and ridge in each ensemble, shape (rungs, 2).
    """

    def __init__(self, ensemble: Ensemble, anchor_cost: float, betas: Vector) -> None:
        """Take from the ensemble what is needed on the host."""
        assert ensemble.ridge is not None
        self.dimension, self.precision = ensemble.dimension, ensemble.frame.stiffness
        self.guides, self.eyes = ensemble.guides, ensemble.eyes
        self.share, self.sharpness = float(ensemble.ridge.share), float(ensemble.ridge.sharpness)
        self.anchor_cost, self.cutoff, self.betas = anchor_cost, float(ensemble.cutoff), betas
        even = np.arange(0.0, _DEEP, min(_EVEN / np.sqrt(self.dimension), 0.1))
        self._depths = np.unique(np.concatenate([even, _GRADED]))[::-1]

    def integrals(self, ends: Vector, costs: Vector, squares: Vector, pulled: Vector) -> tuple[Vector, Vector]:
        """Return J for each chain, shape (chains,), and I for each ensemble too, shape (chains, rungs).

        J is −inf for a chain that stands behind a barrier, and for one whose ray says nothing.

        Args:
            ends: how far rays go, shape (chains,).
            costs: as found by `look_along`, shape (chains, points).
            squares: |δ|², shape (chains,).
            pulled: b·δ, likewise.
        """
        values = np.concatenate([np.full((len(costs), 1), self.anchor_cost), costs], axis=1)
        path = _Path(ends, np.minimum(values, self.anchor_cost + _MOST * (self.cutoff - self.anchor_cost)))
        walls = self._walls(path, values)
        q = np.log(walls)[:, None] - self._depths
        t = np.exp(q)
        guide = np.mean([path(g * t) for g in self.guides], axis=0)
        steep = np.asarray(logsumexp([self.sharpness * path(f * t) for f in self.eyes], axis=0))
        prior = self.dimension * q - 0.5 * self.precision * squares[:, None] * t * t - pulled[:, None] * t
        held = np.stack([guide, self.share / self.sharpness * steep])
        energies = np.einsum("kg,gcn->ckn", np.concatenate([np.zeros((1, 2)), self.betas]), held)
        found = _log_integral(prior[:, None] - energies, q[:, None])
        counts = (walls > 1.0 - _BEHIND) & np.isfinite(found).all(axis=1)
        return np.where(counts, found[:, 0], -np.inf), np.where(counts[:, None], found[:, 1:], 0.0)

    def _walls(self, path: "_Path", values: Vector) -> Vector:
        """Return where rays first leave the region, in lengths of δ, or their ends: shape (chains,)."""
        out = values > self.cutoff
        first = np.maximum(np.argmax(out, axis=1), 1)
        low, high = ((first - back) / POINTS * path.ends for back in (1, 0))
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            beyond = path(middle[:, None])[:, 0] > self.cutoff
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        return np.where(out.any(axis=1), low, path.ends)


class _Path:
    """The cost along rays, between the places where it was looked up."""

    def __init__(self, ends: Vector, values: Vector) -> None:
        self.ends, self._pieces = ends, CubicSpline(np.arange(POINTS + 1), values, axis=1).c

    def __call__(self, t: Vector) -> Vector:
        """Return C(t δ), shape (chains, places) like t."""
        chains = np.arange(len(self.ends))[:, None]
        place = np.clip(t / self.ends[:, None], 0.0, 1.0) * POINTS
        piece = np.minimum(place.astype(int), POINTS - 1)
        rest = place - piece
        a, b, c, d = (coefficient[piece, chains] for coefficient in self._pieces)
        return ((a * rest + b) * rest + c) * rest + d


def _log_integral(logs: Vector, x: Vector) -> Vector:
    """Return log ∫ e^logs dx along the last axis, between the points linear and corrected for what bends them."""
    steps, widths = np.diff(logs), np.diff(x)
    bends = 2.0 * np.diff(steps / widths) / (widths[..., 1:] + widths[..., :-1])
    bends = np.concatenate([bends[..., :1], 0.5 * (bends[..., 1:] + bends[..., :-1]), bends[..., -1:]], axis=-1)
    # What is cut off from an arch by its chord, as a share of the integral.
    arch = np.clip(-bends * widths**2 / 12.0, -_ARCH, _ARCH)
    return np.asarray(logsumexp(log_pieces(logs, x) + arch, axis=-1))
