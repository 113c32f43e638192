"""Where the time goes, and what is written while training."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stacking_jax.console import say


class Clock:
    """Wall time by category; sections may nest, and time counts for the innermost.

    Attributes:
      seconds: category -> seconds, over this process and the ones before it.
    """

    CATEGORIES = ("init", "compile", "data", "step", "grow", "evaluate", "checkpoint")

    def __init__(self, before: dict[str, float] | None = None):
        self.seconds = dict.fromkeys(self.CATEGORIES, 0.0) | (before or {})
        self._stack = ["init"]
        self._since = time.monotonic()

    def _settle(self) -> None:
        now = time.monotonic()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def section(self, category: str) -> Iterator[None]:
        self._settle()
        self._stack.append(category)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def go_on_from(self, before: dict[str, float]) -> None:
        """Adds what earlier processes of the same run have spent."""
        for category, seconds in before.items():
            self.seconds[category] = self.seconds.get(category, 0.0) + seconds

    @property
    def wall(self) -> float:
        self._settle()
        return sum(self.seconds.values())

    def read(self) -> dict[str, float]:
        self._settle()
        return dict(self.seconds)


class MetricsLog:
    """metrics.jsonl, and TensorBoard events where a writer is installed.

    A run that goes on from step n drops the lines after step n first, so that no
    step stands twice in the file.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None):
        self._path = run_dir / "metrics.jsonl"
        if resume_step is None:
            resume_step = -1
        _drop_lines_after(self._path, resume_step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._board = _tensorboard(run_dir, purge_step=resume_step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def human(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 1234567 -> '1.23M'."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # The line that was being written when the run was killed.
        if row["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(run_dir: Path, purge_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        say("tensorboardX is not installed: no TensorBoard events, metrics.jsonl has everything")
        return None
    return SummaryWriter(logdir=str(run_dir), purge_step=purge_step or None)
