"""Proposals made from what is known of the anchor: optimizer moments and curvature."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from volumejax import tree
from volumejax.eigenpairs import Eigenpairs
from volumejax.low_rank import LowRankPrecision
from volumejax.optax_moments import second_moments
from volumejax.optax_states import find_moments
from volumejax.proposals import Dense, Diagonal
from volumejax.tempering import CurvatureModel, mean_cost, tempered

__all__ = [
    "adam_proposal",
    "curvature_model",
    "curvature_proposal",
    "damped_proposal",
    "matching_beta",
    "model_beta",
]


_MOST_BEYOND = 0.5
"""Share of what eigenpairs explain that may lie beyond the diagonal, for one that is itself an estimate."""


def adam_proposal(
    opt_state: Any,
    params: PyTree,
    prior: Any,
    *,
    beta: float | None = None,
    cutoff: float | None = None,
    damping: float = 0.0,
    exponent: float = 0.5,
    gradient_batch: int = 1,
    shift: bool = True,
    b2: float | None = None,
) -> Diagonal:
    r"""Return the tempered posterior of an optimizer's second moments ν, which cost nothing where the state is at hand.

    `curvature_proposal` with :math:`H = n (\nu^{\text{exponent}} + \text{damping})^2`. The moments stand for curvature
    up to a factor: ν of a mean over n examples is about 1/n of the mean curvature per example, once the mean gradient
    is small, so give n as `gradient_batch`; `tune_proposal` finds the rest. The paper's form is `damped_proposal`.

    Args:
        opt_state: optax state, as for `second_moments`.
        params: the anchor.
        prior: as for `curvature_proposal`.
        beta: as for `curvature_proposal`.
        cutoff: as for `curvature_proposal`; under `jax.jit` only `beta` will do.
        damping: non-negative, in the units of the root of the moments.
        exponent: power of the second moment.
        gradient_batch: examples over which one step's gradient was averaged.
        shift: as for `curvature_proposal`.
        b2: decay rate of the second moment, for its bias correction, where the state does not hold it.

    Raises:
        ValueError: the state holds no second moments, they do not match the parameters, or as for
            `curvature_proposal`.

    Example:
        >>> import jax.numpy as jnp, optax, volumejax as vj
        >>> params = {"w": jnp.ones(2)}
        >>> optimizer = optax.adam(1e-3)
        >>> _, state = optimizer.update({"w": jnp.array([0.0, 1.0])}, optimizer.init(params))
        >>> proposal = vj.adam_proposal(state, params, vj.Gaussian(1.0), beta=3.0)
        >>> print([f"{x:.3f}" for x in (*proposal.scale["w"], *proposal.mean["w"])])
        ['1.000', '0.500', '-1.000', '-0.250']

    Reference: Scherlis & Belrose, arXiv 2501.18812, §3, for the moments; the Gaussian is `curvature_proposal`'s.
    """
    if not damping >= 0.0:
        raise ValueError(f"damping must not be negative, got {damping}")
    if not gradient_batch >= 1:
        raise ValueError(f"gradient_batch must be at least 1, got {gradient_batch}")
    moments = second_moments(opt_state, params, b2=b2)
    h = jax.tree.map(lambda v: gradient_batch * (v**exponent + damping) ** 2, moments)
    if tree.is_traced((h, params)):
        if beta is None:
            raise ValueError("under jax.jit adam_proposal cannot look for the beta of a cutoff; pass beta instead")
        made = tempered(CurvatureModel(h, None, None), params, prior, beta, 1.0 if shift else None)
    else:
        made = curvature_proposal(h, params, prior, beta=beta, cutoff=cutoff, shift=shift)
    return made  # pyright: ignore[reportReturnType] - a diagonal curvature gives a Diagonal


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
    curvature: PyTree | Float[Array, "D D"] | Eigenpairs,
    params: PyTree,
    prior: Any,
    *,
    eigenpairs: Eigenpairs | None = None,
    beta: float | None = None,
    cutoff: float | None = None,
    shift: bool = True,
) -> Diagonal | Dense | LowRankPrecision:
    r"""Return the Gaussian approximation of the tempered posterior, :math:`\propto \pi(\theta) e^{-\beta C(\theta)}`.

    Directions have :math:`\Sigma^{-1} = \beta H + \Lambda` and :math:`\mu = -\Sigma \Lambda (\theta_0 - m)`, with Λ
    and m the prior's precision and mean.

    Args:
        curvature: H, the Hessian (or GGN) of the cost at the anchor: a pytree like the parameters for its diagonal, a
            D × D array in the order of `ravel_pytree`, or `Eigenpairs` from `top_eigenpairs` where the rest is flat.
        params: the anchor.
        prior: supplies Λ and m; flat priors have Λ = 0, and then H must be positive definite.
        eigenpairs: the stiffest directions of H beside its diagonal. The diagonal is then lowered by what they explain
            of it, down to 0, so that nothing counts twice. Both must be in one unit: not an optimizer's moments with
            these. Negative eigenvalues count as 0.
        beta: inverse temperature, the literature's nβ; None takes `matching_beta` of the cutoff.
        cutoff: ε in nats, needed where beta is None.
        shift: whether to use the mean μ; it matters at large cutoffs and can hurt at small ones.

    Returns:
        `Diagonal`, `Dense`, or `LowRankPrecision` where there are eigenpairs.

    Raises:
        ValueError: shapes that do not fit, or a precision that is not positive definite.

    Example:
        >>> import jax.numpy as jnp, volumejax as vj
        >>> proposal = curvature_proposal(jnp.array([0.0, 0.3]), jnp.ones(2), vj.Gaussian(1.0), beta=10.0)
        >>> print(proposal.scale, proposal.mean)
        [1.  0.5] [-1.   -0.25]
    """
    prior.check(params)
    if tree.is_traced((curvature, eigenpairs, params)):
        raise ValueError("curvature_proposal factorises on the host; build it before jax.jit and pass the proposal in")
    if beta is None and cutoff is None:
        raise ValueError(
            "curvature_proposal needs either beta or cutoff; pass the cutoff of the volume to be estimated"
        )
    if _is_dense(curvature, params):
        if eigenpairs is not None:
            raise ValueError("a dense curvature holds its eigenpairs already; leave eigenpairs out")
        return _dense_proposal(np.asarray(curvature, np.float64), params, prior, beta, cutoff, shift)
    model = curvature_model(curvature, params, eigenpairs)
    if beta is None:
        beta = model_beta(model, params, prior, cutoff, shift)
    with jax.enable_x64(True):
        least = jax.tree.map(lambda h, p: jnp.min(beta * tree.wide(h) + tree.wide(p), initial=jnp.inf),
                             model.diagonal, prior.precision(params))  # fmt: skip
        positive = all(float(leaf) > 0.0 for leaf in jax.tree.leaves(least)) and beta >= 0.0
    if not positive:
        raise ValueError(
            "curvature_proposal: beta·H + Λ has entries that are not positive; raise beta or use a proper prior"
        )
    made = tempered(model, params, prior, beta, 1.0)
    pulled = shift and any(bool(jnp.any(leaf != 0.0)) for leaf in jax.tree.leaves(made.mean))
    return made if pulled else tempered(model, params, prior, beta, None)


def model_beta(model: CurvatureModel, params: PyTree, prior: Any, cutoff: float | None, shift: bool) -> float:
    """Return the β of `matching_beta` for a diagonal with a low-rank part."""

    def mean(beta: float) -> float:
        # An array, and float64 on its way in, so that one program serves the whole search.
        with jax.enable_x64(True):
            return float(mean_cost(model, params, prior, jnp.asarray(beta, jnp.float64), shift))

    return _match(mean, cutoff)


def curvature_model(curvature: PyTree, params: PyTree, eigenpairs: Eigenpairs | None = None) -> CurvatureModel:
    """Return a diagonal and a low-rank part that add up to H, once they are known to fit.

    Args:
        curvature: as for `curvature_proposal`, but no matrix.
        params: the anchor.
        eigenpairs: as for `curvature_proposal`.

    Raises:
        ValueError: shapes that do not fit, negative entries of the diagonal, NaN, eigenpairs of another curvature.
    """
    if isinstance(curvature, Eigenpairs):
        if eigenpairs is not None:
            raise ValueError("eigenpairs are given twice; pass a diagonal as curvature, or leave eigenpairs out")
        curvature, eigenpairs = 0.0, curvature
    diagonal = _diagonal_curvature(curvature, params)
    parts = (diagonal, None if eigenpairs is None else (eigenpairs.values, eigenpairs.vectors))
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(parts)):
        raise ValueError("curvature has NaN or infinite entries; compute it where the cost is finite")
    if eigenpairs is None:
        return CurvatureModel(diagonal, None, None)
    shapes = [tuple(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(eigenpairs.vectors)]
    same = jax.tree.structure(eigenpairs.vectors) == jax.tree.structure(params)
    if not same or shapes != [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]:
        raise ValueError("the vectors of eigenpairs do not have the parameters' structure and (rank, *leaf shape)")
    values = jnp.maximum(eigenpairs.values, 0.0)
    explained = jax.tree.map(lambda u: jnp.tensordot(values, u**2, 1, precision="highest"), eigenpairs.vectors)
    _check_share(diagonal, explained)
    rest = jax.tree.map(lambda h, part: jnp.maximum(h - part, 0.0), diagonal, explained)
    return CurvatureModel(rest, values, eigenpairs.vectors)


def _check_share(diagonal: PyTree, explained: PyTree) -> None:
    """Raise a ValueError where the eigenpairs hold far more than the diagonal, and so are of another curvature."""
    within = jax.tree.map(jnp.minimum, diagonal, explained)
    present, whole, held = (
        sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(part)) for part in (diagonal, explained, within)
    )
    if present > 0.0 and whole - held > _MOST_BEYOND * whole:
        raise ValueError(
            f"the eigenpairs explain {whole:.3g} of a curvature whose diagonal sums to {present:.3g}: they are not of "
            "one and the same; an optimizer's moments have another unit than the Gauss-Newton matrix. Leave eigenpairs "
            "out, or give that matrix's own diagonal"
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

    def mean(beta: float) -> float:
        total = beta * h + unit
        return float(0.5 * np.sum(h / total) + 0.5 * np.sum(h * (unit * pull / total) ** 2))

    return _match(mean, cutoff)


def _match(mean: Callable[[float], float], cutoff: float | None) -> float:
    """Return the root of mean(β) + 1/β = cutoff."""
    if cutoff is None or not cutoff > 0.0:
        raise ValueError(f"cutoff must be a positive number of nats, got {cutoff}")

    def excess(log_beta: float) -> float:
        beta = math.exp(log_beta)
        return math.log(mean(beta) + 1.0 / beta) - math.log(cutoff)

    # The left-hand side exceeds 1/β, and falls to 0.
    low = -math.log(cutoff)
    high = low
    while excess(high) > 0.0:
        high += 2.0
    root_of_excess = scipy.optimize.brentq(excess, low - 1e-6, high + 1e-6)
    return math.exp(float(root_of_excess))  # pyright: ignore[reportArgumentType] - a tuple only with full_output


def _dense_proposal(
    h: np.ndarray, params: PyTree, prior: Any, beta: float | None, cutoff: float | None, shift: bool
) -> Dense:
    if not np.all(np.isfinite(h)):
        raise ValueError("curvature has NaN or infinite entries; compute it where the cost is finite")
    precision = _ravel64(prior.precision(params))
    pull = _ravel64(prior.displacement(params)) if hasattr(prior, "displacement") else np.zeros_like(precision)
    if beta is None:
        beta = matching_beta(h, precision, cutoff or 0.0, pull if shift else None)
    matrix = beta * h
    matrix[np.diag_indices_from(matrix)] += precision
    factor = _inverse_cholesky(matrix)
    cholesky = jnp.asarray(factor, jnp.float32)
    if not (shift and np.any(precision * pull)):
        return Dense(cholesky, None)
    unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), params))[1]
    return Dense(cholesky, unravel(jnp.asarray(-factor @ (factor.T @ (precision * pull)), jnp.float32)))


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
    if find_moments(curvature, params):
        raise ValueError("curvature is the state of an optimizer; pass second_moments(opt_state, params) of it")
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
    (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), (upper,))
    return invert(upper.T, lower=1)[0]
