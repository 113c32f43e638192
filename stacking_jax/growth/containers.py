"""Containers of every kind: finding the layers in them, and building them anew."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from stacking_jax.errors import UserError
from stacking_jax.growth.layerwise import LayerwiseState
from stacking_jax.growth.layouts import Unrolled, path_keys


def layerwise_states(tree: Any) -> set[tuple[str, ...]]:
    """Paths of the states of `layerwise` transforms."""
    is_state = lambda node: isinstance(node, LayerwiseState)  # noqa: E731
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)[0]
    return {path_keys(path) for path, node in flat if is_state(node)}


def refuse_factored(keys: tuple[str, ...]) -> None:
    """Refuses a leaf of a factored optimiser's state in a stacked layout."""
    # Adafactor keeps placeholders of shape (1,), which look like one layer, and moments
    # that lack an axis. Optax names the field above the parameter, T5X below.
    if "v_row" in keys or "v_col" in keys:
        raise UserError(
            f"{'/'.join(keys)} holds Adafactor's factored moments, whose layers cannot be told by "
            "path and axis; grow them with grow_opt_state(..., params=...) or grow_state"
        )


def numbered_children(node: Any, layout: Unrolled) -> dict[int, Any] | None:
    """Layer number -> key of that layer in this container; None for no container."""
    if isinstance(node, Mapping):
        keys = {layout.number(str(key)): key for key in node}
    elif is_list(node) and layout.key(0) == "0":
        keys = dict(enumerate(range(len(node))))
    else:
        return None
    keys.pop(None, None)
    return keys


def is_list(node: Any) -> bool:
    """Whether layers may stand in this container one after the other."""
    return (
        isinstance(node, Sequence)
        and not isinstance(node, str | bytes)
        and not hasattr(node, "_fields")
    )


def check_numbers(numbers: list[int], layout: Unrolled, where: str) -> None:
    """Refuses gaps in the numbers of layers."""
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"the layers {layout.pattern!r} under {where} are numbered {numbers}; "
            "expected 0, 1, 2, ... without gaps"
        )


def items_of(node: Mapping) -> dict:
    """The children of a mapping as they are: an NNX state would wrap those that are dicts."""
    return dict(getattr(node, "raw_mapping", node))


def rebuilt(node: Mapping, items: dict) -> Mapping:
    """A mapping of the same type with other items."""
    if isinstance(node, collections.defaultdict):
        return type(node)(node.default_factory, items)
    return type(node)(items)


def map_children(visit: Callable, node: Any, keys: tuple[str, ...]) -> Any:
    """Rebuilds one pytree node with `visit(child, path)` for every child."""
    if node is None or jax.tree_util.all_leaves([node]):
        return node
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    visited = [visit(child, keys + path_keys(path)) for path, child in children]
    if all(new is old for new, (_, old) in zip(visited, children, strict=True)):
        return node
    return jax.tree_util.tree_unflatten(treedef, visited)
