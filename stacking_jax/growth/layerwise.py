"""Optimisers that see layers, not the stacked array.

Adafactor's factored moments, its clipping by a block's RMS and its parameter
scale, Muon's orthogonalisation and LAMB's trust ratio belong to one matrix of one
layer. On a stacked leaf [layers, in, out] they would mix layers, training scanned
and unrolled would differ, and growing would not commute with the update. So
everything that looks at a leaf as a whole runs under `vmap` over the layers.

The second gain: every layer counts its own steps. A layer whose moments start
afresh corrects their bias by its own count, and takes the first step of a fresh
optimiser instead of one that is three times as long.

What looks at the whole gradient (a clip by the global norm) or at the run's step (a
schedule, accumulation, skipping) stays outside and happens once:
`optax.chain(optax.clip_by_global_norm(1.0), layerwise(optax.scale_by_adam(), layout),
optax.scale_by_learning_rate(schedule))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import Layout, Scanned, Unrolled, path_keys
from stacking_jax.growth.stacks import layouts_of, place_of

if TYPE_CHECKING:
    import optax


class LayerwiseState(NamedTuple):
    """State of a transform that runs once per layer and once for the rest.

    Attributes:
      stacked: the state for the layers, nested under the layout's own keys so that
        one path finds all of it, counts included. For a `Scanned` stack every leaf
        has the layers on axis 0, whatever the axis of the parameters; for an
        `Unrolled` one there is a state per layer. With several stacks: by name.
      rest: the state for everything else.
    """

    stacked: Any
    rest: Any


def layerwise(
    transform: optax.GradientTransformation, layout: Layout | Mapping[str, Layout]
) -> optax.GradientTransformationExtraArgs:
    """Runs `transform` per layer on the leaves of a stack, and once on the rest.

    Args:
      transform: any transform that treats leaves, or whole layers, independently.
        Draws of random noise are none: every layer would draw the same. Masks and
        labels must be functions of the parameters and not trees, and see every layer
        of an `Unrolled` stack as its first.
      layout: where the stack lives; several stacks by name.

    Returns:
      A transform with a `LayerwiseState`. Further arguments of `update` (a loss
      value, say) are handed on to every layer as they are.

    Raises:
      UserError: in `init`, if nothing in the parameters lies in a stack.
    """
    import optax

    transform = optax.with_extra_args_support(transform)
    layouts = layouts_of(layout)
    single = not isinstance(layout, Mapping)

    def init(params):
        parts = _split(params, layouts)
        stacked = {}
        for name, one in layouts.items():
            if not jax.tree.leaves(parts[name]):
                raise UserError(f"layerwise: no leaf of the parameters lies in {one}")
            if isinstance(one, Scanned):
                state = jax.vmap(transform.init, in_axes=one.axis)(parts[name])
            else:
                state = {number: transform.init(part) for number, part in parts[name].items()}
            stacked[name] = _nest(state, one)
        return LayerwiseState(stacked[""] if single else stacked, transform.init(parts[None]))

    def update(updates, state, params=None, **extra):
        parts = _split(updates, layouts)
        param_parts = dict.fromkeys(parts) if params is None else _split(params, layouts)
        states = {"": state.stacked} if single else state.stacked
        stacked = {}
        for name, one in layouts.items():
            inner = _unnest(states[name], one)
            if isinstance(one, Scanned):
                axis = one.axis
                run = jax.vmap(
                    lambda g, s, p: transform.update(g, s, p, **extra),
                    in_axes=(axis, 0, axis), out_axes=(axis, 0),
                )
                parts[name], after = run(parts[name], inner, param_parts[name])
            else:
                after = {}
                for number, part in parts[name].items():
                    given = None if params is None else param_parts[name][number]
                    parts[name][number], after[number] = transform.update(
                        part, inner[number], given, **extra
                    )
            stacked[name] = _nest(after, one)
        parts[None], rest = transform.update(parts[None], state.rest, param_parts[None], **extra)
        merged = _merge(parts, updates, layouts)
        return merged, LayerwiseState(stacked[""] if single else stacked, rest)

    return optax.GradientTransformationExtraArgs(init, update)


def to_layerwise(
    opt_state: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    layout: Layout | Mapping[str, Layout],
) -> Any:
    """Turns the state of `optimizer` into one of `layerwise(optimizer, layout)`.

    For a run that began without `layerwise` and is to go on with it: moments are
    taken over, and every layer gets the count that all of them shared.

    Args:
      opt_state: the state as `optimizer` keeps it.
      optimizer: the bare one.
      params: the parameters to which the state belongs; shapes suffice.
      layout: where the stack lives.

    Raises:
      UserError: if a leaf belongs to no single layer, as factored moments do that
        were taken over the stacked array.
    """
    wanted = jax.eval_shape(layerwise(optimizer, layout).init, params)
    layouts = layouts_of(layout)
    single = not isinstance(layout, Mapping)
    old = {
        path_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]
    }

    def take(keys, shape, axis):
        leaf = old.get(keys)
        if leaf is None:
            raise UserError(f"the optimiser state holds no {'/'.join(keys)}; is it another's?")
        if axis is None:
            found = leaf
        elif leaf.ndim == len(shape):
            found = jnp.moveaxis(leaf, axis, 0)
        else:
            found = jnp.broadcast_to(leaf, (shape[0], *leaf.shape))
        if found.shape != shape:
            raise UserError(
                f"{'/'.join(keys)} has shape {leaf.shape}, which does not fall into layers of "
                f"shape {shape[1:]}; start this optimiser's state afresh"
            )
        return found

    def fill(tree, axis=None, rename=lambda keys: keys):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: take(rename(path_keys(path)), leaf.shape, axis), tree
        )

    states = {"": wanted.stacked} if single else wanted.stacked
    stacked = {}
    for name, one in layouts.items():
        inner = _unnest(states[name], one)
        if isinstance(one, Scanned):
            inner = fill(inner, one.axis)
        else:
            inner = {
                number: fill(state, rename=lambda keys, n=number, o=one: _renumbered(keys, o, n))
                for number, state in inner.items()
            }
        stacked[name] = _nest(inner, one)
    return LayerwiseState(stacked[""] if single else stacked, fill(wanted.rest))


def _split(tree: Any, layouts: dict[str, Layout]) -> dict:
    """One tree per stack (for an unrolled one: per layer), and the rest under None.

    A part of a scanned stack and the rest keep the nesting of the whole, so that masks
    and labels by path see the paths that they know. A layer of an unrolled stack is
    always called the first, so that its state fits wherever the layer goes.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    owned = [_owner(path_keys(path), layouts) for path, _ in flat]

    def part(owner):
        pairs = zip(flat, owned, strict=True)
        mine = [leaf if it == owner else None for (_, leaf), (it, _) in pairs]
        return _prune(jax.tree.unflatten(treedef, mine))

    parts: dict = {None: part((None, None))}
    for name, layout in layouts.items():
        if isinstance(layout, Scanned):
            parts[name] = part((name, None))
            continue
        layers: dict[int, dict] = {}
        for (_, leaf), ((it, number), keys) in zip(flat, owned, strict=True):
            if it == name:
                _put(layers.setdefault(number, {}), keys, leaf)
        parts[name] = dict(sorted(layers.items()))
    return parts


