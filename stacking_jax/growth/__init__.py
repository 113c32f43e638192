"""The growth library: depth maps, operators, layouts, plans.

Imports jax and numpy only, so that any codebase can adopt it.
"""

from stacking_jax.growth.costs import ModelCosts
from stacking_jax.growth.depth_map import DepthMap, Segment, as_depth_map
from stacking_jax.growth.grow import grow
from stacking_jax.growth.layouts import Layout, Scanned, Unrolled
from stacking_jax.growth.operators import OPERATORS, gradstack, midas, operator
from stacking_jax.growth.plan import Plan, Stage
from stacking_jax.growth.run_stack import run_stack

__all__ = [
    "OPERATORS", "DepthMap", "Layout", "ModelCosts", "Plan", "Scanned", "Segment", "Stage",
    "Unrolled", "as_depth_map", "gradstack", "grow", "midas", "operator", "run_stack",
]
