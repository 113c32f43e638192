"""A candidate tried out: grown from a state that stays, trained for a while, and scored."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from stacking_jax.models.kernels import check_documents
from stacking_jax.training import distributed, sharding
from stacking_jax.training.growing import growth_program
from stacking_jax.training.paired import BatchLoss
from stacking_jax.training.programs import Programs, compile_stage
from stacking_jax.training.setup import Setup
from stacking_jax.training.state import TrainState


def try_out(
    setup: Setup, number: int, state: TrainState, *, until: int, score_at: Collection[int],
    batches: int | None, skipped_batches: int = 0, programs: Programs | None = None,
    after_step: Callable[[int, dict], None] = lambda step, metrics: None,
) -> dict[int, list[BatchLoss]]:
    """Grows into a stage, trains on, and scores on the way.

    `state` is left as it is. Beside it lies the grown one alone, which is gone afterwards: two
    states in all, where training has one.

    Args:
      setup: of the run, with this candidate as if it had been chosen.
      number: the stage that is grown into, counted from 0.
      state: at the end of the stage before.
      until: the step to train to; later stages are entered as the plan says.
      score_at: the steps (updates done) at which it is scored.
      batches: held-out ones of each source; None for those of an evaluation.
      skipped_batches: left out of the data so far, see `spikes`.
      programs: of the stage, where they are at hand.
      after_step: called with the number of each update and its metrics, on the devices.

    Returns:
      Step -> the held-out losses.
    """
    scores: dict[int, list[BatchLoss]] = {}
    stages = setup.plan.stages
    begin = stages[number].start
    rows = sharding.local_rows(setup.config.batch_size, setup.mesh)
    limit = setup.config.model.max_documents

    def score(step: int) -> None:
        if step in score_at and step not in scores:
            scores[step] = setup.held_out.batch_losses(
                lambda params, batch: programs.eval_step(params, batch, np.int32(step)),
                state.params, setup.mesh, batches,
            )

    read = setup.data.iterate(
        begin + skipped_batches, rows,
        place=functools.partial(sharding.place_batch, mesh=setup.mesh),
        placed=setup.config.device_batches,
    )
    with contextlib.closing(read):
        for at, stage in enumerate(stages[number:], start=number):
            if stage.start >= until and at > number:
                break
            depth = stages[at - 1].depth
            if programs is None:
                programs = compile_stage(
                    *setup.to_compile(at, depth if stage.grows and at > number else None)
                )
            if at == number:
                state = growth_into(setup, number)(state)
                distributed.meet("trial")
            elif stage.grows:
                state = programs.grow(state)
            score(stage.start)
            before: Any = None
            for step in range(stage.start + 1, min(stage.end, until) + 1):
                _, here, batch = next(read)
                check_documents(here["segment_ids"], limit, f"the batch of step {step}")
                state, metrics = programs.train_step(state, batch)
                after_step(step, metrics)
                # One step ahead of the devices, and no more.
                jax.block_until_ready(before)
                before = metrics
                if step < stage.end or step == until:
                    score(step)
            programs = None
    return scores


def growth_into(setup: Setup, number: int) -> Any:
    """The growth into a stage, compiled, which keeps the state that it grows."""
    stage = setup.plan.stages[number]
    program = growth_program(
        setup.config.model, setup.growth_of(number), setup.optimizer, stage,
        setup.shapes(stage.depth), seed=setup.config.seed, donate=False,
    )
    return program.compile(setup.shapes(setup.plan.stages[number - 1].depth))
