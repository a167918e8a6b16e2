r"""Whitened coordinates around the anchor, in which a prior is a quadratic inside walls.

With θ = θ0 + scale·δ every prior of this library reads

.. math:: \log \pi(\theta)\,d\theta
          = \mathrm{offset} - \tfrac12 \mathrm{stiffness}\,|\delta|^2 - b\cdot\delta + \log d\delta

inside its support: stiffness 1 and b = (θ0−m)/σ for a Gaussian, both 0 for the flat ones.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jaxtyping import Array, Bool, Float, Key, PyTree

from volumejax import tree
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox
from volumejax.tree import wide

__all__ = ["Ball", "Frame", "Walls", "frame_of"]


_LEAST_UNIT = 1e-3
"""Of the prior's own width: an anchor nearer than that to zero does not set the unit."""


class Walls(eqx.Module):
    """A box in whitened coordinates; leaves like the parameters, float32."""

    low: PyTree
    high: PyTree


class Ball(eqx.Module):
    """A ball in whitened coordinates: |δ + centre| ≤ radius, float32."""

    centre: PyTree
    radius: Float[Array, ""]


class Frame(eqx.Module):
    """The anchor's whitened coordinates and the prior in them."""

    anchor: PyTree
    scale: PyTree
    """Unit of δ in each leaf: a scalar or an array of the leaf's shape, float32."""
    pull: PyTree | None
    """b, float32; None for a flat prior."""
    offset: Float[Array, ""]
    """log π(θ0) + Σ log scale, float64."""
    stiffness: float = eqx.field(static=True)
    walls: Walls | None = None
    ball: Ball | None = None

    @property
    def improper(self) -> bool:
        """Whether nothing but the region holds δ back: neither a pull nor a wall of the prior."""
        return self.stiffness == 0.0 and self.walls is None and self.ball is None

    def params(self, displacement: PyTree) -> PyTree:
        """Return θ0 + scale·δ in the dtype of the anchor."""
        return jax.tree.map(lambda x, s, d: (x + s * d).astype(x.dtype), self.anchor, self.scale, displacement)

    def pulled(self, vector: PyTree) -> Float[Array, ""]:
        """Return b·vector, float64."""
        with jax.enable_x64(True):
            return jnp.zeros((), jnp.float64) if self.pull is None else tree.dot(self.pull, vector)

    def supports(self, displacement: PyTree) -> Bool[Array, ""]:
        """Return whether the point lies in the prior's support."""
        with jax.enable_x64(True):
            inside = jnp.ones((), bool)
            if self.walls is not None:
                fits = jax.tree.map(
                    lambda d, a, b: jnp.all((d >= a) & (d <= b)), displacement, self.walls.low, self.walls.high
                )
                inside = jax.tree.reduce(jnp.logical_and, fits)
            if self.ball is not None:
                from_centre = jax.tree.map(jnp.add, displacement, self.ball.centre)
                inside = inside & (tree.dot(from_centre, from_centre) <= wide(self.ball.radius) ** 2)
            return inside

    def exit(self, displacement: PyTree) -> Float[Array, ""]:
        """Return the factor by which a point may be taken away from the anchor before it leaves the support; float64.

        +inf where it never does.
        """
        with jax.enable_x64(True):
            furthest = jnp.full((), jnp.inf, jnp.float64)
            if self.walls is not None:

                def least(d: Array, low: Array, high: Array) -> Array:
                    d, wall = wide(d), wide(jnp.where(d > 0.0, high, low))
                    return jnp.min(jnp.where(d == 0.0, jnp.inf, wall / jnp.where(d == 0.0, 1.0, d)), initial=jnp.inf)

                factors = jax.tree.map(least, displacement, self.walls.low, self.walls.high)
                furthest = jax.tree.reduce(jnp.minimum, factors)
            if self.ball is not None:
                # |t d + c| = R
                square, across = tree.dot(displacement, displacement), tree.dot(displacement, self.ball.centre)
                room = wide(self.ball.radius) ** 2 - tree.dot(self.ball.centre, self.ball.centre)
                root = jnp.sqrt(jnp.maximum(across**2 + square * room, 0.0))
                leaves = (root - across) / jnp.where(square > 0.0, square, 1.0)
                furthest = jnp.where(square > 0.0, leaves, furthest)
            return furthest

    def log_reference(self, precision: Float[Array, ""]) -> Float[Array, ""]:
        """Return log ∫ exp(−½ a|δ|² − b·δ) dδ, over the box where there is one; float64."""
        with jax.enable_x64(True):
            a = wide(precision)
            dimension = tree.size(self.anchor)
            total = 0.5 * dimension * jnp.log(2.0 * jnp.pi / a)
            if self.pull is not None:
                total = total + 0.5 * tree.dot(self.pull, self.pull) / a
            if self.walls is not None:
                root = jnp.sqrt(a)
                shares = jax.tree.map(
                    lambda low, high: jnp.sum(_log_interval(root * wide(low), root * wide(high))),
                    self.walls.low,
                    self.walls.high,
                )
                total = total + jax.tree.reduce(jnp.add, shares)
            return total

    def draw_reference(self, key: Key[Array, ""], precision: Float[Array, ""]) -> PyTree:
        """Draw δ from the density ∝ exp(−½ a|δ|² − b·δ), inside the box where there is one; exact, float32."""
        a = jnp.asarray(precision, jnp.float32)
        if self.walls is not None:
            return jax.tree.map(
                lambda u, low, high: _truncated_normal(u, jnp.sqrt(a), low, high),
                tree.uniform_like(key, self.anchor),
                self.walls.low,
                self.walls.high,
            )
        z = jax.tree.map(lambda z: z / jnp.sqrt(a), tree.normal_like(key, self.anchor))
        return z if self.pull is None else jax.tree.map(lambda z, b: z - b / a, z, self.pull)

    def draw_prior(self, key: Key[Array, ""]) -> PyTree:
        """Draw δ from a proper prior; float32, so that a prior far from zero loses nothing to rounding."""
        if self.stiffness > 0.0:
            with jax.enable_x64(True):
                one = jnp.ones((), jnp.float64)
            return self.draw_reference(key, one)
        if self.walls is not None:
            return jax.tree.map(
                lambda u, low, high: jnp.clip(low + (high - low) * u, low, high),
                tree.uniform_like(key, self.anchor),
                self.walls.low,
                self.walls.high,
            )
        if self.ball is None:
            raise ValueError("a flat prior without an end cannot be drawn from; use vj.UniformBox or vj.UniformBall")
        z, factor = tree.unit_ball_like(key, self.anchor)
        with jax.enable_x64(True):
            length = wide(self.ball.radius) * factor
            return jax.tree.map(lambda z, c: (length * wide(z) - wide(c)).astype(jnp.float32), z, self.ball.centre)


