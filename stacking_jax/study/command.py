"""What `stacking-jax study` does: the grid, its runs, results.json, report.html and figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stacking_jax.console import say
from stacking_jax.paths import local_path
from stacking_jax.reporting.html import write_page
from stacking_jax.study.analysis import Analysis, analyse
from stacking_jax.study.config import StudyConfig
from stacking_jax.study.figures import study_figures
from stacking_jax.study.grid import MANIFEST, Configure, Grid, check_same_cells
from stacking_jax.study.report import study_html
from stacking_jax.study.results import ArmResult, StudyResult, last_scores, read_study
from stacking_jax.study.runner import run_cells
from stacking_jax.training.telemetry import write_json

REPORT, RESULTS, FIGURES = "report.html", "results.json", "figures"


def run_study(
    config: StudyConfig, run_dir: str | os.PathLike, configure: Configure, *, jobs: int = 1,
    launch: str | None = None, retry: bool = False,
) -> dict[str, int]:
    """Runs what is not complete of a study, and writes its results and report.

    Args:
      config: the study.
      run_dir: its folder, new or the one that holds it: `study.json`, `cells/ARM/seed-S` (run
        directories), `logs`, `states`, `results.json`, `report.html`, `figures/*.png`.
      configure: reads the configuration of an arm.
      jobs, launch, retry: see `runner.run_cells`.

    Returns:
      How many cells are in each state.

    Raises:
      UserError: an arm makes no run, or the folder holds another study's cells.
      runner.Interrupted: it was asked to stop.
    """
    study = local_path(run_dir)
    grid = Grid.of(config, configure)
    check_same_cells(study, grid)
    study.mkdir(parents=True, exist_ok=True)
    write_json(study / MANIFEST, grid.to_dict())
    for name, budget in grid.budgets.items():
        say(f"{name}: {budget.steps} steps, {budget.model_flops:.3g} FLOPs")
    counts = run_cells(study, grid, jobs=jobs, launch=launch, retry=retry)
    report_study(study)
    return counts


def report_study(
    run_dir: str | os.PathLike, out: str | os.PathLike | None = None, as_json: bool = False
) -> Path:
    """Writes results, report and figures of what is complete so far; returns the report's path.

    Args:
      run_dir: the folder of the study.
      out: the report; None: report.html in that folder.
      as_json: print what results.json holds in place of the declared comparisons.

    Raises:
      UserError: the folder holds no study, a run in it is broken, or nothing can be written.
    """
    study = read_study(local_path(run_dir))
    analysis = analyse(study)
    results = results_of(study, analysis)
    write_json(study.path / RESULTS, results)
    figures = study_figures(study, analysis.declared)
    path = write_page(out or study.path / REPORT, study_html(study, analysis, figures))
    for drawn in figures:
        drawn.write_png(study.path / FIGURES)
    text = json.dumps(results) if as_json else declared_text(analysis)
    if text:
        print(text)
    say(f"report: {path}")
    return path


def results_of(study: StudyResult, analysis: Analysis) -> dict:
    """What results.json holds: per arm its values by seed, and every comparison."""
    return {
        "name": study.config.name,
        "arms": {
            name: {
                "steps": arm.steps,
                "model_flops": arm.model_flops,
                "loss": arm.values("loss"),
                "score": arm.values("score"),
                "tasks": _task_scores(arm),
                "seconds": arm.seconds,
                "left_out": arm.left_out,
                "states": {seed: state.kind for seed, state in arm.states.items()},
            }
            for name, arm in study.arms.items()
        },
        **analysis.to_dict(),
    }


def _task_scores(arm: ArmResult) -> dict[str, dict[int, float | None]]:
    """Task -> seed -> its score of 100 at the end."""
    found: dict[str, dict[int, float | None]] = {}
    for seed, run in arm.runs.items():
        for task, row in last_scores(run).items():
            found.setdefault(task, {})[seed] = row.get("value")
    return found


def declared_text(analysis: Analysis) -> str:
    """The declared comparisons as lines for a terminal."""
    lines = []
    for line in (*analysis.declared, *analysis.noise):
        pair = f"{line.arm} − {line.reference}, {line.endpoint} ({line.budget})"
        if line.arm == line.reference:
            pair = f"A/A, {line.arm}, {line.endpoint}"
        said = f"{pair}: {line.says}"
        if line.found and line.found.low is not None:
            said += (
                f", {line.found.mean:+.4f} ({line.found.low:+.4f} to {line.found.high:+.4f}) over "
                f"{line.found.pairs} seeds"
            )
        lines.append(said)
    return "\n".join(lines)
