"""Proposals made from what is known of the anchor: optimizer moments and curvature."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from volumejax import tree
from volumejax.optax_moments import second_moments
from volumejax.proposals import Dense, Diagonal

__all__ = ["adam_proposal", "curvature_proposal", "damped_proposal", "matching_beta"]


def adam_proposal(
    opt_state: Any, params: PyTree, prior: Any, *, damping: float = 1e-3, exponent: float = 0.5, b2: float | None = None
) -> Diagonal:
    """Return the paper's Adam proposal, from the second moments in an optax state.

    Args:
        opt_state: optax state that holds Adam's moments.
        params: the anchor.
        prior: checked against the parameters; the paper's form does not depend on it.
        damping: added to the root of the moments, in their units.
        exponent: power of the second moment.
        b2: decay rate of the second moment, for its bias correction; None for optax's default.

    Returns:
        `damped_proposal` of the bias-corrected second moments.

    Raises:
        ValueError: the state holds no Adam moments, or they do not match the parameters.

    Example:
        >>> import jax.numpy as jnp, optax, volumejax as vj
        >>> params = {"w": jnp.ones(2)}
        >>> optimizer = optax.adam(1e-3)
        >>> _, state = optimizer.update({"w": jnp.array([1.0, 4.0])}, optimizer.init(params))
        >>> scale = vj.adam_proposal(state, params, vj.Gaussian(1.0)).scale["w"]
        >>> print(f"{scale[0]:.3f} {scale[1]:.3f}")
        0.999 0.250

    Reference: Scherlis & Belrose, arXiv 2501.18812, §3.
    """
    prior.check(params)
    return damped_proposal(second_moments(opt_state, params, b2=b2), params, damping=damping, exponent=exponent)


def damped_proposal(curvature: PyTree, params: PyTree, *, damping: float, exponent: float = 0.5) -> Diagonal:
    """Return directions with standard deviations 1/(h^exponent + damping), without a mean: the paper's form.

    Args:
        curvature: h, non-negative, a pytree like the parameters: second moments or a diagonal of curvature.
        params: the anchor.
        damping: positive; bounds the standard deviations by 1/damping.
        exponent: power of h.

    Raises:
        ValueError: damping is not positive, or the curvature does not fit the parameters or is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> print(jnp.round(damped_proposal(jnp.array([0.0, 4.0]), jnp.zeros(2), damping=0.5).scale, 3))
        [2.  0.4]
    """
    if not damping > 0.0:
        raise ValueError(f"damping must be positive, got {damping}; it bounds the spread of flat directions")
    h = _diagonal_curvature(curvature, params)
    return Diagonal(jax.tree.map(lambda h: 1.0 / (h**exponent + damping), h))


def curvature_proposal(
    curvature: PyTree | Float[Array, "D D"],
    params: PyTree,
    prior: Any,
    *,
    beta: float | None = None,
    cutoff: float | None = None,
    shift: bool = True,
) -> Diagonal | Dense:
    r"""Return the Gaussian approximation of the tempered posterior, :math:`\propto \pi(\theta) e^{-\beta C(\theta)}`.

    Directions have :math:`\Sigma^{-1} = \beta H + \Lambda` and :math:`\mu = -\Sigma \Lambda (\theta_0 - m)`, with Λ
    and m the prior's precision and mean.

    Args:
        curvature: H, the Hessian (or GGN) of the cost at the anchor: a pytree like the parameters for its diagonal, or
            a D × D array in the order of `ravel_pytree`.
        params: the anchor.
        prior: supplies Λ and m; flat priors have Λ = 0, and then H must be positive definite.
        beta: inverse temperature, the literature's nβ; None takes `matching_beta` of the cutoff.
        cutoff: ε in nats, needed where beta is None.
        shift: whether to use the mean μ; it matters at large cutoffs and can hurt at small ones.

    Returns:
        `Diagonal` or `Dense`.

    Raises:
        ValueError: shapes that do not fit, or a precision that is not positive definite.

    Example:
        >>> import jax.numpy as jnp, volumejax as vj
        >>> proposal = curvature_proposal(jnp.array([0.0, 0.3]), jnp.ones(2), vj.Gaussian(1.0), beta=10.0)
        >>> print(proposal.scale, proposal.mean)
        [1.  0.5] [-1.   -0.25]
    """
    prior.check(params)
    if tree.is_traced((curvature, params)):
        raise ValueError("curvature_proposal factorises on the host; build it before jax.jit and pass the proposal in")
    dense = _is_dense(curvature, params)
    h = np.asarray(curvature, np.float64) if dense else _ravel64(_diagonal_curvature(curvature, params))
    if not np.all(np.isfinite(h)):
        raise ValueError("curvature has NaN or infinite entries; compute it where the cost is finite")
    precision = _ravel64(prior.precision(params))
    pull = _ravel64(prior.displacement(params)) if hasattr(prior, "displacement") else np.zeros_like(precision)
    if beta is None:
        if cutoff is None:
            raise ValueError(
                "curvature_proposal needs either beta or cutoff; pass the cutoff of the volume to be estimated"
            )
        beta = matching_beta(h, precision, cutoff, pull if shift else None)
    unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), params))[1]
    if dense:
        matrix = beta * h
        matrix[np.diag_indices_from(matrix)] += precision
        factor = _inverse_cholesky(matrix)
        mean = -factor @ (factor.T @ (precision * pull)) if shift and np.any(precision * pull) else None
        return Dense(
            jnp.asarray(factor, jnp.float32), None if mean is None else unravel(jnp.asarray(mean, jnp.float32))
        )
    total = beta * h + precision
    if not np.all(total > 0.0):
        raise ValueError(
            "curvature_proposal: beta·H + Λ has entries that are not positive; raise beta or use a proper prior"
        )
    mean = -precision * pull / total
    return Diagonal(
        unravel(jnp.asarray(1.0 / np.sqrt(total), jnp.float32)),
        unravel(jnp.asarray(mean, jnp.float32)) if shift and np.any(mean) else None,
    )


def matching_beta(
    curvature: Float[np.ndarray, "D"] | Float[np.ndarray, "D D"],
    precision: np.ndarray,
    cutoff: float,
    displacement: np.ndarray | None = None,
) -> float:
    r"""Return the β whose tempered posterior is closest to the region {C ≤ ε} of the quadratic model.

    It solves :math:`\mathbb{E}_\beta C + 1/\beta = \epsilon` with
    :math:`\mathbb{E}_\beta C = \tfrac12 \mathrm{tr}\, H\Sigma + \tfrac12 \mu^\top H \mu`, the saddle point of
    :math:`\mathrm{mass}(\epsilon) = \int Z(\beta) e^{\beta\epsilon}\, d\beta / 2\pi i\beta`. The term 1/β stands for
    the hard edge: for a flat prior β = (D+2)/2ε, whose Gaussian has the covariance of the ellipsoid itself.

    Args:
        curvature: H, diagonal or dense.
        precision: diagonal of Λ.
        cutoff: ε in nats.
        displacement: θ0 − m, where the proposal is to be shifted towards the prior's mean; None for μ = 0.

    Example:
        >>> import numpy as np
        >>> round(matching_beta(np.ones(10), np.zeros(10), cutoff=0.5), 6)
        12.0
    """
    if not cutoff > 0.0:
        raise ValueError(f"cutoff must be a positive number of nats, got {cutoff}")
    # In units of the prior's width, where it has one; a flat prior leaves H as it is.
    root = np.sqrt(np.where(precision > 0.0, precision, 1.0))
    pull = np.zeros_like(root) if displacement is None else root * displacement * (precision > 0.0)
    unit = (precision > 0.0).astype(np.float64)
    if curvature.ndim == 2:
        h, vectors = np.linalg.eigh(curvature / root / root[:, None])
        pull = vectors.T @ pull
    else:
        h = curvature / root**2
    keep = h > 1e-12 * h.max(initial=0.0)
    h, unit, pull = h[keep], unit[keep], pull[keep]

    def excess(log_beta: float) -> float:
        beta = math.exp(log_beta)
        total = beta * h + unit
        mean_cost = 0.5 * np.sum(h / total) + 0.5 * np.sum(h * (unit * pull / total) ** 2)
        return float(np.log(mean_cost + 1.0 / beta) - np.log(cutoff))

    # The left-hand side exceeds 1/β, and falls to 0.
    low = -math.log(cutoff)
    high = low
    while excess(high) > 0.0:
        high += 2.0
    root_of_excess = scipy.optimize.brentq(excess, low - 1e-6, high + 1e-6)
    return math.exp(float(root_of_excess))  # pyright: ignore[reportArgumentType] - a tuple only with full_output


def _is_dense(curvature: Any, params: PyTree) -> bool:
    """Return whether `curvature` is a matrix rather than a tree like the parameters, once a matrix is known to fit."""
    if not isinstance(curvature, jax.Array | np.ndarray) or curvature.ndim != 2:
        return False
    if (
        jax.tree.structure(params) == jax.tree.structure(curvature)
        and jnp.shape(jax.tree.leaves(params)[0]) == curvature.shape
    ):
        return False
    dimension = tree.size(params)
    if curvature.shape != (dimension, dimension):
        raise ValueError(
            f"curvature is an array of shape {curvature.shape}, but there are {dimension} parameters; "
            "pass a D × D matrix or a pytree like the parameters"
        )
    return True


def _diagonal_curvature(curvature: PyTree, params: PyTree) -> PyTree:
    """Return the diagonal as full float32 leaves, once it is known to fit and to be non-negative."""
    parts = tree.broadcast_to(curvature, params, "curvature")
    full = jax.tree.map(lambda h, x: jnp.broadcast_to(jnp.asarray(h, jnp.float32), jnp.shape(x)), parts, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(full):
        if not tree.is_traced(leaf) and not bool(jnp.all(leaf >= 0.0)):
            raise ValueError(
                f"curvature{jax.tree_util.keystr(path)} has negative or NaN entries; take the GGN, or absolute values"
            )
    return full


def _ravel64(values: PyTree) -> Float[np.ndarray, "D"]:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(values)])


def _inverse_cholesky(precision: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """Return the lower triangular L with L Lᵀ = precision⁻¹, without forming the inverse."""
    # Reversing the order of the axes turns the lower factor R of the reversed matrix into an upper one, P = U Uᵀ, and
    # U⁻ᵀ is lower triangular.
    try:
        reversed_factor = scipy.linalg.cholesky(precision[::-1, ::-1], lower=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "curvature_proposal: beta·H + Λ is not positive definite; raise beta, symmetrise H, or use a proper prior"
        ) from error
    upper = reversed_factor[::-1, ::-1]
    identity = np.eye(upper.shape[0])
    return scipy.linalg.solve_triangular(upper.T, identity, lower=True, check_finite=False, overwrite_b=True)
