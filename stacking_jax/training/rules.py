"""One table: which axes of the mesh split which axis of an array.

Models name the axes of their arrays (`embed`, `heads`, `batch`, ...) and know nothing of
meshes; a mesh names its own. What lies between them is this table, and what a user
overrides of it (`MeshConfig.rules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from stacking_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "sequence", "tensor")
"""The axes of the mesh. The devices of the last lie closest together; `slice` is the only one
whose devices need no fast link between them."""

TABLE: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("slice", "data", "fsdp"),
    "length": ("sequence",),
    "keys": (),  # The length of keys and values: every query of a row needs them all.
    "stream": (),
    # Parameters, and the activations that they make.
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
}
"""Axis of an array -> the mesh axes that split it, the first in the largest pieces."""

ACTIVATIONS = (
    ("batch", "length", "stream"),
    ("batch", "length", "heads", None),
    ("batch", "keys", "kv_heads", None),
    ("batch", None, "length", "keys"),
    ("batch", "length", "vocab"),
    ("vocab", "stream"),
)
"""The axes of the activations that a model places, the gathered embedding table among them."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The table as a mesh carries it: hashable, since programs are compiled for it.

    Attributes:
      table: pairs of an array's axis and the mesh axes that split it.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...] = tuple(TABLE.items())

    @classmethod
    def of(cls, overrides: Mapping[str, Any] | None = None) -> Rules:
        """The table with some of its lines replaced.

        Args:
          overrides: axis of an array -> a mesh axis, several of them, or None for whole.

        Raises:
          UserError: for an axis that neither arrays nor meshes have, or one mesh axis twice.
        """
        if not isinstance(overrides or {}, Mapping):
            raise UserError(
                "MeshConfig.rules is a table such as {'embed': ('fsdp', 'sequence')}; "
                f"got {overrides!r}"
            )
        table = dict(TABLE)
        for name, axes in (overrides or {}).items():
            if name not in TABLE:
                raise UserError(
                    f"MeshConfig.rules: no array has an axis {name!r}; there are {', '.join(TABLE)}"
                )
            table[name] = _axes(name, axes)
        rules = cls(tuple(table.items()))
        for names in ACTIVATIONS:
            rules.split(names, "activations")
        return rules

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes that split an array's axis of this name; None is never split."""
        return () if name is None else dict(self.table)[name]

    def split(self, names: Sequence[str | None], what: str) -> tuple[tuple[str, ...], ...]:
        """The mesh axes of every axis of an array.

        Args:
          names: of the array's axes.
          what: the array, for the message.

        Raises:
          UserError: if one mesh axis would split the array twice.
        """
        split = tuple(self.axes(name) for name in names)
        owner: dict[str, str | None] = {}
        for name, axes in zip(names, split, strict=True):
            for axis in axes:
                if axis in owner:
                    raise UserError(
                        f"MeshConfig.rules: {what} with the axes {_shown(names)} would be split "
                        f"over {axis!r} twice, by {owner[axis]} and by {name}; "
                        "take it out of one of the two rules"
                    )
                owner[axis] = name
        return split

    def for_decoding(self) -> Rules:
        """The rules where text is continued or scored: lengths are short, and rows are many.

        What splits the length in training splits the rows instead, so that no device idles.
        """
        table = dict(self.table)
        free = tuple(axis for axis in table["length"] if axis not in table["batch"])
        return Rules(tuple((table | {"batch": table["batch"] + free, "length": ()}).items()))


def _axes(name: str, axes: Any) -> tuple[str, ...]:
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    if not isinstance(axes, Sequence) or not all(isinstance(axis, str) for axis in axes):
        raise UserError(
            f"MeshConfig.rules: {name!r} is split by a mesh axis, several in parentheses, or "
            f"None; got {axes!r}"
        )
    for axis in axes:
        if axis not in AXES:
            raise UserError(
                f"MeshConfig.rules: {name!r} cannot be split by {axis!r}, which is no axis of the "
                f"mesh; there are {', '.join(AXES)}"
            )
    if len(set(axes)) < len(axes):
        raise UserError(f"MeshConfig.rules: {name!r} names a mesh axis twice: {tuple(axes)}")
    return tuple(axes)


def _shown(names: Sequence[str | None]) -> str:
    return " × ".join(name or "-" for name in names)
