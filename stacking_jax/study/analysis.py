"""What a study says: differences at equal steps, equal FLOPs and equal time, as plain data.

Rules: only runs whose learning-rate schedule ended are read; every difference is paired by
seed and has an interval; a comparison that was not declared beforehand is exploratory.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from stacking_jax.reporting.comparison import EQUAL_FLOPS
from stacking_jax.study import statistics
from stacking_jax.study.results import ArmResult, StudyResult, last_scores
from stacking_jax.study.statistics import Difference

UNITS = {"loss": "nats per token", "score": "points of 100"}
NO_EVIDENCE = "no evidence"


@dataclasses.dataclass(frozen=True)
class Line:
    """One difference, arm − reference.

    Attributes:
      arm, reference: names; of the A/A row both are the same.
      endpoint: 'loss' or 'score'.
      budget: what the two share: 'steps', 'FLOPs', 'time', or how they differ.
      found: the difference; None without a pair of seeds.
      adjusted: Holm's p value, for comparisons declared beforehand.
      detectable: the smallest effect that such a comparison finds with power 0.8, at the error
        rate of its family's strictest test.
      says: in words; see `statistics.words`.
      note: how it came about, where that needs saying.
    """

    arm: str
    reference: str
    endpoint: str
    budget: str
    found: Difference | None
    adjusted: float | None = None
    detectable: float | None = None
    says: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TimeToLoss:
    """How much sooner an arm reaches the final loss of a reference.

    Attributes:
      arm, reference: names.
      reached: in how many of `pairs` seeds it does at all.
      pairs: seeds that both have.
      ratio, low, high: time of the reference's whole run over the time at which the arm
        reaches its loss: geometric mean, and its 95 % interval; None unless all seeds reach it.
    """

    arm: str
    reference: str
    reached: int
    pairs: int
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that the report shows; `to_dict` is what results.json holds."""

    declared: tuple[Line, ...]
    noise: tuple[Line, ...]
    equal_steps: tuple[Line, ...]
    equal_flops: tuple[Line, ...]
    equal_time: tuple[Line, ...]
    time_to_loss: tuple[TimeToLoss, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def analyse(study: StudyResult) -> Analysis:
    """Every comparison of a study; see the module's text for the rules."""
    evidence = _informative(study)
    pairs = [
        (arm, reference) for reference in study.references for arm in study.arms.values()
        if arm is not reference
    ]
    return Analysis(
        declared=_declared(study, evidence),
        noise=_noise(study),
        equal_steps=_at_equal(study, pairs, "steps"),
        equal_flops=_at_equal(study, pairs, "FLOPs"),
        equal_time=_at_equal_time(study),
        time_to_loss=tuple(
            time_to_loss(arm, reference) for arm, reference in pairs
            if arm.clocks and reference.clocks
        ),
        notes=_notes(study, evidence),
    )


def shared_budget(a: ArmResult, b: ArmResult) -> str:
    """What two arms share, in words."""
    shared = []
    if a.steps == b.steps:
        shared.append("steps")
    if abs(a.model_flops - b.model_flops) <= EQUAL_FLOPS * max(a.model_flops, b.model_flops):
        shared.append("FLOPs")
    return "equal " + " and ".join(shared) if shared else "unequal budgets"


def _declared(study: StudyResult, evidence: bool | None) -> tuple[Line, ...]:
    lines = [
        _line(study.arms[arm], study.arms[reference], endpoint)
        for endpoint in study.config.endpoints
        for arm, reference in study.config.comparisons
    ]
    tested = [i for i, line in enumerate(lines) if line.found and line.found.p is not None]
    adjusted = statistics.holm([lines[i].found.p for i in tested])
    for i, p in zip(tested, adjusted, strict=True):
        found = lines[i].found
        detectable = statistics.smallest_detectable(
            found.deviation, found.pairs, (1 - statistics.LEVEL) / len(lines)
        )
        says = statistics.words(found, p)
        if lines[i].endpoint == "score" and evidence is False:
            says = NO_EVIDENCE
        lines[i] = dataclasses.replace(
            lines[i], adjusted=p, detectable=detectable, says=says
        )
    return tuple(lines)


def _line(arm: ArmResult, reference: ArmResult, endpoint: str) -> Line:
    found = statistics.paired(arm.values(endpoint), reference.values(endpoint))
    return Line(
        arm.name, reference.name, endpoint, shared_budget(arm, reference), found,
        says=statistics.words(found),
    )


def _noise(study: StudyResult) -> tuple[Line, ...]:
    name = study.config.noise_arm or next(iter(study.arms))
    lines = []
    for endpoint in study.config.endpoints:
        found = statistics.halves(study.arms[name].values(endpoint))
        lines.append(
            Line(name, name, endpoint, "the same", found, says=statistics.words(found),
                 note="one half of its seeds against the other")
        )
    return tuple(lines)


def _at_equal(
    study: StudyResult, pairs: Sequence[tuple[ArmResult, ArmResult]], budget: str
) -> tuple[Line, ...]:
    return tuple(
        _line(arm, reference, endpoint)
        for endpoint in study.config.endpoints
        for arm, reference in pairs
        if budget in shared_budget(arm, reference).split()
    )


def _at_equal_time(study: StudyResult) -> tuple[Line, ...]:
    """Each arm against full depth that ended when it did.

    No run was planned for an equal time. Where references ended before and after, each with
    its own schedule, what lies between is interpolated over the logarithm of time, seed by seed.
    """
    ends = sorted(
        (arm for arm in study.references if arm.clocks and _never_grows(arm)),
        key=lambda arm: arm.seconds,
    )
    lines = []
    for endpoint in study.config.endpoints:
        for arm in study.arms.values():
            if arm.seconds is None or arm in ends or not ends:
                continue
            lines.append(_equal_time_line(arm, ends, endpoint))
    return tuple(lines)


def _never_grows(arm: ArmResult) -> bool:
    return all(len(clock.stages) == 1 for clock in arm.clocks.values())


def _equal_time_line(arm: ArmResult, ends: Sequence[ArmResult], endpoint: str) -> Line:
    time = arm.seconds
    near = min(ends, key=lambda end: abs(end.seconds - time))
    if abs(near.seconds - time) <= EQUAL_FLOPS * time:
        return dataclasses.replace(_line(arm, near, endpoint), budget="equal time")
    before = [end for end in ends if end.seconds < time]
    after = [end for end in ends if end.seconds > time]
    if not before or not after:
        took = ", ".join(f"{end.name} {end.seconds:.0f} s" for end in ends)
        return Line(
            arm.name, near.name, endpoint, "time", None, says="no reference ended there",
            note=f"{time:.0f} s; {took}",
        )
    low, high = before[-1], after[0]
    share = math.log(time / low.seconds) / math.log(high.seconds / low.seconds)
    a, b = low.values(endpoint), high.values(endpoint)
    between = {seed: (1 - share) * a[seed] + share * b[seed] for seed in set(a) & set(b)}
    found = statistics.paired(arm.values(endpoint), between)
    return Line(
        arm.name, f"{low.name} … {high.name}", endpoint, "equal time", found,
        says=statistics.words(found),
        note=f"interpolated between runs of {low.seconds:.0f} s and "
        f"{high.seconds:.0f} s at {time:.0f} s",
    )


def time_to_loss(arm: ArmResult, reference: ArmResult) -> TimeToLoss:
    """When the arm's own run first has the loss with which the reference ended.

    Along the arm's one run, whose schedule ends at its own budget: a point before its end is
    not yet decayed, so the figure is on the careful side for the arm.
    """
    goals = reference.values("loss")
    seeds = sorted(set(goals) & set(arm.runs))
    logs = []
    for seed in seeds:
        curve = [(row["step"], row["eval_loss"]) for row in arm.runs[seed].evals]
        step = first_below(curve, goals[seed])
        if step is not None:
            logs.append(math.log(reference.clocks[seed].total / arm.clocks[seed].at(step)))
    if not seeds or len(logs) < len(seeds):
        return TimeToLoss(arm.name, reference.name, len(logs), len(seeds))
    found = statistics.mean_of(logs)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return TimeToLoss(
        arm.name, reference.name, len(logs), len(seeds), math.exp(found.mean), low, high
    )


def first_below(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The step at which a curve (step, loss) first reaches `goal`, between points on a line."""
    before = None
    for step, loss in curve:
        if loss <= goal:
            if before is None or before[1] <= loss:
                return step
            share = (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def _informative(study: StudyResult) -> bool | None:
    """Whether the score can tell arms apart at all; None where there is no such rule."""
    if study.config.informative is None:
        return None
    name, low, high = study.config.informative
    values = study.arms[name].values("score")
    return None if not values else low <= sum(values.values()) / len(values) <= high


def _notes(study: StudyResult, evidence: bool | None) -> tuple[str, ...]:
    notes = []
    if evidence is False:
        name, low, high = study.config.informative
        values = study.arms[name].values("score").values()
        notes.append(
            f"No evidence on the score: {name} has {sum(values) / len(values):.1f} of 100, outside "
            f"{low:g} to {high:g}, so the tasks are too hard or too easy to tell arms apart."
        )
    few = [arm.name for arm in study.arms.values() if len(arm.runs) < 2]
    if few:
        notes.append(f"Fewer than two seeds, and so no interval: {', '.join(few)}.")
    lacking = [arm.name for arm in study.arms.values() if len(arm.runs) < len(arm.states)]
    if lacking:
        notes.append(
            "Not all cells are complete and comparable; differences are over the seeds that "
            f"both arms have. Lacking: {', '.join(lacking)}."
        )
    without = {
        f"{task} ({row.get('reason', 'no value')})"
        for arm in study.arms.values() for run in arm.runs.values()
        for task, row in last_scores(run).items() if row.get("value") is None
    }
    if without:
        listed = "; ".join(sorted(without))
        notes.append(f"Runs without a score, since a task has no value: {listed}.")
    if study.config.may_differ:
        differ = {key: _differing(study, key) for key in study.config.may_differ}
        listed = ", ".join(
            key.replace("_", " ") + (f" ({', '.join(arms)})" if arms else "")
            for key, arms in differ.items()
        )
        notes.append(
            f"By the study's own design, arms may differ in {listed}"
            + ("; in brackets, those that differ from most." if any(differ.values()) else ".")
        )
    return tuple(notes)


def _differing(study: StudyResult, key: str) -> list[str]:
    """The arms whose runs say something else of it than most arms do."""
    told = {
        arm.name: json.dumps(run.comparability[key], default=str)
        for arm in study.arms.values() for run in arm.runs.values() if key in run.comparability
    }
    counts = collections.Counter(told.values()).most_common(1)
    return [name for name, value in told.items() if value != counts[0][0]]
