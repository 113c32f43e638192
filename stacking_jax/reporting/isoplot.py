"""Isoplots: what a model can do against its loss, over the checkpoints of a run.

Two methods that reach the same loss need not be able to do the same (MIDAS,
arXiv:2409.19044, §5; Saunshi et al. 2025, §3.2). A point is a checkpoint: its validation
log-perplexity (nats per token) and the mean score of a group of tasks. A line is fitted by
least squares per method, over the points of all its runs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from stacking_jax.errors import UserError
from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.drawn import save_png
from stacking_jax.reporting.plots import Figure, run_style
from stacking_jax.reporting.runs import Run
from stacking_jax.reporting.svg import FAINT, INK, inline_svg, new_axes


@dataclasses.dataclass(frozen=True)
class Point:
    """A checkpoint of a run: its loss, and its mean score on a group of tasks."""

    step: int
    loss: float
    score: float


@dataclasses.dataclass(frozen=True)
class Line:
    """score = slope · loss + offset, for losses from `low` to `high`.

    Attributes:
      points: how many it was fitted to.
      residual: root mean square of what it leaves, in points of score.
    """

    slope: float
    offset: float
    low: float
    high: float
    points: int
    residual: float

    def at(self, loss: float) -> float:
        return self.slope * loss + self.offset


@dataclasses.dataclass(frozen=True)
class Isoplot:
    """One group of tasks.

    Attributes:
      group: its name.
      tasks: names of its tasks, the same at every point.
      chance: mean chance of its tasks, None where one of them has none.
      points: per run, in the order of the comparison.
      lines: method -> fitted line, where two losses or more are known.
      notes: what was left out.
    """

    group: str
    tasks: tuple[str, ...]
    chance: float | None
    points: tuple[tuple[Point, ...], ...]
    lines: dict[str, Line]
    notes: tuple[str, ...]

    @property
    def shared_loss(self) -> float | None:
        """The middle of the losses that every line covers; None where they do not overlap."""
        if len(self.lines) < 2:
            return None
        low = max(line.low for line in self.lines.values())
        high = min(line.high for line in self.lines.values())
        return (low + high) / 2 if low <= high else None


def isoplots(runs: Sequence[Run]) -> list[Isoplot]:
    """One for each group of tasks that was evaluated at some checkpoint with a loss."""
    # A group is compared over the tasks that every run with that group has.
    groups: dict[str, list[set[str]]] = {}
    for run in runs:
        mine: dict[str, set[str]] = {}
        for row in run.task_evals:
            if units.known(row.get("value")):
                mine.setdefault(str(row.get("group", "")), set()).add(row["task"])
        for group, tasks in mine.items():
            groups.setdefault(group, []).append(tasks)
    found = []
    for group, sets in groups.items():
        tasks = set.intersection(*sets)
        made = _isoplot(runs, group, tasks, set.union(*sets) - tasks) if tasks else None
        if made is not None:
            found.append(made)
    return found


def _isoplot(runs: Sequence[Run], group: str, tasks: set[str], partial: set[str]) -> Isoplot | None:
    notes = []
    if partial:
        notes.append(f"left out, since not every run has them: {', '.join(sorted(partial))}")
    points, chances, without = [], {}, 0
    for run in runs:
        losses = {row["step"]: row["eval_loss"] for row in run.evals}
        by_step: dict[int, dict[str, float]] = {}
        for row in run.task_evals:
            if row["task"] in tasks and units.known(row.get("value")):
                by_step.setdefault(int(row["step"]), {})[row["task"]] = row["value"]
                chances[row["task"]] = row.get("chance")
        mine = []
        for step, scores in sorted(by_step.items()):
            if set(scores) == tasks and units.known(losses.get(step)):
                mine.append(Point(step, losses[step], sum(scores.values()) / len(scores)))
            else:
                without += 1
        points.append(tuple(mine))
    if not any(points):
        return None
    if without:
        notes.append(
            f"left out: {without} checkpoints without a held-out loss or one of the scores"
        )
    lines = {}
    for method in dict.fromkeys(run.method for run in runs):
        pooled = [p for run, mine in zip(runs, points, strict=True) if run.method == method
                  for p in mine]  # fmt: skip
        line = fit_line([p.loss for p in pooled], [p.score for p in pooled])
        if line is not None:
            lines[method] = line
    known = [chances[task] for task in tasks]
    chance = None if any(not units.known(c) for c in known) else sum(known) / len(known)
    return Isoplot(group, tuple(sorted(tasks)), chance, tuple(points), lines, tuple(notes))


def fit_line(losses: Sequence[float], scores: Sequence[float]) -> Line | None:
    """The least-squares line; None where there are not two losses to fit it to."""
    count = len(losses)
    if count < 2:
        return None
    mean_x, mean_y = sum(losses) / count, sum(scores) / count
    spread = sum((x - mean_x) ** 2 for x in losses)
    if spread <= 1e-12:
        return None
    slope = sum(
        (x - mean_x) * (y - mean_y) for x, y in zip(losses, scores, strict=True)
    ) / spread
    offset = mean_y - slope * mean_x
    rest = sum((slope * x + offset - y) ** 2 for x, y in zip(losses, scores, strict=True))
    return Line(slope, offset, min(losses), max(losses), count, (rest / count) ** 0.5)


# Figures


def isoplot_figures(
    runs: Sequence[Run], found: Sequence[Isoplot], styles: Sequence[int] | None = None
) -> list[Figure]:
    """One figure per group, for the report.

    Args:
      runs: as `isoplots` was given them.
      found: what it found.
      styles: per run the place that decides its colour and mark; by default its own.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib import style

    figures = []
    with style.context("default"):
        for plot in found:
            figure, axes = new_axes()
            draw(axes, runs, plot, styles)
            title = f"{units.group_title(plot.group)} against loss"
            caption = (
                "A mark per checkpoint: validation log-perplexity and the mean score of "
                f"{_counted(len(plot.tasks), 'task')}; a line per method, by least squares."
                + _about_chance(plot)
                + "".join(f" {note[0].upper()}{note[1:]}." for note in plot.notes)
            )
            key = f"isoplot-{plot.group}"
            figures.append(
                Figure(key, title, caption, inline_svg(figure, key, f"{title}. {caption}"))
            )
    return figures


