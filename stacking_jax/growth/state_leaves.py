"""Reading an optimiser state: to which parameter, layer and field each leaf belongs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.layerwise import LayerwiseState
from stacking_jax.growth.layouts import Layout, Scanned, path_keys
from stacking_jax.growth.stacks import layer_axis, place_of

Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """What one leaf of an optimiser state is.

    Attributes:
      keys: its path.
      owner: the path of the state that holds it, such as that of a `ScaleByAdamState`.
      field: the field of that state, such as 'mu'; None where there is no telling.
      of_parameter: whether the field holds a leaf per parameter (a moment), rather
        than one value of its own (a count).
      stack: which of the layouts it belongs to; None for none.
      axis: where it holds one entry per layer of a `Scanned` stack; None otherwise.
      number: its layer in an `Unrolled` stack.
    """

    keys: Keys
    owner: Keys
    field: str | None
    of_parameter: bool
    stack: int | None = None
    axis: int | None = None
    number: int | None = None

    @property
    def path(self) -> str:
        return "/".join(self.keys)

    @property
    def per_layer(self) -> bool:
        """Whether it can be told which layer an entry belongs to."""
        return self.axis is not None or self.number is not None


def read_state(opt_state: Any, layouts: Sequence[Layout], params: Any) -> list[StateLeaf]:
    """What every leaf of a state is, in the order of `jax.tree.leaves`.

    Args:
      opt_state: any optax state, or nested containers of them.
      layouts: where the stacks live.
      params: the parameters that the state belongs to (shapes suffice), or None:
        then every leaf under a stack is taken to have its parameter's shape.

    Raises:
      UserError: if a leaf of a stack falls into no layers.
    """
    flat = jax.tree_util.tree_flatten_with_path(opt_state)[0]
    shapes = {path_keys(path): np.shape(leaf) for path, leaf in flat}
    is_wrapped = lambda node: isinstance(node, LayerwiseState)  # noqa: E731
    wrapped = {
        path_keys(path)
        for path, node in jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_wrapped)[0]
        if is_wrapped(node)
    }
    parameters = _Parameters(params, layouts)
    return [_read(path, shapes, wrapped, layouts, parameters) for path, _ in flat]


def check_shapes(opt_state: Any, optimizer: Any, params: Any) -> None:
    """Compares a grown state with what the optimiser would make for the grown parameters.

    Raises:
      UserError: naming the first leaf that is missing, surplus, or of another shape.
    """
    wanted, got = _described(jax.eval_shape(optimizer.init, params)), _described(opt_state)
    for path in sorted(set(wanted) | set(got)):
        if wanted.get(path) != got.get(path):
            raise UserError(
                f"the grown optimiser state holds {got.get(path, 'nothing')} at {path}, but for "
                f"the grown parameters this optimiser keeps {wanted.get(path, 'nothing')} there; "
                "is it the optimiser of this state? One that looks at whole arrays belongs into "
                "layerwise(optimizer, layout)"
            )


def _described(tree: Any) -> dict[str, str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(path_keys(path)): f"{leaf.dtype}{list(np.shape(leaf))}" for path, leaf in flat}


class _Parameters:
    """Shapes of the parameters, by path and by name within a layer."""

    def __init__(self, params: Any, layouts: Sequence[Layout]):
        self.given = params is not None
        self.by_path: dict[Keys, tuple[int, ...]] = {}
        self.by_name: dict[tuple[int, Keys], set[tuple[int, ...]]] = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            keys = path_keys(_unboxed(path))
            self.by_path[keys] = np.shape(leaf)
            for index, layout in enumerate(layouts):
                place = place_of(keys, layout)
                if place is not None:
                    self.by_name.setdefault((index, place.name), set()).add(np.shape(leaf))

    def tail(self, keys: Keys) -> int | None:
        """Where the path of a parameter begins within these keys."""
        return next((at for at in range(len(keys)) if keys[at:] in self.by_path), None)

    def below_one(self, keys: Keys) -> bool:
        """Whether these keys lead further than to a parameter."""
        ends = range(1, len(keys))
        return any(keys[at:end] in self.by_path for end in ends for at in range(end))

    def shape(self, keys: Keys, stack: int, name: Keys) -> tuple[int, ...] | None:
        at = self.tail(keys)
        if at is not None:
            return self.by_path[keys[at:]]
        # The state may have been made for a subtree of these parameters.
        shapes = self.by_name.get((stack, name), set())
        return next(iter(shapes)) if len(shapes) == 1 else None


def _unboxed(path: tuple) -> tuple:
    """Without the last step into a box such as Flax's `Partitioned` or a `Variable`."""
    boxed = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey)
    return path[:-1] if boxed and path[-1].name == "value" else path


