"""What each stage boundary cost: a line of time for each, on one scale, in the report."""

from __future__ import annotations

from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.goodput import CATEGORIES
from stacking_jax.reporting.markup import escape, header, number, run_key

_COLUMNS = (
    ("Stage", ""), ("", ""), ("Stall", "steps"), ("Stall", "time"), ("Waiting", "for programs"),
    ("Growing", ""), ("Saving", ""), ("A step", "before"), ("A step", "after"),
)


def boundaries_section(comparison: Comparison) -> str:
    """A line of time per boundary, all on one scale, the end of the old stage in one place."""
    rows = [row for run in comparison.runs for row in run.boundaries if row["spans"]]
    if not rows:
        return ""
    before = max(-row["spans"][0][1] for row in rows)
    scale = before + max(row["spans"][-1][2] for row in rows)
    groups, shown = [], set()
    for i, (run, named) in enumerate(zip(comparison.runs, comparison.rows, strict=True)):
        lines = "".join(_line(row, before, scale) for row in run.boundaries if row["spans"])
        shown |= {span[0] for row in run.boundaries for span in row["spans"]}
        if lines:
            groups.append(
                f'<tbody><tr class="group"><th scope="rowgroup" class="text"'
                f' colspan="{len(_COLUMNS)}">{run_key(i)}{escape(named.label)}</th></tr>'
                f"{lines}</tbody>"
            )
    chips = "".join(
        '<span><span class="chip" style="margin-left:0;'
        f'background:{color}"></span>{name.lower()}</span>'
        for category, (name, color) in CATEGORIES.items() if category in shown
    )
    return (
        "<h2>Stage boundaries</h2>"
        f'<div class="legend">{chips}<span><span class="chip tick"></span>end of a step</span>'
        "</div>"
        '<div class="card scroll"><table class="stages">'
        f"{header(_COLUMNS, text_columns=2)}{''.join(groups)}</table></div>"
        '<p class="small">From the last steps of a stage to the first of the next; the dark line'
        " is the end of the old stage. Stall: from there to the end of the first new step, less"
        " what a step of the new stage takes (the median of its next ones), and less evaluations;"
        " in steps of the new stage. Waiting for programs: the part of their compiling that was"
        " not hidden behind the steps of the old stage.</p>"
    )


def _line(row: dict[str, Any], before: float, scale: float) -> str:
    def at(seconds: float) -> str:
        return f"{100 * (before + seconds) / scale:.3f}%"

    parts = "".join(
        f'<i style="left:{at(begin)};width:{100 * (end - begin) / scale:.3f}%;'
        f'background:{_color(name)}" title="{escape(_name(name))}: '
        f'{escape(_short(end - begin))}"></i>'
        for name, begin, end in row["spans"]
    )
    ticks = "".join(
        f'<b style="left:{at(end)}" title="end of step {int(step)}"></b>'
        for step, end in row["steps"]
    )
    seconds = row["seconds"]
    cells = "".join(
        number(value, _short(value))
        for value in (
            row["stall_seconds"],
            *(seconds.get(name, 0.0) for name in ("compile", "grow", "checkpoint")),
            row.get("old_step_seconds"), row["step_seconds"],
        )
    )
    return (
        f"<tr><td class=\"text\">to {units.integer(row['depth'])} layers, after step "
        f"{units.integer(row['start'])}</td>"
        '<td class="text middle" style="width:100%">'
        f'<div class="times">{parts}{ticks}<u style="left:{at(0.0)}"></u></div></td>'
        + number(row["stall_steps"], f"{row['stall_steps']:.2f}") + cells + "</tr>"
    )


def _short(seconds: float | None) -> str:
    """'4 ms' where `units.duration` would say '0.0 s'."""
    if units.known(seconds) and 0 < seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return units.duration(seconds)


def _name(category: str) -> str:
    return CATEGORIES.get(category, CATEGORIES["rest"])[0]


def _color(category: str) -> str:
    return CATEGORIES.get(category, CATEGORIES["rest"])[1]
