"""Converters between stacked and unrolled layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stacking_jax.errors import UserError
from stacking_jax.growth.boxes import is_box, with_axis_name, without_axis_name
from stacking_jax.growth.containers import (
    check_numbers,
    items_of,
    layerwise_states,
    map_children,
    numbered_children,
    rebuilt,
    refuse_factored,
)
from stacking_jax.growth.later import Later
from stacking_jax.growth.layouts import Scanned, Unrolled, path_keys
from stacking_jax.growth.stacks import layer_axis, place_of

_MISSING = object()


def to_unrolled(
    tree: Any, scanned: Scanned, pattern: str | Unrolled, *, numbered_by: type = str
) -> Any:
    """Takes a stack apart: one subtree per layer where stacked arrays were.

    Args:
      tree: parameters, an optimiser's moments, a whole state: converted wherever the
        stack is found. Concrete, traced, abstract, boxed or not.
      scanned: where the stacked layers are. Its axis may be any; its period plays no part.
      pattern: where the layers go, with `{}` for the number: 'decoder/layers_{}'
        instead of 'decoder/layers', both counted from the same place in the tree.
      numbered_by: under a pattern such as 'h/{}': `str` or `int` for a dict with such
        keys, `list` or `tuple` for these.

    Returns:
      The tree with the other layout. `to_scanned` is the way back.

    Raises:
      UserError: if there is no such stack, its leaves disagree on the number of layers,
        it does not lie in dicts, or the place of the layers is taken.
    """
    if not isinstance(scanned, Scanned):
        raise UserError(f"to_unrolled starts from Scanned(...); got {scanned!r}")
    unrolled = pattern if isinstance(pattern, Unrolled) else Unrolled(pattern)
    if numbered_by not in (str, int, list, tuple):
        raise UserError(f"layers are numbered by str, int, list or tuple; got {numbered_by!r}")
    if numbered_by is not str and unrolled.key(0) != "0":
        raise UserError(f"{unrolled.pattern!r} makes names; only under 'h/{{}}' are there numbers")
    later = Later()

    def runs(node: Mapping) -> list[tuple]:
        return [] if _get(node, scanned.keys) is _MISSING else [scanned.keys]

    def convert(node: Mapping, keys: tuple[str, ...]) -> Any:
        stack, here = _get(node, scanned.keys), (*keys, *scanned.keys)
        layers = _take_apart(stack, scanned, here, later)
        rest = _without(node, scanned.keys)
        return _with(rest, unrolled, layers, numbered_by, keys)

    converted = _convert_everywhere(tree, runs, convert, scanned, scanned.path)
    return later.finish(converted)


def to_scanned(
    tree: Any, unrolled: Unrolled | str, path: str, axis: int = 0, *,
    axis_name: str | None = "layers",
) -> Any:
    """Stacks the layers of an unrolled stack along an axis of each array.

    Args:
      tree: as in `to_unrolled`.
      unrolled: where the layers are, or their pattern. All of them must be alike.
      path: where the stacked arrays go, counted from the same place in the tree.
      axis: of the layers in every stacked array.
      axis_name: the name that boxed arrays (`nn.Partitioned`, an NNX variable with axis
        names) get for it.

    Raises:
      UserError: if there is no such stack, its layers are unlike, an array has no room
        for that axis, or the place of the stack is taken.
    """
    unrolled = Unrolled(unrolled) if isinstance(unrolled, str) else unrolled
    if not isinstance(unrolled, Unrolled):
        raise UserError(f"to_scanned starts from Unrolled(...); got {unrolled!r}")
    scanned = Scanned(path, axis)
    later = Later()

    def runs(node: Mapping) -> list[tuple]:
        numbered = numbered_children(_get(node, unrolled.parents), unrolled) or {}
        return [(*unrolled.parents, unrolled.key(number)) for number in numbered]

    def convert(node: Mapping, keys: tuple[str, ...]) -> Any:
        above = _get(node, unrolled.parents)
        numbered = numbered_children(above, unrolled)
        where = "/".join((*keys, *unrolled.parents))
        check_numbers(sorted(numbered), unrolled, where or "the tree")
        children = items_of(above) if isinstance(above, Mapping) else above
        layers = [children[numbered[number]] for number in range(len(numbered))]
        stack = _put_together(layers, scanned.axis, axis_name, unrolled, where, later)
        rest = node
        if isinstance(above, Mapping):
            for key in numbered.values():
                rest = _without(rest, (*unrolled.parents, key))
        else:
            rest = _without(rest, unrolled.parents)
        if _get(rest, scanned.keys) is not _MISSING:
            raise UserError(f"{'/'.join((*keys, *scanned.keys))} is taken; choose another path")
        return _put(rest, scanned.keys, stack, keys)

    converted = _convert_everywhere(tree, runs, convert, unrolled, unrolled.pattern)
    return later.finish(converted)


def _convert_everywhere(tree: Any, runs, convert, layout: Any, name: str) -> Any:
    """`convert(node, path)` for every dict from which `runs(node)` lead to the stack."""
    if layerwise_states(tree):
        raise UserError(
            "a layerwise optimiser state cannot be converted; convert the parameters and the "
            "moments of the bare optimiser"
        )
    before = _in_stack(tree, layout)
    for path in before:
        refuse_factored(path_keys(path))
    if not before:
        raise UserError(f"no leaf of the tree lies under {name!r}")
    found: set[tuple[str, ...]] = set()
    inside: set[tuple[str, ...]] = set()

    def visit(node: Any, keys: tuple[str, ...]) -> Any:
        if keys in inside:
            return node
        here = runs(node) if isinstance(node, Mapping) else []
        inside.update((*keys, *run) for run in here)
        node = map_children(visit, node, keys)
        if not here:
            return node
        found.add(keys)
        return convert(node, keys)

    result = visit(tree, ())
    for path in before:
        keys = path_keys(path)
        if keys[: place_of(keys, layout).start] not in found:
            raise UserError(
                f"{'/'.join(keys)} does not lie in dicts all the way, so its layers cannot be "
                "moved to other names"
            )
    return result


def _in_stack(tree: Any, layout: Any) -> list:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [path for path, _ in flat if place_of(path_keys(path), layout) is not None]


# ---- moving subtrees ----


def _find(node: Any, key: str) -> Any:
    """The key of a mapping that reads as this text; `_MISSING` for none."""
    if not isinstance(node, Mapping):
        return _MISSING
    return next((one for one in node if str(one) == str(key)), _MISSING)


def _get(node: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = _find(node, key)
        if found is _MISSING:
            return _MISSING
        node = items_of(node)[found]
    return node


def _without(node: Mapping, keys: Sequence) -> Mapping:
    found = _find(node, keys[0])
    items = items_of(node)
    below = _without(items[found], keys[1:]) if len(keys) > 1 else {}
    if below:
        items[found] = below
    else:
        del items[found]
    return rebuilt(node, items)


def _put(node: Any, keys: Sequence, subtree: Any, above: tuple[str, ...]) -> Mapping:
    """`node` with one more subtree; dicts on the way are made in its type."""
    if not isinstance(node, Mapping):
        raise UserError(f"{'/'.join(above)} is no dict, so nothing can be put under it")
    items = items_of(node)
    if len(keys) == 1:
        items[keys[0]] = subtree
    else:
        found = _find(node, keys[0])
        below = rebuilt(node, {}) if found is _MISSING else items[found]
        key = keys[0] if found is _MISSING else found
        items[key] = _put(below, keys[1:], subtree, (*above, str(keys[0])))
    return rebuilt(node, items)


def _with(
    node: Mapping, unrolled: Unrolled, layers: list, numbered_by: type, above: tuple[str, ...]
) -> Mapping:
    parents = unrolled.parents
    place, where = _get(node, parents), "/".join((*above, *parents)) or "the tree"
    if not parents and numbered_by is not str:
        raise UserError("numbered layers need a key to stand under, such as 'layers/{}'")
    if place is not _MISSING and (numbered_by is not str or numbered_children(place, unrolled)):
        raise UserError(f"{where} is taken, so there is no place for {unrolled.pattern!r}")
    if numbered_by in (list, tuple):
        return _put(node, parents, numbered_by(layers), above)
    for number, layer in enumerate(layers):
        key = number if numbered_by is int else unrolled.key(number)
        node = _put(node, (*parents, key), layer, above)
    return node


# ---- arrays ----


def _take_apart(stack: Any, scanned: Scanned, keys: tuple[str, ...], later: Later) -> list:
    count, first = None, ""
    for path, leaf in jax.tree_util.tree_flatten_with_path(stack)[0]:
        name, shape = "/".join((*keys, *path_keys(path))), np.shape(leaf)
        axis = layer_axis(shape, scanned, name)
        if count is None:
            count, first = shape[axis], name
        if shape[axis] != count:
            raise UserError(
                f"{name} has shape {shape}: axis {scanned.axis} holds {shape[axis]} layers, but "
                f"{first} holds {count}"
            )

    def take(path, node, number):
        name = "/".join((*keys, *path_keys(path)))
        if not is_box(node):
            return _layer(node, scanned.axis, number, later, name)
        inner = jax.tree.map(lambda x: _layer(x, scanned.axis, number, later, name), node)
        ndim = np.ndim(jax.tree.leaves(node)[0])
        return without_axis_name(inner, scanned.axis, ndim, name)

    return [
        jax.tree_util.tree_map_with_path(
            lambda path, node, number=number: take(path, node, number), stack, is_leaf=is_box
        )
        for number in range(count or 0)
    ]


def _layer(leaf: Any, axis: int, number: int, later: Later, name: str) -> Any:
    axis %= leaf.ndim
    shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=shape, sharding=_less(leaf.sharding, axis))
    if isinstance(leaf, np.ndarray):
        return np.asarray(np.take(leaf, number, axis=axis))
    return later.do(
        lambda x: jax.lax.index_in_dim(x, number, axis, keepdims=False), [leaf], leaf, name,
        reshard=lambda sharding: _less(sharding, axis),
    )


def _put_together(
    layers: list, axis: int, axis_name: str | None, unrolled: Unrolled, where: str, later: Later
) -> Any:
    def describe(layer):
        flat = jax.tree_util.tree_flatten_with_path(layer)[0]
        return {path_keys(p): (np.shape(leaf), getattr(leaf, "dtype", None)) for p, leaf in flat}

    described = [describe(layer) for layer in layers]
    for number, one in enumerate(described):
        first = described[0]
        unlike = [keys for keys in {**first, **one} if first.get(keys) != one.get(keys)]
        if unlike or jax.tree.structure(layers[number]) != jax.tree.structure(layers[0]):
            tail = f" in {'/'.join(unlike[0])}" if unlike else " in their containers"
            raise UserError(
                f"the layers {unrolled.key(0)} and {unrolled.key(number)} under "
                f"{where or 'the tree'} differ{tail}, so they cannot be stacked"
            )

    def stack(path, *nodes):
        name = "/".join((where, *path_keys(path)))
        if not is_box(nodes[0]):
            return _stacked(nodes, axis, later, name)
        inner = jax.tree.map(lambda *leaves: _stacked(leaves, axis, later, name), *nodes)
        ndim = np.ndim(jax.tree.leaves(nodes[0])[0]) + 1
        return with_axis_name(inner, axis, ndim, axis_name)

    return jax.tree_util.tree_map_with_path(stack, *layers, is_leaf=is_box)


def _stacked(leaves: Sequence[Any], axis: int, later: Later, name: str) -> Any:
    first, ndim = leaves[0], np.ndim(leaves[0]) + 1
    if not -ndim <= axis < ndim:
        raise UserError(
            f"{name} has shape {np.shape(first)}: there is no room for layers on axis {axis}"
        )
    axis %= ndim
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (*first.shape[:axis], len(leaves), *first.shape[axis:])
        return first.update(shape=shape, sharding=_more(first.sharding, axis, ndim))
    if all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
        return np.stack(leaves, axis=axis)
    return later.do(
        lambda *arrays: jnp.stack(arrays, axis=axis), list(leaves), first, name,
        reshard=lambda sharding: _more(sharding, axis, ndim),
    )


def _less(sharding: Any, axis: int) -> Any:
    """The sharding without one axis; None (the compiler's choice) where it has no names."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [entry for i, entry in enumerate(sharding.spec) if i != axis]
    return sharding.update(spec=PartitionSpec(*spec))


def _more(sharding: Any, axis: int, ndim: int) -> Any:
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (ndim - 1 - len(sharding.spec))]
    spec.insert(axis, None)
    return sharding.update(spec=PartitionSpec(*spec))
