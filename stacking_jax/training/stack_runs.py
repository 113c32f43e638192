"""How the stack runs in a stage: which stored layer at each position, and how much of it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from stacking_jax.growth import Stage
from stacking_jax.models import Decoder
from stacking_jax.models.decoder import Constrain
from stacking_jax.models.losses import inputs_from_targets, prompt_inputs
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import ramp_of

StackOf = Callable[[jax.Array], dict[str, Any]]
"""From the number of updates done to arguments of `Decoder.hidden_states`: `depth_map`, `gates`."""


def plain_stack(step: jax.Array) -> dict[str, Any]:
    """Every stored layer once."""
    del step
    return {}


def training_stack(config: TrainConfig, stage: Stage) -> StackOf:
    """How a training step of this stage runs the stack."""
    return inference_stack(config, stage)


def inference_stack(config: TrainConfig, stage: Stage) -> StackOf:
    """How the network of this stage is evaluated: whole, with the gates that it is trained with."""
    ramp = ramp_of(config, stage)
    if stage.run_map is None and ramp is None:
        return plain_stack

    def stack(step):
        gates = {} if ramp is None else {"gates": ramp(step)}
        return gates if stage.run_map is None else {"depth_map": stage.run_map, **gates}

    return stack


def hidden_of_batch(
    model: Decoder, batch: dict[str, jax.Array], runs: dict[str, Any], constrain: Constrain
) -> jax.Array:
    """The hidden states `[B, L, D]` of a batch whose tokens are to be predicted.

    Args:
      model: with its parameters.
      batch: as `make_train_step` takes it.
      runs: what a `StackOf` gives.
      constrain: places activations on the mesh.
    """
    segment_ids, bidirectional = batch["segment_ids"], None
    if "prefix" in batch and model.config.bidirectional_prompts:
        bidirectional = prompt_inputs(batch["prefix"], segment_ids)
    return model.hidden_states(
        inputs_from_targets(batch["tokens"], segment_ids),
        segment_ids=segment_ids,
        positions=batch["positions"],
        bidirectional=bidirectional,
        constrain=constrain,
        **runs,
    )
