"""What `stacking-jax evaluate` does: find tasks, load checkpoints, score, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_jax.console import say, warn
from stacking_jax.errors import UserError
from stacking_jax.evaluation import model, results
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.evaluate import TaskResult
from stacking_jax.evaluation.evaluator import Evaluator
from stacking_jax.paths import open_path


def evaluate_run(
    run_dir: str | Path,
    tasks: str | Sequence[str],
    settings: EvaluationConfig = EvaluationConfig(),
    *,
    step: int | None = None,
    all_steps: bool = False,
    out: str | Path | None = None,
) -> dict[int, list[TaskResult]]:
    """Evaluates checkpoints of a run on tasks.

    Args:
      run_dir: of the run.
      tasks: names; see `registry.find`.
      settings: of the evaluation.
      step: of the checkpoint; None for the newest.
      all_steps: every checkpoint that is there.
      out: where results are written; None for `default_out`.

    Returns:
      Step -> results in the order of the tasks.

    Raises:
      UserError: for what the user can put right.
    """
    run = model.RunModels(run_dir, settings)
    steps = run.steps if all_steps else [run.choose(step)]
    out = default_out(run_dir, settings) if out is None else open_path(out)
    evaluator = Evaluator.open(tasks, settings, out, run.tokenizer)
    found = {}
    for chosen in steps:
        try:
            loaded = run.load(chosen)
        except UserError as error:
            if len(steps) == 1:
                raise
            warn(f"step {chosen} is left out: {error}")
            continue
        found[chosen] = evaluator.evaluate(loaded, chosen)
    if not found:
        raise UserError(f"no checkpoint of {run_dir} can be evaluated")
    return found


def default_out(run_dir: str | Path, settings: EvaluationConfig) -> Path:
    """RUN/evaluations; with other loops than in training a folder of their own below it."""
    out = open_path(run_dir) / results.FOLDER
    return out if settings.loops is None else out / f"loops-{settings.loops}"


def show(found: dict[int, list[TaskResult]], out: str | Path, as_json: bool) -> None:
    """Prints results to standard output, and to standard error where their rows lie."""
    if as_json:
        by_step = {
            str(step): {result.task: result.to_dict() for result in of_step}
            for step, of_step in found.items()
        }
        # One checkpoint needs no level of its own.
        value: Any = next(iter(by_step.values())) if len(by_step) == 1 else by_step
        print(json.dumps(value, allow_nan=False))
    else:
        from stacking_jax.evaluation.table import results_table
        from stacking_jax.reporting.command import terminal

        for step, of_step in found.items():
            print(results_table(step, of_step, **terminal()), end="")
    folders = ", ".join(str(results.step_folder(out, step)) for step in found)
    say(f"every prompt, prediction and score: {folders}")
