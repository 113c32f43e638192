"""The teacher that a run trains for itself: the run, with a smaller model."""

from __future__ import annotations

import dataclasses
import math

from stacking_jax.models import DecoderConfig
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growth_config import GrowthConfig

FOLDER = "teacher"
"""Of the run directory: a run directory of its own."""

_D_FF_MULTIPLE = 8


def config_of_teacher(config: TrainConfig) -> TrainConfig:
    """The configuration of the teacher: the same data in the same order, a part of the steps.

    `DistillConfig.teacher_depth` of the layers and `teacher_width` of the width (whole heads of
    the student's width), plain and at full depth throughout.
    """
    distill = config.distill
    return dataclasses.replace(
        config.without_methods(),
        name=None if config.name is None else f"{config.name}, its teacher",
        model=smaller(config.model, distill.teacher_depth, distill.teacher_width),
        growth=GrowthConfig(),
        total_steps=max(round(distill.teacher_steps * config.total_steps), 1),
        evaluate_tasks=None,
        log_records=False,
    )


def smaller(model: DecoderConfig, depth: float, width: float) -> DecoderConfig:
    """A decoder of a share of the layers and of the width, with heads as wide as before."""
    heads = max(round(width * model.num_heads), 1)
    kv_heads = model.num_kv_heads
    if kv_heads is not None:
        kv_heads = math.gcd(heads, max(round(width * kv_heads), 1))
    # A share of the width that the model's own heads need not divide.
    d_model = model.d_model * heads // model.num_heads
    d_ff = max(round(width * model.d_ff / _D_FF_MULTIPLE), 1) * _D_FF_MULTIPLE
    return dataclasses.replace(
        model,
        num_layers=max(round(depth * model.num_layers), 1),
        d_model=d_model, d_ff=d_ff, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=model.head_width if d_model != heads * model.head_width else model.head_dim,
    )
