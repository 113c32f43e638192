"""Growth operators: short generators of depth maps.

An operator makes one map from its own arguments, most often the present depth and a
block; `growth_map` asks any of them, by name, for the map from one depth to another.
To add one: write the function beside its kin, name it in `registry`, and say in
`reach` how it gets to a depth.
"""

from stacking_jax.growth.operators.blocks import (
    first_block,
    gradstack,
    lidas,
    midas,
    random_block,
    repeat_block,
)
from stacking_jax.growth.operators.chosen import custom, drop_last, every_nth, inherit_first
from stacking_jax.growth.operators.reach import growth_map, stage_depths
from stacking_jax.growth.operators.registry import OPERATORS, operator
from stacking_jax.growth.operators.whole_stack import (
    g_stack,
    interleave,
    loop,
    progressive,
    single_layer,
    solar,
)

__all__ = [
    "OPERATORS", "custom", "drop_last", "every_nth", "first_block", "g_stack", "gradstack",
    "growth_map", "inherit_first", "interleave", "lidas", "loop", "midas", "operator",
    "progressive", "random_block", "repeat_block", "single_layer", "solar", "stage_depths",
]
