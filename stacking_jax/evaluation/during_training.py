"""Evaluation on tasks while a run trains: the code and the numbers of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stacking_jax.data import tokenizer as open_tokenizer
from stacking_jax.evaluation.evaluator import Evaluator
from stacking_jax.evaluation.model import language_model
from stacking_jax.evaluation.results import FOLDER
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.mesh import LogicalMesh


class TaskEvaluation:
    """The tasks of a run; their examples are read once, before it begins."""

    def __init__(self, config: TrainConfig, run_dir: Path, mesh: LogicalMesh):
        """Reads the examples.

        Raises:
          UserError: for a task that does not exist or has no example.
        """
        self._config, self._mesh = config, mesh.for_decoding()
        self._tokenizer = open_tokenizer(config.data)
        self._evaluator = Evaluator.open(
            config.evaluate_tasks, config.evaluation, run_dir / FOLDER, self._tokenizer
        )

    def due(self, step: int, stage_end: int) -> bool:
        """Whether the tasks run after this step: every so many, and at a stage's end."""
        every = self._config.evaluate_every
        return step == stage_end or (every > 0 and step % every == 0)

    def evaluate(self, params: Any, step: int) -> Iterator[dict[str, Any]]:
        """Evaluates the parameters as they are after `step` updates.

        Yields:
          Per task a row for metrics.jsonl: task, group, metric, value, interval, n, chance.
        """
        model = language_model(
            self._config, params, self._tokenizer, self._mesh, self._config.evaluation
        )
        for result in self._evaluator.evaluate(model, step):
            yield {"task": result.task, **result.to_dict()}
