"""`grow` materialises a depth map on any tree that holds a stack of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap, as_depth_map, contiguous_runs
from stacking_jax.growth.layouts import Layout, Scanned, Unrolled, path_keys


def grow(tree: Any, depth_map: DepthMap | tuple[int, ...], layout: Layout) -> Any:
    """Returns the tree whose layer i is stored layer `depth_map.sources[i]`.

    The tree may be parameters, an optimiser state, an average, a whole train
    state; its leaves NumPy or JAX arrays, tracers, or `jax.ShapeDtypeStruct`s.
    Leaves outside the stack are returned as they are. Pure, so it can run under
    `jax.jit` with `out_shardings`, which is how a sharded state grows in place.

    Args:
      tree: any pytree that holds the stack, once or several times (an
        optimiser's moments are found by the same path).
      depth_map: a map over as many stored layers as the stack holds.
      layout: where the layers live: `Scanned` or `Unrolled`.

    Returns:
      A tree of the same containers and dtypes; only the stack's depth differs.

    Raises:
      UserError: if nothing in the tree matches the layout, or a leaf of the
        stack does not hold as many layers as the map reads from.
    """
    if isinstance(layout, Scanned):
        return _grow_scanned(tree, as_depth_map(depth_map), layout)
    if isinstance(layout, Unrolled):
        return _grow_unrolled(tree, as_depth_map(depth_map), layout)
    raise UserError(f"a layout is Scanned(...) or Unrolled(...); got {layout!r}")


def _grow_scanned(tree: Any, depth_map: DepthMap, layout: Scanned) -> Any:
    found = False

    def grow_leaf(path, leaf):
        nonlocal found
        keys = path_keys(path)
        if not layout.matches(keys):
            return leaf
        found = True
        return _take_layers(leaf, depth_map, layout.axis, "/".join(keys))

    grown = jax.tree_util.tree_map_with_path(grow_leaf, tree)
    if not found:
        raise _no_match(tree, layout.path)
    return grown


def _take_layers(leaf: Any, depth_map: DepthMap, axis: int, name: str) -> Any:
    shape = np.shape(leaf)
    if not -len(shape) <= axis < len(shape):
        raise UserError(
            f"{name} has shape {shape}: there is no axis {axis} to hold its layers"
        )
    if shape[axis] != depth_map.stored:
        raise UserError(
            f"{name} has shape {shape}: axis {axis} holds {shape[axis]} layers, "
            f"but the depth map reads from {depth_map.stored}"
        )
    axis %= len(shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        new_shape = (*shape[:axis], len(depth_map), *shape[axis + 1 :])
        return leaf.update(shape=new_shape)
    if isinstance(leaf, np.ndarray):
        return np.take(leaf, depth_map.sources, axis=axis)
    # Slices put end to end rather than a gather: they are plain copies on every
    # backend, and a map has few contiguous runs.
    pieces = [
        jax.lax.slice_in_dim(leaf, first, last + 1, axis=axis)
        for first, last in contiguous_runs(depth_map.sources)
    ]
    return jnp.concatenate(pieces, axis=axis) if len(pieces) > 1 else pieces[0]


def _grow_unrolled(tree: Any, depth_map: DepthMap, layout: Unrolled) -> Any:
    found = False

    def visit(node: Any, keys: tuple[str, ...]) -> Any:
        nonlocal found
        if _ends_with(keys, layout.parents):
            layers = _numbered_children(node, layout)
            if layers:
                found = True
                where = "/".join(keys) or "the tree"
                _check_numbers(sorted(layers), depth_map, layout, where)
                return _with_layers(node, layers, depth_map, layout)
        return _map_children(visit, node, keys)

    grown = visit(tree, ())
    if not found:
        raise _no_match(tree, layout.pattern)
    return grown


def _numbered_children(node: Any, layout: Unrolled) -> dict[int, Any]:
    """Layer number -> key of that layer in this container."""
    if isinstance(node, Mapping):
        keys = {layout.number(str(key)): key for key in node}
    elif isinstance(node, list) and layout.key(0) == "0":
        keys = dict(enumerate(range(len(node))))
    else:
        return {}
    keys.pop(None, None)
    return keys


def _check_numbers(numbers: list[int], depth_map: DepthMap, layout: Unrolled, where: str):
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"the layers {layout.pattern!r} under {where} are numbered {numbers}; "
            "expected 0, 1, 2, ... without gaps"
        )
    if len(numbers) != depth_map.stored:
        raise UserError(
            f"{where} holds {len(numbers)} layers {layout.pattern!r}, "
            f"but the depth map reads from {depth_map.stored}"
        )


def _with_layers(node: Any, layers: dict[int, Any], depth_map: DepthMap, layout: Unrolled) -> Any:
    # Each copy gets containers of its own: an aliased dict that somebody changes
    # in place would change two layers at once.
    copies = [jax.tree.map(lambda leaf: leaf, node[layers[i]]) for i in depth_map.sources]
    if isinstance(node, list):
        return type(node)(copies)
    key_type = type(layers[0])
    others = {key: node[key] for key in node if layout.number(str(key)) is None}
    numbered = {key_type(layout.key(i)): layer for i, layer in enumerate(copies)}
    return type(node)(others | numbered)


def _map_children(visit: Callable, node: Any, keys: tuple[str, ...]) -> Any:
    """Rebuilds one pytree node with `visit(child, path)` for every child."""
    if node is None or jax.tree_util.all_leaves([node]):
        return node
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    visited = [visit(child, keys + path_keys(path)) for path, child in children]
    if all(new is old for new, (_, old) in zip(visited, children, strict=True)):
        return node
    return jax.tree_util.tree_unflatten(treedef, visited)


def _ends_with(keys: tuple[str, ...], run: tuple[str, ...]) -> bool:
    return not run or keys[-len(run) :] == run


def _no_match(tree: Any, path: str) -> UserError:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    shown = ", ".join("/".join(path_keys(where)) for where, _ in leaves[:3])
    rest = f", ... ({len(leaves)} leaves)" if len(leaves) > 3 else ""
    return UserError(
        f"no leaf of the tree lies under {path!r}; the tree holds {shown or 'no leaves'}{rest}"
    )
