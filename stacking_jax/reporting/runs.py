"""Reads a run directory: what a run is, how far it came, what it measured.

A run directory holds `summary.json` (written when the run ends),
`metrics.jsonl` (one object per line, growing while it runs), `plan.json`, `config.json`,
`goodput.json` and `decisions.jsonl`. All six are read here and nowhere else in this package. A run
that is still going on has no summary; it is read from its last metrics and
says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.paths import identity, is_remote, open_path
from stacking_jax.reporting.evaluations import read_evaluations

_CUMULATIVE = ("tokens", "model_flops", "wall_seconds", "train_seconds")
# What a row of each kind must hold to be of use. Kinds that are not listed are left alone, so
# that a later version may write more.
_REQUIRED = {
    "train": ("step", "loss", *_CUMULATIVE),
    "eval": ("step", "eval_loss", *_CUMULATIVE),
    "grow": ("step", "from_depth", "to_depth", *_CUMULATIVE),
    "boundary": ("step", "start", "depth", "stall_seconds", "stall_steps", "step_seconds"),
    "resume": ("step",),
    "task_eval": ("step",),
}
_SUMMARY_REQUIRED = ("final_step", "eval_loss", *_CUMULATIVE)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, finished or going on.

    Attributes:
      path: the run directory.
      name: from the summary or the configuration, else the directory's name.
      method: "midas", "full depth", ...
      finished: whether `summary.json` is there.
      step: the last step that is recorded.
      total_steps: what the plan asked for; None if nothing says.
      depth: number of layers at the end of the plan.
      first_depth: number of layers of the first stage.
      num_stages: stages of the plan; None if nothing says.
      train, evals, growths: rows of `metrics.jsonl` by kind, in the order of their steps, each
        step once: what a restart did again replaces what it threw away.
      decisions: taken while it ran, see `training.decisions`; oldest first.
      boundaries: rows on what each stage boundary cost, see `training.boundaries`.
      task_evals: scores on tasks, of training and of the `evaluate` command, each task once per
        step, in the order of the steps.
      restarts: the steps from which the run went on after it had stopped.
      goodput: category -> seconds of the time since the run began; {} if no one kept account.
      restart_costs: per restart its `step`, `down_seconds` and `recomputed_seconds`.
      train_loss, eval_loss: nats per token, at the end or in the last row.
      eval_step: the step that `eval_loss` belongs to.
      bits_per_byte: the held-out loss in bits per byte of text.
      tokens, model_flops, wall_seconds, train_seconds, compile_seconds: totals.
      params: parameters at the end.
      stages: per stage what was measured (finished runs), dicts as in the summary.
      comparability: what must agree before two runs may be compared.
      plan, config: `plan.json`, `config.json`, {} where the file is missing.
      versions: of the libraries, where the run recorded them.
      notes: what the reader had to overlook.
    """

    path: Path
    name: str
    method: str
    finished: bool
    step: int
    total_steps: int | None
    depth: int | None
    first_depth: int | None
    num_stages: int | None
    train: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    growths: tuple[dict[str, Any], ...]
    decisions: tuple[dict[str, Any], ...]
    boundaries: tuple[dict[str, Any], ...]
    task_evals: tuple[dict[str, Any], ...]
    restarts: tuple[int, ...]
    goodput: dict[str, float]
    restart_costs: tuple[dict[str, float], ...]
    train_loss: float | None
    eval_loss: float | None
    eval_step: int | None
    bits_per_byte: float | None
    tokens: float | None
    model_flops: float | None
    wall_seconds: float | None
    train_seconds: float | None
    compile_seconds: float | None
    params: float | None
    speedup_blocks: float | None
    speedup_model: float | None
    stages: tuple[dict[str, Any], ...]
    comparability: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]

    @property
    def seed(self) -> Any:
        return self.comparability.get("seed")

    @property
    def status(self) -> str:
        """'finished', 'unfinished at step N' or 'stopped at step N of M'."""
        if not self.finished:
            return f"unfinished at step {self.step}"
        if self.total_steps is not None and self.step < self.total_steps:
            return f"stopped at step {self.step} of {self.total_steps}"
        return "finished"


