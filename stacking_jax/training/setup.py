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
from stacking_jax.training.charges import charged, spent
from stacking_jax.training.config import GrowthConfig, TrainConfig
from stacking_jax.training.decisions import Decision, choice_of, decided_growth, decided_plan
from stacking_jax.training.growing import check_growths, growth_program
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
      plan: its stages, with what has been decided.
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
      decisions: taken so far, see `decisions`.
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
    decisions: tuple[Decision, ...] = ()

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
            data = PackedBatches(
                cache, "train", batch_size=config.batch_size, seed=config.seed,
                total_steps=config.total_steps,
            )
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
        setup.check_candidates()
        if config.growth.moments == "copy_first":
            warn(
                "GrowthConfig.moments = 'copy_first': copies keep their source's first moment and "
                "forget the second; 'copy' or 'reset_copies' is the safer choice"
            )
        return setup

    def check_candidates(self) -> None:
        """Traces every growth that may be chosen.

        Raises:
          UserError: for the first one that could not be carried out.
        """
        for number, stage in enumerate(self.plan.stages):
            for way in self.config.choice.ways if stage.grows else ():
                choice = choice_of(way, self.plan, number, self.config.growth)
                self.decided([choice]).check_growth(number)

    def check_growth(self, number: int) -> None:
        """Traces the growth into a stage; raises as `growing.check_growths`."""
        stage = self.plan.stages[number]
        growth_program(
            self.config.model, self.growth_of(number), self.optimizer, stage,
            self.shapes(stage.depth),
        ).check(self.shapes(self.plan.stages[number - 1].depth))

    def decided(self, taken: Sequence[Decision]) -> Setup:
        """The same run with these decisions, on its configuration's plan, and no others."""
        plan = decided_plan(self.config.plan(), taken)
        setup = dataclasses.replace(self, plan=plan, decisions=tuple(taken))
        setup.__dict__["_shapes"] = self._shapes  # Depths are the same; each is traced once.
        return setup

    def growth_of(self, number: int) -> GrowthConfig:
        """How copies start at the growth into a stage, and what becomes of their moments."""
        return decided_growth(self.config.growth, self.decisions, number)

    def to_compile(self, number: int, before: int | None) -> tuple:
        """The arguments of `programs.compile_stage` for a stage.

        Args:
          number: of the stage.
          before: layers from which it grows; None where it does not.
        """
        stage = self.plan.stages[number]
        config = dataclasses.replace(self.config, growth=self.growth_of(number))
        return (
            config, self.plan, stage, self.graph, self.optimizer, self.mesh,
            self.shapes(stage.depth), self.data.keys,
            None if before is None else self.shapes(before),
        )

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
        """Cumulative model FLOPs after `step` updates, padding and trials included.

        Those that the run has spent on training its own teacher come before the first.
        """
        stages, costs = self.plan.stages, self._costs
        trials = sum(
            steps * stages[number].flops_per_token(costs)
            for number, steps in spent(self.decisions).items() if step > stages[number].start
        )
        tokens = self.config.tokens_per_step
        until = self.plan.flops_until(step, costs, tokens) + tokens * trials
        return self._own_teacher + until

    def described_plan(self) -> dict:
        """`TrainConfig.describe_plan` of what has been decided, and what that cost."""
        tokens = self.config.tokens_per_step
        described = self.config.named(charged(
            self.plan.describe(self._costs, tokens), tokens, spent(self.decisions)
        ))
        return teacher.charged(self.config, described) if self.config.distill.on else described


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
        total_steps=config.total_steps,
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
