"""The growth library: depth maps, operators, layouts, plans.

Imports jax and numpy only, so that any codebase can adopt it.
"""

from stacking_jax.growth.convert import to_scanned, to_unrolled
from stacking_jax.growth.costs import ModelCosts
from stacking_jax.growth.depth_map import NEW, DepthMap, Segment, as_depth_map
from stacking_jax.growth.detect import Detected, detect_layout
from stacking_jax.growth.grow import grow
from stacking_jax.growth.layerwise import LayerwiseState, layerwise, to_layerwise
from stacking_jax.growth.layouts import Layout, Scanned, Unrolled
from stacking_jax.growth.loops import Loop
from stacking_jax.growth.modules import grow_module
from stacking_jax.growth.moments import grow_opt_state
from stacking_jax.growth.operators import (
    OPERATORS,
    custom,
    drop_last,
    every_nth,
    first_block,
    g_stack,
    gradstack,
    growth_map,
    inherit_first,
    interleave,
    lidas,
    loop,
    midas,
    operator,
    progressive,
    random_block,
    repeat_block,
    single_layer,
    solar,
    stage_depths,
)
from stacking_jax.growth.outputs import PRESETS, Part, Tensors
from stacking_jax.growth.plan import Plan, Stage
from stacking_jax.growth.restart import POLICIES
from stacking_jax.growth.rewarm import rewarm
from stacking_jax.growth.run_stack import run_stack
from stacking_jax.growth.starts import (
    STARTS,
    Average,
    Copy,
    Identity,
    Interpolate,
    Noise,
    Random,
    Scale,
    gates_ramp,
    start_copies,
)
from stacking_jax.growth.state import grow_state
from stacking_jax.growth.timing import g_stack_tokens

__all__ = [
    "NEW", "OPERATORS", "POLICIES", "PRESETS", "STARTS", "Average", "Copy", "DepthMap",
    "Detected", "Identity", "Interpolate", "LayerwiseState", "Layout", "Loop", "ModelCosts",
    "Noise", "Part", "Plan", "Random", "Scale", "Scanned", "Segment", "Stage", "Tensors",
    "Unrolled", "as_depth_map", "custom", "detect_layout", "drop_last", "every_nth", "first_block",
    "g_stack", "g_stack_tokens", "gates_ramp", "gradstack", "grow", "grow_module",
    "grow_opt_state", "grow_state", "growth_map", "inherit_first", "interleave", "layerwise",
    "lidas", "loop", "midas", "operator", "progressive", "random_block", "repeat_block", "rewarm",
    "run_stack",
    "single_layer", "solar", "stage_depths", "start_copies", "to_layerwise", "to_scanned",
    "to_unrolled",
]
