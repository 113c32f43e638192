"""What happens at a stage boundary: the whole state grows, on the devices."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan, Random, Stage, gates_ramp, grow, grow_state
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import spikes
from stacking_jax.training.config import GrowthConfig, TrainConfig
from stacking_jax.training.state import TrainState, initial_state, shardings_of


def growth_program(
    model: DecoderConfig, growth: GrowthConfig, optimizer: optax.GradientTransformation,
    stage: Stage, after: TrainState, *, seed: int = 0, donate: bool = True,
) -> GrowthProgram:
    """The jitted growth into a stage: parameters and moments together, in their shards.

    The old state is donated. Leaves of the stack change their shape, so theirs is the one
    memory that cannot be used again: at most old and new state lie there together. A window
    of gradient norms begins anew, for the reason that `spikes.empty_window` gives.

    Args:
      model: the decoder's shape, for layers that are drawn anew.
      growth: how copies start, and what becomes of their moments.
      optimizer: of the state.
      stage: the stage that begins, with its map.
      after: the abstract grown state; keys, shapes, dtypes and shardings are kept to.
      seed: of the run.
      donate: give the old state away; False keeps it, for another growth from it.

    Raises:
      UserError: when traced, for a start or policy that this optimiser or model cannot have.
    """
    starts = growth.starts()
    draws = any(stage.grow_map.fresh) or any(isinstance(start, Random) for start in starts)
    # Values that are drawn at this growth: no other growth and no first layer has them.
    key = jax.random.fold_in(jax.random.key(seed), stage.start)

    def run(state: TrainState, key: jax.Array) -> TrainState:
        # Of all that is drawn, only what is used is computed.
        fresh = initial_state(model, optimizer, stage.depth, key).params if draws else None
        grown = grow_state(
            spikes.without_window(state), stage.grow_map, LAYOUT, start=starts,
            moments=growth.moments, optimizer=optimizer, fresh=fresh,
            key=jax.random.fold_in(key, 1), target=spikes.without_window(after),
        )
        if stage.mix is not None:
            grown = dataclasses.replace(grown, params=grow(state.params, stage.mix, LAYOUT))
        return dataclasses.replace(grown, spikes=spikes.zeros_of_window(after.spikes))

    program = jax.jit(
        run, donate_argnums=0 if donate else (), out_shardings=shardings_of(after)
    )
    return GrowthProgram(program, key)


class GrowthProgram:
    """The jitted growth with its random key, silent about the memory that it cannot use again."""

    def __init__(self, program: Any, key: jax.Array):
        self._program, self._key = program, key
        self._compiled: Any = None

    def __call__(self, state: TrainState) -> TrainState:
        with warnings.catch_warnings():
            _expect_the_warnings()
            return (self._compiled or self._program)(state, self._key)

    def compile(self, state: TrainState) -> GrowthProgram:
        """Compiles it for states like this one, concrete or abstract, and for no others."""
        self._compiled = self.lower(state).compile()
        return self

    def lower(self, state: TrainState) -> Any:
        """The lowered program, for a concrete or abstract state."""
        with warnings.catch_warnings():
            _expect_the_warnings()
            return self._program.lower(state, self._key)

    def check(self, state: TrainState) -> None:
        """Traces it, so that what is wrong shows before a run begins."""
        with warnings.catch_warnings():
            _expect_the_warnings()
            jax.eval_shape(self._program, state, self._key)


def _expect_the_warnings() -> None:
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    # Said once, before the run begins.
    warnings.filterwarnings("ignore", message="copy_first")


def check_growths(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    plan: Plan,
    shapes: Callable[[int], TrainState],
) -> None:
    """Traces every growth of a plan.

    Raises:
      UserError: for the first one that could not be carried out.
    """
    for before, stage in zip(plan.stages, plan.stages[1:]):
        if not stage.grows:
            continue
        program = growth_program(
            config.model, config.growth, optimizer, stage, shapes(stage.depth)
        )
        program.check(shapes(before.depth))


def ramp_of(config: TrainConfig, stage: Stage) -> Callable[[jax.Array], jax.Array] | None:
    """The gates of a stage by the number of updates done, or None if its copies have none."""
    if not stage.grows or not config.growth.ramp_steps:
        return None
    return lambda step: gates_ramp(
        step, stage.grow_map, config.growth.ramp_steps, begin=stage.start
    )


def refuse_open_ramp(config: TrainConfig, step: int, what: str) -> None:
    """Raises UserError if copies are only partly let in at a checkpoint.

    Its parameters alone are then not the network that was trained.

    Args:
      config: of the run.
      step: of the checkpoint.
      what: what was to be done with it, for the message.
    """
    ramp = config.growth.ramp_steps
    for stage in config.plan().stages if ramp else ():
        if stage.grows and stage.start < step < stage.start + ramp:
            raise UserError(
                f"cannot {what} checkpoint {step}: the copies of the growth at step {stage.start} "
                f"are let in by gates until step {stage.start + ramp}; choose a checkpoint from "
                f"there on, or of step {stage.start} at the latest"
            )
