"""A set of tasks, evaluated on one checkpoint after another: by the command or in training."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

import jax

from stacking_jax.console import progress, say, warn
from stacking_jax.data import Tokenizer
from stacking_jax.data.round_trip import check_round_trip
from stacking_jax.errors import UserError
from stacking_jax.evaluation import registry, results
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.evaluate import (
    PreparedTask,
    TaskResult,
    evaluate_task,
    prepare,
    unread,
)
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.evaluation.task import EvalTask
from stacking_jax.paths import open_path

_LOOKED_AT = 20


class Evaluator:
    """Tasks with their examples, read once.

    Attributes:
      tasks: with their examples.
      unread: of tasks without data, results that say so.
      settings: of the evaluation.
      out: the folder below which results are written, one folder per step.
    """

    def __init__(
        self,
        tasks: Sequence[EvalTask],
        settings: EvaluationConfig,
        out: str | Path,
        tokenizer: Tokenizer,
        required: Collection[str] | None = None,
    ):
        """Reads the examples.

        Args:
          tasks: to evaluate.
          settings: of the evaluation.
          out: the folder below which results are written.
          tokenizer: of the model, to see whether it can hold the texts.
          required: names of tasks that must have data; None for all. Of a group, those
            tasks run whose data are there, and the others say what they miss.

        Raises:
          UserError: if a required task cannot be read, or none at all.
        """
        self.settings = settings
        self.out = open_path(out)
        self.tasks: list[PreparedTask] = []
        self.unread: list[TaskResult] = []
        with progress("reading tasks", len(tasks), "tasks") as advance:
            for task in tasks:
                try:
                    self.tasks.append(prepare(task, settings))
                except UserError as error:
                    if required is None or task.name in required:
                        raise
                    self.unread.append(unread(task, str(error)))
                advance(1, task.name)
        if not self.tasks:
            raise UserError(f"none of the tasks has data; the first: {self.unread[0].reason}")
        for result in self.unread:
            warn(f"{result.task} is not evaluated: {result.reason}")
        _check_text(self.tasks, tokenizer, settings.allow_lossy)

    @classmethod
    def open(
        cls, names: str | Sequence[str], settings: EvaluationConfig, out: str | Path,
        tokenizer: Tokenizer,
    ) -> Evaluator:
        """The tasks of these names; see `registry.find`.

        Raises:
          UserError: for a name that names nothing, or a task without examples that was
            asked for by its own name.
        """
        names = registry.split_names(names)
        tasks = registry.find(
            names, eval_data_dir=settings.data_dir, bad_rows=settings.bad_rows,
            shots=settings.shots,
        )
        return cls(tasks, settings, out, tokenizer, required=names)

    def evaluate(self, model: LanguageModel, step: int) -> list[TaskResult]:
        """Evaluates one checkpoint and writes what came of it, task by task.

        Raises:
          UserError: if something cannot be scored or written.
        """
        found = []
        began = time.monotonic()
        folder = results.step_folder(self.out, step)
        for number, prepared in enumerate(self.tasks, start=1):
            title = f"step {step} · {number}/{len(self.tasks)} {prepared.task.name}"
            with progress(title, len(prepared.examples), "examples") as advance:
                result = evaluate_task(model, prepared, self.settings, advance)
            if jax.process_index() == 0:
                results.write_results(folder, [result], self.settings)
            found.append(result)
        examples = sum(result.n for result in found)
        seconds = time.monotonic() - began
        say(f"step {step}: {len(found)} tasks, {examples:,} examples in {seconds:.0f} s")
        return [*found, *self.unread]


def _check_text(tasks: Sequence[PreparedTask], tokenizer: Tokenizer, allow_lossy: bool) -> None:
    """Says which tasks the vocabulary cannot hold, such as T5's, which deletes newlines.

    Raises:
      UserError: for a reasoning primitive, whose layout is the problem itself.
    """
    lost = []
    for prepared in tasks:
        texts = [example.prompt + example.target for example in prepared.examples[:_LOOKED_AT]]
        if prepared.task.group.startswith("primitives") and not allow_lossy:
            check_round_trip(tokenizer, texts, prepared.task.name)
        elif any(tokenizer.decode(tokenizer.encode(text)) != text for text in texts):
            lost.append(prepared.task.name)
    if lost:
        others = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warn(
            f"the vocabulary {tokenizer.info.name} does not give back the text of "
            f"{', '.join(lost[:3])}{others}: the model reads other text than the JSONL shows"
        )