def _read(path, shapes, wrapped, layouts, parameters: _Parameters) -> StateLeaf:
    full = path_keys(path)
    path = _unboxed(path)
    keys = path_keys(path)
    prefix = next((keys[:at] for at in range(len(keys)) if keys[:at] in wrapped), None)
    if prefix is not None:
        path, keys, stack, number = _inside_wrapper(path, keys, prefix, layouts)
        owner, field, of_parameter = _owner(path, keys, parameters)
        axis = 0 if stack is not None and isinstance(layouts[stack], Scanned) else None
        # A wrapper's state has the layers on axis 0, whatever the parameters' axis.
        outer = full[: len(full) - len(keys)]
        return StateLeaf(full, (*outer, *owner), field, of_parameter, stack, axis, number)
    owner, field, of_parameter = _owner(path, keys, parameters)
    for stack, layout in enumerate(layouts):
        place = place_of(keys, layout)
        if place is None:
            continue
        if place.number is not None:
            return StateLeaf(full, owner, field, of_parameter, stack, number=place.number)
        shape = parameters.shape(keys, stack, place.name)
        axis = _axis(full, keys, owner, field, shape, shapes, layout, parameters)
        return StateLeaf(full, owner, field, of_parameter, stack, axis)
    return StateLeaf(full, owner, field, of_parameter)


def _inside_wrapper(path, keys: Keys, prefix: Keys, layouts: Sequence[Layout]):
    """The path below a `LayerwiseState`, and the layers to which it leads."""
    at = len(prefix) + 1
    if keys[len(prefix)] == "stacked":
        for skipped in (0, 1):  # several stacks lie under their names
            for stack, layout in enumerate(layouts):
                place = place_of(keys[at + skipped :], layout)
                if place is not None and place.start == 0:
                    at = len(keys) - len(place.name)
                    return path[at:], keys[at:], stack, place.number
    return path[at:], keys[at:], None, None


def _owner(path, keys: Keys, parameters: _Parameters) -> tuple[Keys, str | None, bool]:
    """(path of the state that holds the leaf, its field, whether one leaf per parameter)."""
    tail = parameters.tail(keys)
    if tail is not None:
        return (keys[: tail - 1], keys[tail - 1], True) if tail else ((), None, True)
    named = [i for i, entry in enumerate(path) if isinstance(entry, jax.tree_util.GetAttrKey)]
    if not named:
        return (), None, True
    last = named[-1]
    return keys[:last], keys[last], last < len(keys) - 1


def _axis(full, keys, owner, field, shape, shapes, layout: Scanned, parameters) -> int | None:
    """The axis of the layers of a leaf; None for a placeholder that is no layer's."""
    own, path = shapes[full], "/".join(full)
    if shape is None:
        if parameters.below_one(full):
            raise UserError(
                f"{path} is one of several leaves for one parameter, which belong to no single "
                "layer; wrap the optimiser in layerwise(optimizer, layout)"
            )
        if parameters.given and layout.axis != 0:
            raise UserError(
                f"{path} lies in the stack {layout.path!r} but belongs to no parameter of it, so "
                "it cannot be told on which axis its layers are; keep such a state in "
                "layerwise(optimizer, layout)"
            )
        axis = layer_axis(own, layout, path)
        if not parameters.given and _siblings(full, owner, field, shapes) is not None:
            raise UserError(
                f"{path} holds factored moments, which lack axes of their parameters; give "
                "params=..., the parameters before the growth"
            )
        return axis
    axis = layer_axis(shape, layout, path)
    factored = _siblings(full, owner, field, shapes)
    if factored is not None:
        return _factored_axis(path, field, own, shape, factored["v"], axis)
    if own != shape:
        raise UserError(
            f"{path} has shape {own}, its parameter {shape}: it belongs to no single layer, since "
            "this optimiser looks at the stacked array as a whole; wrap it in "
            "layerwise(optimizer, layout)"
        )
    return axis


def _siblings(full: Keys, owner: Keys, field: str | None, shapes: dict) -> dict | None:
    """Shapes of the three fields of optax's `FactoredState`, if the leaf lies in one."""
    if field not in ("v_row", "v_col", "v"):
        return None
    below = full[len(owner) + 1 :]
    found = {name: shapes.get((*owner, name, *below)) for name in ("v_row", "v_col", "v")}
    return None if None in found.values() else found


def _factored_axis(path, field, own, shape, full_moment, axis: int) -> int | None:
    """Where Adafactor keeps the layers of `v_row`, `v_col` or `v`.

    Moments are factored over the two largest axes: `v_row` lacks the largest, `v_col`
    the second largest, and whatever is not in use is a placeholder of shape (1,).
    """
    if full_moment == shape:
        return axis if field == "v" else None
    if field == "v":
        return None
    second, first = (int(i) for i in np.argsort(shape)[-2:])
    if axis in (first, second):
        raise UserError(
            f"{path}: Adafactor factored a parameter of shape {shape} over the axis of its "
            "layers, which mixes them; wrap the optimiser in layerwise(optimizer, layout)"
        )
    gone = first if field == "v_row" else second
    if own != (*shape[:gone], *shape[gone + 1 :]):
        raise UserError(f"{path} has shape {own}, which does not follow from {shape} by factoring")
    return axis - (gone < axis)