def read_run(path: str | os.PathLike, evaluations: bool = True) -> Run:
    """Reads one run directory.

    Args:
      path: the folder.
      evaluations: also what `evaluate` has written there since.

    Raises:
      UserError: the directory is no run, a file is broken (with file and line), or a key that a
        comparison needs is missing.
    """
    path = open_path(path) if is_remote(path) else Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}, not a run directory: give the folder that training named --run_dir"
        )
    if not any((path / name).exists() for name in ("summary.json", "metrics.jsonl", "plan.json")):
        raise UserError(
            f"{path} is not a run directory: it holds no summary.json, metrics.jsonl or plan.json;"
            " give the folder that training named --run_dir"
        )
    notes: list[str] = []
    plan = _read_object(path / "plan.json")
    config = _read_object(path / "config.json")
    summary = _read_object(path / "summary.json")
    rows = _read_metrics(path / "metrics.jsonl", notes)
    if (path / "summary.json").exists():
        _require_numbers(summary, _SUMMARY_REQUIRED, str(path / "summary.json"))
        values = _from_summary(summary, rows)
    else:
        values = _from_metrics(rows)

    planned = _dicts(plan.get("stages"), f"{path / 'plan.json'}: stages")
    stages = _dicts(summary.get("stages"), f"{path / 'summary.json'}: stages")
    depths = [s["depth"] for s in (planned or stages) if isinstance(s.get("depth"), int)]
    depth = summary.get("depth", depths[-1] if depths else None)
    num_stages = len(planned or stages) or None

    def described(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """What the run says of itself, wherever it says it."""
        for source in (summary, config, plan):
            if isinstance(source.get(key), kind) and not isinstance(source[key], bool):
                return source[key]
        return default

    return Run(
        path=path,
        name=described("name", str) or identity(path).name,
        method=described("method", str) or _method(planned, num_stages),
        finished=bool(summary),
        total_steps=_whole(described("total_steps", (int, float))),
        depth=_whole(depth),
        first_depth=depths[0] if depths else _whole(depth),
        num_stages=num_stages,
        train=tuple(r for r in rows if r["kind"] == "train"),
        evals=tuple(r for r in rows if r["kind"] == "eval"),
        growths=tuple(r for r in rows if r["kind"] == "grow"),
        decisions=_decisions(path / "decisions.jsonl"),
        boundaries=tuple(_boundary(r, path) for r in rows if r["kind"] == "boundary"),
        task_evals=_task_evals(path if evaluations else None, rows),
        restarts=tuple(int(r["step"]) for r in rows if r["kind"] == "resume"),
        **_goodput(path / "goodput.json"),
        params=_number(summary.get("params", planned[-1].get("params") if planned else None)),
        speedup_blocks=described("speedup_blocks", (int, float)),
        speedup_model=described("speedup_model", (int, float)),
        stages=stages,
        comparability=described("comparability", dict, {}),
        plan=plan,
        config=config,
        versions={str(k): str(v) for k, v in described("versions", dict, {}).items()},
        notes=tuple(notes),
        **values,
    )


def _decisions(path: Path) -> tuple[dict[str, Any], ...]:
    """What the run has decided; what cannot be read is named."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = _dicts([json.loads(line) for line in lines], str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for decision in found:
        _require_numbers(decision, ("stage", "step"), str(path))
        if decision.get("kind") not in ("boundary", "choice"):
            raise UserError(f"{path}: a decision is of the unknown kind {decision.get('kind')!r}")
    return found


def _task_evals(path: Path | None, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Scores on tasks; what the command wrote stands for what training wrote at that step."""
    found = {(r["step"], r["task"]): r for r in rows if r["kind"] == "task_eval" and "task" in r}
    if path is not None:
        found |= {(r["step"], r["task"]): r for r in read_evaluations(path)}
    return tuple(sorted(found.values(), key=lambda row: row["step"]))


def _boundary(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """A row on a boundary, once its parts are found to be what can be drawn."""
    where = f"{path / 'metrics.jsonl'}: the boundary at step {row['start']}"
    seconds, spans, steps = (row.get(name) for name in ("seconds", "spans", "steps"))
    if not (
        isinstance(seconds, dict) and isinstance(spans, list) and isinstance(steps, list)
        and all(isinstance(span, list) and len(span) == 3 for span in spans)
        and all(isinstance(step, list) and len(step) == 2 for step in steps)
    ):
        raise UserError(
            f"{where} lacks 'seconds', 'spans' or 'steps'; was it written by another version of "
            "stacking_jax?"
        )
    _require_numbers(seconds, tuple(seconds), where)
    for numbers in (*(span[1:] for span in spans), *steps):
        _require_numbers(dict(enumerate(numbers)), tuple(range(2)), where)
    return row


def _goodput(path: Path) -> dict[str, Any]:
    """The account of the wall time; a broken number in it is named."""
    account = _read_object(path)
    seconds = account.get("seconds", {})
    restarts = _dicts(account.get("restarts"), f"{path}: restarts")
    if not isinstance(seconds, dict):
        raise UserError(f"{path}: seconds must be an object")
    costs = ("step", "down_seconds", "recomputed_seconds")
    _require_numbers(seconds, tuple(seconds), f"{path}: seconds")
    for restart in restarts:
        _require_numbers(restart, costs, f"{path}: restarts")
    return {"goodput": seconds, "restart_costs": restarts}


def _from_summary(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = {
        key: _number(summary.get(key))
        for key in ("train_loss", "eval_loss", "bits_per_byte", "compile_seconds", *_CUMULATIVE)
    }
    step = int(summary["final_step"])
    return {**values, "step": step, "eval_step": step}


def _from_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The totals of a run that still goes on: the last rows that say something."""
    train = [r for r in rows if r["kind"] == "train"]
    evals = [r for r in rows if r["kind"] == "eval"]
    counted = [r for r in rows if r["kind"] in ("train", "eval", "grow")]
    last = max(counted, key=lambda r: (r["step"], r["wall_seconds"]), default={})
    return {
        "step": int(last.get("step", 0)),
        "train_loss": train[-1]["loss"] if train else None,
        "eval_loss": evals[-1]["eval_loss"] if evals else None,
        "eval_step": int(evals[-1]["step"]) if evals else None,
        "bits_per_byte": _number(evals[-1].get("bits_per_byte")) if evals else None,
        "compile_seconds": None,
        **{key: last.get(key) for key in _CUMULATIVE},
    }


def _method(planned: tuple[dict[str, Any], ...], num_stages: int | None) -> str:
    """A name for how the run grew, where the run gives none."""
    if num_stages == 1:
        return "full depth"
    operators = {str(s["operator"]) for s in planned if s.get("operator")}
    return " + ".join(sorted(operators)) or ("grown" if num_stages else "unknown")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; {} if there is no such file."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{path}{line} is not valid JSON ({_why(error)}); if the run is still writing it, try"
            " again, otherwise restore the file"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _read_text(path: Path) -> str | None:
    try:
        # A live file may end in the middle of a character: that is the last line's matter.
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    text = _read_text(path)
    if text is None:
        notes.append("metrics.jsonl is missing: there are no curves of this run")
        return []
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for place, (number, line) in enumerate(lines):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if place == len(lines) - 1:
                notes.append(
                    f"line {number} of metrics.jsonl is incomplete and was left out"
                    " (a run that is being written, or was stopped while writing)"
                )
                break
            if _is_resume(lines[place + 1][1]):
                notes.append(f"line {number} of metrics.jsonl was cut off by a stop of the run")
                continue
            raise UserError(
                f"{where} is not valid JSON ({_why(error)}); repair or remove the line"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise UserError(f"{where} is not a metrics row: it must be an object with a 'kind'")
        _require_numbers(row, _REQUIRED.get(row["kind"], ()), where)
        if row["kind"] in _REQUIRED:
            rows.append(row)
    return _without_repeats(rows)


def _is_resume(line: str) -> bool:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(row, dict) and row.get("kind") == "resume"


def _without_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step of each kind once.

    A run that was stopped goes on from its last checkpoint, so that steps after it are written
    twice. The later rows belong to the parameters that the run ends with.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        if row["kind"] == "resume":
            kept = [r for r in kept if r["kind"] == "resume" or r["step"] <= row["step"]]
        kept.append(row)
    last = {}
    for row in kept:
        # Several restarts from one step are several events.
        which = len(last) if row["kind"] == "resume" else str(row.get("task", ""))
        last[(row["kind"], row["step"], which)] = row
    return sorted(last.values(), key=lambda r: r["step"])


def _require_numbers(row: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Checks the keys, and turns null (how JSON may write a NaN) into NaN in losses."""
    missing = [key for key in keys if key not in row]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(repr(key) for key in missing)}; was it written by another"
            " version of stacking_jax?"
        )
    for key in keys:
        if row[key] is None and str(key).endswith("loss"):
            row[key] = math.nan
        value = row[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {key!r} is {value!r}, not a number")
        if not str(key).endswith("loss") and not math.isfinite(value):
            raise UserError(f"{where}: {key!r} is {value!r}, not a finite number")


def _dicts(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where} must be a list of objects")
    return tuple(value)


def _number(value: Any) -> float | None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    return value if ok else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or not math.isfinite(number) else int(number)


def _why(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
