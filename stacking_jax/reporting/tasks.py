"""The part of the report on tasks: what each run can do at its end, and at equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.isoplot import Isoplot
from stacking_jax.reporting.markup import breakable, escape, header, number
from stacking_jax.reporting.runs import Run


def tasks_section(comparison: Comparison) -> str:
    """A table per group: tasks down, runs across, scores at each run's last evaluation."""
    last = [_last(run) for run in comparison.runs]
    groups: dict[str, dict[str, Any]] = {}
    for scores in last:
        for task, row in scores.items():
            groups.setdefault(str(row.get("group", "")), {}).setdefault(task, row)
    if not groups:
        return ""
    columns = [("Task", ""), *((row.label, "") for row in comparison.rows), ("Chance", "")]
    body = []
    for group, tasks in groups.items():
        title = units.group_title(group)
        body.append(
            f'<tbody><tr class="group"><th scope="rowgroup" class="text" colspan="{len(columns)}">'
            f"{escape(title)}</th></tr>{_means(last, tasks)}"
            + "".join(_line(task, row, last) for task, row in tasks.items())
            + "</tbody>"
        )
    steps = {max((int(row["step"]) for row in s.values()), default=0) for s in last if s}
    return (
        "<h2>Tasks</h2>"
        '<div class="card scroll"><table class="stages">'
        f"{header(columns, text_columns=1)}{''.join(body)}</table></div>"
        '<p class="small">Scores from 0 to 100 at the last checkpoint that was evaluated'
        f" (step {escape(' / '.join(map(str, sorted(steps))))}), and 95 % bootstrap intervals over"
        " examples: they say nothing about another seed. A dash: not evaluated, or more than 1 %"
        " of the prompts do not fit into the context.</p>"
    )


def isoplot_section(found: Sequence[Isoplot]) -> str:
    """What the fitted lines say: slopes, and scores at the same loss."""
    if not any(plot.lines for plot in found):
        return ""
    columns = (
        ("Group", ""), ("Method", ""), ("Checkpoints", ""), ("Slope", "points per nat"),
        ("Residual", "points"), ("Score", "at the loss on the right"), ("Loss", "shared middle"),
    )  # fmt: skip
    body = "".join(
        f'<tr><th scope="row" class="text">{escape(plot.group)}</th>'
        f'<td class="text">{escape(method)}</td>'
        + number(line.points, units.integer(line.points))
        + number(line.slope, f"{line.slope:.1f}")
        + number(line.residual, f"{line.residual:.1f}")
        + (
            number(line.at(plot.shared_loss), f"{line.at(plot.shared_loss):.1f}")
            + number(plot.shared_loss, units.loss(plot.shared_loss))
            if plot.shared_loss is not None
            else f"<td>{units.MISSING}</td>" * 2
        )
        + "</tr>"
        for plot in found
        for method, line in plot.lines.items()
    )
    return (
        "<h2>Scores at equal loss</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=2)}<tbody>{body}</tbody></table></div>"
        '<p class="small">The lines of the isoplots: a checkpoint\'s mean score on a group against'
        " its validation log-perplexity, fitted per method. Checkpoints of one run are no"
        " independent runs.</p>"
    )


def _last(run: Run) -> dict[str, dict[str, Any]]:
    """The latest row of each task; rows come in the order of their steps."""
    return {row["task"]: row for row in run.task_evals}


def _means(last: Sequence[dict[str, dict[str, Any]]], tasks: dict[str, Any]) -> str:
    """The mean of a group of several tasks, for runs that have them all."""
    if len(tasks) < 2:
        return ""
    cells = []
    for scores in last:
        values = [scores.get(task, {}).get("value") for task in tasks]
        mean = sum(values) / len(values) if all(units.known(v) for v in values) else None
        cells.append(number(mean, units.MISSING if mean is None else f"{mean:.1f}"))
    name = f'<th scope="row" class="text">mean of {len(tasks)}</th>'
    return f"<tr>{name}{''.join(cells)}<td></td></tr>"


def _line(task: str, any_row: dict[str, Any], last: Sequence[dict[str, dict[str, Any]]]) -> str:
    cells = []
    for scores in last:
        row = scores.get(task, {})
        value, interval = row.get("value"), row.get("interval")
        shown = units.MISSING
        if units.known(value):
            shown = f"{value:.1f}"
            if isinstance(interval, list) and len(interval) == 2:
                shown += f" ({interval[0]:.1f} to {interval[1]:.1f})"
        cells.append(number(value, shown))
    chance = any_row.get("chance")
    shown = f"{chance:.1f}" if units.known(chance) else units.MISSING
    head = f'<th scope="row" class="text">{breakable(task)}</th>'
    return f"<tr>{head}{''.join(cells)}{number(chance, shown)}</tr>"
