"""What gin can bind: the dataclasses that define a run, under their own names.

The classes themselves know nothing of gin.
"""

from __future__ import annotations

from stacking_jax.data import DataConfig
from stacking_jax.gin_config import require_gin
from stacking_jax.models import DecoderConfig
from stacking_jax.training.config import GrowthConfig, MeshConfig, OptimizerConfig, TrainConfig

CONFIGURABLES = (
    DecoderConfig, DataConfig, GrowthConfig, OptimizerConfig, MeshConfig, TrainConfig,
)

_registered: dict[type, type] = {}


def register() -> dict[type, type]:
    """Registers everything once; returns class -> its configurable version."""
    gin = require_gin()
    for kind in CONFIGURABLES:
        if kind not in _registered:
            _registered[kind] = gin.external_configurable(kind)
    return _registered


register()


def configured() -> TrainConfig:
    """The run that the loaded gin configuration describes."""
    return _registered[TrainConfig]()
