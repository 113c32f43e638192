"""Figures of a study: arms with bands over seeds, final values, differences with intervals.

As in `reporting.plots`, no name stands in a figure: the page's legend holds them, and a picture
has a legend of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from stacking_jax.errors import UserError
from stacking_jax.reporting import units
from stacking_jax.reporting.curves import SKIPPED
from stacking_jax.reporting.drawn import Drawn
from stacking_jax.reporting.plots import run_style
from stacking_jax.reporting.svg import FAINT, new_axes
from stacking_jax.study.analysis import UNITS, Line
from stacking_jax.study.results import ArmResult, StudyResult
from stacking_jax.study.statistics import mean_of

_AXES = (
    ("tokens", "Loss against tokens", "tokens", "tokens"),
    ("model_flops", "Loss against model FLOPs", "FLOP", "model FLOPs"),
    ("time", "Loss against time", "time", "time of steps and boundaries"),
)


def study_figures(study: StudyResult, declared: Sequence[Line]) -> list[Drawn]:
    """All figures for which the study has runs.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise UserError(
            f"the report's figures need matplotlib ({error}); install the 'train' extra"
        ) from error

    arms = list(study.arms.values())
    figures = []
    with style.context("default"):
        if any(run.evals for arm in arms for run in arm.runs.values()):
            figures += [_curves(arms, *axis) for axis in _AXES]
        for endpoint in ("loss", "score"):
            if any(arm.values(endpoint) for arm in arms):
                figures.append(_ends(arms, endpoint))
        for endpoint in dict.fromkeys(line.endpoint for line in declared):
            lines = [line for line in declared if line.endpoint == endpoint]
            if any(line.found and line.found.low is not None for line in lines):
                figures.append(_differences(study, lines, endpoint))
    return figures


def band(arm: ArmResult, key: str) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of the held-out loss at every step that all seeds evaluated."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for seed, run in arm.runs.items():
        for row in run.evals:
            x = arm.clocks[seed].at(row["step"]) if key == "time" else row[key]
            by_step.setdefault(int(row["step"]), []).append((x, row["eval_loss"]))
    points = []
    for _, found in sorted(by_step.items()):
        losses = [loss for _, loss in found]
        if len(found) == len(arm.runs):
            x = statistics.fmean(x for x, _ in found)
            points.append((x, statistics.fmean(losses), min(losses), max(losses)))
    return points


def _curves(
    arms: Sequence[ArmResult], key: str, title: str, unit: str, called: str
) -> Drawn:
    bands = [band(arm, key) if arm.runs else [] for arm in arms]
    largest = max((points[-1][0] for points in bands if points), default=1.0)
    divisor, name = units.axis_scale(largest, unit)
    figure, axes = new_axes()
    shown: list[float] = []
    for i, points in enumerate(bands):
        if not points:
            continue
        style = run_style(i)
        x, mean, low, high = ([p[k] for p in points] for k in range(4))
        x = [value / divisor for value in x]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0, zorder=2)
        axes.plot(x, mean, color=style["color"], ls=style["linestyle"], lw=1.5, zorder=3)
        axes.plot(
            x[-1:], mean[-1:], ls="", marker=style["marker"], ms=6, color=style["color"],
            mec="white", mew=0.7, zorder=4,
        )  # fmt: skip
        late = [p for p in points if p[0] > SKIPPED * points[-1][0]] or points
        shown += [value for p in late for value in p[2:]]
    low, high = min(shown), max(shown)
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low - pad, high + pad)
    axes.set_xlim(0, 1.02 * largest / divisor)
    axes.set_xlabel(f"{called} [{name}]" if name != called else called)
    axes.set_ylabel("held-out loss [nats per token]")
    caption = (
        "Line: mean over seeds; band: the lowest to the highest seed; the mark is where the "
        "schedule ended. Only marks may be compared with marks: on the way the learning rate is "
        "still high. The first tenth of each run may be out of view."
    )
    return Drawn(f"study-{key.replace('_', '-')}", title, caption, figure, _legend(arms))


def _ends(arms: Sequence[ArmResult], endpoint: str) -> Drawn:
    figure, axes = new_axes()
    for i, arm in enumerate(arms):
        style, values = run_style(i), list(arm.values(endpoint).values())
        if not values:
            continue
        axes.plot(
            [i] * len(values), values, ls="", marker=style["marker"], ms=5, alpha=0.45,
            color=style["color"], mec="white", mew=0.5, zorder=3,
        )  # fmt: skip
        mean = mean_of(values)
        if mean.low is not None:
            axes.plot([i + 0.22] * 2, [mean.low, mean.high], color=style["color"], lw=1.6)
        axes.plot([i + 0.14, i + 0.3], [mean.mean] * 2, color=style["color"], lw=2.2)
    axes.set_xlim(-0.6, len(arms) - 0.3)
    axes.set_xticks([])
    axes.ticklabel_format(axis="y", useOffset=False)
    what = "final held-out loss" if endpoint == "loss" else "final score, mean of the tasks"
    axes.set_ylabel(f"{what} [{UNITS[endpoint]}]")
    caption = (
        "Arms from left to right as in the legend. Marks: seeds; beside them the mean and its "
        "95 % interval over seeds. Arms share seeds: whether two of them differ is told by the "
        "paired differences, not by whether these intervals overlap."
    )
    title = "Final held-out loss" if endpoint == "loss" else "Final score"
    return Drawn(f"study-ends-{endpoint}", title, caption, figure, _legend(arms, line=False))


def _differences(study: StudyResult, lines: Sequence[Line], endpoint: str) -> Drawn:
    figure, axes = new_axes()
    places = list(study.arms)
    axes.axvline(0, color=FAINT, lw=0.9, zorder=1)
    for row, line in enumerate(lines):
        if line.found is None:
            continue
        style, found = run_style(places.index(line.arm)), line.found
        if found.low is not None:
            axes.plot([found.low, found.high], [row, row], color=style["color"], lw=1.8)
        axes.plot(
            [found.mean], [row], ls="", marker=style["marker"], ms=7, color=style["color"],
            mec="white", mew=0.7, zorder=3,
        )  # fmt: skip
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [str(row + 1) for row in range(len(lines))])
    axes.set_xlabel(f"arm − reference [{UNITS[endpoint]}]")
    axes.set_ylabel("comparison")
    caption = (
        "Mean paired difference and its 95 % interval over seeds, before the correction for "
        "several comparisons; numbered as in the table. What crosses the line at zero is not "
        "distinguishable from no difference."
    )
    what = "held-out loss" if endpoint == "loss" else "score"
    legend = tuple(
        (_mark(places.index(line.arm)), f"{row}. {line.arm} − {line.reference}")
        for row, line in enumerate(lines, start=1)
    )
    return Drawn(f"study-differences-{endpoint}", f"Differences in {what}", caption, figure, legend)


def _legend(arms: Sequence[ArmResult], line: bool = True) -> tuple:
    return tuple(
        (run_style(i) if line else _mark(i), arm.name) for i, arm in enumerate(arms)
    )


def _mark(index: int) -> dict:
    return run_style(index) | {"linestyle": ""}
