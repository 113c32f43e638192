"""What gin can bind: the dataclasses that define a run, under their own names.

The classes themselves know nothing of gin.
"""

from __future__ import annotations

import re
from typing import Any

from stacking_jax.data import DataConfig, UL2Config
from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.finetune_config import FinetuneConfig
from stacking_jax.gin_config import one_line_errors, require_gin
from stacking_jax.models import DecoderConfig
from stacking_jax.planning import PlanConfig
from stacking_jax.study.config import StudyConfig
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.config import GrowthConfig, MeshConfig, OptimizerConfig, TrainConfig
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.path_config import PathConfig
from stacking_jax.training.similarity_config import SimilarityConfig
from stacking_jax.training.spike_config import SpikeConfig

CONFIGURABLES = (
    DecoderConfig, DataConfig, UL2Config, GrowthConfig, OptimizerConfig, MeshConfig, TrainConfig,
    EvaluationConfig, FinetuneConfig, SpikeConfig, PlanConfig, LoopConfig, SimilarityConfig,
    PathConfig, DistillConfig, ChoiceConfig, StudyConfig,
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


def configured(kind: type = TrainConfig) -> Any:
    """What the loaded gin configuration describes: the run, or another of the classes here.

    Raises:
      UserError: if something is not set, or set to a value of the wrong kind.
    """
    try:
        with one_line_errors():
            return _registered[kind]()
    except TypeError as error:
        # gin explains what is missing on lines of its own below Python's message.
        message = str(error)
        called = re.findall(r"In call to configurable '(\w+)'", message)[0]
        unset = re.search(r"No values supplied by Gin or caller for arguments: \[(.*)\]", message)
        if unset is None:
            raise UserError(
                f"a value of {called} is of the wrong kind: {message.splitlines()[0]}"
            ) from error
        names = ", ".join(f"{called}.{name}" for name in re.findall(r"'(\w+)'", unset[1]))
        raise UserError(
            f"nothing sets {names}; begin with a file of gin/experiments, or include "
            "gin/train.gin and a file of gin/models"
        ) from error
