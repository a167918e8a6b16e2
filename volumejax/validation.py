"""Checks of a question before any long work: the anchor, the cost, the prior and the cutoff must fit each other."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from volumejax import tree
from volumejax.tree import is_traced

__all__ = ["check_deterministic", "check_prior", "check_question", "check_region", "evaluate", "named"]


def check_question(
    cost: Callable[[PyTree], Float[Array, ""]], params: PyTree, prior: Any, cutoff: ArrayLike
) -> tuple[PyTree, Array | np.ndarray]:
    """Return what `check_region` does, once the question is known to make sense.

    Shapes and dtypes are always checked; values only where they are concrete.

    Raises:
        ValueError: naming the thing and the remedy.
    """
    params, attainable = check_region(cost, params, prior, cutoff)
    if not is_traced((cost, params, cutoff)):
        _check_anchor(cost, params, float(attainable))
    return params, attainable


def check_region(
    cost: Callable[[PyTree], Float[Array, ""]], params: PyTree, prior: Any, cutoff: ArrayLike
) -> tuple[PyTree, Array | np.ndarray]:
    """Return `params` as JAX arrays, and the cutoff, once region and prior are known to make sense for such parameters.

    A concrete cutoff comes back as float64, no lower than it is in the dtype of the cost: an error rate of 0.2 in
    float32 exceeds 0.2.

    Raises:
        ValueError: as for `check_question`, whatever the cost of `params`.
    """
    tree.check_floating(params, "params")
    _check_finite(params)
    params = jax.tree.map(jnp.asarray, params)
    check_prior(prior)
    prior.check(params)
    if jnp.ndim(cutoff) != 0:
        raise ValueError(f"cutoff must be a scalar, got shape {jnp.shape(cutoff)}; vmap over cutoffs instead")
    if not is_traced(cutoff) and not (float(np.asarray(cutoff)) > 0.0 and np.isfinite(float(np.asarray(cutoff)))):
        raise ValueError(
            f"cutoff must be a positive, finite number of nats, got {cutoff}; for no error at all among n examples "
            "give an error rate below 1/n"
        )
    dtype = _check_scalar(cost, params)
    if is_traced(cutoff):
        return params, jnp.asarray(cutoff)
    wanted = np.asarray(cutoff, np.float64)
    return params, np.asarray(np.maximum(wanted, wanted.astype(dtype).astype(np.float64)))


def named(value: Any) -> str:
    """Return what a value is, for messages; a class in place of an instance is called one."""
    return f"the class {value.__name__}, not an instance of it" if isinstance(value, type) else type(value).__name__


def check_deterministic(cost: Callable[[PyTree], Float[Array, ""]], params: PyTree) -> None:
    """Raise a ValueError where two evaluations of the cost near the anchor differ, the second one traced anew."""
    nearby = jax.tree.map(lambda x: x + (1e-3 * (1.0 + jnp.abs(x))).astype(x.dtype), params)
    anew = eqx.filter_jit(lambda cost, params: cost(params))
    values = [float(value(cost, nearby)) for value in (evaluate, anew)]
    if not np.array_equal(*values, equal_nan=True):
        raise ValueError(
            f"the cost is not deterministic: two evaluations at one point gave {values[0]:.9g} and {values[1]:.9g}; "
            "fix its data, its dropout and its random keys"
        )


def check_prior(prior: Any) -> None:
    """Raise a ValueError for what is no prior, such as a number or a class."""
    if isinstance(prior, type) or not hasattr(prior, "check"):
        raise ValueError(f"prior must be one such as vj.Gaussian(sigma=0.5) or vj.Lebesgue(), got {named(prior)}")


def _check_finite(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # NumPy, since inside a transformation jax.numpy would trace even what is concrete.
        if not is_traced(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} contains NaN or infinity; use a checkpoint from "
                "before training diverged"
            )


def _check_scalar(cost: Callable[[PyTree], Any], params: PyTree) -> np.dtype:
    """Return the dtype of the cost, once it is known to be a floating-point scalar."""
    try:
        out = eqx.filter_eval_shape(cost, params)
    except TypeError as error:  # of shapes, or of NumPy; a ValueError speaks for itself
        shapes = jax.tree.map(lambda x: x.shape, params)
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the cost fails on parameters of shapes {shapes} ({type(error).__name__}: {reason}); it must take such "
            "parameters and be written with jax.numpy"
        ) from error
    if not (eqx.is_array(out) or isinstance(out, jax.ShapeDtypeStruct)):
        raise ValueError(f"cost must return one scalar in nats, got {type(out).__name__}; drop auxiliary outputs")
    if out.shape != ():
        raise ValueError(f"cost must return one scalar in nats, got shape {out.shape}; take the mean over examples")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"cost must return a floating-point scalar, got dtype {out.dtype}; cast it to float32")
    return out.dtype


def _check_anchor(cost: Callable[[PyTree], Array], params: PyTree, cutoff: float) -> None:
    value = evaluate(cost, params)
    if is_traced(value):  # by what the cost closes over
        return
    here = float(value)
    if np.isnan(here):
        raise ValueError(
            "the cost at the anchor is NaN; check the data, the labels and the parameters that the cost holds"
        )
    if not here <= cutoff:
        raise ValueError(
            f"the cost at the anchor is {here:.6g} nats, not within the cutoff {cutoff:g}; raise the cutoff, "
            "or use a cost that is 0 at the anchor such as kl_to_anchor or loss_gap"
        )


@eqx.filter_jit
def evaluate(cost: Callable[[PyTree], Array], params: PyTree) -> Array:
    """Return the cost, compiled once for all callers."""
    return cost(params)
