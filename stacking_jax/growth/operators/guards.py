"""What every operator checks, and the layers that it must leave alone.

`keep_first` and `keep_last` exclude layers at the two ends from being repeated: the
operator then works on the layers between as if they were the whole stack. The first
and last layers of a trained network do other work than those between (MIDAS, fig. 6).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap


def whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int.

    Raises:
      UserError: if it is not a whole number, or less than `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise UserError(f"{name} must be a whole number; got {value!r}")
    if least is not None and number < least:
        raise UserError(f"{name} must be at least {least}; got {number}")
    return number


def between(name: str, depth: int, keep_first: int, keep_last: int) -> int:
    """How many layers lie between those that are kept, for the operator `name`.

    Raises:
      UserError: if the numbers are none, or no layer lies between.
    """
    depth = whole(f"{name}: the depth", depth, least=1)
    keep_first = whole(f"{name}: keep_first", keep_first, least=0)
    keep_last = whole(f"{name}: keep_last", keep_last, least=0)
    inner = depth - keep_first - keep_last
    if inner < 1:
        raise UserError(
            f"{name} keeps the first {keep_first} and the last {keep_last} of {depth} layers, "
            "and none lies between"
        )
    return inner


def guarded(sources: Iterable[int], depth: int, keep_first: int, keep_last: int) -> DepthMap:
    """The map whose middle is `sources`, counted from the first layer that is not kept."""
    middle = (keep_first + source for source in sources)
    return DepthMap(
        [*range(keep_first), *middle, *range(depth - keep_last, depth)], stored=depth
    )
