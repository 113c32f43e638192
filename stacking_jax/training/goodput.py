"""Where the wall time of a run went, over all its restarts, and what part of it trained.

The wall time begins with the first process and goes on while none runs. A checkpoint holds
the seconds of the work that it carries; whatever else has passed until a later process
starts was lost: down while nothing ran, recomputed where work was done that no checkpoint
kept. Both are known from files alone, since a killed process can say nothing: this file and
metrics.jsonl give the last sign of life.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.training.telemetry import Clock, write_json

LOST = ("recomputed", "down")
PRODUCTIVE = "step"

ML_GOODPUT = {
    "init": "TRAINING_PREP",
    "restore": "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME",
    "compile": "PROGRAM_STARTUP",
    "data": "DATA_LOADING_SYNC",
    "checkpoint": "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME",
    "recomputed": "WASTED_PROGRESS_FROM_DISRUPTION",
    "down": "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION",
}
"""Our categories under the names of ml-goodput-measurement's `BadputType`; growing and
evaluating are its CUSTOM_BADPUT_EVENTS."""

_OF_A_STAGE = (
    "depth", "steps", "seconds", "compile_seconds", "compile_ahead_seconds", "grow_seconds",
)
_TAIL = 1 << 16


class Goodput:
    """Keeps `goodput.json` of a run directory.

    Attributes:
      lost: category -> seconds that restarts have cost so far.
      restarts: per restart its step, time and cost, oldest first.
    """

    def __init__(self, run_dir: Path, clock: Clock, *, writes: bool = True):
        """Reads what is there, before anything of it is written anew.

        Args:
          run_dir: of the run; it need not exist yet.
          clock: of this process.
          writes: whether this process is the one that writes the file.
        """
        self._path, self._clock, self._writes = run_dir / "goodput.json", clock, writes
        self._old = _read(self._path)
        self._last_sign = max(
            self._old.get("unix_time", 0.0), _last_row_time(run_dir / "metrics.jsonl")
        )
        self._began: float | None = self._old.get("began_unix_time")
        self.lost = {name: self._old.get("seconds", {}).get(name, 0.0) for name in LOST}
        self.restarts: list[dict[str, Any]] = list(self._old.get("restarts", []))
        self._latest: tuple[int, list[Mapping[str, Any]]] = (0, [])

    def begin(
        self, step: int, kept: Mapping[str, float], began: float | None = None
    ) -> dict[str, float]:
        """Settles what was lost before this process started.

        Args:
          step: that the run goes on from; 0 from its beginning.
          kept: category -> seconds of the work in the checkpoint that it goes on from.
          began: when work before its first step began, in Unix time; see `within_run`.

        Returns:
          What this restart has cost: `recomputed_seconds` and `down_seconds`.
        """
        started, kept_seconds = self._clock.began_unix_time, sum(kept.values())
        if self._began is None:
            # A new run, or one grown from another: the work that it begins with is its own.
            self._began = started - kept_seconds
            if began is not None:
                self._began = min(self._began, began)
            return {f"{name}_seconds": 0.0 for name in LOST}
        # A clock that was set back must not make time negative.
        lost = max(started - self._began - kept_seconds, sum(self.lost.values()))
        down = self.lost["down"] + max(started - self._last_sign, 0.0)
        after = {"down": min(down, lost), "recomputed": lost - min(down, lost)}
        cost = {f"{name}_seconds": max(after[name] - self.lost[name], 0.0) for name in LOST}
        self.lost = after
        self.restarts.append({"step": step, "unix_time": started, **cost})
        return cost

    def read(self, step: int, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The account until now.

        Args:
          step: updates done.
          stages: `Counters.stages`.

        Returns:
          Plain data. `seconds` has a value for every category, whose sum is
          `wall_seconds`; `goodput` is the share of the steps in it. `compile_ahead_seconds`
          passed in the background, beside all of these.
        """
        seconds = self._clock.read() | self.lost
        wall = sum(seconds.values())
        names: dict[str, float] = {}
        for category, value in seconds.items():
            if category != PRODUCTIVE:
                name = ML_GOODPUT.get(category, "CUSTOM_BADPUT_EVENTS")
                names[name] = names.get(name, 0.0) + value
        return {
            "began_unix_time": self._began,
            "unix_time": time.time(),
            "step": step,
            "wall_seconds": wall,
            "goodput": seconds[PRODUCTIVE] / wall if wall else 0.0,
            "seconds": seconds,
            "compile_ahead_seconds": math.fsum(
                stage.get("compile_ahead_seconds", 0.0) for stage in stages
            ),
            "stages": [
                {name: stage.get(name, 0.0) for name in _OF_A_STAGE}
                for stage in stages
            ],
            "restarts": self.restarts,
            "badput": names,
        }

    def write(self, step: int, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Writes the account until now, and returns it; also a sign of life.

        Raises:
          UserError: if the file cannot be written, as on a full disk.
        """
        self._latest = (step, list(stages))
        account = self.read(step, stages)
        if self._writes:
            write_json(self._path, account)
        return account

    def close(self) -> None:
        """Writes once more, however the run ends; a full disk has been reported already."""
        with contextlib.suppress(UserError):
            self.write(*self._latest)


def _read(path: Path) -> dict[str, Any]:
    """What an earlier process wrote; {} where it is of no use."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        seconds = {name: float(value["seconds"].get(name, 0.0)) for name in LOST}
        return {
            "began_unix_time": float(value["began_unix_time"]),
            "unix_time": float(value["unix_time"]),
            "seconds": seconds,
            "restarts": list(value["restarts"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _last_row_time(path: Path) -> float:
    """When the last line that is whole was written to metrics.jsonl; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - _TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return float(json.loads(line)["unix_time"])
    return 0.0
