"""What a run is made of, before its first step: plan, devices, data, shapes of its states."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optax

from stacking_jax.console import warn
from stacking_jax.data import MixedCache, PackedBatches, PackedCache, open_cache
from stacking_jax.data.records import Batch
from stacking_jax.data.taught_batches import TaughtBatches
from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.models import LAYOUT
from stacking_jax.training import sharding, spikes, teacher
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import check_growths
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.state import TrainState, abstract_state, model_graph
from stacking_jax.training.summary import describe
from stacking_jax.training.telemetry import Clock


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Everything about a run that its steps do not change.

    Attributes:
      config: of the run.
      run_dir: where it is kept.
      plan: its stages.
      mesh: the devices.
      data: training batches by step.
      taught: those of the steps that read a teacher's labels; None where none does.
      data_digest: of the cache that they come from.
      held_out: held-out batches.
      tasks: its evaluation tasks, or None.
      optimizer: over all layers.
      graph: the model without its parameters.
      teacher: that runs beside the student in taught stages; None where none does.
      about: what is known of it before the first step; see `summary.describe`.
    """

    config: TrainConfig
    run_dir: Path
    plan: Plan
    mesh: sharding.LogicalMesh
    data: PackedBatches
    taught: TaughtBatches | None
    data_digest: str
    held_out: HeldOut
    tasks: Any
    optimizer: optax.GradientTransformation
    graph: Any
    teacher: teacher.TeacherModel | None
    about: dict

    @classmethod
    def of(cls, config: TrainConfig, run_dir: Path, clock: Clock) -> Setup:
        """Finds everything that a run needs and holds it against each other; writes nothing.

        Raises:
          UserError: for what does not fit.
        """
        plan = config.plan()
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(
            mesh, config.batch_size, config.microbatches, config.data.sequence_length
        )
        with clock.section("data"):
            cache = open_cache(config.data)
            check_vocabulary(config, cache)
            data = PackedBatches(cache, "train", batch_size=config.batch_size, seed=config.seed)
            sharding.check_attention(
                mesh, config.model, config.batch_size // config.microbatches,
                config.data.sequence_length, "prefix" in data.keys,
            )
            passes = data.passes(config.total_steps)
            taught = _taught(config, cache)
            held_out = HeldOut.open(cache, config)
            tasks = _task_evaluation(config, run_dir, mesh)
        setup = cls(
            config, run_dir, plan, mesh, data, taught, cache.manifest.digest, held_out, tasks,
            make_optimizer(config.optimizer, LAYOUT), model_graph(config.model),
            _teacher(config, run_dir, mesh),
            describe(config, run_dir, cache, held_out, passes),
        )
        setup.shapes(plan.final_depth)
        check_growths(config, setup.optimizer, plan, setup.shapes)
        if config.growth.moments == "copy_first":
            warn(
                "GrowthConfig.moments = 'copy_first': copies keep their source's first moment and "
                "forget the second; 'copy' or 'reset_copies' is the safer choice"
            )
        return setup

    def shapes(self, depth: int) -> TrainState:
        """The abstract state of a depth. Each is asked for several times, and traced once."""
        return self._shapes(depth)

    @functools.cached_property
    def _shapes(self):
        @functools.cache
        def shapes(depth: int) -> TrainState:
            abstract = abstract_state(self.config.model, self.optimizer, depth, self.mesh)
            return spikes.with_window(abstract, self.config.spikes, self.mesh)

        return shapes

    @functools.cached_property
    def _costs(self):
        return self.config.costs()

    @functools.cached_property
    def _own_teacher(self) -> float:
        return teacher.own_flops(self.config)

    def iterate(
        self, first_step: int, skipped: int, rows: Sequence[int], *,
        place: Callable[[Batch], Any], placed: int,
    ) -> Iterator[tuple[int, Batch, Any]]:
        """The batches of the updates after `first_step`, see `PackedBatches.iterate`.

        Args:
          first_step: updates done.
          skipped: batches that were left out so far.
          rows, place, placed: see there.
        """
        until = skipped + self.config.distill.steps(self.config.total_steps)

        def batch_of(number: int, rows: Any) -> Batch:
            source = self.data if self.taught is None or number >= until else self.taught
            return source.batch(number, rows)

        return self.data.iterate(
            first_step + skipped, rows, place=place, placed=placed, batch_of=batch_of
        )

    def flops_at(self, step: int) -> float:
        """Cumulative model FLOPs after `step` updates, padding included.

        Those that the run has spent on training its own teacher come before the first.
        """
        until = self.plan.flops_until(step, self._costs, self.config.tokens_per_step)
        return self._own_teacher + until


def check_vocabulary(config: TrainConfig, cache: PackedCache | MixedCache) -> None:
    """Raises UserError if the data hold ids that the model has no row for."""
    size = cache.manifest.vocab_size
    if size > config.model.vocab_size:
        raise UserError(
            f"the vocabulary {cache.manifest.vocabulary.name} has {size} ids, but the model only "
            f"{config.model.vocab_size}; bind DecoderConfig.vocab_size = {size} or more"
        )


def _taught(config: TrainConfig, cache: PackedCache | MixedCache) -> TaughtBatches | None:
    """Batches with a teacher's labels, all of which are there."""
    if not config.distill.on:
        return None
    teacher.check_vocabulary(config, cache.manifest.vocabulary)
    labels = teacher.labels_of(config)
    if labels is None:
        return None
    taught = TaughtBatches(
        cache, labels, batch_size=config.batch_size, seed=config.seed,
        select=config.distill.select, select_by=config.distill.select_by,
    )
    taught.passes(config.distill.steps(config.total_steps))
    return taught


def _teacher(
    config: TrainConfig, run_dir: Path, mesh: sharding.LogicalMesh
) -> teacher.TeacherModel | None:
    found = teacher.find(config)
    if found is None:
        return None
    try:
        found.abstract(mesh)  # What the mesh cannot divide shows before the run begins.
    except UserError as error:
        raise UserError(f"the teacher does not fit this mesh: {error}") from None
    return teacher.within(found, run_dir)


def _task_evaluation(config: TrainConfig, run_dir: Path, mesh: sharding.LogicalMesh):
    """The evaluation tasks of a run, or None; loaded only where there are some."""
    if not config.evaluate_tasks:
        return None
    from stacking_jax.evaluation.during_training import TaskEvaluation

    return TaskEvaluation(config, run_dir, mesh)
