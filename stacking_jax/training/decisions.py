"""What a run has decided while it went on, kept so that it is decided once.

Process 0 decides; the decision is on disk before anybody acts on it; a run that goes on replays
it. The plan of a run is thus a pure function of its configuration and of what is recorded
(`decided_plan`), and what would follow a decision, were it taken, is asked of the same function.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.growth.plan import divide_steps
from stacking_jax.paths import is_remote
from stacking_jax.training import consensus, distributed
from stacking_jax.training.candidates import Candidate
from stacking_jax.training.growth_config import GrowthConfig
from stacking_jax.training.telemetry import one_line_disk_errors

FILE = "decisions.jsonl"

Decision = dict[str, Any]
"""`kind`, `stage` (that it is about, counted from 0), `step` (updates done then), and

- of a 'boundary', which makes the stage begin at that step, `reason` and what was seen;
- of a 'choice' of how to grow into it, `candidate`, `operator`, `map`, `growth` (settings in
  place of `GrowthConfig`'s), and of one that was tried out the scores and the `cost`.
"""


# ---- What follows from decisions: pure -------------------------------------------------------


def decided_plan(plan: Plan, taken: Iterable[Decision]) -> Plan:
    """The plan with what was decided.

    A boundary that is brought forward leaves the steps that are left to the stages after it, in
    the proportions that they had.

    Raises:
      UserError: if a decision does not fit the plan.
    """
    for decision in taken:
        number = int(decision["stage"])
        if not 1 <= number < len(plan.stages):
            raise UserError(
                f"a decision is about stage {number + 1}, but the plan has {len(plan.stages)}"
            )
        if decision["kind"] == "boundary":
            plan = _begin_at(plan, number, int(decision["step"]))
        else:
            before, stage = plan.stages[number - 1 : number + 1]
            grow_map = Plan.custom(
                [(before.depth, 1), (stage.depth, 1, list(decision["map"]))]
            ).stages[1].grow_map
            stages = list(plan.stages)
            stages[number] = dataclasses.replace(
                stage, grow_map=grow_map, operator=decision["operator"]
            )
            plan = Plan(tuple(stages))
    return plan


def _begin_at(plan: Plan, number: int, step: int) -> Plan:
    stages = list(plan.stages)
    before, after = stages[number - 1], stages[number:]
    if not before.start < step < plan.total_steps:
        raise UserError(
            f"stage {number + 1} cannot begin at step {step}: the one before begins at "
            f"{before.start}, and the run ends at {plan.total_steps}"
        )
    stages[number - 1] = dataclasses.replace(before, steps=step - before.start)
    lengths = divide_steps(plan.total_steps - step, [math.log(stage.steps) for stage in after])
    for place, (stage, steps) in enumerate(zip(after, lengths, strict=True), start=number):
        stages[place] = dataclasses.replace(stage, start=step, steps=steps)
        step += steps
    return Plan(tuple(stages))


def choice_of(
    candidate: Candidate, plan: Plan, number: int, growth: GrowthConfig
) -> Decision:
    """The decision for this candidate, as if it had been taken.

    Args:
      candidate: how to grow.
      plan: of the run.
      number: the stage that it grows into, counted from 0.
      growth: of the run, whose layers at the ends are kept.

    Raises:
      UserError: if it does not lead there.
    """
    before, stage = plan.stages[number - 1 : number + 1]
    grow_map, operator = candidate.growth_into(
        before.depth, stage.depth, growth.keep_first, growth.keep_last
    )
    return {
        "kind": "choice", "stage": number, "step": stage.start, "candidate": candidate.name,
        "operator": operator, "map": list(grow_map.sources), "growth": dict(candidate.settings),
    }


def alike(
    ways: Iterable[Candidate], plan: Plan, number: int, growth: GrowthConfig
) -> list[list[str]]:
    """The names of the candidates, those together that are the same growth into a stage.

    MIDAS and GradStack, say, differ from the second growth on only.
    """
    groups: dict[str, list[str]] = {}
    for way in ways:
        choice = choice_of(way, plan, number, growth)
        grown = json.dumps([choice["map"], choice["growth"]], sort_keys=True)
        groups.setdefault(grown, []).append(way.name)
    return list(groups.values())


def decided_growth(growth: GrowthConfig, taken: Iterable[Decision], number: int) -> GrowthConfig:
    """How copies start, and what becomes of their moments, at the growth into a stage."""
    for decision in taken:
        if decision["kind"] == "choice" and decision["stage"] == number:
            settings = decision["growth"]
            growth = Candidate("", None, settings).growth_config(growth)
    return growth


# ---- What is on disk -------------------------------------------------------------------------


class Decisions:
    """The decisions of a run directory; all processes hold the same.

    Attributes:
      taken: oldest first.
    """

    def __init__(self, run_dir: Path, taken: Sequence[Decision] = ()):
        self._path = run_dir / FILE
        self.taken: tuple[Decision, ...] = tuple(taken)

    @classmethod
    def open(cls, run_dir: Path, kept: Sequence[Decision] = ()) -> Decisions:
        """Reads what process 0 finds.

        Args:
          run_dir: of the run.
          kept: those of the checkpoint that it goes on from, which count where the file is gone.

        Raises:
          UserError: if the file cannot be read.
        """
        taken = read(run_dir) if jax.process_index() == 0 else []
        about = {(decision["kind"], decision["stage"]) for decision in taken}
        taken = [d for d in kept if (d["kind"], d["stage"]) not in about] + taken
        return cls(run_dir, consensus.from_first(sorted(taken, key=_order)))

    def record(self, decision: Decision) -> Decision:
        """Takes a decision: that of process 0, whatever this one would have decided.

        Returns:
          It, once it is on disk.

        Raises:
          UserError: if it cannot be written, as on a full disk.
        """
        # By way of JSON, so that what is acted on now is what is read after a restart.
        decision = consensus.from_first(json.loads(json.dumps(decision, allow_nan=False)))
        taken = (*self.taken, decision)
        with distributed.main_process_first("decision"):
            if jax.process_index() == 0:
                write(self._path, taken)
        self.taken = taken
        return decision

    def of_stage(self, number: int) -> list[Decision]:
        return [decision for decision in self.taken if decision["stage"] == number]

    def chosen(self, number: int) -> Decision | None:
        """The choice of how to grow into a stage; None where there is none yet."""
        found = [d for d in self.of_stage(number) if d["kind"] == "choice"]
        return found[-1] if found else None


def read(run_dir: Path) -> list[Decision]:
    """The decisions of a run directory, oldest first.

    Raises:
      UserError: if the file is there and cannot be read.
    """
    path = run_dir / FILE
    try:
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); without it the run would decide anew, and differ"
        ) from None


def write(path: Path, taken: Iterable[Decision]) -> None:
    """Writes the file whole or not at all, and waits until it would survive a power cut."""
    text = "".join(json.dumps(decision, allow_nan=False) + "\n" for decision in taken)
    with one_line_disk_errors(path):
        if is_remote(path):  # An object appears whole, and is stored when the call returns.
            path.write_text(text)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _order(decision: Decision) -> tuple[int, int]:
    """Of one stage, the boundary comes before the choice."""
    return int(decision["stage"]), 0 if decision["kind"] == "boundary" else 1
