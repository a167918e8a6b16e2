"""Angular-Gaussian direction proposals: y ~ N(μ, Σ), of which only the direction y/|y| matters.

A ray is measured in units of its own y: θ0 + s·y with r = s|y|. The factor |y|^D that this puts into the prior's radial
integral stands in the proposal's as well and cancels, so no norm is ever taken.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree
from volumejax.tree import is_traced, wide

__all__ = ["Dense", "Diagonal", "Isotropic", "RayDraw", "check_positive", "ray_draw", "sum_log"]


class RayDraw(eqx.Module):
    """A drawn y, and the proposal along it: log N(s·y; μ, Σ) = log_density + slope·s − ½ curvature·s². float64.

    The density of the direction on the sphere, times |y|^{−D}, is the integral of s^{D−1} N(s·y; μ, Σ) over s > 0.
    """

    direction: PyTree
    log_density: Float[Array, ""]
    slope: Float[Array, ""]
    curvature: Float[Array, ""]


class Isotropic(eqx.Module):
    """Every direction equally likely.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> Isotropic().draw(jax.random.key(0), {"w": jnp.zeros(3)}).direction["w"].shape
        (3,)
    """

    def check(self, params: PyTree) -> None:
        """Accept any parameters."""
        del params

    def draw(self, key: Key[Array, ""], params: PyTree) -> RayDraw:
        """Draw y ~ N(0, I)."""
        y = tree.normal_like(key, params)
        return ray_draw(y, _zero(), tree.dot(y, y), _zero(), _zero(), tree.size(params))


class Diagonal(eqx.Module):
    """Σ = diag(scale²).

    Args:
        scale: standard deviations, a pytree like the parameters (scalars or full leaves), positive.
        mean: μ, an offset from the anchor; None for zero, or a pytree like the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> proposal = Diagonal(scale=jnp.array([1e-6, 1.0]), mean=jnp.array([5.0, 0.0]))
        >>> print(f"{proposal.draw(jax.random.key(0), jnp.zeros(2)).direction[0]:.3f}")
        5.000
    """

    scale: Any
    mean: Any = None

    def check(self, params: PyTree) -> None:
        """Raise a ValueError where scale or mean does not fit the parameters."""
        check_positive(tree.broadcast_to(self.scale, params, "Diagonal scale"), "Diagonal scale")
        if self.mean is not None:
            tree.broadcast_to(self.mean, params, "Diagonal mean")

    def draw(self, key: Key[Array, ""], params: PyTree) -> RayDraw:
        """Draw y = μ + scale·z."""
        scale = tree.broadcast_to(self.scale, params, "Diagonal scale")
        mean = tree.broadcast_to(0.0 if self.mean is None else self.mean, params, "Diagonal mean")
        y = jax.tree.map(lambda z, s, m: _single(m) + _single(s) * z, tree.normal_like(key, params), scale, mean)
        with jax.enable_x64(True):
            white_y = jax.tree.map(lambda y, s: wide(y) / wide(s), y, scale)
            white_mean = jax.tree.map(lambda m, s, y: jnp.broadcast_to(wide(m) / wide(s), y.shape), mean, scale, y)
            log_scale = jax.tree.map(lambda s, y: sum_log(s, y.size), scale, y)
            return ray_draw(
                y,
                tree.dot(white_y, white_mean),
                tree.dot(white_y, white_y),
                tree.dot(white_mean, white_mean),
                jax.tree.reduce(jnp.add, log_scale, _zero()),
                tree.size(params),
            )


class Dense(eqx.Module):
    """Σ = L Lᵀ for a D × D lower triangular `cholesky`, in the order of `jax.flatten_util.ravel_pytree`.

    Args:
        cholesky: L, with a positive diagonal. y = μ + L z, so a rotation contained in Σ is applied, not dropped.
        mean: μ, an offset from the anchor; None for zero, or a pytree like the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, y = Dense(jnp.array([[1.0, 0.0], [1.0, 1e-6]])).draw(jax.random.key(0), jnp.zeros(2)).direction
        >>> print(f"{y / x:.3f}")  # along the diagonal
        1.000
    """

    cholesky: Float[Array, "D D"]
    mean: Any = None
    white_mean: Float[Array, "D"] | None = None

    def __init__(self, cholesky: ArrayLike, mean: Any = None) -> None:
        """Solve L w = μ once, so that a ray costs one product with L and nothing more."""
        factor = jnp.asarray(cholesky, jnp.result_type(float))
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
            raise ValueError(f"Dense cholesky must be a square matrix, got shape {factor.shape}")
        if not is_traced(cholesky) and not _is_cholesky(np.asarray(cholesky)):
            raise ValueError(
                "Dense cholesky must be lower triangular with a positive diagonal; pass "
                "numpy.linalg.cholesky(covariance)"
            )
        self.cholesky = factor
        self.mean = None
        self.white_mean = None
        if mean is not None:
            self.mean = jax.tree.map(lambda m: jnp.asarray(m, factor.dtype), mean)
            flat = ravel_pytree(self.mean)[0]
            if flat.shape != factor.shape[:1]:
                raise ValueError(f"Dense mean has {flat.size} numbers, the cholesky factor {factor.shape[0]} rows")
            self.white_mean = jax.scipy.linalg.solve_triangular(factor, flat, lower=True)

    def check(self, params: PyTree) -> None:
        """Raise a ValueError where the factor or the mean does not fit the parameters."""
        if self.cholesky.shape[0] != tree.size(params):
            raise ValueError(
                f"Dense cholesky is {self.cholesky.shape[0]} × {self.cholesky.shape[0]}, but there are "
                f"{tree.size(params)} parameters; build it from the curvature of these parameters"
            )
        if self.mean is not None:
            tree.broadcast_to(self.mean, params, "Dense mean")

    def draw(self, key: Key[Array, ""], params: PyTree) -> RayDraw:
        """Draw y = μ + L z."""
        z = ravel_pytree(tree.normal_like(key, params))[0]
        unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))[1]
        flat = jnp.dot(self.cholesky, z.astype(self.cholesky.dtype), precision="highest")
        white_mean = jnp.zeros_like(z) if self.white_mean is None else self.white_mean
        if self.mean is not None:
            flat = flat + ravel_pytree(self.mean)[0]
        with jax.enable_x64(True):
            # The whitened y is known before rounding; solving for it again would amplify the rounding of y.
            white_y = wide(z) + wide(white_mean)
            return ray_draw(
                unravel(flat.astype(jnp.float32)),
                tree.dot(white_y, white_mean),
                tree.dot(white_y, white_y),
                tree.dot(white_mean, white_mean),
                jnp.sum(jnp.log(wide(jnp.diagonal(self.cholesky)))),
                z.size,
            )


def ray_draw(
    direction: PyTree, cross: Array, square: Array, mean_square: Array, log_det: Array, dimension: int
) -> RayDraw:
    """Collect yᵀΣ⁻¹μ, yᵀΣ⁻¹y, μᵀΣ⁻¹μ and ½ log det Σ into the quadratic along the ray."""
    with jax.enable_x64(True):
        constant = -0.5 * mean_square - log_det - 0.5 * dimension * math.log(2.0 * math.pi)
        return RayDraw(direction, constant, cross, square)


def _is_cholesky(factor: np.ndarray) -> bool:
    # Row by row, since the matrix may be as large as memory allows.
    return bool(np.all(np.diagonal(factor) > 0)) and not any(np.any(row[i + 1 :]) for i, row in enumerate(factor))


def _single(x: Any) -> Array:
    return jnp.asarray(x, jnp.float32)


def _zero() -> Array:
    with jax.enable_x64(True):
        return jnp.zeros((), jnp.float64)


def sum_log(scale: Any, count: int) -> Float[Array, ""]:
    """Return Σ log scale over a leaf of `count` numbers, all alike where the scale is a scalar; inside `enable_x64`."""
    total = jnp.sum(jnp.log(wide(scale)))
    return total * count if jnp.ndim(scale) == 0 else total


def check_positive(scale: PyTree, name: str) -> None:
    """Raise a ValueError unless every concrete leaf is positive and finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(scale):
        if not is_traced(leaf) and not np.all((np.asarray(leaf) > 0) & np.isfinite(np.asarray(leaf))):
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must be positive and finite everywhere; add damping")
