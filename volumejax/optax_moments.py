"""The optax adapter: an optimizer's state in, moments of the gradient shaped like the parameters out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from volumejax.optax_states import (
    FACTORED,
    INSTEAD,
    NOVOGRAD,
    Decay,
    Found,
    Path,
    by_path,
    find_moments,
    kinds_of,
    spell,
)
from volumejax.tree import is_traced

__all__ = ["first_moments", "second_moments"]

_FORGOTTEN = "opt_state is missing; pass the state of the optimizer, to a VolumeProbe as its last argument"


def second_moments(opt_state: Any, params: PyTree, *, b2: ArrayLike | None = None) -> PyTree:
    r"""Return the running mean square of the gradient that an optimizer keeps, in float32.

    .. math:: \hat v = v / (1 - b_2^t) \quad\text{(Adam's family, with the state's own count } t \text{)}

    States are found through `chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams`, `apply_if_finite`,
    `lookahead`, `schedule_free` and other wrappers, and states that share the parameters among them are put together.

    | optimizer | what is returned |
    |---|---|
    | adam, adamw, nadam, nadamw, lamb, yogi, ademamix | v / (1 − b2^t) |
    | amsgrad | the same from its current v (`nu`), not the running maximum (`nu_max`) that it divides by |
    | adabelief, acprop | the same from its v, which is central: the mean square deviation of g from its running mean |
    | rmsprop, plain or centred; adadelta | v uncorrected (no count is kept); of a centred one the raw v, not v − m² |
    | rmsprop with bias correction; schedule-free adamw | v / (1 − decay^t) |
    | novograd | its one number for each leaf, a running mean of \|g\|², divided by the leaf's size |
    | adafactor | rows × columns / mean of the rows; leaves too small to be factored as they are |

    Some states cannot be told from others by what they hold. Do not pass those of adamax and adamaxw, which keep a
    largest gradient where Adam has its moments, nor that of adopt, whose moments start from the first gradient. Of a
    schedule-free rmsprop with bias correction give `b2`: it looks like the schedule-free adamw.

    Args:
        opt_state: an optax state, bare or restored as nested dicts and lists; or the flax TrainState or nnx.Optimizer
            that holds it. Restored dicts with the fields count, mu and nu are taken for Adam's.
        params: the parameters that the optimizer trains; leaves are matched by path and shape, so flax nnx states and
            plain dicts fit each other. Of a `lookahead` the fast ones.
        b2: decay rate of the bias correction, for all states that have one; None takes it from `inject_hyperparams`
            where that was used, and otherwise optax's default: 0.999, for rmsprop 0.9.

    Returns:
        A pytree with the structure of `params`, in squared units of the gradient. NaN where, under jit, a count is 0.

    Raises:
        ValueError: no second moments (sgd, lion), or none of the parameters themselves (galore); no update made yet;
            parameters without moments (masked, frozen), or with several; moments that do not match the parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"w": jnp.ones(2)}
        >>> optimizer = optax.adam(1e-3)
        >>> updates, state = optimizer.update({"w": jnp.array([1.0, 3.0])}, optimizer.init(params))
        >>> print(jnp.round(second_moments(state, params)["w"], 3).tolist())
        [1.0, 9.0]

    Reference: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4.
    """
    _check_rate(b2, "b2")
    found = find_moments(opt_state, params)
    if not found:
        if opt_state is None:
            raise ValueError(_FORGOTTEN)
        raise ValueError(
            f"the optimizer state ({', '.join(kinds_of(opt_state))}) holds no second moments, as Adam, RMSProp or "
            f"Adafactor would keep; {INSTEAD}"
        )
    shapes = {path: jnp.shape(leaf) for path, leaf in by_path(params).items()}
    return _assemble([(state.layout.name, _second(state, shapes, b2)) for state in found], params, "second")


def first_moments(opt_state: Any, params: PyTree, *, b1: ArrayLike | None = None) -> PyTree:
    r"""Return the running mean of the gradient that an optimizer keeps, m / (1 − b1^t), in float32.

    Args:
        opt_state: as for `second_moments`: Adam's family, or a centred rmsprop (uncorrected unless it keeps a count).
        params: as for `second_moments`.
        b1: decay rate of the bias correction; None takes the injected one, or optax's default: 0.9.

    Returns:
        A pytree with the structure of `params`, in units of the gradient. NaN where, under jit, a count is 0.

    Raises:
        ValueError: no mean of the gradient is kept (sgd's momentum is a sum, NovoGrad's is normalised, Lion's has no
            second moment beside it); otherwise as for `second_moments`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"w": jnp.ones(2)}
        >>> optimizer = optax.adam(1e-3)
        >>> updates, state = optimizer.update({"w": jnp.array([1.0, 3.0])}, optimizer.init(params))
        >>> print(jnp.round(first_moments(state, params)["w"], 3).tolist())
        [1.0, 3.0]
    """
    _check_rate(b1, "b1")
    found = find_moments(opt_state, params)
    lacking = [state.layout.name for state in found if state.layout.first is None]
    if lacking or not found:
        raise ValueError(
            f"the optimizer state ({', '.join(lacking or kinds_of(opt_state))}) holds no running mean of the gradient; "
            "train with optax.adam or another of its family, or average gradients yourself"
        )
    return _assemble([(state.layout.name, _first(state, b1)) for state in found], params, "first")


def _second(state: Found, shapes: dict[Path, tuple[int, ...]], b2: ArrayLike | None) -> dict[Path, Array]:
    correction = _correction(state, state.layout.second_decay, b2)
    if state.layout is FACTORED:
        rows, columns, whole = (by_path(state.fields[name]) for name in ("v_row", "v_col", "v"))
        moments = {path: _unfactor(rows[path], columns[path], whole[path], shapes.get(path)) for path in whole}
    elif state.layout is NOVOGRAD:
        moments = {path: _spread(nu, shapes.get(path)) for path, nu in by_path(state.fields["nu"]).items()}
    else:
        moments = by_path(state.fields[state.layout.second])
    return _divide(moments, correction)


def _first(state: Found, b1: ArrayLike | None) -> dict[Path, Array]:
    moments = {} if state.layout.first is None else by_path(state.fields[state.layout.first])
    return _divide(moments, _correction(state, state.layout.first_decay, b1))


def _divide(moments: dict[Path, Any], correction: ArrayLike) -> dict[Path, Array]:
    return {path: jnp.asarray(moment).astype(jnp.float32) / correction for path, moment in moments.items()}


def _correction(state: Found, decay: Decay | None, given: ArrayLike | None) -> ArrayLike:
    """Return what a running mean that started at 0 has to be divided by; NaN before the first update."""
    if "count" not in state.fields:
        return 1.0
    count = _scalar(state.fields["count"])
    if not is_traced(count) and int(count) == 0:
        raise ValueError(f"the {state.layout.name} has count 0: it holds no moments yet; run at least one update first")
    steps = jnp.asarray(count).astype(jnp.float32)
    if decay is None:
        return jnp.where(steps > 0.0, 1.0, jnp.nan)
    rate = given
    if rate is None:
        rate = _scalar(state.injected.get(decay.name, decay.default))
        _check_rate(rate, f"the injected {decay.name}")
    return -jnp.expm1(steps * _log(rate))


def _log(rate: ArrayLike) -> ArrayLike:
    """Return log(rate), without the rounding of 1 − rate that a float32 logarithm would suffer."""
    if is_traced(rate):
        return jnp.log1p(jnp.asarray(rate, jnp.float32) - 1.0)
    value = float(np.asarray(rate))
    return math.log(value) if value > 0.0 else -math.inf


def _check_rate(rate: ArrayLike | None, name: str) -> None:
    if rate is None or is_traced(rate):
        return
    value = float(np.asarray(rate))
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), got {value:g}; pass the value that the optimizer was built with, and give "
            "inject_hyperparams hyperparam_dtype=float32 where the parameters' dtype rounds it to 1"
        )


def _scalar(value: Any) -> Any:
    """Return the number itself, out of the Variable or dict that may hold it."""
    return jax.tree.leaves(value)[0]


def _unfactor(row: ArrayLike, column: ArrayLike, whole: ArrayLike, shape: tuple[int, ...] | None) -> ArrayLike:
    """Return the product of row means and column means that Adafactor stands for; unfactored leaves as they are.

    The two longest axes are factored, the longest of all averaged away in `row`.
    """
    if shape is None or jnp.shape(whole) == shape or len(shape) < 2:
        return whole
    short, long = (int(axis) for axis in np.argsort(shape)[-2:])
    if jnp.shape(row) != _without(shape, long) or jnp.shape(column) != _without(shape, short):
        return whole
    rows = jnp.expand_dims(jnp.asarray(row).astype(jnp.float32), long)
    columns = jnp.expand_dims(jnp.asarray(column).astype(jnp.float32), short)
    mean = jnp.mean(rows, axis=short, keepdims=True)
    return rows / jnp.where(mean > 0.0, mean, 1.0) * columns


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _spread(norm: ArrayLike, shape: tuple[int, ...] | None) -> ArrayLike:
    """Return the mean square per parameter from the square of the leaf's norm."""
    if shape is None or jnp.shape(norm) != ():
        return norm
    return jnp.broadcast_to(jnp.asarray(norm).astype(jnp.float32) / max(math.prod(shape), 1), shape)


