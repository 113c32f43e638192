"""Training: one run from its configuration to its summary. Needs no TensorFlow."""

from stacking_jax.training.config import (
    GrowthConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from stacking_jax.training.train import Stopped, train

__all__ = ["GrowthConfig", "MeshConfig", "OptimizerConfig", "Stopped", "TrainConfig", "train"]
