"""Arrays in boxes that name their axes: `nn.Partitioned` of Linen, variables of NNX.

Known by what they can do, so that Flax is never imported.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec

from stacking_jax.errors import UserError

# Where NNX variables keep the names of their axes, by version of Flax.
_NNX_NAMES = ("out_sharding", "sharding_names", "sharding")


def is_box(node: Any) -> bool:
    """Whether the node is an array with metadata about its axes."""
    return _is_linen(node) or _is_nnx(node)


def without_axis_name(box: Any, axis: int, ndim: int, name: str) -> Any:
    """The box without the name of one of its `ndim` axes.

    Raises:
      UserError: if it does not name each axis.
    """
    def less(names):
        if len(names) != ndim and not isinstance(names, PartitionSpec):
            raise UserError(f"{name} names {len(names)} axes, {tuple(names)}, but has {ndim}")
        names = [*names, *[None] * (ndim - len(names))]
        del names[axis]
        return names

    return _renamed(box, less)


def with_axis_name(box: Any, axis: int, ndim: int, axis_name: str | None) -> Any:
    """The box with a name for a new axis, the `axis`-th of `ndim`."""

    def more(names):
        names = [*names, *[None] * (ndim - 1 - len(names))]
        names.insert(axis % ndim, axis_name)
        return names

    return _renamed(box, more)


def _renamed(box: Any, change) -> Any:
    if _is_linen(box):
        return box.replace(names=type(box.names)(change(box.names)))
    metadata = box.get_metadata()
    for field in _NNX_NAMES:
        names = metadata.get(field)
        if isinstance(names, PartitionSpec):
            box.set_metadata(field, PartitionSpec(*change(names)))
        elif isinstance(names, tuple):
            box.set_metadata(field, tuple(change(names)))
    return box


def _is_linen(node: Any) -> bool:
    return isinstance(getattr(node, "names", None), tuple) and hasattr(node, "remove_axis")


def _is_nnx(node: Any) -> bool:
    return hasattr(node, "get_metadata") and hasattr(node, "set_metadata")
