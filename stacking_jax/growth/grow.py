"""`grow` materialises a depth map on any tree that holds a stack of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap, contiguous_runs
from stacking_jax.growth.layouts import Layout, Scanned, Unrolled, path_keys


def grow(tree: Any, depth_map: DepthMap | Sequence[int], layout: Layout) -> Any:
    """Returns the tree whose layer i is stored layer `depth_map.sources[i]`.

    The tree may be parameters, an optimiser state, an average, a whole train
    state; its leaves NumPy or JAX arrays, tracers, or `jax.ShapeDtypeStruct`s.
    Leaves outside the stack are returned as they are; every layer of the result
    has buffers of its own, fit for donation. Pure, so it can run under
    `jax.jit` with `out_shardings`, which is how a sharded state grows in place.

    Args:
      tree: any pytree that holds the stack, once or several times (an
        optimiser's moments are found by the same path).
      depth_map: a map over as many stored layers as the stack holds; or the
        stored layer of each new one, read against what the stack holds.
      layout: where the layers live: `Scanned` or `Unrolled`.

    Returns:
      A tree of the same containers and dtypes; only the stack's depth differs.

    Raises:
      UserError: if nothing in the tree matches the layout, or a leaf of the
        stack does not hold as many layers as the map reads from.
    """
    if isinstance(layout, Scanned):
        return _grow_scanned(tree, depth_map, layout)
    if isinstance(layout, Unrolled):
        return _grow_unrolled(tree, depth_map, layout)
    raise UserError(f"a layout is Scanned(...) or Unrolled(...); got {layout!r}")


def _grow_scanned(tree: Any, depth_map: DepthMap | Sequence[int], layout: Scanned) -> Any:
    found = False

    def grow_leaf(path, leaf):
        nonlocal found, depth_map
        keys = path_keys(path)
        if not layout.matches(keys):
            return leaf
        found = True
        name, axis, shape = "/".join(keys), layout.axis, np.shape(leaf)
        if not -len(shape) <= axis < len(shape):
            raise UserError(f"{name} has shape {shape}: there is no axis {axis} to hold its layers")
        what = f"{name} has shape {shape}: axis {axis} holds {shape[axis]} layers"
        # Of a plain list, the first leaf decides how many layers are stored.
        depth_map = _map_over(shape[axis], depth_map, what)
        return _take_layers(leaf, depth_map, axis % len(shape))

    grown = jax.tree_util.tree_map_with_path(grow_leaf, tree)
    if not found:
        raise _no_match(tree, layout.path)
    return grown


def _map_over(stored: int, depth_map: DepthMap | Sequence[int], what: str) -> DepthMap:
    if not isinstance(depth_map, DepthMap):
        depth_map = DepthMap(depth_map, stored=stored)
    if depth_map.stored != stored:
        raise UserError(f"{what}, but the depth map reads from {depth_map.stored}")
    return depth_map


def _take_layers(leaf: Any, depth_map: DepthMap, axis: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        new_shape = (*leaf.shape[:axis], len(depth_map), *leaf.shape[axis + 1 :])
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


def _grow_unrolled(tree: Any, depth_map: DepthMap | Sequence[int], layout: Unrolled) -> Any:
    found = False

    def visit(node: Any, keys: tuple[str, ...]) -> Any:
        nonlocal found, depth_map
        if _ends_with(keys, layout.parents):
            layers = _numbered_children(node, layout)
            if layers:
                found = True
                where = "/".join(keys) or "the tree"
                _check_numbers(sorted(layers), layout, where)
                what = f"{where} holds {len(layers)} layers {layout.pattern!r}"
                depth_map = _map_over(len(layers), depth_map, what)
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


def _check_numbers(numbers: list[int], layout: Unrolled, where: str) -> None:
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"the layers {layout.pattern!r} under {where} are numbered {numbers}; "
            "expected 0, 1, 2, ... without gaps"
        )


def _with_layers(node: Any, layers: dict[int, Any], depth_map: DepthMap, layout: Unrolled) -> Any:
    # Each copy gets containers and arrays of its own: what is shared could not be
    # donated, and whoever changed it in place would change two layers at once.
    copies = [
        jax.tree.map(_copy if is_copy else lambda leaf: leaf, node[layers[source]])
        for source, is_copy in zip(depth_map.sources, depth_map.copies, strict=True)
    ]
    if isinstance(node, list):
        return type(node)(copies)
    key_type = type(layers[0])
    numbered = {key_type(layout.key(i)): layer for i, layer in enumerate(copies)}
    grown: dict = {}
    for key in node:
        # An ordered mapping keeps its order: the layers stand where they stood.
        grown |= {key: node[key]} if layout.number(str(key)) is None else numbered
    return type(node)(grown)


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf


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
