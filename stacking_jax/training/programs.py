"""What a stage runs, traced for a mesh and compiled: its growth, train and evaluation steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.data.records import BATCH_KEYS
from stacking_jax.growth import Plan, Stage
from stacking_jax.training import sharding
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import GrowthProgram, growth_program
from stacking_jax.training.schedules import learning_rate
from stacking_jax.training.similarity import similarity_term
from stacking_jax.training.stack_runs import inference_stack, training_stack
from stacking_jax.training.state import TrainState, shardings_of
from stacking_jax.training.step import all_finite, make_eval_step, make_train_step
from stacking_jax.training.teaching import teaching_of

_TRIED_BYTES = 2**30
_A_STEP = jax.ShapeDtypeStruct((), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a stage runs, compiled.

    Attributes:
      train_step: as `make_train_step` says; the state is given away, a teacher's parameters
        are not.
      eval_step: as `make_eval_step` says.
      finite: whether a state may be saved.
      grow: from the state of the stage before, given away, to that of this one; None where
        nothing grows.
    """

    train_step: Callable[..., tuple[TrainState, dict]]
    eval_step: Callable[[Any, dict, Any], tuple[Any, Any]]
    finite: Callable[[TrainState], jax.Array]
    grow: GrowthProgram | None = None


def compile_stage(
    config: TrainConfig, plan: Plan, stage: Stage, graph: Any, optimizer: Any,
    mesh: sharding.LogicalMesh, abstract: TrainState, keys: Sequence[str] = BATCH_KEYS,
    before: TrainState | None = None,
) -> Programs:
    """Compiles what a stage runs.

    Args:
      config: of the run.
      plan, stage: its stages, and the one of them.
      graph: the model without its parameters.
      optimizer: of the state.
      mesh: the devices.
      abstract: the state of the stage.
      keys: the arrays of a batch, `PackedBatches.keys`.
      before: the abstract state of the stage before, where the stage begins by growing it.
    """
    *_, programs = compile_in_turn(
        config, plan, stage, graph, optimizer, mesh, abstract, keys, before
    )
    return programs


def compile_in_turn(
    config: TrainConfig, plan: Plan, stage: Stage, graph: Any, optimizer: Any,
    mesh: sharding.LogicalMesh, abstract: TrainState, keys: Sequence[str] = BATCH_KEYS,
    before: TrainState | None = None, try_out: bool = False,
) -> Iterator[Programs | None]:
    """`compile_stage`, with a pause (None) after each program; those needed first come first.

    With `try_out` the step is run once on zeros where that pays, see `_pays_to_try`.
    """
    grow = None
    if before is not None:
        grow = compile_growth(config, plan, stage, graph, optimizer, mesh, abstract, keys, before)
        yield None
    step = lower_train_step(
        config, plan, stage, graph, optimizer, mesh, abstract, keys
    ).compile()
    yield None
    if try_out and _pays_to_try(mesh, abstract):
        jax.block_until_ready(step(*_zeros((abstract, *step_arguments(config, stage, mesh, keys)))))
        yield None
    finite = all_finite.lower(abstract).compile()
    yield None
    stack = inference_stack(config, stage)
    evaluate = (
        jax.jit(make_eval_step(graph, stack, sharding.constrainer(mesh)))
        .lower(abstract.params, abstract_batch(config, mesh, keys), _A_STEP)
        .compile()
    )
    yield Programs(step, evaluate, finite, grow)


def _pays_to_try(mesh: sharding.LogicalMesh, abstract: TrainState) -> bool:
    """Whether a step is to be run once, on zeros, before it is needed.

    XLA's CPU backend prepares a program's products when they run for the first time, which made
    the first step of a stage take two or three times as long as the next. It needs room for a
    second state meanwhile, so a large one is not worth it. With several devices the order in
    which two programs reach them must not differ, which only the steps themselves see to.
    """
    one_cpu = mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    return one_cpu and jax.process_count() == 1 and size <= _TRIED_BYTES


def _zeros(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), tree
    )


def compile_growth(
    config: TrainConfig, plan: Plan, stage: Stage, graph: Any, optimizer: Any,
    mesh: sharding.LogicalMesh, abstract: TrainState, keys: Sequence[str],
    before: TrainState,
) -> GrowthProgram:
    """Compiles the growth into a stage alone; takes what `compile_stage` does."""
    del plan, graph, mesh, keys
    return growth_program(
        config.model, config.growth, optimizer, stage, abstract, seed=config.seed
    ).compile(before)


def lower_train_step(
    config: TrainConfig, plan: Plan, stage: Stage, graph: Any, optimizer: Any,
    mesh: sharding.LogicalMesh, abstract: TrainState, keys: Sequence[str] = BATCH_KEYS,
) -> jax.stages.Lowered:
    """The train step of a stage, traced for `mesh` and not compiled; see `compile_stage`.

    The mesh may be one of devices that are described only, as `planning` has them.
    """
    train_step = make_train_step(
        graph,
        optimizer,
        learning_rate(config.optimizer, plan.total_steps, config.growth, plan.growth_steps),
        clip_norm=config.optimizer.clip_norm,
        z_loss=config.z_loss,
        microbatches=config.microbatches,
        skip_nonfinite=config.on_nan == "skip",
        spikes=config.spikes,
        stack=training_stack(config, stage),
        similarity=similarity_term(config, stage),
        skip_undrawn=stage.path is not None and config.paths.undrawn == "skip",
        teaching=teaching_of(config, stage),
        constrain=sharding.constrainer(mesh),
    )
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(shardings_of(abstract), None)
    ).lower(abstract, *step_arguments(config, stage, mesh, keys))


def step_arguments(
    config: TrainConfig, stage: Stage, mesh: sharding.LogicalMesh,
    keys: Sequence[str] = BATCH_KEYS,
) -> tuple[Any, ...]:
    """What the train step of a stage takes behind the state, abstract.

    The batch, with a cache's labels where they are learnt from; and the parameters of a teacher
    where one runs.
    """
    batch, teaching = abstract_batch(config, mesh, keys), teaching_of(config, stage)
    if teaching is None:
        return (batch,)
    return (batch | teaching.labels(mesh), *teaching.arguments(mesh))


def abstract_batch(
    config: TrainConfig, mesh: sharding.LogicalMesh, keys: Sequence[str] = BATCH_KEYS
) -> dict:
    """Shapes, dtypes and shardings of a batch: int32 `[B, L]` for each of `keys`."""
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, config.data.sequence_length), jnp.int32,
        sharding=mesh.sharding(sharding.BATCH),
    )
    return dict.fromkeys(keys, rows)
