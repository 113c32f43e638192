"""A trace of chosen steps, for xprof and Perfetto."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from stacking_jax.console import say
from stacking_jax.errors import UserError
from stacking_jax.paths import is_remote


def parse_steps(text: str) -> tuple[int, int]:
    """'10:15' as (10, 15): the first and the last step of a trace, both in it; '10' is one step.

    Raises:
      UserError: for anything else.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"--profile takes FIRST:LAST, steps from 1 on, such as 10:15; got {text!r}"
        )
    return first, last


class Profile:
    """Traces the steps from `first` to `last`, both included, into RUN/profile.

    Other processes than the first trace nothing. Asked before and after each step.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None):
        """
        Args:
          run_dir: of the run, on a local disk.
          steps: the first and the last, counted from 1; None traces nothing.

        Raises:
          UserError: the trace cannot be written there.
        """
        if steps is not None and is_remote(run_dir):
            raise UserError(
                f"--profile writes to a local disk, and {run_dir} is none; "
                "trace some steps of a run with a local --run_dir"
            )
        self._steps = steps if jax.process_index() == 0 else None
        self._folder = run_dir / "profile"
        self._tracing = False

    def before(self, step: int) -> None:
        """Begins the trace where `step` is in it: also at its middle, of a run that goes on."""
        if self._steps is not None and not self._tracing:
            first, last = self._steps
            if first <= step <= last:
                jax.profiler.start_trace(self._folder)
                self._tracing = True

    def annotate(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """What names a step in the trace, as a context."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, once that is done on the devices."""
        if self._tracing and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what has been traced."""
        if not self._tracing:
            return
        self._tracing, self._steps = False, None
        jax.profiler.stop_trace()
        newest = max((self._folder / "plugins/profile").iterdir(), key=lambda f: f.stat().st_mtime)
        traces = sorted(newest.glob("*.trace.json.gz"))
        where = f"; or drop {traces[0]} on https://ui.perfetto.dev" if traces else ""
        say(f"trace: xprof --logdir {self._folder} (pip install xprof){where}")
