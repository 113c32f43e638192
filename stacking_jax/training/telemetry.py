"""Where the time goes, and what is written while training."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stacking_jax.console import say, warn
from stacking_jax.errors import UserError
from stacking_jax.paths import is_remote
from stacking_jax.training.spool import Spool


class Clock:
    """Wall time by category; sections may nest, and time counts for the innermost.

    Attributes:
      seconds: category -> seconds, over this process and the ones before it.
      began_unix_time: when this process began to count.
      on_change: told the category that time counts for from now on; see `watchdog`.
      spans: the last pieces of time, oldest first: category, begin and end in seconds by
        `time.monotonic`; see `boundaries`.
    """

    CATEGORIES = (
        "init", "restore", "compile", "data", "step", "grow", "evaluate", "checkpoint"
    )

    def __init__(self, before: dict[str, float] | None = None):
        self.seconds = dict.fromkeys(self.CATEGORIES, 0.0) | (before or {})
        self.on_change: Callable[[str], None] | None = None
        self.spans: collections.deque[tuple[str, float, float]] = collections.deque(maxlen=512)
        self._stack = ["init"]
        self._since = time.monotonic()
        self.began_unix_time = time.time()

    def _settle(self) -> None:
        now = time.monotonic()
        category, began = self._stack[-1], self._since
        self.seconds[category] = self.seconds.get(category, 0.0) + now - began
        if self.spans and self.spans[-1][0] == category:
            began = self.spans.pop()[1]
        self.spans.append((category, began, now))
        self._since = now

    @contextlib.contextmanager
    def section(self, category: str) -> Iterator[None]:
        self._settle()
        self.seconds.setdefault(category, 0.0)
        self._stack.append(category)
        self._changed()
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()
            self._changed()

    def touch(self) -> None:
        """A sign of life within a section: what goes on there still makes progress."""
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self._stack[-1])

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

    A run that goes on from step n drops what it had written after the checkpoint
    of step n first, so that nothing stands twice in the file. For a run directory in an
    object store, both are written on the local disk and copied every half a minute.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None):
        self._spool = Spool(run_dir) if is_remote(run_dir) else None
        if self._spool is not None:
            with one_line_disk_errors(run_dir):
                self._spool.fetch("metrics.jsonl")
            run_dir = self._spool.folder
        self._path = run_dir / "metrics.jsonl"
        with one_line_disk_errors(self._path):
            _drop_lines_after(self._path, -1 if resume_step is None else resume_step)
            self._file = open(self._path, "a", encoding="utf-8")
        self._board = _tensorboard(run_dir, None if resume_step is None else resume_step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a line, and a TensorBoard scalar for every finite number.

        Raises:
          UserError: if the file cannot be written, as on a full disk.
        """
        # JSON knows no NaN; null is what readers of any language understand.
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        row = {"kind": kind, "step": step, "unix_time": time.time(), **plain}
        line = json.dumps(row, allow_nan=False)
        with one_line_disk_errors(self._path):
            self._file.write(line + "\n")
            self._file.flush()
        if self._board is not None:
            group = f"{kind}/{values['task']}" if "task" in values else kind
            for name, value in plain.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{group}/{name}", value, step)
        if self._spool is not None:
            self._spool.upload_if_due()

    def flush(self) -> None:
        """Sees to it that everything is in the run directory: before a checkpoint of the same."""
        if self._spool is not None:
            with one_line_disk_errors(self._path):
                self._spool.upload()

    def close(self) -> None:
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:  # As on a full disk, which has been reported already.
                warn(
                    f"TensorBoard events are not complete ({error.strerror or error}); "
                    "metrics.jsonl is what counts"
                )
        with one_line_disk_errors(self._path):
            self._file.close()
            if self._spool is not None:
                self._spool.close()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
      UserError: if it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with one_line_disk_errors(path):
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        if is_remote(path):
            path.write_text(text)
            return
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_line_disk_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about writing `path` into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(path):  # a store has its own kinds
            raise
        raise UserError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}; "
            "put that right and run the same command again"
        ) from error


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
        # What comes right after the step of its checkpoint will happen again.
        again = row["kind"] in ("grow", "decision")
        if row["step"] < step or (row["step"] == step and not again):
            kept.append(line)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(run_dir: Path, purge_step: int | None):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        say("tensorboardX is not installed: no TensorBoard events, metrics.jsonl has everything")
        return None
    # A queue without a limit (0): were its writer to fail, on a full disk say, a full
    # queue would hold the training up for ever.
    return SummaryWriter(logdir=str(run_dir), purge_step=purge_step, max_queue=0, flush_secs=10)
