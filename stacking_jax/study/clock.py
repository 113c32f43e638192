"""How long a run takes on a machine that is never disturbed: median steps, and boundaries."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from stacking_jax.reporting.runs import Run, read_run
from stacking_jax.training.within_run import FOLDER as TEACHER


class Boundary(NamedTuple):
    """What comes between two stages.

    Attributes:
      start: updates done when the new stage begins.
      stall: seconds that training stood still; the median over seeds. None where no run has an
        account of it, as of a stage of a step or two; it counts as nothing.
      trials: seconds of the training steps in which candidates were tried out.
    """

    start: int
    stall: float | None
    trials: float


@dataclasses.dataclass(frozen=True)
class Clock:
    """The time of one run.

    Attributes:
      stages: per stage its first step, its steps, and the seconds of a step: the median over all
        steps of all seeds, so that what disturbed the machine in between does not count.
      boundaries: one for every stage but the first, whether anything grows there or not.
      beside: seconds in which a teacher was trained first, by a clock of its own.
    """

    stages: tuple[tuple[int, int, float], ...]
    boundaries: tuple[Boundary, ...]
    beside: float = 0.0

    def at(self, step: float) -> float:
        """Seconds from the start to the end of step `step`; what lies beside comes before it."""
        steps = sum(
            seconds * min(max(step - start, 0), count) for start, count, seconds in self.stages
        )
        between = sum((of.stall or 0.0) + of.trials for of in self.boundaries if of.start < step)
        return self.beside + steps + between

    @property
    def total(self) -> float:
        return self.at(sum(count for _, count, _ in self.stages))


def clocks_of(runs: Mapping[int, Run]) -> dict[int, Clock]:
    """The clock of every seed of an arm.

    Seeds share the seconds of a step and of a stall, stage by stage. The stages are each seed's
    own, since a run may decide itself when one ends.

    Args:
      runs: seed -> its run.
    """
    all_runs = list(runs.values())
    steps, stalls = _step_seconds(all_runs), _stalls(all_runs)
    teachers = {
        seed: read_run(run.path / TEACHER) for seed, run in runs.items()
        if run.plan.get("teacher", {}).get("trained_within_the_run")
    }
    beside = clocks_of(teachers) if teachers else {}
    clocks = {}
    for seed, run in runs.items():
        stages = tuple(
            (start, count, steps[number])
            for number, (start, count) in enumerate(_planned(run), start=1)
        )
        tried = _trial_steps(run)
        boundaries = tuple(
            Boundary(start, stalls.get(number), tried.get(number, 0.0) * seconds)
            for number, (start, _, seconds) in enumerate(stages, start=1) if number > 1
        )
        clocks[seed] = Clock(
            stages, boundaries, beside[seed].total if seed in beside else 0.0
        )
    return clocks


def _planned(run: Run) -> list[tuple[int, int]]:
    """(first step, steps) of each stage, as it came to be."""
    counts = [int(stage["steps"]) for stage in run.plan.get("stages") or [{"steps": run.step}]]
    return list(zip(itertools.accumulate(counts[:-1], initial=0), counts, strict=True))


def _step_seconds(runs: list[Run]) -> dict[int, float]:
    """Stage, from 1 -> the median seconds of a step, between each two logged rows of a stage."""
    found: dict[int, list[float]] = collections.defaultdict(list)
    for run in runs:
        for before, after in itertools.pairwise(run.train):
            seconds = after["train_seconds"] - before["train_seconds"]
            if before.get("stage") == after.get("stage") and seconds > 0:
                found[after.get("stage")].append(seconds / (after["step"] - before["step"]))
    # Fewer than two logged steps: what the runs say of the whole stage.
    for number in range(1, 1 + max(len(_planned(run)) for run in runs)):
        if number not in found:
            found[number] = [
                run.stages[number - 1]["seconds"] / max(1, _planned(run)[number - 1][1])
                for run in runs if len(run.stages) >= number
            ] or [0.0]
    return {number: statistics.median(seconds) for number, seconds in found.items()}


def _stalls(runs: list[Run]) -> dict[int, float]:
    """Stage, from 2 -> median seconds by which it was held up."""
    found: dict[int, list[float]] = collections.defaultdict(list)
    for run in runs:
        accounted = {int(row["start"]): float(row["stall_seconds"]) for row in run.boundaries}
        grown = {
            int(row["step"]): row.get("seconds", 0.0) + row.get("compile_seconds", 0.0)
            for row in run.growths
        }
        for number, (start, _) in enumerate(_planned(run), start=1):
            # A run that was taken up at its boundary has no account of it.
            if number > 1 and (start in accounted or start in grown):
                found[number].append(accounted.get(start, grown.get(start, 0.0)))
    return {number: statistics.median(seconds) for number, seconds in found.items()}


def _trial_steps(run: Run) -> dict[int, float]:
    """Stage, from 1 -> training steps of it that trying out candidates took."""
    return {
        int(decision["stage"]) + 1: float(decision["cost"]["steps"])
        for decision in run.decisions if "cost" in decision
    }
