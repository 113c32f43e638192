"""What a stage boundary cost: the last old steps, what came between, and the first new ones.

A stall is the time from the end of the last old step to the end of the first new one, less what a
step of the new stage takes, and less evaluations and the trying out of candidates, which are
asked for and no part of growing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

_OF_A_STEP = ("data", "step")
_ASKED_FOR = ("evaluate", "choose")

Span = tuple[str, float, float]


def account(
    spans: Iterable[Span], done: Iterable[tuple[int, float]], start: int, last: int
) -> dict[str, Any] | None:
    """The row of metrics.jsonl for one boundary.

    Args:
      spans: `Clock.spans`.
      done: `Recorder.done`.
      start: updates done when the new stage began.
      last: the last of the new stage's first steps that are looked at.

    Returns:
      `seconds`, category -> seconds between the end of step `start` and that of the next;
      `step_seconds`, the median of the new stage's steps after its first, and of the old
      stage's `old_step_seconds`; `stall_seconds`, and in steps of the new stage `stall_steps`;
      `spans`, [category, begin, end] and `steps`, [step, end], in seconds from the end of
      step `start`. None where not enough of these steps was seen: a run that goes on there.
    """
    ends, spans = dict(done), list(spans)
    new = [_steps_alone(spans, ends, step) for step in range(start + 2, last + 1)]
    if not new or None in new or start not in ends or start + 1 not in ends:
        return None
    old = [_steps_alone(spans, ends, step) for step in range(start - len(new) + 1, start + 1)]
    old = [seconds for seconds in old if seconds is not None]
    zero = ends[start]
    seconds = seconds_between(spans, zero, ends[start + 1])
    step_seconds = statistics.median(new)
    stall = sum(value for name, value in seconds.items() if name not in _ASKED_FOR) - step_seconds
    shown = [step for step in range(start - len(old), last + 1) if step in ends]
    begins, stops = ends[shown[0]], ends[last]
    return {
        "seconds": seconds,
        "step_seconds": step_seconds,
        "old_step_seconds": statistics.median(old) if old else None,
        "stall_seconds": max(stall, 0.0),
        "stall_steps": max(stall, 0.0) / step_seconds,
        "spans": [
            [name, round(begin - zero, 6), round(end - zero, 6)]
            for name, begin, end in _without_splinters(spans, begins, stops)
        ],
        "steps": [[step, round(ends[step] - zero, 6)] for step in shown],
    }


def seconds_between(spans: Iterable[Span], begin: float, end: float) -> dict[str, float]:
    """Category -> seconds of the time from `begin` to `end`."""
    seconds: dict[str, float] = {}
    for name, began, ended in spans:
        part = min(end, ended) - max(begin, began)
        if part > 0:
            seconds[name] = seconds.get(name, 0.0) + part
    return seconds


def _without_splinters(spans: list[Span], begin: float, end: float) -> list[Span]:
    """The pieces of a time, end to end; those too short to be seen belong to the one before."""
    kept: list[Span] = []
    for name, began, ended in spans:
        began, ended = max(began, begin), min(ended, end)
        if ended <= began:
            continue
        short = ended - began < 0.002 * (end - begin)
        if kept and (short or kept[-1][0] == name):
            kept[-1] = (kept[-1][0], kept[-1][1], ended)
        else:
            kept.append((name, began, ended))
    return kept


def _steps_alone(spans: list[Span], ends: dict[int, float], step: int) -> float | None:
    """Seconds from the end of the step before to the end of this one, but for saving and such."""
    if step not in ends or step - 1 not in ends:
        return None
    seconds = seconds_between(spans, ends[step - 1], ends[step])
    return sum(seconds.get(name, 0.0) for name in _OF_A_STEP)
