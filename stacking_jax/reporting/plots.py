"""Figures of a comparison, as SVG text for the report.

Each figure is drawn without pyplot (no global state) and holds no text of the
runs: their names stand in the page's legend, which escapes them.

Above each axis against which a run grows lies a strip per run with the depth
of each stage in it. Boundaries continue as dotted lines through the plot.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.curves import (
    Limits,
    depth_steps,
    end_of,
    half_width_of,
    loss_and_stage,
    loss_limits,
    points_per_run,
    smooth,
    thin,
)
from stacking_jax.reporting.runs import Run
from stacking_jax.reporting.svg import FAINT, INK, STRIP, inline_svg, new_axes

# Okabe and Ito's colours, which people with any of the common colour blindnesses tell apart,
# without the yellow (too light for a line on white). Marks and dashes differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#3B3B3B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_MOST_STRIPS = 6


@dataclasses.dataclass(frozen=True)
class Figure:
    """One drawn figure: its title, what is to be seen (also for screen readers), and the SVG."""

    key: str
    title: str
    caption: str
    svg: str


def run_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the run at this place."""
    n = len(COLORS)
    return {
        "color": COLORS[index % n],
        "marker": MARKERS[index % n],
        "linestyle": DASHES[(index // n) % len(DASHES)],
    }


def draw_figures(comparison: Comparison) -> list[Figure]:
    """All figures for which the runs hold data.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib import style

    # A person's own matplotlibrc is meant for other figures.
    with style.context("default"):
        return _figures(comparison)


def _figures(comparison: Comparison) -> list[Figure]:
    runs = comparison.runs
    figures = []
    if any(run.train or run.evals for run in runs):
        limits = loss_limits(runs)
        figures += [
            _loss_figure(runs, limits, *axis)
            for axis in (
                ("step", "Loss against steps", "step", "steps"),
                ("model_flops", "Loss against model FLOPs", "FLOP", "model FLOPs"),
                ("train_seconds", "Loss against training time", "time", "training time"),
                ("wall_seconds", "Loss against wall time", "time", "wall time"),
            )
        ]
    ends = [
        i
        for i, (row, ok) in enumerate(zip(comparison.rows, comparison.eligible, strict=True))
        if ok and units.known(row.eval_loss)
    ]
    if len(ends) > 1:
        figures.append(_ends_figure(comparison, ends))
    if any("learning_rate" in row for run in runs for row in run.train):
        figures.append(_rate_figure(runs))
    if any(depth_steps(run) for run in runs):
        figures.append(_depth_figure(runs))
    if any(len(run.train) > 2 for run in runs):
        figures.append(_speed_figure(runs))
    return figures


# What each figure shows.


def _loss_figure(
    runs: Sequence[Run], limits: Limits, key: str, title: str, unit: str, called: str
) -> Figure:
    largest = max((end_of(run, key) for run in runs), default=0.0)
    divisor, name = (1.0, "") if unit == "step" else units.axis_scale(largest, unit)
    figure, axes = new_axes(_num_strips(runs))
    most = points_per_run(runs)
    for i, run in enumerate(runs):
        style = run_style(i)
        x = [row[key] / divisor for row in run.train]
        loss, stage = loss_and_stage(run)
        # The more points stand on a point of paper, the fainter each of them.
        faint = 0.28 if min(len(x), most) * len(runs) < 1200 else 0.14
        axes.plot(*thin(x, loss, most), color=style["color"], lw=0.6, alpha=faint, zorder=2)
        axes.plot(
            *thin(x, smooth(loss, stage, half_width_of(run)), most // 2),
            color=style["color"], ls=style["linestyle"], lw=1.0, alpha=0.6, zorder=3,
        )  # fmt: skip
        ex = [row[key] / divisor for row in run.evals]
        ey = [row["eval_loss"] for row in run.evals]
        axes.plot(
            ex, ey, color=style["color"], ls=style["linestyle"], lw=1.5, zorder=4,
            marker=style["marker"], ms=3.6, mec="white", mew=0.5,
            markevery=max(1, len(ex) // max(6, 120 // len(runs))),
        )  # fmt: skip
        if ex:
            # Filled where a run has ended, hollow where it goes on.
            axes.plot(
                ex[-1:], ey[-1:], ls="", marker=style["marker"], ms=6.5, zorder=5,
                mfc=style["color"] if run.finished else "white",
                mec="white" if run.finished else style["color"], mew=0.8,
            )  # fmt: skip
    if limits.log:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.set_ylim(limits.low, limits.high)
    axes.set_xlim(0, 1.02 * largest / divisor or 1)
    if key == "step":
        _step_ticks(axes)
    else:
        axes.set_xlabel(f"{called} [{name}]")
    axes.set_ylabel("loss [nats per token]" + (", logarithmic" if limits.log else ""))
    strips = _strips(axes, runs, key, divisor)
    caption = (
        "Faint: training loss as logged; thin: its running mean within a stage; thick with marks:"
        " held-out loss."
    )
    if limits.cut is not None:
        caption += (
            f" The loss axis ends at {limits.high:.2f}: the first steps, up to {limits.cut:.2f},"
            " are out of view."
        )
    if strips:
        caption += " Strips above: depth of each stage; dotted lines: where the run grew."
    return _finish(figure, key, title, caption)


def _ends_figure(comparison: Comparison, ends: Sequence[int]) -> Figure:
    """Only the ends of runs whose schedules ended: the points that may be set side by side."""
    figure, axes = new_axes()
    shown = [(i, comparison.rows[i]) for i in ends]
    largest = max(row.model_flops for _, row in shown)
    divisor, name = units.axis_scale(largest, "FLOP")
    for i, row in shown:
        style = run_style(i)
        axes.plot(
            [row.model_flops / divisor], [row.eval_loss], ls="", marker=style["marker"], ms=8,
            color=style["color"], mec="white", mew=0.8, zorder=4,
        )  # fmt: skip
    axes.set_xlim(0, 1.08 * largest / divisor)
    axes.margins(y=0.3)
    axes.set_xlabel(f"model FLOPs of the whole run [{name}]")
    axes.set_ylabel("final held-out loss [nats per token]")
    axes.ticklabel_format(axis="y", useOffset=False)
    return _finish(
        figure,
        "ends",
        "Held-out loss at the end of each run",
        "One point per run that ended with its learning-rate schedule and is comparable. Points one"
        " above the other share a budget. The loss axis does not start at zero.",
    )


def _rate_figure(runs: Sequence[Run]) -> Figure:
    figure, axes = new_axes(_num_strips(runs))
    curves = []
    for run in runs:
        rows = [row for row in run.train if units.known(row.get("learning_rate"))]
        curves.append(([row["step"] for row in rows], [row["learning_rate"] for row in rows]))
    peak = max((rate for _, rates in curves for rate in rates), default=0.0)
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    power = 0 if -2 <= power <= 2 else power
    for i, (x, y) in enumerate(curves):
        style = run_style(i)
        # Wider beneath, narrower above: runs that share a schedule lie on one another.
        width = 1.4 + 1.3 * (len(runs) - 1 - i) / max(1, len(runs) - 1)
        axes.plot(
            *thin(x, [rate / 10**power for rate in y], points_per_run(runs) // 2),
            color=style["color"], ls=style["linestyle"], lw=width,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _step_ticks(axes)
    axes.set_ylabel("learning rate" + (f" [$10^{{{power}}}$]" if power else ""))
    _strips(axes, runs, "step", 1.0)
    return _finish(
        figure,
        "learning_rate",
        "Learning rate",
        "The schedule runs over the steps of the whole run, whatever the stage.",
    )


def _depth_figure(runs: Sequence[Run]) -> Figure:
    figure, axes = new_axes()
    deepest = 1
    for i, run in enumerate(runs):
        steps = depth_steps(run)
        style = run_style(i)
        # Runs of one depth would hide one another: each is moved by a little.
        shift = (i - (len(runs) - 1) / 2) * 0.012 * max((d for _, d in steps), default=1)
        x = [point for begin, _ in steps for point in (begin, begin)][1:] + [run.step]
        y = [depth + shift for _, depth in steps for _ in range(2)]
        deepest = max([deepest, *(d for _, d in steps)])
        if steps:
            axes.plot(x, y, color=style["color"], ls=style["linestyle"], lw=1.8)
    axes.set_ylim(0, 1.12 * deepest)
    axes.set_xlim(left=0)
    axes.set_yticks(_depth_ticks(runs, deepest))
    _step_ticks(axes)
    axes.set_ylabel("depth [layers]")
    return _finish(
        figure,
        "depth",
        "Depth over the run",
        "Layers that are trained at each step. Lines of one depth are drawn next to each other.",
    )


def _speed_figure(runs: Sequence[Run]) -> Figure:
    figure, axes = new_axes(_num_strips(runs))
    curves = []
    for run in runs:
        x, y, stage = [], [], []
        for before, row in itertools.pairwise(run.train):
            seconds = row["train_seconds"] - before["train_seconds"]
            if seconds > 0 and row["tokens"] > before["tokens"]:
                x.append(row["step"])
                y.append((row["tokens"] - before["tokens"]) / seconds)
                stage.append(row.get("stage"))
        curves.append((x, smooth(y, stage, half_width_of(run))))
    largest = max((v for _, y in curves for v in y), default=0.0)
    divisor, name = units.axis_scale(largest, "tokens/s")
    for i, (x, y) in enumerate(curves):
        style = run_style(i)
        axes.plot(
            *thin(x, [v / divisor for v in y], points_per_run(runs) // 2),
            color=style["color"], ls=style["linestyle"], lw=1.4,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _step_ticks(axes)
    axes.set_ylabel(f"speed [{name}]")
    _strips(axes, runs, "step", 1.0)
    return _finish(
        figure,
        "speed",
        "Tokens per second of training time",
        "Real tokens (no padding) over the time of the steps alone, running mean within a stage.",
    )


# What the figures are made of.


def _depth_ticks(runs: Sequence[Run], deepest: int) -> list[int]:
    depths = sorted({depth for run in runs for _, depth in depth_steps(run)})
    kept: list[int] = []
    for depth in reversed(depths):
        if not kept or kept[-1] - depth >= 0.06 * deepest:
            kept.append(depth)
    return [0, *reversed(kept)]


def _num_strips(runs: Sequence[Run]) -> int:
    return min(_MOST_STRIPS, sum(bool(run.growths) for run in runs))


def _strips(axes, runs: Sequence[Run], key: str, divisor: float) -> bool:
    """Draws the strip of depths of each run that grew, and the boundaries through the plot."""
    from matplotlib.patches import Rectangle

    grown = [(i, run) for i, run in enumerate(runs) if run.growths]
    for i, run in grown:
        for row in run.growths:
            color = run_style(i)["color"]
            axes.axvline(row[key] / divisor, color=color, lw=0.8, ls=":", zorder=1)
    place = axes.get_position()
    figure = axes.figure
    width_pt = place.width * figure.get_figwidth() * 72
    high_pt = place.height * figure.get_figheight() * 72
    left, right = axes.get_xlim()
    blend = axes.get_xaxis_transform()
    for level, (i, run) in enumerate(grown[:_MOST_STRIPS]):
        bottom, high = 1 + (3 + STRIP * level) / high_pt, (STRIP - 2) / high_pt
        edges = [0.0, *(row[key] / divisor for row in run.growths), end_of(run, key) / divisor]
        depths = [depth for _, depth in depth_steps(run)]
        for (begin, end), depth in zip(itertools.pairwise(edges), depths, strict=True):
            color = COLORS[i % len(COLORS)]
            axes.add_patch(
                Rectangle(
                    (begin, bottom), end - begin, high, transform=blend, clip_on=False,
                    facecolor=color, alpha=0.10 + 0.22 * depth / max(depths), lw=0,
                )
            )  # fmt: skip
            axes.add_patch(
                Rectangle(
                    (begin, bottom), end - begin, high, transform=blend, clip_on=False,
                    fill=False, edgecolor="white", lw=0.8,
                )
            )  # fmt: skip
            # A number that would not fit in its stage is left to the table of stages.
            if (end - begin) / (right - left or 1) * width_pt >= 4.6 * len(str(depth)) + 3:
                axes.text(
                    (begin + end) / 2, bottom + high / 2, str(depth), transform=blend,
                    ha="center", va="center_baseline", fontsize=8, color=INK, clip_on=False,
                )  # fmt: skip
        if level == 0:
            axes.annotate(
                "depth", (0, bottom + high / 2), xycoords=blend, xytext=(-4, 0),
                textcoords="offset points", ha="right", va="center", fontsize=8, color=FAINT,
                annotation_clip=False,
            )  # fmt: skip
    axes.set_xlim(left, right)
    return bool(grown)


def _step_ticks(axes) -> None:
    """Steps as whole numbers, long ones with their thousands as K."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))

    def name(step: float, _) -> str:
        return f"{step / 1000:g} K" if step and axes.get_xlim()[1] >= 10_000 else f"{step:g}"

    axes.xaxis.set_major_formatter(FuncFormatter(name))


def _plain_log_ticks(axes) -> None:
    """Losses are read as numbers, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(figure, key: str, title: str, caption: str) -> Figure:
    return Figure(key, title, caption, inline_svg(figure, key, f"{title}. {caption}"))
