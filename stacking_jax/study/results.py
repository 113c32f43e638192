"""What the cells of a study came to, arm by arm."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import MUST_AGREE, OPTIONAL, schedule_still_open
from stacking_jax.reporting.runs import Run, read_run
from stacking_jax.study.config import StudyConfig
from stacking_jax.study.grid import Cell, read_manifest
from stacking_jax.study.runner import COMPLETE, State, state_of

# Sections of a run's clock in which something else than the run itself is trained.
_BESIDE = ("teacher", "choose")


@dataclasses.dataclass(frozen=True)
class Clock:
    """How long an arm takes on a machine that is never disturbed.

    Attributes:
      stages: per stage its first step, its steps, and the seconds of a step: the median over all
        steps of all seeds, so that what disturbed the machine in between does not count.
      boundaries: (step, seconds) per growth, the median over seeds of what it stalled training.
      beside: seconds of training that are no steps of the run: a teacher, candidates of a choice.
    """

    stages: tuple[tuple[int, int, float], ...]
    boundaries: tuple[tuple[int, float], ...]
    beside: float = 0.0

    def at(self, step: float) -> float:
        """Seconds from the start to the end of step `step`; what lies beside comes before it."""
        steps = sum(
            seconds * min(max(step - start, 0), count) for start, count, seconds in self.stages
        )
        stalls = sum(seconds for start, seconds in self.boundaries if start < step)
        return self.beside + steps + stalls

    @property
    def total(self) -> float:
        return self.at(sum(count for _, count, _ in self.stages))


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One arm.

    Attributes:
      name: of the arm.
      steps, model_flops: its budget, as planned.
      runs: seed -> its complete run, where it may be compared.
      left_out: seed -> why its complete run may not be.
      states: seed -> how far the cell is.
      clock: None while no run is complete.
    """

    name: str
    steps: int
    model_flops: float
    runs: dict[int, Run]
    left_out: dict[int, str]
    states: dict[int, State]
    clock: Clock | None

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
        """The arms against which comparisons are made; of a study without any, the first."""
        names = dict.fromkeys(pair[1] for pair in self.config.comparisons)
        return [self.arms[name] for name in names] or [next(iter(self.arms.values()))]


def read_study(path: Path) -> StudyResult:
    """Reads the manifest and every cell that is complete.

    Raises:
      UserError: the folder holds no study, or a run in it is broken.
    """
    manifest = read_manifest(path)
    config = StudyConfig(**manifest["study"])
    cells = [Cell(**{**of, "arguments": tuple(of["arguments"])}) for of in manifest["cells"]]
    states = {cell: state_of(path, cell) for cell in cells}
    runs = {cell: read_run(path / cell.folder) for cell, at in states.items()
            if at.kind == COMPLETE}
    reasons = _reasons(runs, config.may_differ, {name: of["steps"] for name, of in
                                                 manifest["arms"].items()})
    arms = {}
    for name, budget in manifest["arms"].items():
        mine = [cell for cell in cells if cell.arm == name]
        good = {c.seed: runs[c] for c in mine if c in runs and c not in reasons}
        arms[name] = ArmResult(
            name, budget["steps"], budget["model_flops"], good,
            {c.seed: reasons[c] for c in mine if c in reasons},
            {c.seed: states[c] for c in mine},
            clock_of(list(good.values())) if good else None,
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


def clock_of(runs: Sequence[Run]) -> Clock:
    """The clock of an arm, from the runs of all its seeds."""
    planned = runs[0].plan.get("stages") or [{"start": 0, "steps": runs[0].step}]
    stages, start = [], 0
    for number, stage in enumerate(planned, start=1):
        seconds = [value for run in runs for value in _step_seconds(run, number)]
        if not seconds:  # Fewer than two logged steps: what the run says of the whole stage.
            seconds = [
                run.stages[number - 1]["seconds"] / max(1, stage["steps"])
                for run in runs if len(run.stages) >= number
            ] or [0.0]
        stages.append((start, int(stage["steps"]), statistics.median(seconds)))
        start += int(stage["steps"])
    stalls = collections.defaultdict(list)
    for run in runs:
        accounted = {int(row["start"]): row["stall_seconds"] for row in run.boundaries}
        for row in run.growths:
            step = int(row["step"])
            waited = row.get("seconds", 0.0) + row.get("compile_seconds", 0.0)
            stalls[step].append(accounted.get(step, waited))
    return Clock(
        tuple(stages),
        tuple((step, statistics.median(found)) for step, found in sorted(stalls.items())),
        statistics.median(sum(run.goodput.get(name, 0.0) for name in _BESIDE) for run in runs),
    )


def _step_seconds(run: Run, stage: int) -> list[float]:
    """Seconds of a step between each two logged rows of a stage (its first row aside)."""
    rows = [row for row in run.train if row.get("stage") == stage]
    return [
        (after["train_seconds"] - before["train_seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(rows)
        if after["train_seconds"] > before["train_seconds"]
    ]


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
    for cell, run in runs.items():
        if run.step != steps[cell.arm]:
            found.setdefault(cell, f"it ended at step {run.step}, not {steps[cell.arm]}")
        elif (why := schedule_still_open(run)) is not None:
            found.setdefault(cell, why)
        elif run.seed != cell.seed:
            found.setdefault(cell, f"its seed is {run.seed}")
    return found
