"""Ends a process that is alive but gets nowhere: JAX itself would wait for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from stacking_jax.training.config import TrainConfig
from stacking_jax.training.telemetry import Clock

STUCK = 75
"""The exit code: EX_TEMPFAIL of sysexits.h, 'try again'."""

_STEPS = ("data", "step")
_FIRST_STEPS = 2
# Where one waits for another, and JAX for ever, there is a limit unless 0 is asked for.
_SEVERAL_PROCESSES = 1800.0


class Watchdog:
    """A thread that measures how long the run has been in one place.

    Training and reading data have `step_limit` seconds; whatever rightly takes longer
    (compiling, the first two steps of a program, an evaluation, a growth, a checkpoint,
    the beginning) has `other_limit`. At the limit the stacks of all threads go to
    standard error and to a file, and the process ends with code 75, whatever its main
    thread waits for. A thread that keeps Python's lock while it hangs keeps this one
    from running too; then faulthandler's, which needs no lock, ends the process with 1.
    """

    def __init__(self, step_limit: float, other_limit: float, run_dir: Path):
        self._limits = (step_limit, other_limit)
        self._file = run_dir / f"stuck-process-{jax.process_index()}.txt"
        # One tuple, so that the thread never reads half of a change.
        self._place = ("init", time.monotonic())
        self._steps = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, category: str) -> None:
        """The run is elsewhere now: a category of `Clock`."""
        if self._place[0] == "step":
            self._steps += 1
        self._place = (category, time.monotonic())
        if category == "compile":
            self._steps = 0

    def start(self) -> None:
        self._place = (self._place[0], time.monotonic())
        self._arm()
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def limit(self) -> float:
        """Seconds that the run may stay where it is."""
        step_limit, other_limit = self._limits
        running = self._place[0] in _STEPS and self._steps >= _FIRST_STEPS
        return step_limit if running else max(step_limit, other_limit)

    def _watch(self) -> None:
        pause = min(self._limits) / 8
        while not self._done.wait(min(pause, 10)):
            limit = self.limit
            category, since = self._place
            self._arm()
            seconds = time.monotonic() - since
            if seconds > limit:
                self._end(category, seconds, limit)

    def _arm(self) -> None:
        """Sets faulthandler's own thread, for the case that this one cannot run any more."""
        faulthandler.dump_traceback_later(1.5 * self.limit, exit=True, file=_stderr())

    def _end(self, category: str, seconds: float, limit: float) -> None:
        message = (
            f"stuck: process {jax.process_index()} has been at '{category}' for {seconds:.1f} s "
            f"(limit {limit:g} s); the stacks of its threads follow, and stand in {self._file}; "
            f"the process ends with code {STUCK}, the same command goes on from the last "
            "checkpoint\n"
        )
        # A full disk or a file system that hangs must not hold up the end.
        faulthandler.dump_traceback_later(0.25 * limit, exit=True, file=_stderr())
        try:
            os.write(_stderr().fileno(), message.encode())
            faulthandler.dump_traceback(file=_stderr())
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file=file)
        finally:
            os._exit(STUCK)


@contextlib.contextmanager
def watched(clock: Clock, config: TrainConfig, run_dir: Path) -> Iterator[None]:
    """Watches the sections of a clock meanwhile, with the limits of the configuration."""
    step_limit = config.step_timeout
    if step_limit is None:
        step_limit = _SEVERAL_PROCESSES if jax.process_count() > 1 else 0
    if not step_limit:
        yield
        return
    watchdog = Watchdog(step_limit, config.other_timeout, run_dir)
    clock.on_change = watchdog.enter
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()
        clock.on_change = None


def _stderr():
    """The process's own, whatever Python's name for it has been bound to."""
    return sys.__stderr__ or sys.stderr
