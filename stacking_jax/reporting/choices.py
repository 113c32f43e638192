"""What was decided in a run, and by what: for the terminal, and as a part of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.markup import escape, header, number, run_key, text_cell
from stacking_jax.reporting.tables import Table, printable, render


def ranking_table(
    decision: Mapping[str, Any], width: int | None = None, color: bool = False
) -> str:
    """The candidates of one choice, the best first; see `training.decisions`."""
    rows = []
    for place, row in enumerate(decision["ranking"], start=1):
        rows.append(
            (
                str(place), printable(row["name"]), units.loss(row["loss_at_growth"]),
                units.loss(row["loss"]), *difference_text(row, place == 1),
            )
        )  # fmt: skip
    cost = decision["cost"]
    return render(
        Table(
            title=(
                f"Step {decision['step']}, {decision['from_depth']} to {decision['to_depth']} "
                f"layers, after {decision['lag']} steps of each candidate"
            ),
            header=("", "candidate", "loss at growth", "after the lag", "above the best", "95 %"),
            rows=tuple(rows),
            left=(False, True, False, False, False, False),
            lines=(
                printable(decision["verdict"]),
                f"losses in nats per token; trying took {units.duration(cost['seconds'])} and "
                f"{units.flops(cost['flops'])}",
            ),
        ),
        width,
        color,
    )


def difference_text(row: Mapping[str, Any], first: bool) -> tuple[str, str]:
    """How much higher a loss is than the best, and the interval of that."""
    if first:
        return "", ""
    if row.get("difference") is None:
        return "diverged", ""
    interval = units.MISSING
    if row["low"] is not None:
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
    return f"{row['difference']:+.4f}", interval


def choices_section(comparison: Comparison) -> str:
    """Every decision of every run; '' where none was taken."""
    groups = []
    for i, (run, named) in enumerate(zip(comparison.runs, comparison.rows, strict=True)):
        lines = "".join(_lines(decision) for decision in run.decisions)
        if lines:
            groups.append(
                '<tbody><tr class="group"><th scope="rowgroup" class="text" colspan="6">'
                f"{run_key(i)}{escape(named.label)}</th></tr>{lines}</tbody>"
            )
    if not groups:
        return ""
    columns = (
        ("Decision", ""), ("Candidate", ""), ("Loss", "at growth"), ("Loss", "after the lag"),
        ("Above the best", "nats/token"), ("95 % interval", "paired, by batches"),
    )
    return (
        "<h2>Decided while running</h2>"
        '<div class="card scroll"><table>'
        f"{header(columns, text_columns=2)}{''.join(groups)}</table></div>"
        '<p class="small">Losses on the same held-out batches. What trying the candidates cost is '
        "part of the run's model FLOPs and wall time. Intervals are over held-out batches, for "
        "all comparisons with the best together; they say nothing of other seeds, and not that "
        "the lowest loss after a lag is the lowest in the end.</p>"
    )


def _lines(decision: Mapping[str, Any]) -> str:
    about = f"stage {int(decision['stage']) + 1}, after step {units.integer(decision['step'])}"
    if decision["kind"] == "boundary":
        return f"<tr>{text_cell(about)}{_wide(reason(decision))}</tr>"
    ranking = decision.get("ranking")
    if not ranking:
        said = f"{decision.get('candidate')}: {decision.get('verdict')}"
        return f"<tr>{text_cell(about)}{_wide(said)}</tr>"
    lines = []
    for place, row in enumerate(ranking):
        difference, interval = difference_text(row, place == 0)
        lines.append(
            f"<tr>{text_cell(about if place == 0 else '')}{text_cell(row['name'])}"
            + number(row["loss_at_growth"], units.loss(row["loss_at_growth"]))
            + number(row["loss"], units.loss(row["loss"]))
            + f"<td>{escape(difference)}</td><td>{escape(interval)}</td></tr>"
        )
    return "".join(lines)


def _wide(text: str) -> str:
    return f'<td class="text" colspan="5">{escape(text)}</td>'


def reason(decision: Mapping[str, Any]) -> str:
    """Why a stage began when it did."""
    if decision.get("reason") == "plateau":
        return (
            f"begins at a plateau: the loss fell by {decision['improvement']:.2%} from one half of "
            f"{units.integer(decision['window'])} steps to the next, less than "
            f"{decision['threshold']:.2%}"
        )
    if "budget" in decision:
        return (
            f"begins by its budget: {decision['spent']:.4g} {decision['reason']} of "
            f"{decision['budget']:.4g} were spent"
        )
    return f"begins here ({decision.get('reason')})"