def _prune(node: Any) -> Any:
    """Without the dict entries that belong to another part.

    Elsewhere None stands for them, which most transforms take, but not all.
    """
    if type(node) is not dict:
        return node
    children = {key: _prune(child) for key, child in node.items()}
    kept = lambda child: child is not None and not (type(child) is dict and not child)  # noqa: E731
    return {key: child for key, child in children.items() if kept(child)}


def _put(tree: dict, keys: tuple[str, ...], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def _merge(parts: dict, like: Any, layouts: dict[str, Layout]) -> Any:
    """The parts of `_split(like)` put together again."""
    in_order, by_path = {}, {}
    for name, part in parts.items():
        if name is None or isinstance(layouts[name], Scanned):
            in_order[name] = iter(jax.tree.leaves(part))
            continue
        for number, one in part.items():
            for path, leaf in jax.tree_util.tree_flatten_with_path(one)[0]:
                by_path[name, number, path_keys(path)] = leaf
    merged = []
    for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]:
        (name, number), keys = _owner(path_keys(path), layouts)
        merged.append(next(in_order[name]) if number is None else by_path[name, number, keys])
    return jax.tree.unflatten(jax.tree.structure(like), merged)


def _owner(
    keys: tuple[str, ...], layouts: dict[str, Layout]
) -> tuple[tuple[str | None, int | None], tuple[str, ...]]:
    """(stack, layer), and the path under which the transform sees the leaf."""
    for name, layout in layouts.items():
        place = place_of(keys, layout)
        if place is None:
            continue
        if place.number is None:
            return (name, None), keys
        return (name, place.number), _renumbered(keys, layout, 0)
    return (None, None), keys


def _renumbered(keys: tuple[str, ...], layout: Unrolled, number: int) -> tuple[str, ...]:
    """The path of the same leaf in another layer."""
    place = place_of(keys, layout)
    if place is None or place.number is None:
        return keys
    at = place.start + len(layout.parents)
    return (*keys[:at], layout.key(number), *keys[at + 1 :])


def _nest(state: Any, layout: Layout) -> Any:
    keys = layout.keys if isinstance(layout, Scanned) else layout.parents
    if not isinstance(layout, Scanned):
        state = {layout.key(number): one for number, one in state.items()}
    for key in reversed(keys):
        state = {key: state}
    return state


def _unnest(state: Any, layout: Layout) -> Any:
    keys = layout.keys if isinstance(layout, Scanned) else layout.parents
    for key in keys:
        state = state[key]
    if isinstance(layout, Scanned):
        return state
    return {layout.number(key): one for key, one in state.items()}
