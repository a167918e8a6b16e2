"""Priors over parameters, and what they look like along a ray.

Every prior here is, on the ray θ0 + s·y, the exponential of a quadratic in s up to an exit point; that is all that the
radial integral needs.
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree
from volumejax.logmath import log_ball_volume
from volumejax.tree import is_traced, wide

__all__ = ["Gaussian", "Lebesgue", "Line", "UniformBall", "UniformBox"]


class Line(eqx.Module):
    """log π(θ0 + s·y) = log_density + slope·s − ½ curvature·s² for 0 ≤ s < exit, and −∞ beyond. float64."""

    log_density: Float[Array, ""]
    slope: Float[Array, ""]
    curvature: Float[Array, ""]
    exit: Float[Array, ""]


class Gaussian(eqx.Module):
    """Independent normals, θ ~ N(mean, sigma²).

    Args:
        sigma: standard deviation, a positive scalar or a pytree like the parameters (scalars or full leaves).
        mean: centre; None for zero, or a pytree like the parameters (the anchor itself, for instance).

    Example:
        >>> import jax.numpy as jnp
        >>> print(Gaussian(sigma=2.0).anchor_term({"w": jnp.full(3, 4.0)}))
        -6.0
    """

    sigma: Any
    mean: Any = None
    proper: ClassVar[bool] = True

    def __check_init__(self) -> None:
        _require_positive(self.sigma, "Gaussian sigma")
        _require_finite(self.mean, "Gaussian mean")

    def check(self, params: PyTree) -> None:
        """Raise a ValueError where sigma or mean does not fit the parameters."""
        tree.broadcast_to(self.sigma, params, "Gaussian sigma")
        self._centre(params)

    def anchor_term(self, params: PyTree) -> Float[Array, ""]:
        """Return −½ Σ (θ0−m)²/σ²."""
        with jax.enable_x64(True):
            z = self.whiten(self.displacement(params), params)
            return -0.5 * tree.dot(z, z)

    def log_density(self, params: PyTree) -> Float[Array, ""]:
        """Return log π(params)."""
        with jax.enable_x64(True):
            sigma = tree.broadcast_to(self.sigma, params, "Gaussian sigma")
            log_scale = jax.tree.map(_sum_log, sigma, params)
            total = jax.tree.reduce(jnp.add, log_scale, jnp.zeros((), jnp.float64))
            return self.anchor_term(params) - total - 0.5 * tree.size(params) * math.log(2.0 * math.pi)

    def line(self, params: PyTree, direction: PyTree) -> Line:
        """Return the prior along params + s·direction."""
        with jax.enable_x64(True):
            step = self.whiten(direction, params)
            here = self.whiten(self.displacement(params), params)
            return Line(self.log_density(params), -tree.dot(here, step), tree.dot(step, step), _infinity())

    def displacement(self, params: PyTree) -> PyTree:
        """Return θ0 − m, in float64."""
        with jax.enable_x64(True):
            centre = self._centre(params)
            return jax.tree.map(lambda x, m: wide(x) - wide(m), params, centre)

    def whiten(self, vector: PyTree, params: PyTree) -> PyTree:
        """Return vector / sigma, in float64."""
        with jax.enable_x64(True):
            sigma = tree.broadcast_to(self.sigma, params, "Gaussian sigma")
            return jax.tree.map(lambda x, s: wide(x) / wide(s), vector, sigma)

    def precision(self, params: PyTree) -> PyTree:
        """Return the diagonal of Λ = σ⁻², shaped like the parameters."""
        sigma = tree.broadcast_to(self.sigma, params, "Gaussian sigma")
        return jax.tree.map(
            lambda s, x: jnp.broadcast_to(1.0 / jnp.asarray(s, jnp.float32) ** 2, x.shape), sigma, params
        )

    def sample(self, key: Key[Array, ""], like: PyTree) -> PyTree:
        """Draw parameters shaped like `like`."""
        z = tree.normal_like(key, like)
        sigma = tree.broadcast_to(self.sigma, like, "Gaussian sigma")
        centre = self._centre(like)
        with jax.enable_x64(True):
            return jax.tree.map(
                lambda z, s, m, x: (wide(m) + wide(s) * wide(z)).astype(x.dtype), z, sigma, centre, like
            )

    def middle(self, like: PyTree) -> PyTree:
        """Return the mean, shaped like `like`."""
        return _filled(self._centre(like), like)

    def _centre(self, params: PyTree) -> PyTree:
        return tree.broadcast_to(0.0 if self.mean is None else self.mean, params, "Gaussian mean")


class UniformBox(eqx.Module):
    """Uniform between `low` and `high`, each a scalar or a pytree like the parameters.

    Bounds are rounded to the dtype of the parameters before they are compared, so that parameters clipped to them are
    inside.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{UniformBox(-1.0, 1.0).log_density(jnp.zeros(3)):.3f}")  # -log 2³
        -2.079
    """

    low: Any
    high: Any
    proper: ClassVar[bool] = True

    def check(self, params: PyTree) -> None:
        """Raise a ValueError where the bounds do not fit the parameters, or leave the anchor outside."""
        low, high = self.bounds(params)
        for (path, x), a, b in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(low), jax.tree.leaves(high), strict=True
        ):
            where = jax.tree_util.keystr(path)
            _require_finite(a, f"UniformBox low{where}")
            _require_finite(b, f"UniformBox high{where}")
            if not is_traced((a, b)) and not np.all(np.asarray(a, np.float64) < np.asarray(b, np.float64)):
                raise ValueError(f"UniformBox low{where} is not below high{where}; swap or widen the bounds")
            if not is_traced((x, a, b)) and not np.all(_between(np.asarray(x), np.asarray(a), np.asarray(b))):
                raise ValueError(f"the anchor{where} lies outside the UniformBox; widen the bounds or move the anchor")

    def anchor_term(self, params: PyTree) -> Float[Array, ""]:
        """Return 0: a flat prior has no distance term."""
        del params
        return _zero()

    def log_density(self, params: PyTree) -> Float[Array, ""]:
        """Return minus the log volume of the box inside it, −∞ outside."""
        with jax.enable_x64(True):
            low, high = self.bounds(params)
            terms = jax.tree.map(lambda a, b, x: _sum_log(wide(b) - wide(a), x), low, high, params)
            inside = jax.tree.map(
                lambda a, b, x: jnp.all(_between(x, jnp.asarray(a), jnp.asarray(b))), low, high, params
            )
            log_volume = jax.tree.reduce(jnp.add, terms, jnp.zeros((), jnp.float64))
            return jnp.where(jax.tree.reduce(jnp.logical_and, inside), -log_volume, -jnp.inf)

    def line(self, params: PyTree, direction: PyTree) -> Line:
        """Return the prior along params + s·direction; it ends at the nearest wall ahead."""
        with jax.enable_x64(True):
            low, high = self.bounds(params)

            def leaf_exit(x: Array, y: Array, a: Any, b: Any) -> Array:
                room = jnp.where(y > 0, wide(b) - wide(x), wide(a) - wide(x))
                return jnp.min(jnp.where(y == 0, jnp.inf, room / jnp.where(y == 0, 1.0, wide(y))), initial=jnp.inf)

            exits = jax.tree.map(leaf_exit, params, direction, low, high)
            nearest = jax.tree.reduce(jnp.minimum, exits, _infinity())
            return Line(self.log_density(params), _zero(), _zero(), jnp.maximum(nearest, 0.0))

    def precision(self, params: PyTree) -> PyTree:
        """Return zeros: a flat prior has no curvature."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def sample(self, key: Key[Array, ""], like: PyTree) -> PyTree:
        """Draw parameters shaped like `like`."""
        low, high = self.bounds(like)
        unit = tree.uniform_like(key, like)
        with jax.enable_x64(True):
            spread = jax.tree.map(lambda u, a, b: wide(a) + (wide(b) - wide(a)) * wide(u), unit, low, high)
            return jax.tree.map(lambda value, x: value.astype(x.dtype), spread, like)

    def middle(self, like: PyTree) -> PyTree:
        """Return the middle of the box, shaped like `like`."""
        low, high = self.bounds(like)
        with jax.enable_x64(True):
            return _filled(jax.tree.map(lambda a, b: 0.5 * (wide(a) + wide(b)), low, high), like)

    def bounds(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Return the bounds as pytrees like the parameters."""
        low = tree.broadcast_to(self.low, params, "UniformBox low")
        return low, tree.broadcast_to(self.high, params, "UniformBox high")


class UniformBall(eqx.Module):
    """Uniform in the ball of `radius` around `center` (None for zero, or a pytree like the parameters).

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{UniformBall(1.0).log_density(jnp.zeros(3)):.3f}")  # -log 4π/3
        -1.432
    """

    radius: Any
    center: Any = None
    proper: ClassVar[bool] = True

    def __check_init__(self) -> None:
        _require_positive(self.radius, "UniformBall radius")
        _require_finite(self.center, "UniformBall center")

    def check(self, params: PyTree) -> None:
        """Raise a ValueError where the centre does not fit the parameters, or the anchor lies outside."""
        offset = self.offset(params)
        if not is_traced((self.radius, offset)) and float(tree.dot(offset, offset)) > float(self.radius) ** 2:
            raise ValueError("the anchor lies outside the UniformBall; enlarge the radius or move the center")

    def anchor_term(self, params: PyTree) -> Float[Array, ""]:
        """Return 0: a flat prior has no distance term."""
        del params
        return _zero()

    def log_density(self, params: PyTree) -> Float[Array, ""]:
        """Return minus the log volume of the ball inside it, −∞ outside."""
        with jax.enable_x64(True):
            offset = self.offset(params)
            radius = wide(self.radius)
            log_volume = log_ball_volume(tree.size(params), jnp.log(radius))
            return jnp.where(tree.dot(offset, offset) <= radius**2, -log_volume, -jnp.inf)

    def line(self, params: PyTree, direction: PyTree) -> Line:
        """Return the prior along params + s·direction; it ends at the sphere."""
        with jax.enable_x64(True):
            offset = self.offset(params)
            a = tree.dot(direction, direction)
            b = tree.dot(offset, direction)
            room = jnp.maximum(wide(self.radius) ** 2 - tree.dot(offset, offset), 0.0)
            root = jnp.sqrt(b * b + a * room)
            # The root of a s² + 2 b s = room, in the form that does not cancel.
            away = b > 0.0
            leave = jnp.where(away, room / jnp.where(away, b + root, 1.0), (root - b) / a)
            return Line(self.log_density(params), _zero(), _zero(), leave)

    def precision(self, params: PyTree) -> PyTree:
        """Return zeros: a flat prior has no curvature."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def sample(self, key: Key[Array, ""], like: PyTree) -> PyTree:
        """Draw parameters shaped like `like`."""
        direction, factor = tree.unit_ball_like(key, like)
        with jax.enable_x64(True):
            scale = wide(self.radius) * factor
        return tree.axpy(scale, direction, self.middle(like))

    def middle(self, like: PyTree) -> PyTree:
        """Return the centre, shaped like `like`."""
        return _filled(tree.broadcast_to(0.0 if self.center is None else self.center, like, "UniformBall center"), like)

    def offset(self, params: PyTree) -> PyTree:
        """Return θ0 − centre, in float64."""
        with jax.enable_x64(True):
            centre = tree.broadcast_to(0.0 if self.center is None else self.center, params, "UniformBall center")
            return jax.tree.map(lambda x, c: wide(x) - wide(c), params, centre)


class Lebesgue(eqx.Module):
    """The flat measure of unit density: the log mass is then a log volume.

    Example:
        >>> import jax.numpy as jnp
        >>> print(Lebesgue().log_density(jnp.ones(3)))
        0.0
    """

    proper: ClassVar[bool] = False

    def check(self, params: PyTree) -> None:
        """Accept any parameters."""
        del params

    def anchor_term(self, params: PyTree) -> Float[Array, ""]:
        """Return 0."""
        del params
        return _zero()

    def log_density(self, params: PyTree) -> Float[Array, ""]:
        """Return 0."""
        del params
        return _zero()

    def line(self, params: PyTree, direction: PyTree) -> Line:
        """Return the constant density, without an exit."""
        del params, direction
        return Line(_zero(), _zero(), _zero(), _infinity())

    def precision(self, params: PyTree) -> PyTree:
        """Return zeros: a flat prior has no curvature."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)


def _filled(values: PyTree, like: PyTree) -> PyTree:
    """Return `values` in the shapes and dtypes of `like`."""
    return jax.tree.map(lambda v, x: jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape), values, like)


def _zero() -> Array:
    with jax.enable_x64(True):
        return jnp.zeros((), jnp.float64)


def _infinity() -> Array:
    with jax.enable_x64(True):
        return jnp.full((), jnp.inf, jnp.float64)


def _sum_log(value: Any, like: Array) -> Array:
    """Sum log(value), broadcast to the shape of `like`, in float64."""
    total = jnp.sum(jnp.log(wide(value)))
    return total * math.prod(like.shape) if jnp.ndim(value) == 0 else total


def _between(x: Any, low: Any, high: Any) -> Any:
    """Compare arrays of NumPy or JAX in the dtype of `x`."""
    return (x >= low.astype(x.dtype)) & (x <= high.astype(x.dtype))


def _require_positive(value: Any, name: str) -> None:
    _require_finite(value, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if eqx.is_array_like(leaf) and not is_traced(leaf) and not np.all(np.asarray(leaf) > 0):
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must be positive everywhere, got {leaf}")


def _require_finite(value: Any, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if eqx.is_array_like(leaf) and not is_traced(leaf) and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must be finite everywhere, got {leaf}")
