"""Evaluation on tasks while a run trains: the code and the numbers of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stacking_jax.data import tokenizer as open_tokenizer
from stacking_jax.evaluation.evaluator import Evaluator
from stacking_jax.evaluation.model import language_model
from stacking_jax.evaluation.results import FOLDER
from stacking_jax.growth import Stage
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.mesh import LogicalMesh
from stacking_jax.training.stack_runs import evaluation_runs


class TaskEvaluation:
    """The tasks of a run; their examples are read once, before it begins."""

    def __init__(self, config: TrainConfig, run_dir: Path, mesh: LogicalMesh):
        """Reads the examples.

        Raises:
          UserError: for a task that does not exist or has no example, or loops that not every
            stage has.
        """
        for number, stage in enumerate(config.plan().stages, start=1):
            _runs(config, stage, f"stage {number}")
        self._config, self._mesh = config, mesh.for_decoding()
        self._tokenizer = open_tokenizer(config.data)
        self._evaluator = Evaluator.open(
            config.evaluate_tasks, config.evaluation, run_dir / FOLDER, self._tokenizer
        )

    def due(self, step: int, stage_end: int) -> bool:
        """Whether the tasks run after this step: every so many, and at a stage's end."""
        every = self._config.evaluate_every
        return step == stage_end or (every > 0 and step % every == 0)

    def evaluate(self, params: Any, step: int, stage: Stage) -> Iterator[dict[str, Any]]:
        """Evaluates the parameters as they are after `step` updates, the last of them in `stage`.

        Yields:
          Per task a row for metrics.jsonl: task, group, metric, value, interval, n, chance.
        """
        model = language_model(
            self._config, params, self._tokenizer, self._mesh, self._config.evaluation,
            _runs(self._config, stage, f"the stage of step {step}"),
        )
        for result in self._evaluator.evaluate(model, step):
            yield {"task": result.task, **result.to_dict()}


def _runs(config: TrainConfig, stage: Stage, what: str) -> dict[str, Any]:
    loops = config.evaluation.loops
    return evaluation_runs(stage.depth, stage.run_map, stage.loop, loops, what)
