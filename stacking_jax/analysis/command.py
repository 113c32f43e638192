"""What `stacking-jax diagnose` does: look, keep, draw, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from stacking_jax.analysis.diagnose import PARTS, diagnose
from stacking_jax.console import say
from stacking_jax.errors import UserError
from stacking_jax.paths import is_remote, open_path
from stacking_jax.reporting.diagnostics import FOLDER


def run(
    run_dir: str, *, step: int | None = None, block: int | None = None, batches: int = 8,
    rows: int | None = None, parts: Sequence[str] = PARTS, as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Diagnoses a checkpoint, writes STEP.json and STEP.png, and prints a table.

    Args:
      run_dir: of the run.
      step, block, batches, rows, parts: see `diagnose`.
      as_json: print the JSON in place of the table.
      out: the folder of the files; None for RUN/diagnostics.

    Raises:
      UserError: for what the user can put right.
    """
    found = diagnose(
        run_dir, step=step, block=block, batches=batches, rows=rows, parts=parts
    )
    if jax.process_index():
        return
    folder = open_path(run_dir) / FOLDER if out is None else open_path(out)
    text = json.dumps(found, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{found['step']}.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}; choose another --out") from error
    if as_json:
        print(text)
    else:
        from stacking_jax.reporting.command import terminal
        from stacking_jax.reporting.diagnostics import diagnosis_table

        name = open_path(run_dir).name
        print(diagnosis_table(name, found, **terminal()), end="")
    say(f"all of it: {folder / str(found['step'])}.json")
    if is_remote(folder):
        say("pictures are drawn into a local folder: --out DIR")
        return
    from stacking_jax.reporting.diagnostics_figures import write_png

    say(f"drawn: {write_png(found, folder / (str(found['step']) + '.png'))}")