def _assemble(parts: list[tuple[str, dict[Path, Array]]], params: PyTree, which: str) -> PyTree:
    """Return the moments of all states in the structure of the parameters; only paths and shapes need to agree."""
    merged: dict[Path, Array] = {}
    for _, moments in parts:
        twice = sorted(spell(path) for path in merged.keys() & moments.keys())
        if twice:
            raise ValueError(
                f"the optimizer state holds several {which} moments ({', '.join(name for name, _ in parts)}) of the "
                f"parameters {twice}; pass the inner state of the one to be used"
            )
        merged |= moments
    wanted = by_path(params)
    missing = sorted(spell(path) for path in wanted.keys() - merged.keys())
    extra = sorted(spell(path) for path in merged.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            "the optimizer state and the parameters have different leaves: "
            f"parameters without moments {missing} (masked, frozen, or under an optimizer that keeps none), moments "
            f"without parameters {extra}; pass the state of the optimizer that trains exactly these parameters, or cut "
            "the parameters to the leaves that have moments"
        )
    for path, leaf in wanted.items():
        if jnp.shape(merged[path]) != jnp.shape(leaf):
            raise ValueError(
                f"the {which} moment of {spell(path)!r} has shape {jnp.shape(merged[path])} and the parameter has "
                f"{jnp.shape(leaf)}; pass the state of the optimizer that trains these parameters"
            )
    return jax.tree.unflatten(jax.tree.structure(params), [merged[path] for path in wanted])
