"""The optax adapter: an optimizer's state in, second moments shaped like the parameters out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import PyTree

__all__ = ["second_moments"]


def second_moments(opt_state: Any, params: PyTree, *, b2: float | None = None) -> PyTree:
    """Return Adam's bias-corrected second moment of the gradient, nu / (1 − b2^count), in float32.

    Args:
        opt_state: the state of `optax.adam`, `optax.adamw`, or any chain or wrapper that holds exactly one
            `optax.ScaleByAdamState`. (Adamax keeps a largest gradient in the same state; do not pass it.)
        params: the parameters that the optimizer trains; leaves are matched by path and shape.
        b2: the optimizer's decay rate, which its state does not hold; None for optax's default, 0.999.

    Returns:
        A pytree with the structure of `params`, in squared units of the gradient. NaN if, under jit, count is
        0.

    Raises:
        ValueError: no Adam state, or several; no update made yet; moments that do not match the parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"w": jnp.ones(2)}
        >>> optimizer = optax.adam(1e-3)
        >>> updates, state = optimizer.update({"w": jnp.array([1.0, 3.0])}, optimizer.init(params))
        >>> print(jnp.round(second_moments(state, params)["w"], 3).tolist())
        [1.0, 9.0]

    Reference: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    b2 = 0.999 if b2 is None else b2
    if not 0.0 <= b2 < 1.0:
        raise ValueError(f"b2 must be in [0, 1), got {b2}; pass the value that the optimizer was built with")
    state = _adam_state(opt_state)
    count = jnp.asarray(state.count)
    if not isinstance(count, Tracer) and int(count) == 0:
        raise ValueError("the Adam state has count 0: it holds no moments yet; run at least one update first")
    log_b2 = math.log(b2) if b2 > 0.0 else -math.inf
    correction = -jnp.expm1(count.astype(jnp.float32) * log_b2)
    return jax.tree.map(lambda moment: moment.astype(jnp.float32) / correction, _matched(state.nu, params))


def _adam_state(opt_state: Any) -> optax.ScaleByAdamState:
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_adam)
    found = [leaf for leaf in leaves if _is_adam(leaf)]
    if not found:
        raise ValueError(
            "the optimizer state holds no optax.ScaleByAdamState; pass the state of optax.adam or adamw, "
            "or of a chain with optax.scale_by_adam, or use a curvature proposal from diagonal_ggn instead"
        )
    if len(found) > 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} Adam states; pass the one that trains these parameters"
        )
    return found[0]


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _matched(moments: PyTree, params: PyTree) -> PyTree:
    """Return the moments in the structure of the parameters; only paths and shapes need to agree."""
    by_path = _by_path(moments)
    wanted = _by_path(params)
    missing, extra = sorted(wanted.keys() - by_path.keys()), sorted(by_path.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            "the Adam state and the parameters have different leaves: "
            f"parameters without moments {missing}, moments without parameters {extra}; pass the state of "
            "the optimizer that trains exactly these parameters, or cut both to the same leaves"
        )
    for path, leaf in wanted.items():
        if jnp.shape(by_path[path]) != jnp.shape(leaf):
            raise ValueError(
                f"the second moment of {path!r} has shape {jnp.shape(by_path[path])} and the parameter has "
                f"{jnp.shape(leaf)}; pass the state of the optimizer that trains these parameters"
            )
    return jax.tree.unflatten(jax.tree.structure(params), [by_path[path] for path in wanted])


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
