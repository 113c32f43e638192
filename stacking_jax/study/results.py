"""What the cells of a study came to, arm by arm."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import MUST_AGREE, OPTIONAL, schedule_still_open
from stacking_jax.reporting.runs import Run, read_run
from stacking_jax.study.clock import Clock, clocks_of
from stacking_jax.study.config import StudyConfig
from stacking_jax.study.grid import Cell, read_manifest
from stacking_jax.study.runner import COMPLETE, State, state_of


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One arm.

    Attributes:
      name: of the arm.
      steps: its budget, as planned.
      model_flops: of a whole run: the median over the seeds of what was spent, since a run may
        decide itself when to grow; as planned while no run is complete.
      runs: seed -> its complete run, where it may be compared.
      left_out: seed -> why its complete run may not be.
      states: seed -> how far the cell is.
      clocks: seed -> the time of its run.
    """

    name: str
    steps: int
    model_flops: float
    runs: dict[int, Run]
    left_out: dict[int, str]
    states: dict[int, State]
    clocks: dict[int, Clock]

    @property
    def seconds(self) -> float | None:
        """Of a whole run, the median over the seeds; None while no run is complete."""
        totals = [clock.total for clock in self.clocks.values()]
        return statistics.median(totals) if totals else None

    def values(self, endpoint: str) -> dict[int, float]:
        """Seed -> 'loss' (nats per token) or 'score' (of 100), where it is known."""
        of = final_loss if endpoint == "loss" else final_score
        found = {seed: of(run) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if units.known(value)}


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """All arms of a study, in its order, and the study itself."""

    config: StudyConfig
    path: Path
    arms: dict[str, ArmResult]

    @property
    def references(self) -> list[ArmResult]:
        """The arms against which others are held, declared or not.

        Those of the comparisons; of a study without any, the first; and all that were given the
        FLOPs of another arm, which is what they are there for.
        """
        declared = [pair[1] for pair in self.config.comparisons] or [next(iter(self.arms))]
        opponents = [arm.name for arm in self.config.all_arms() if arm.flops_of is not None]
        return [self.arms[name] for name in dict.fromkeys((*declared, *opponents))]


def read_study(path: Path) -> StudyResult:
    """Reads the manifest and every cell that is complete.

    Raises:
      UserError: the folder holds no study, or a run in it is broken.
    """
    manifest = read_manifest(path)
    config = StudyConfig(**manifest["study"])
    cells = [Cell(**{**of, "arguments": tuple(of["arguments"])}) for of in manifest["cells"]]
    states = {cell: state_of(path, cell) for cell in cells}
    # The score is what the run measured at its end: later evaluations, of other tasks or of fewer
    # examples, change nothing that was declared.
    runs = {cell: read_run(path / cell.folder, evaluations=False) for cell, at in states.items()
            if at.kind == COMPLETE}
    reasons = _reasons(runs, config.may_differ, {name: of["steps"] for name, of in
                                                 manifest["arms"].items()})
    arms = {}
    for name, budget in manifest["arms"].items():
        mine = [cell for cell in cells if cell.arm == name]
        good = {c.seed: runs[c] for c in mine if c in runs and c not in reasons}
        spent = [run.model_flops for run in good.values() if units.known(run.model_flops)]
        arms[name] = ArmResult(
            name, budget["steps"],
            statistics.median(spent) if spent else budget["model_flops"], good,
            {c.seed: reasons[c] for c in mine if c in reasons},
            {c.seed: states[c] for c in mine},
            clocks_of(good) if good else {},
        )
    return StudyResult(config, path, arms)


def final_loss(run: Run) -> float | None:
    return run.eval_loss


def final_score(run: Run) -> float | None:
    """The mean over the tasks at the last step, None where one of them has no value."""
    rows = last_scores(run)
    values = [row.get("value") for row in rows.values()]
    return statistics.fmean(values) if values and all(map(units.known, values)) else None


def last_scores(run: Run) -> dict[str, dict[str, Any]]:
    """Task -> its row at the end of the run."""
    return {row["task"]: row for row in run.task_evals if int(row["step"]) == run.step}


def _reasons(
    runs: dict[Cell, Run], may_differ: Sequence[str], steps: dict[str, int]
) -> dict[Cell, str]:
    """Why a complete run may not be compared: it differs from most, or its schedule is open."""
    found: dict[Cell, str] = {}
    for key, called in MUST_AGREE.items():
        if key in may_differ:
            continue
        values = {
            cell: json.dumps(run.comparability.get(key), default=str)
            for cell, run in runs.items()
            if key in run.comparability or key not in OPTIONAL
        }
        if len(set(values.values())) > 1:
            most = collections.Counter(values.values()).most_common(1)[0][0]
            for cell, value in values.items():
                if value != most:
                    found.setdefault(cell, f"{called} {value}, but {most} in most cells")
    scored = {cell: last_scores(run).keys() for cell, run in runs.items()}
    everything = set().union(*scored.values())
    for cell, run in runs.items():
        lacks = sorted(everything - scored[cell])
        if run.step != steps[cell.arm]:
            found.setdefault(cell, f"it ended at step {run.step}, not {steps[cell.arm]}")
        elif (why := schedule_still_open(run)) is not None:
            found.setdefault(cell, why)
        elif run.seed != cell.seed:
            found.setdefault(cell, f"its seed is {run.seed}")
        elif lacks:
            found.setdefault(cell, f"it was not scored at its end on {', '.join(lacks)}")
    return found
