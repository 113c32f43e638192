"""Layouts: where the layers of a stack live in a tree.

A layout says which leaves belong to the stack; it never looks at sizes to
decide, since an optimiser may keep leaves that merely look like layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax

from stacking_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scanned:
    """All layers of a leaf are stacked along one axis, as `nn.scan` leaves them.

    Attributes:
      path: '/'-joined keys, matched as a contiguous run anywhere in a leaf's
        path: 'decoder/layers' is found under 'params/' and in the optimiser's
        copies of the parameters alike.
      axis: the axis of the layers, the same for every leaf of the stack.
      period: how many unlike layers follow one another in a cycle. A depth map
        counts such units.
    """

    path: str
    axis: int = 0
    period: int = 1

    def __post_init__(self):
        _check_period(self)
        if not _keys(self.path):
            raise UserError("Scanned(path) needs at least one key, such as Scanned('layers')")

    @property
    def keys(self) -> tuple[str, ...]:
        return _keys(self.path)

    def matches(self, path: Sequence[str]) -> bool:
        """Whether a leaf with these path keys belongs to the stack."""
        return _find_run(path, self.keys) is not None


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Every layer is a subtree of its own: 'blocks_{}', 'h/{}', 'encoder/layers_{}'.

    Attributes:
      pattern: '/'-joined keys with one `{}` that stands for the layer's number;
        matched as a contiguous run anywhere in a path. Under 'h/{}' the layers
        may be a dict (numbers as text or int), a list or a tuple.
      period: how many unlike layers follow one another in a cycle, such as 2 for
        the local and global attention of Gemma 2. A depth map counts such units.
    """

    pattern: str
    period: int = 1

    def __post_init__(self):
        _check_period(self)
        if self.pattern.count("{}") != 1:
            raise UserError(
                f"Unrolled({self.pattern!r}) needs exactly one {{}} where the layer's number "
                "stands, such as 'blocks_{}' or 'h/{}'"
            )
        if "{}" not in _keys(self.pattern)[-1]:
            raise UserError(
                f"Unrolled({self.pattern!r}): the {{}} belongs into the last key of the pattern"
            )

    @property
    def parents(self) -> tuple[str, ...]:
        """The keys above the numbered one."""
        return _keys(self.pattern)[:-1]

    def key(self, number: int) -> str:
        """The key of a layer, as text."""
        return _keys(self.pattern)[-1].replace("{}", str(number))

    def number(self, key: str) -> int | None:
        """The layer's number if `key` is the key of a layer, else None."""
        head, tail = _keys(self.pattern)[-1].split("{}")
        found = re.fullmatch(re.escape(head) + r"(0|[1-9][0-9]*)" + re.escape(tail), key)
        return int(found[1]) if found else None


Layout = Scanned | Unrolled


def path_keys(path: Sequence) -> tuple[str, ...]:
    """The keys of a JAX key path as text: dict keys, attributes, positions."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def units_in(layers: int, layout: Layout, what: str) -> int:
    """How many units of `layout.period` layers there are.

    Raises:
      UserError: if the layers are no whole number of units; `what` names them.
    """
    if layers % layout.period:
        raise UserError(
            f"{what}, which are no whole number of units of {layout.period} unlike layers; with "
            "period=1 a map counts single layers and has to keep the cycle itself"
        )
    return layers // layout.period


def _check_period(layout: Layout) -> None:
    if not isinstance(layout.period, int) or isinstance(layout.period, bool) or layout.period < 1:
        raise UserError(f"{layout!r}: the period is a whole number of layers, at least 1")


def _keys(path: str) -> tuple[str, ...]:
    return tuple(key for key in path.split("/") if key)


def _find_run(path: Sequence[str], run: Sequence[str]) -> int | None:
    for start in range(len(path) - len(run) + 1):
        if tuple(path[start : start + len(run)]) == tuple(run):
            return start
    return None
