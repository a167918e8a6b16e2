r"""The tempered posterior of a quadratic cost, :math:`\propto \pi(\theta) e^{-\beta C(\theta)}`, as a proposal.

    Σ⁻¹ = βH + Λ,   μ = −ΣΛ(θ0 − m),   H = diag(h) + Σ_i λ_i u_i u_iᵀ

with Λ and m the prior's precision and mean. Pure, so that a whole family of proposals is one compiled program.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from volumejax import tree
from volumejax.low_rank import LowRankPrecision
from volumejax.proposals import Diagonal
from volumejax.rows import gram, mix_rows, over_rows, project
from volumejax.tree import wide

__all__ = ["CurvatureModel", "mean_cost", "tempered"]


class CurvatureModel(eqx.Module):
    """H = diag(h) + Σ λ u uᵀ, non-negative; the low-rank part may be absent."""

    diagonal: PyTree
    """h, a pytree like the parameters of full float32 leaves."""
    values: Float[Array, "rank"] | None
    vectors: PyTree | None
    """u, leaves of shape (rank, *leaf shape)."""

    def bent(self, exponent: ArrayLike, damping: ArrayLike) -> "CurvatureModel":
        """Return (h^exponent + damping)² and λ^(2·exponent) in place of h and λ: the same at ½ and 0."""
        power, floor = (jnp.asarray(x, jnp.float32) for x in (exponent, damping))
        diagonal = jax.tree.map(lambda h: (h**power + floor) ** 2, self.diagonal)
        return CurvatureModel(diagonal, None if self.values is None else self.values ** (2.0 * power), self.vectors)


def tempered(
    model: CurvatureModel, params: PyTree, prior: Any, beta: ArrayLike, shift: ArrayLike | None
) -> Diagonal | LowRankPrecision:
    """Return the Gaussian of the tempered posterior; nothing is checked.

    Args:
        model: H.
        params: the anchor.
        prior: supplies Λ and m; a prior without a centre has no μ.
        beta: inverse temperature.
        shift: factor of μ, 1 to use it and 0 not to, traced or not; None leaves it out of the program.

    Example:
        >>> import jax.numpy as jnp, volumejax as vj
        >>> model = CurvatureModel(jnp.array([0.0, 0.3]), None, None)
        >>> print(tempered(model, jnp.ones(2), vj.Gaussian(1.0), 10.0, None).scale)
        [1.  0.5]
    """
    with jax.enable_x64(True):
        precision = jax.tree.map(
            lambda h, p: jnp.asarray(beta, jnp.float64) * wide(h) + wide(p), model.diagonal, prior.precision(params)
        )
        if model.values is None:
            scale = jax.tree.map(lambda p: (1.0 / jnp.sqrt(p)).astype(jnp.float32), precision)
            made = Diagonal(scale)
        else:
            root = jnp.sqrt(jnp.asarray(beta, jnp.float64) * wide(model.values))
            made = LowRankPrecision(precision, jax.tree.map(lambda u: over_rows(root, u) * wide(u), model.vectors))
        if shift is None:
            return made
        pull = jax.tree.map(lambda x: -jnp.asarray(shift, jnp.float64) * x, _force(params, prior))
        if isinstance(made, LowRankPrecision):
            return made.shifted(made.apply_covariance(pull))  # pyright: ignore[reportReturnType] - its own class
        mean = jax.tree.map(lambda x, p: (x / p).astype(jnp.float32), pull, precision)
        return Diagonal(made.scale, mean)


@eqx.filter_jit
def mean_cost(model: CurvatureModel, params: PyTree, prior: Any, beta: ArrayLike, shift: bool) -> Float[Array, ""]:
    """Return E_β C = ½ tr HΣ + ½ μᵀHμ, the second term where `shift` is on; float64.

    By Woodbury with V = √(βλ) u, P = βh + Λ, K = VᵀP⁻¹V: Σ = P⁻¹ − P⁻¹V(I + K)⁻¹VᵀP⁻¹.
    """
    with jax.enable_x64(True):
        beta = jnp.asarray(beta, jnp.float64)
        # A flat direction of both H and Λ has no mean cost, and no say.
        spread = jax.tree.map(
            lambda h, p: _inverse(beta * wide(h) + wide(p)), model.diagonal, prior.precision(params)
        )  # fmt: skip
        total = 0.5 * tree.dot(model.diagonal, spread)
        force = _force(params, prior)
        mean = jax.tree.map(lambda f, s: -f * s, force, spread)
        if model.values is not None:
            values = wide(model.values)
            root = jnp.sqrt(beta * values)
            reached = jax.tree.map(lambda u, s: over_rows(root, u) * wide(u) * s[None], model.vectors, spread)
            stiff = jax.tree.map(lambda u: over_rows(root, u) * wide(u), model.vectors)
            inner = gram(stiff, reached)
            system = jnp.eye(values.shape[0], dtype=jnp.float64) + inner
            bent = jax.tree.map(lambda r, h: r * wide(h)[None], reached, model.diagonal)
            total -= 0.5 * jnp.trace(jnp.linalg.solve(system, gram(bent, reached)))
            total += 0.5 * jnp.trace(jnp.linalg.solve(system, inner)) / beta
            back = jnp.linalg.solve(system, project(stiff, mean))
            mean = jax.tree.map(lambda m, r: m - mix_rows(back, r), mean, reached)
            if shift:
                total += 0.5 * jnp.sum(values * project(model.vectors, mean) ** 2)
        if shift:
            weighted = jax.tree.map(lambda m, h: m * wide(h), mean, model.diagonal)
            total += 0.5 * tree.dot(weighted, mean)
        return total


def _force(params: PyTree, prior: Any) -> PyTree:
    """Return Λ(θ0 − m), zeros where the prior has no centre; call inside `enable_x64`."""
    precision = prior.precision(params)
    if not hasattr(prior, "displacement"):
        return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float64), precision)
    return jax.tree.map(lambda p, x: wide(p) * x, precision, prior.displacement(params))


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0.0, 1.0 / jnp.where(x > 0.0, x, 1.0), 0.0)