def frame_of(prior: Any, params: PyTree) -> Frame:
    """Return the frame of `prior` at the anchor `params`.

    The unit of δ is the prior's σ; for flat priors the anchor's RMS, or a share of the prior's own width where the
    anchor is zero.

    Raises:
        ValueError: no frame is known for this kind of prior.

    Example:
        >>> import jax.numpy as jnp, volumejax as vj
        >>> frame = frame_of(vj.Gaussian(2.0), jnp.full(3, 4.0))
        >>> print(frame.pull, frame.stiffness)
        [2. 2. 2.] 1.0
    """
    with jax.enable_x64(True):
        if isinstance(prior, Gaussian):
            scale = _narrow(tree.broadcast_to(prior.sigma, params, "Gaussian sigma"))
            pull = _narrow(prior.whiten(prior.displacement(params), params))
            # The density at the anchor is that of the rounded pull and scale: of the exact ones, all mass would be off
            # by a rounding to the D-th power, up to half a nat at D = 10⁷.
            log_peak = -0.5 * tree.size(params) * np.log(2.0 * np.pi)
            return Frame(params, scale, pull, log_peak - 0.5 * tree.dot(pull, pull), 1.0)
        log_density = prior.log_density(params)
        unit = _rms(params)
        if isinstance(prior, UniformBox):
            low, high = prior.bounds(params)
            widths = jax.tree.map(lambda a, b, x: jnp.sum((wide(b) - wide(a)) + 0.0 * wide(x)), low, high, params)
            mean_width = jax.tree.reduce(jnp.add, widths) / tree.size(params)
            width = mean_width / np.sqrt(12.0)
            scale = _same(jnp.where(unit > _LEAST_UNIT * width, unit, width), params)
            walls = Walls(*(_whitened(bound, params, scale) for bound in (low, high)))
            return Frame(params, scale, None, log_density + _log_units(scale, params), 0.0, walls=walls)
        if isinstance(prior, UniformBall):
            radius = wide(prior.radius)
            width = radius / np.sqrt(tree.size(params))
            scale = _same(jnp.where(unit > _LEAST_UNIT * width, unit, width), params)
            centre = jax.tree.map(lambda o, s: (o / wide(s)).astype(jnp.float32), prior.offset(params), scale)
            ball = Ball(centre, (radius / wide(jax.tree.leaves(scale)[0])).astype(jnp.float32))
            return Frame(params, scale, None, log_density + _log_units(scale, params), 0.0, ball=ball)
        if isinstance(prior, Lebesgue):
            scale = _same(jnp.where(unit > 0.0, unit, 1.0), params)
            return Frame(params, scale, None, log_density + _log_units(scale, params), 0.0)
    raise ValueError(
        f"no whitened coordinates are known for a prior of type {type(prior).__name__}; use vj.Gaussian, "
        "vj.UniformBox, vj.UniformBall or vj.Lebesgue"
    )


def _rms(params: PyTree) -> Array:
    return jnp.sqrt(tree.dot(params, params) / tree.size(params))


def _same(unit: Array, params: PyTree) -> PyTree:
    return jax.tree.map(lambda _: unit.astype(jnp.float32), params)


def _narrow(values: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), values)


def _whitened(bound: PyTree, params: PyTree, scale: PyTree) -> PyTree:
    return jax.tree.map(lambda v, x, s: ((wide(v) - wide(x)) / wide(s)).astype(jnp.float32), bound, params, scale)


def _log_units(scale: PyTree, params: PyTree) -> Array:
    """Return Σ log scale over all coordinates, from the scale as rounded to float32."""
    logs = jax.tree.map(lambda s, x: jnp.sum(jnp.broadcast_to(jnp.log(wide(s)), x.shape)), scale, params)
    return jax.tree.reduce(jnp.add, logs, jnp.zeros((), jnp.float64))


def _log_interval(low: Array, high: Array) -> Array:
    """Return log(Φ(high) − Φ(low)), taken in the tail where it does not cancel."""
    flip = low > 0.0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    return log_ndtr(high) + jnp.log1p(-jnp.exp(log_ndtr(low) - log_ndtr(high)))


def _truncated_normal(uniform: Array, root: Array, low: Array, high: Array) -> Array:
    below, above = ndtr(root * low), ndtr(root * high)
    # A uniform of exactly 0, one in 2²³, would lie infinitely many deviations away.
    return jnp.clip(ndtri(below + (uniform + 2.0**-24) * (above - below)) / root, low, high)
