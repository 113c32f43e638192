"""Where the wall time of each run went: a stacked bar and a table in the report."""

from __future__ import annotations

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.markup import escape, header, number, run_key
from stacking_jax.reporting.runs import Run
from stacking_jax.reporting.sections import name_cell

CATEGORIES = {
    "step": ("Training", "#0072B2"),
    "compile": ("Compiling", "#E69F00"),
    "init": ("Starting", "#999999"),
    "data": ("Waiting for data", "#56B4E9"),
    "grow": ("Growing", "#009E73"),
    "choose": ("Choosing how to grow", "#F0A070"),
    "evaluate": ("Evaluating", "#CC79A7"),
    "checkpoint": ("Saving", "#8C6BB1"),
    "restore": ("Restoring", "#C3A6DD"),
    "recomputed": ("Done again", "#D55E00"),
    "down": ("Down", "#7A1F1F"),
    "rest": ("Rest", "#C8C8C8"),
}
"""Category -> its name and colour, in the order of the bar."""

_UNITS = {
    "step": "steps only", "recomputed": "lost to restarts", "down": "lost to restarts",
    "rest": "not told apart",
}


def goodput_section(comparison: Comparison) -> str:
    """The bars on one scale, and in numbers; of runs without an account what is known."""
    accounts = [seconds_of(run) for run in comparison.runs]
    longest = max((sum(seconds.values()) for seconds in accounts), default=0.0)
    if not longest:
        return ""
    shown = [name for name in CATEGORIES if any(seconds.get(name) for seconds in accounts)]
    bars, numbers = [], []
    for i, (row, seconds) in enumerate(zip(comparison.rows, accounts, strict=True)):
        wall = sum(seconds.values())
        goodput = seconds.get("step", 0.0) / wall if wall else None
        parts = "".join(
            f'<i style="width:{100 * seconds.get(name, 0.0) / longest:.2f}%;'
            f'background:{CATEGORIES[name][1]}" title="{CATEGORIES[name][0]}: '
            f'{escape(units.duration(seconds.get(name, 0.0)))}"></i>'
            for name in shown
        )
        bars.append(
            f"<tr>{name_cell(i, row)}"
            f'<td class="text middle" style="width:100%"><div class="bar">{parts}</div></td>'
            + number(goodput, units.percent(goodput))
            + number(wall, units.duration(wall))
            + "</tr>"
        )
        numbers.append(
            f"<tr>{name_cell(i, row)}"
            + "".join(
                number(seconds.get(name), units.duration(seconds.get(name))) for name in shown
            )
            + "</tr>"
        )
    chips = "".join(
        '<span><span class="chip" style="margin-left:0;'
        f'background:{CATEGORIES[name][1]}"></span>{CATEGORIES[name][0].lower()}</span>'
        for name in shown
    )
    columns = (("Run", ""), ("", ""), ("Goodput", "training / all"), ("All", "since it began"))
    named = (("Run", ""), *((CATEGORIES[name][0], _UNITS.get(name, "")) for name in shown))
    return (
        "<h2>Where the time went</h2>"
        f'<div class="legend">{chips}</div>'
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=2)}<tbody>{''.join(bars)}</tbody></table></div>"
        '<div class="card scroll" style="margin-top:14px"><table class="results">'
        f"{header(named)}<tbody>{''.join(numbers)}</tbody></table></div>"
        '<p class="small">Goodput is the share of the time since a run began, the time in which'
        " it was stopped included, in which its steps were computed and kept. Done again: work"
        " that was lost with its process, because no checkpoint held it. Down: from the last"
        " sign of life of a process to the start of the next. The wall time in the other tables"
        " counts neither.</p>" + _restarts(comparison)
    )


def seconds_of(run: Run) -> dict[str, float]:
    """Category -> seconds, from the account of the run or, where it has none, its totals."""
    if run.goodput:
        return {
            name if name in CATEGORIES else "rest": value for name, value in run.goodput.items()
        }
    known = {"step": run.train_seconds or 0.0, "compile": run.compile_seconds or 0.0}
    return known | {"rest": max(0.0, (run.wall_seconds or 0.0) - sum(known.values()))}


def _restarts(comparison: Comparison) -> str:
    items = []
    for i, (run, row) in enumerate(zip(comparison.runs, comparison.rows, strict=True)):
        told = "; ".join(
            f"at step {units.integer(restart['step'])}, "
            f"{units.duration(restart['down_seconds'])} down and "
            f"{units.duration(restart['recomputed_seconds'])} done again"
            for restart in run.restart_costs
        )
        if told:
            items.append(f"<li>{run_key(i)}{escape(row.label)} went on {told}</li>")
    return f'<ul class="stand small">{"".join(items)}</ul>' if items else ""
