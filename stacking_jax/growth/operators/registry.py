"""Operators by name: what a plan, gin and the command line refer to."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap
from stacking_jax.growth.operators.blocks import (
    first_block,
    gradstack,
    lidas,
    midas,
    random_block,
    repeat_block,
)
from stacking_jax.growth.operators.chosen import custom, drop_last, every_nth, inherit_first
from stacking_jax.growth.operators.whole_stack import (
    g_stack,
    interleave,
    loop,
    progressive,
    single_layer,
    solar,
)

OPERATORS: dict[str, Callable[..., DepthMap]] = {
    function.__name__: function
    for function in (
        midas, gradstack, lidas, repeat_block, first_block, random_block,
        g_stack, progressive, interleave, solar, single_layer, loop,
        inherit_first, custom, every_nth, drop_last,
    )
}


def operator(name: str) -> Callable[..., DepthMap]:
    """The operator of that name: one growth, by its own arguments.

    `growth_map` is the way to ask any of them for a depth.

    Raises:
      UserError: if there is none; the message shows the nearest names.
    """
    if not isinstance(name, str) or name not in OPERATORS:
        near = difflib.get_close_matches(str(name), OPERATORS, n=3) or sorted(OPERATORS)
        raise UserError(f"there is no growth operator {name!r}; did you mean {', '.join(near)}?")
    return OPERATORS[name]
