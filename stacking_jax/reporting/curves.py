"""What is drawn, before it is drawn: smoothing, thinning, ranges. Plain numbers only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from stacking_jax.reporting.runs import Run

# The loss falls steeply in the first steps; what comes after this share is what one looks at.
SKIPPED = 0.1
_TOTAL_POINTS = 6000


def smooth(values: Sequence[float], groups: Sequence[Any], half_width: int) -> list[float]:
    """A centred running mean that does not reach across a change of group.

    At the start of a group, where the loss may fall steeply, the window shrinks on both sides, so
    that the mean is not late; at the end it loses its right side only, so that it stays calm.
    Values that are not finite are passed over.

    Args:
      values: one per row.
      groups: one per row; the stage, so that a step in the loss at a growth stays a step.
      half_width: rows on each side.
    """
    out: list[float] = []
    start = 0
    while start < len(values):
        end = start
        while end < len(values) and groups[end] == groups[start]:
            end += 1
        total, seen = [0.0], [0]
        for value in values[start:end]:
            finite = math.isfinite(value)
            total.append(total[-1] + (value if finite else 0.0))
            seen.append(seen[-1] + finite)
        size = end - start
        for i in range(size):
            reach = min(half_width, i)
            low, high = i - reach, min(i + reach + 1, size)
            n = seen[high] - seen[low]
            out.append((total[high] - total[low]) / n if n else math.nan)
        start = end
    return out


def thin(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points or so; of each bucket the lowest and the highest: no peak is lost."""
    if len(x) <= most:
        return list(x), list(y)
    width = math.ceil(2 * len(x) / most)
    xs, ys = [], []
    for start in range(0, len(x), width):
        places = [i for i in range(start, min(start + width, len(x))) if math.isfinite(y[i])]
        if places:
            ends = {min(places, key=lambda i: y[i]), max(places, key=lambda i: y[i])}
            for i in sorted(ends):
                xs.append(x[i])
                ys.append(y[i])
    return xs, ys


@dataclasses.dataclass(frozen=True)
class Limits:
    """The range of the loss axis: ends, whether it is logarithmic, and what is cut off."""

    low: float
    high: float
    log: bool
    cut: float | None  # The highest loss that is out of view.


def loss_limits(runs: Sequence[Run]) -> Limits:
    """A range that shows the part of the curves after each run's first few steps."""
    inside, everything = [], []
    for run in runs:
        begin = SKIPPED * max(run.step, run.total_steps or 0)
        smoothed = smooth(*loss_and_stage(run), half_width_of(run))
        for row, value in zip(run.train, smoothed, strict=True):
            everything.append(row["loss"])
            if row["step"] > begin:
                inside.append(value)
        for row in run.evals:
            everything.append(row["eval_loss"])
            if row["step"] > begin:
                inside.append(row["eval_loss"])
    everything = [v for v in everything if math.isfinite(v)]
    inside = [v for v in inside if math.isfinite(v)] or everything or [0.0, 1.0]
    low, high = min(inside), max(inside)
    if everything and max(everything) < high + 0.25 * (high - low):
        high = max(everything)
    log = low > 0 and high / low > 6
    if log:
        low, high = low / 1.05, high * 1.05
    else:
        pad = 0.06 * ((high - low) or abs(high) or 1.0)
        low, high = low - pad, high + pad
    cut = max(everything) if everything and max(everything) > high else None
    return Limits(low, high, log, cut)


def loss_and_stage(run: Run) -> tuple[list[float], list[Any]]:
    return [row["loss"] for row in run.train], [row.get("stage") for row in run.train]


def half_width_of(run: Run) -> int:
    return max(1, len(run.train) // 50)


def points_per_run(runs: Sequence[Run]) -> int:
    return max(60, min(800, _TOTAL_POINTS // max(1, len(runs))))


def end_of(run: Run, key: str) -> float:
    return (run.step if key == "step" else getattr(run, key)) or 0.0


def depth_steps(run: Run) -> list[tuple[int, int]]:
    """(first step, depth) of each stage that the run has reached."""
    first = run.growths[0]["from_depth"] if run.growths else run.first_depth
    if first is None:
        return []
    return [(0, first), *((row["step"], row["to_depth"]) for row in run.growths)]
