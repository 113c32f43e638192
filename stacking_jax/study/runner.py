"""Carries out the cells of a study: each once, some at a time, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stacking_jax.console import progress, say
from stacking_jax.errors import UserError
from stacking_jax.study.grid import Cell, Grid
from stacking_jax.training.telemetry import write_json

COMPLETE, FAILED, SUBMITTED, CUT, OPEN = "complete", "failed", "submitted", "cut", "open"
STATES = "states"
# Exit codes after which the same command goes on where it stopped; see docs/surviving.md.
GOES_ON = (75, 130, 134, 137, 143)
_LOOK_EVERY = 0.2


@dataclasses.dataclass(frozen=True)
class State:
    """How far a cell is.

    Attributes:
      kind: 'complete'; 'failed', which is left alone until it is retried; 'submitted' to a
        queue; 'cut', which goes on; 'open'.
      line: what it said at last, one line.
    """

    kind: str
    line: str = ""


class Interrupted(Exception):
    """The study was asked to stop; its running cells have saved."""

    def __init__(self, signal_number: int):
        super().__init__("stopped; the same command goes on from there")
        self.signal_number = signal_number


def state_of(study: Path, cell: Cell) -> State:
    """How far a cell is, by what lies on disk."""
    if (study / cell.folder / "summary.json").exists():
        return State(COMPLETE)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return State(**json.loads(_note(study, cell).read_text(encoding="utf-8")))
    return State(CUT if (study / cell.folder / "config.json").exists() else OPEN)


def run_cells(
    study: Path, grid: Grid, *, jobs: int = 1, launch: str | None = None, retry: bool = False
) -> dict[str, int]:
    """Runs what is not complete yet, in the order of the grid.

    Args:
      study: the folder of the study.
      grid: its cells.
      jobs: how many run at a time; with several, the cores are divided among them.
      launch: words before `train`, such as 'bash launch/processes.sh --processes 2 --'; None
        runs each cell as a process here. '{cell}' in it is the number of the cell, three digits.
        One that ends before its run does (a queue) leaves the cell 'submitted'.
      retry: also cells that have failed or were submitted.

    Returns:
      How many cells are in each state now.

    Raises:
      Interrupted: after SIGTERM or SIGINT, once the running cells have saved.
      UserError: jobs is no positive number, `launch` cannot be run, or another process (a
        run that a killed study left behind among them) is still at work here.
    """
    if jobs < 1:
        raise UserError(f"--jobs is a whole number of at least 1; got {jobs}")
    states = {cell: state_of(study, cell) for cell in grid.cells}
    again = (FAILED, SUBMITTED) if retry else ()
    todo = [c for c, at in states.items() if at.kind in (OPEN, CUT, *again)]
    for cell, at in states.items():
        if at.kind == FAILED and not retry:
            say(f"{cell.name} has failed and is left alone (--retry): {at.line}")
    numbers = {cell: number for number, cell in enumerate(grid.cells)}
    running: dict[int, tuple[Cell, subprocess.Popen]] = {}
    told = False
    with (
        _signals() as stopped,
        _alone(study) as held,
        progress("study", len(grid.cells), "cells", start=len(states) - len(todo)) as advance,
    ):
        while (todo and stopped() is None) or running:
            while todo and len(running) < jobs and stopped() is None:
                place = next(i for i in range(jobs) if i not in running)
                cell = todo.pop(0)
                _note(study, cell).unlink(missing_ok=True)
                running[place] = cell, _start(study, cell, numbers[cell], launch, held)
                if launch is None and jobs > 1:
                    _share_cores(running[place][1].pid, place, jobs)
            time.sleep(_LOOK_EVERY)
            if stopped() is not None and not told:
                told = True
                for _, process in running.values():
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
            advance(0, _status(study, [cell for cell, _ in running.values()]))
            for place, (cell, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[place]
                states[cell] = _ended(study, cell, code, launch is not None)
                if states[cell].kind in (FAILED, CUT):
                    say(f"{cell.name}: {states[cell].kind}: {states[cell].line}")
                advance(1, f"{cell.name}: {states[cell].kind}")
        if stopped() is not None:
            raise Interrupted(stopped())
    kinds = [at.kind for at in states.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def command_of(study: Path, cell: Cell, number: int, launch: str | None) -> list[str]:
    """The words that run a cell."""
    words = [*cell.arguments, "--run_dir", str(study / cell.folder)]
    if launch is None:
        return [sys.executable, "-m", "stacking_jax", "train", *words]
    return [*shlex.split(launch.replace("{cell}", f"{number:03d}")), "train", *words]


def log_of(study: Path, cell: Cell) -> Path:
    return study / "logs" / f"{cell.folder.removeprefix('cells/').replace('/', '-')}.log"


def _note(study: Path, cell: Cell) -> Path:
    return study / STATES / f"{cell.folder.removeprefix('cells/').replace('/', '-')}.json"


def _start(
    study: Path, cell: Cell, number: int, launch: str | None, held: int
) -> subprocess.Popen:
    log = log_of(study, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    words = command_of(study, cell, number, launch)
    with open(log, "ab") as out:
        out.write((shlex.join(words) + "\n").encode())
        out.flush()
        try:
            # A session of its own: Ctrl-C reaches this process alone, which hands it on once.
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=(held,),
            )
        except OSError as error:
            raise UserError(f"--launch: {words[0]} cannot be run ({error.strerror})") from error


def _ended(study: Path, cell: Cell, code: int, launched: bool) -> State:
    """What has become of a cell whose process ended; written down unless disk says it already."""
    found = state_of(study, cell)
    if found.kind == COMPLETE:
        return found
    code = 128 - code if code < 0 else code
    line = _last_line(log_of(study, cell)) or f"exit code {code}"
    if code == 0:
        kind = SUBMITTED if launched else FAILED
    else:
        kind = CUT if code in GOES_ON else FAILED
    state = State(kind, line)
    note = _note(study, cell)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, dataclasses.asdict(state))
    return state


def _last_line(log: Path) -> str:
    """What the cell said at last; the last `error:` line where there is one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or [""])[-1]


def _status(study: Path, cells: Sequence[Cell]) -> str:
    shown = []
    for cell in cells:
        step = _last_step(study / cell.folder / "metrics.jsonl")
        shown.append(cell.name + (f" at step {step}" if step else ""))
    return " · ".join(shown)


def _last_step(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError), open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return json.loads(line).get("step")
    return None


def _share_cores(process: int, place: int, jobs: int) -> None:
    """Gives a job its part of the cores, so that jobs do not slow each other down by chance."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= jobs:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process, cores[place::jobs])


@contextlib.contextmanager
def _alone(study: Path) -> Iterator[int]:
    """Holds the right to run cells here; the cells hold it too, should this process be killed."""
    study.mkdir(parents=True, exist_ok=True)
    with open(study / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{study} is being run by another process; wait for its end, or end it"
            ) from None
        yield file.fileno()


@contextlib.contextmanager
def _signals() -> Iterator[Any]:
    """Yields a function: the signal that asked to stop, or None."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda which, _: caught.append(which))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
