"""What `stacking-jax compare` does: read, compare, print, write the report."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from stacking_jax import console
from stacking_jax.reporting.comparison import Comparison, compare_runs
from stacking_jax.reporting.html import write_report
from stacking_jax.reporting.runs import read_run
from stacking_jax.reporting.tables import comparison_table


def compare(
    run_dirs: Sequence[str], out: str | None = None, as_json: bool = False
) -> Comparison:
    """Prints the table of the runs to standard output and writes the report if `out` is given.

    Args:
      run_dirs: run directories, in the order in which they are to be shown.
      out: the HTML file to write; an existing one is replaced. None: no report.
      as_json: print one JSON object (`rows`, `notes`) in place of the table.

    Raises:
      UserError: a directory is no run or is broken, or the report cannot be written.
    """
    comparison = compare_runs([read_run(path) for path in run_dirs])
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=2, allow_nan=False))
    else:
        print(comparison_table(comparison, **terminal()), end="")
    if out is not None:
        command = ["stacking-jax", "compare", *map(str, run_dirs), "--out", str(out)]
        path = write_report(comparison, out, command=shlex.join(command))
        console.say(f"report: {path}")
    return comparison


def terminal() -> dict[str, object]:
    """Arguments of the tables for standard output: a terminal's width and colours, or neither."""
    if not sys.stdout.isatty():
        return {"width": None, "color": False}
    return {
        "width": shutil.get_terminal_size().columns,
        "color": "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb",
    }
