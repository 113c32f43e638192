"""What a run needs of a machine that is not here: memory, time and money before it starts."""

from stacking_jax.planning.config import PlanConfig

__all__ = ["PlanConfig"]
