"""Where an optax state keeps moments of the gradient: found by type, or by fields where a restore lost the types.

A state is a tree of named tuples: chains, masks, partitions and other wrappers around those that hold moments. A
checkpoint gives it back as bare dicts and lists, flax nnx with every array in a Variable. So leaves are named by a path
in which all of these agree.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

__all__ = [
    "ADAM", "FACTORED", "INSTEAD", "NOVOGRAD", "Decay", "Found", "Layout", "Path", "by_path", "find_moments",
    "kinds_of", "spell",
]  # fmt: skip

Path = tuple[str, ...]
"""Keys from the root of a tree to a leaf."""


class Decay(NamedTuple):
    """Decay rate of a running mean that starts at 0: what optax calls it, and its default."""

    name: str
    default: float


class Layout(NamedTuple):
    """One kind of state: its fields, which of them hold moments, and how these forget.

    A moment without a decay needs no bias correction: it starts from the first gradient, or its state has no count.
    """

    name: str
    fields: frozenset[str]
    second: str
    second_decay: Decay | None = None
    first: str | None = None
    first_decay: Decay | None = None


class Found(NamedTuple):
    """A state that holds moments, with the hyperparameters injected around it by name."""

    layout: Layout
    fields: Mapping[str, Any]
    injected: Mapping[str, Any]


_B1, _B2, _DECAY = Decay("b1", 0.9), Decay("b2", 0.999), Decay("decay", 0.9)
_COMMON = frozenset({"count", "mu", "nu"})
ADAM = Layout("ScaleByAdamState", _COMMON, "nu", _B2, "mu", _B1)
NOVOGRAD = Layout("ScaleByNovogradState", _COMMON, "nu")
FACTORED = Layout("FactoredState", frozenset({"count", "v_row", "v_col", "v"}), "v")
_LAYOUTS = (
    ADAM,
    ADAM._replace(name="ScaleByBeliefState"),
    ADAM._replace(name="ScaleByAmsgradState", fields=_COMMON | {"nu_max"}),
    ADAM._replace(name="ScaleByAdemamixState", fields=frozenset({"count", "count_m2", "m1", "m2", "nu"}), first="m1"),
    Layout("ScaleByRmsState", frozenset({"nu"}), "nu"),
    Layout("ScaleByRmsWithCountState", frozenset({"count", "nu"}), "nu", _DECAY),
    Layout("ScaleByRStdDevState", frozenset({"mu", "nu"}), "nu", None, "mu"),
    Layout("ScaleByRStdDevWithCountState", _COMMON, "nu", _DECAY, "mu", _DECAY),
    Layout("ScaleByAdaDeltaState", frozenset({"e_g", "e_x"}), "e_g"),
    NOVOGRAD,
    FACTORED,
)
_BY_NAME = {layout.name: layout for layout in _LAYOUTS}
# Of several kinds with the same fields the first counts.
_BY_FIELDS = {layout.fields: layout for layout in reversed(_LAYOUTS)}
_SCHEDULE_FREE, _GALORE = frozenset({"base_optimizer_state", "z"}), frozenset({"base_optimizer_state", "projector"})
"""Fields by which these wrappers are known."""
INSTEAD = (
    "use curvature instead, curvature_proposal(diagonal_ggn(apply_fn, params, inputs), params, prior, cutoff=...), "
    "or Isotropic()"
)


def by_path(tree: PyTree) -> dict[Path, Any]:
    """Return the leaves of `tree` by path, alike for dicts, dataclasses, lists, and flax nnx Variables.

    Example:
        >>> print(by_path({"layers": [{"w": 1.0}], "scale": {"value": 2.0}}))
        {('layers', '0', 'w'): 1.0, ('scale',): 2.0}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path(keys): leaf for keys, leaf in leaves}


def spell(path: Path) -> str:
    """Return a path as text."""
    return "/".join(path)


def find_moments(opt_state: Any, params: PyTree) -> list[Found]:
    """Return every state inside `opt_state` that holds second moments.

    Args:
        opt_state: an optax state with any wrappers, a flax TrainState or nnx.Optimizer, or any of these restored as
            bare containers.
        params: the parameters, by whose paths copies of them inside the state are told from states.

    Raises:
        ValueError: moments in another basis than that of the parameters (GaLore).
    """
    return list(_walk(opt_state, frozenset(by_path(params)), {}))


def kinds_of(opt_state: Any) -> list[str]:
    """Return the names of the optax states inside `opt_state`, for messages; empty states are left out."""
    names = {type(node).__name__ for node in _nodes(opt_state) if _is_named(node) and len(node) > 0}
    return sorted(names) or ["no state at all"]


def _path(keys: tuple) -> Path:
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    # The array inside an nnx Variable. Nothing is confused: a leaf has no siblings below its own path.
    return names[:-1] if names and names[-1] == "value" else names


def _walk(node: Any, known: frozenset[Path], injected: Mapping[str, Any]) -> Iterator[Found]:
    fields = _children(node)
    # A copy of the parameters or of a gradient may have keys of any name.
    if not fields or by_path(node).keys() <= known:
        return
    layout = _layout(node, fields)
    if layout is not None:
        yield Found(layout, fields, injected)
        return
    injected = {**injected, **_hyperparameters(fields)}
    if _GALORE <= fields.keys():
        raise ValueError(f"GaLore keeps the moments of projected gradients, not those of the parameters; {INSTEAD}")
    if _SCHEDULE_FREE <= fields.keys():
        # The schedule-free Adam keeps its second moments in an RMS state, but with Adam's decay rate.
        injected.setdefault("decay", injected.get("b2", _B2.default))
    for child in fields.values():
        yield from _walk(child, known, injected)


def _layout(node: Any, fields: Mapping[str, Any]) -> Layout | None:
    if _is_named(node):
        layout = _BY_NAME.get(type(node).__name__)
        return layout if layout is not None and layout.fields <= fields.keys() else None
    layout = _BY_FIELDS.get(frozenset(fields)) if isinstance(node, Mapping) else None
    if layout is None or layout.first is None:
        return layout
    first, second = by_path(fields[layout.first]), by_path(fields[layout.second])
    if first.keys() != second.keys():
        # SM3 calls its row and column maxima mu.
        return None
    norms = layout is ADAM and any(jnp.shape(second[path]) != jnp.shape(first[path]) for path in second)
    return NOVOGRAD if norms else layout


def _hyperparameters(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    injected = fields.get("hyperparams")
    return dict(injected) if "inner_state" in fields and isinstance(injected, Mapping) else {}


def _children(node: Any) -> dict[str, Any]:
    """Return the parts of a container by name; nothing for a leaf."""
    if _is_named(node):
        return node._asdict()
    if isinstance(node, Mapping):
        return {str(key): child for key, child in node.items()}
    if isinstance(node, tuple | list):
        return {str(i): child for i, child in enumerate(node)}
    if hasattr(node, "opt_state"):
        return {"opt_state": node.opt_state}
    return {}


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node).values():
        yield from _nodes(child)


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
