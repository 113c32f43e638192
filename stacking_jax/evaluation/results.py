"""What an evaluation leaves on disk: a JSONL file per task, and one JSON of all values.

    RUN/evaluations/step-1000/results.json
    RUN/evaluations/step-1000/variable_assignment/code/depth_0/0_shot.jsonl

Files appear whole or not at all, and the same evaluation writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.evaluate import TaskResult
from stacking_jax.paths import is_remote, make_folder, open_path
from stacking_jax.training.telemetry import one_line_disk_errors

FOLDER = "evaluations"
RESULTS = "results.json"
_OPERATIONAL = ("data_dir", "tokens_per_batch", "shots")


def step_folder(root: str | Path, step: int) -> Path:
    """The folder of one checkpoint's evaluations."""
    return open_path(root) / f"step-{step}"


def rows_path(folder: Path, task: str) -> Path:
    """The JSONL file of a task; slashes of its name become folders."""
    # No part may name the folder itself or the one above, whatever a task is called.
    parts = [re.sub(r"[^A-Za-z0-9._=+-]", "_", part).lstrip(".") or "_" for part in task.split("/")]
    return folder.joinpath(*parts[:-1], parts[-1] + ".jsonl")


def write_results(
    folder: Path, results: Iterable[TaskResult], settings: EvaluationConfig
) -> None:
    """Writes every row and every value; values of other tasks that are there are kept.

    Raises:
      UserError: if something cannot be written.
    """
    values = read_results(folder)
    for result in results:
        path = rows_path(folder, result.task)
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in result.rows]
        _write(path, "".join(line + "\n" for line in lines))
        values[result.task] = result.to_dict() | {"settings": describe_settings(settings)}
    text = json.dumps(dict(sorted(values.items())), indent=1, allow_nan=False)
    _write(folder / RESULTS, text + "\n")


def describe_settings(settings: EvaluationConfig) -> dict[str, Any]:
    """The settings that decide a value, as plain data."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if name not in _OPERATIONAL}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> what was written of it; {} where nothing was.

    Raises:
      UserError: if the file is there and cannot be read.
    """
    path = folder / RESULTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and evaluate again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no object of tasks; remove it and evaluate again")
    return values


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with one_line_disk_errors(path):
        make_folder(path.parent)
        # Bytes, so that a text's own line ends stay what they are.
        data = text.encode("utf-8", errors="replace")
        if is_remote(path):
            path.write_bytes(data)
            return
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