def draw(
    axes, runs: Sequence[Run], plot: Isoplot, styles: Sequence[int] | None = None
) -> None:
    """Draws one group; checkpoints of a run are joined in the order of their steps."""
    from matplotlib.ticker import MaxNLocator

    drawn: set[str] = set()
    for i, (run, points) in enumerate(zip(runs, plot.points, strict=True)):
        style = run_style(i if styles is None else styles[i])
        if points:
            x, y = [p.loss for p in points], [p.score for p in points]
            axes.plot(x, y, color=style["color"], lw=0.6, alpha=0.35, zorder=2)
            axes.plot(
                x, y, ls="", marker=style["marker"], ms=6, color=style["color"], mec="white",
                mew=0.7, zorder=4,
            )  # fmt: skip
        line = plot.lines.get(run.method)
        if line is not None and run.method not in drawn:
            drawn.add(run.method)
            ends = [line.low, line.high]
            axes.plot(
                ends, [line.at(x) for x in ends], color=style["color"], ls=style["linestyle"],
                lw=1.8, zorder=3,
            )  # fmt: skip
    axes.margins(x=0.06, y=0.1)
    low, high = axes.get_ylim()
    if _chance_in_view(plot):
        low, high = min(low, plot.chance - 0.06 * (high - low)), max(high, plot.chance)
        axes.axhline(plot.chance, color=FAINT, lw=0.9, ls=":", zorder=1)
    # A score is a share of a hundred: neither below nothing nor above everything.
    axes.set_ylim(max(low, -2.0), min(max(high, low + 2), 103.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel("validation log-perplexity [nats per token]")
    axes.set_ylabel("mean score [of 100]")


def _chance_in_view(plot: Isoplot) -> bool:
    """Whether chance lies near the scores; far off, its line would press them together."""
    if plot.chance is None:
        return False
    scores = [point.score for points in plot.points for point in points]
    reach = max(max(scores) - min(scores), 5.0)
    return min(scores) - reach <= plot.chance <= max(scores) + reach


def write_png(comparison: Comparison, out: str | os.PathLike) -> Path:
    """All groups side by side in one PNG.

    Raises:
      UserError: there is nothing to draw, matplotlib is missing, or the file cannot be written.
    """
    found = isoplots(comparison.runs)
    if not found:
        raise UserError(
            "no run here was evaluated on tasks at a step with a held-out loss; run "
            "`stacking-jax evaluate --all_steps`, or bind TrainConfig.evaluate_tasks"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UserError(f"drawing needs matplotlib ({error}); install the 'train' extra") from error
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    with rc_context({"font.size": 9}):
        figure = Canvas(figsize=(4.6 * columns, 3.5 * rows + 0.3), layout="constrained", dpi=150)
        grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for axes, plot in zip(grid, found, strict=False):
            axes.grid(True, color="#E6E6E6", lw=0.7)
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes, comparison.runs, plot)
            axes.set_title(units.group_title(plot.group), fontsize=10, color=INK)
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        styles = [run_style(i) for i in range(len(comparison.rows))]
        handles = [
            Line2D([], [], color=s["color"], marker=s["marker"], ls=s["linestyle"], mec="white")
            for s in styles
        ]
        labels = [row.label for row in comparison.rows]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)),
                      frameon=False)  # fmt: skip
        return save_png(figure, Path(out))


def _about_chance(plot: Isoplot) -> str:
    if plot.chance is None:
        return ""
    return " Dotted: chance." if _chance_in_view(plot) else f" Chance is {plot.chance:.1f}."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
