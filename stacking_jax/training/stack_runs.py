"""How the stack runs in a stage: which stored layer at each position, and how much of it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop, Stage
from stacking_jax.models import Decoder
from stacking_jax.models.decoder import Constrain
from stacking_jax.models.losses import inputs_from_targets, prompt_inputs
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import ramp_of
from stacking_jax.training.paths import path_stack

StackOf = Callable[[jax.Array], dict[str, Any]]
"""From the number of updates done to arguments of `Decoder.hidden_states`: `depth_map`, `gates`,
`loop`."""


def plain_stack(step: jax.Array) -> dict[str, Any]:
    """Every stored layer once."""
    del step
    return {}


def training_stack(config: TrainConfig, stage: Stage) -> StackOf:
    """How a training step of this stage runs the stack."""
    if stage.loop is not None:
        runs = {"depth_map": stage.run_map, "loop": stage.loop}
        return lambda step: runs
    if stage.path is not None:
        return path_stack(config.paths, config.seed, stage)
    return inference_stack(config, stage)


def inference_stack(config: TrainConfig, stage: Stage) -> StackOf:
    """How the network of this stage is evaluated: whole, with the gates that it is trained with."""
    if stage.loop is not None:
        runs = looped(stage.loop, stage.depth)
        return lambda step: runs
    ramp = ramp_of(config, stage)
    if stage.run_map is None and ramp is None:
        return plain_stack

    def stack(step):
        gates = {} if ramp is None else {"gates": ramp(step)}
        return gates if stage.run_map is None else {"depth_map": stage.run_map, **gates}

    return stack


def looped(loop: Loop, stored: int, loops: int | None = None) -> dict[str, Any]:
    """How a looped network is evaluated: one exit, and `loops` turns where they are given."""
    loop = loop.with_turns(loop.turns if loops is None else loops)
    return {"depth_map": loop.depth_map(stored), "loop": loop}


def stored_runs(meta: Mapping[str, Any], loops: int | None = None) -> dict[str, Any]:
    """How the network of a checkpoint runs its layers, from what stands beside its state.

    Args:
      meta: the metadata of the checkpoint.
      loops: turns of its loop, where they are to be other than in training.

    Returns:
      `depth_map` and `loop`, or {} for every layer once.

    Raises:
      UserError: if turns are asked for and nothing loops.
    """
    plan, depth = meta.get("plan") or [], int(meta["depth"])
    stage = plan[int(meta["stage"])] if plan else {}
    if stage.get("depth") != depth:
        stage = {}  # Grown on disk since: every layer of it runs once.
    return evaluation_runs(
        depth, stage.get("run_map"), Loop.of_dict(stage.get("loop")), loops,
        f"checkpoint {meta['step']}",
    )


def evaluation_runs(
    depth: int, run_map: Any, loop: Loop | None, loops: int | None, what: str
) -> dict[str, Any]:
    """`stored_runs`, of a stage."""
    if loop is not None:
        return looped(loop, depth, loops)
    if loops is not None:
        raise UserError(
            f"{what} has no loop, so it cannot run {loops} of them: leave loops out"
        )
    if run_map is None:
        return {}
    run_map = run_map if isinstance(run_map, DepthMap) else DepthMap(run_map, stored=depth)
    return {"depth_map": run_map}


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
