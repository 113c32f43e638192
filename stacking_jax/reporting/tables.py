"""Tables for the terminal: a comparison of runs, and a plan of stages.

`rich` draws them where it is installed; otherwise the same cells are set in
plain text. Both fit themselves to the width they are given: a line per run
where that fits, else a column per run, else a block per run.
"""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison, Row

# What a log or a README holds well; wider only if nothing fits.
_LOG_WIDTH = 110
_HEAD_WIDTH = 26


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells before they are drawn: header, rows, an optional row of totals, lines beneath."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[bool, ...]  # Which columns hold text and start at the left.
    footer: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    marked: tuple[bool, ...] = ()  # Which rows carry a mark that should catch the eye.
    long_header: tuple[str, ...] = ()  # Names for a narrow table that stands on its side.


def printable(text: Any) -> str:
    """Text without control characters, which could move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def depth_text(row: Row) -> str:
    """'2→8' for a run that grows, '8' for one that does not."""
    if row.depth is None:
        return units.MISSING
    if row.first_depth in (None, row.depth):
        return str(row.depth)
    return f"{row.first_depth}→{row.depth}"


def status_text(row: Row) -> str:
    """The run's name with its mark, if it has one."""
    marks = [] if row.status == "finished" else [row.status]
    if row.not_comparable:
        marks.append("not comparable")
    return f"{row.label} [{', '.join(marks)}]" if marks else row.label


def comparison_cells(comparison: Comparison) -> Table:
    """The table of a comparison as text cells."""
    header = (
        "run", "method", "depth", "steps", "tokens", "FLOPs", "train", "wall",
        "loss", "bits/byte", "predicted", "measured", "with wall",
    )  # fmt: skip
    long_header = (
        "", "method", "depth [layers]", "steps", "tokens", "model FLOPs", "training time",
        "wall time", "held-out loss [nats/token]", "held-out loss [bits/byte]",
        "predicted speed-up", "measured, training time", "measured, wall time",
    )  # fmt: skip
    rows = tuple(
        (
            printable(status_text(row)),
            printable(row.method),
            depth_text(row),
            units.integer(row.steps),
            units.count(row.tokens),
            units.flops(row.model_flops),
            units.duration(row.train_seconds),
            units.duration(row.wall_seconds),
            units.loss(row.eval_loss),
            units.loss(row.bits_per_byte),
            units.ratio(row.predicted_speedup),
            units.ratio(row.measured_speedup),
            units.ratio(row.measured_speedup_wall),
        )
        for row in comparison.rows
    )
    lines = [
        "loss: held-out cross-entropy, nats per token. train: steps only; wall: everything.",
        "predicted: speed-up of the plan over full depth from the start, head and attention"
        " included; measured: by training time; with wall: compiling, growing, evaluating and"
        " saving included.",
    ]
    for row in comparison.rows:
        lines.extend(f"{row.label}: {line}" for line in row_lines(row))
    lines.extend(comparison.notes)
    return Table(
        title="Comparison of runs" if len(rows) > 1 else "Run",
        header=header,
        rows=rows,
        left=(True, True) + (False,) * (len(header) - 2),
        lines=tuple(map(printable, lines)),
        long_header=long_header,
        marked=tuple(status_text(row) != row.label for row in comparison.rows),
    )


def row_lines(row: Row) -> list[str]:
    """The sentences that belong to one run."""
    lines = [f"not comparable: {reason}" for reason in row.not_comparable]
    if row.speedup_reference:
        lines.append(f"speed-up measured against {row.speedup_reference}")
    return lines + list(row.notes)


def comparison_table(
    comparison: Comparison, width: int | None = None, color: bool = False
) -> str:
    """The comparison as text that is at most `width` columns wide (None: as wide as it needs)."""
    return render(comparison_cells(comparison), width, color)


def plan_table(plan: dict[str, Any], width: int | None = None, color: bool = False) -> str:
    """A plan as text: one line per stage, totals and speed-ups at the bottom.

    Args:
      plan: as in `plan.json`: `stages`, each with `depth` and `steps` and, where known, `params`,
        `flops_per_token`, `tokens`, `cost_share`, `operator`, `map_text`, `run_map_text`;
        `total_steps`,
        `speedup_blocks`, `speedup_model`.
      width: columns to fit into; None: as wide as it needs.
      color: whether to use a terminal's colours.

    Raises:
      UserError: there are no stages, or a stage lacks its depth or steps.
    """
    return render(plan_cells(plan), width, color)


def layers_text(stage: dict[str, Any]) -> str:
    """Where a stage's layers come from, and what else is to be said of how they train."""
    made = stage.get("map_text") or stage.get("operator") or ""
    run_map, path = stage.get("run_map_text"), stage.get("path")
    return " · ".join(text for text in (
        made,
        run_map and f"run as {run_map}",
        path and path < stage["depth"] and f"{path} drawn each step",
        stage.get("taught") and "taught",
    ) if text)  # fmt: skip


def plan_cells(plan: dict[str, Any]) -> Table:
    """The table of a plan as text cells. Raises as `plan_table`."""
    stages = plan.get("stages")
    if not isinstance(stages, list | tuple) or not stages:
        raise UserError("the plan has no stages to show; its key 'stages' must list at least one")
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, dict) or not {"depth", "steps"} <= stage.keys():
            raise UserError(f"stage {number} of the plan lacks 'depth' or 'steps'")
        if not units.known(stage["depth"]) or not units.known(stage["steps"]):
            raise UserError(f"stage {number} of the plan: 'depth' and 'steps' must be numbers")
    shares = cost_shares(stages)
    tokens = [stage.get("tokens") for stage in stages]
    grown_by = [layers_text(stage) for stage in stages]
    # Only where a step runs another number of layers than are stored.
    runs = any(stage.get("run_depth", stage["depth"]) != stage["depth"] for stage in stages)
    rows = tuple(
        (
            str(number),
            str(stage["depth"]),
            *([str(stage.get("run_depth", stage["depth"]))] if runs else []),
            units.integer(stage["steps"]),
            units.count(stage.get("tokens")),
            units.count(stage.get("params")),
            units.flops(stage.get("flops_per_token")),
            units.percent(share),
            printable(made) or ("new" if number == 1 else units.MISSING),
        )
        for number, (stage, share, made) in enumerate(
            zip(stages, shares, grown_by, strict=True), start=1
        )
    )
    total = plan.get("total_steps", sum(stage["steps"] for stage in stages))
    all_tokens = sum(tokens) if all(units.known(t) for t in tokens) else None
    footer = (
        "all", "", *([""] if runs else []), units.integer(total),
        units.count(plan.get("tokens", all_tokens)), "",
        _mean_flops(stages, shares), units.percent(sum(shares) if None not in shares else None), "",
    )  # fmt: skip
    lines = []
    if units.known(plan.get("speedup_model")):
        lines.append(
            "speed-up over full depth from the start:"
            f" {units.ratio(plan['speedup_model'])} with head and attention"
            + (
                f", {units.ratio(plan['speedup_blocks'])} counting the blocks alone"
                if units.known(plan.get("speedup_blocks"))
                else ""
            )
        )
    equal = plan.get("full_depth_steps")
    if units.known(equal) and equal != total:
        lines.append(
            f"as many FLOPs as {units.integer(equal)} steps at full depth:"
            f" --gin_file gin/methods/baseline.gin --gin.TRAIN_STEPS={equal:.0f}"
        )
    if runs:
        lines.append("depth: layers that are stored; runs: positions that a training step computes")
    if isinstance(plan.get("teacher"), dict):
        lines.append(_teacher_line(plan))
    if units.known(plan.get("choice_flops")) and units.known(plan.get("model_flops")):
        lines.append(
            f"{units.flops(plan['choice_flops'])} of the run's "
            f"{units.flops(plan['model_flops'])} "
            f"({units.percent(plan['choice_flops'] / plan['model_flops'])}) try candidates at its "
            "boundaries, counted in the stages behind them; layers: as they grow without a choice"
        )
    if plan.get("trigger"):
        lines.append(
            "boundaries come at these steps or earlier, and the run then costs more: "
            f"ChoiceConfig.trigger = {plan['trigger']!r}"
        )
    if any("+" in (stage.get("map_text") or "") for stage in stages):
        lines.append("+: a new layer, made as at the beginning of a run")
    method = plan.get("method")
    return Table(
        title=printable(plan.get("name") or ("Plan" if method is None else f"Plan: {method}")),
        header=(
            "stage", "depth", *(["runs"] if runs else []), "steps", "tokens", "params",
            "FLOPs/token", "cost", "layers",
        ),
        rows=rows,
        left=(False,) * (7 + runs) + (True,),
        footer=footer,
        lines=tuple(lines),
    )


def _teacher_line(plan: dict[str, Any]) -> str:
    """What a teacher costs, and its training both ways."""
    teacher = plan["teacher"]
    training = teacher.get("training_flops")
    if not units.known(training):
        trained = "its training is not known"
    elif teacher.get("trained_within_the_run"):
        trained = f"trained within the run for {units.flops(training)}, which is counted"
    else:
        trained = f"its training, {units.flops(training)}, is not counted"
    per_token = units.flops(teacher.get("forward_flops_per_token"))
    return (
        f"teacher of {units.count(teacher.get('params'))} parameters in the first "
        f"{units.integer(teacher.get('steps'))} steps: {per_token}/token, counted; {trained}"
    )


def cost_shares(stages: Sequence[dict[str, Any]]) -> list[float | None]:
    """Each stage's share of the plan's FLOPs, from the plan or from steps × FLOPs per token."""
    if all(units.known(stage.get("cost_share")) for stage in stages):
        return [stage["cost_share"] for stage in stages]
    if not all(
        units.known(stage.get(key)) for stage in stages for key in ("steps", "flops_per_token")
    ):
        return [None] * len(stages)
    costs = [stage["steps"] * stage["flops_per_token"] for stage in stages]
    total = sum(costs)
    return [cost / total if total else None for cost in costs]


def _mean_flops(stages: Sequence[dict[str, Any]], shares: Sequence[float | None]) -> str:
    """FLOPs per token over the whole plan, tokens in proportion to steps."""
    steps = sum(stage["steps"] for stage in stages)
    if not steps or not all(units.known(stage.get("flops_per_token")) for stage in stages):
        return ""
    mean = sum(stage["steps"] * stage["flops_per_token"] for stage in stages) / steps
    return f"{units.flops(mean)} (mean)"


def render(table: Table, width: int | None = None, color: bool = False) -> str:
    """Draws a table with `rich`, or in plain text without it."""
    columns = _LOG_WIDTH if width is None else width
    shape = table
    if _natural_width(table) > columns and table.long_header:
        turned = _turned(table)
        if _natural_width(turned) <= columns:
            shape = turned
    body_width = _natural_width(shape)
    if width is None:
        # A log has no edge: rather a long line than a table taken apart.
        columns = max(columns, body_width)
    as_blocks = body_width > columns
    try:
        return _rich(table if as_blocks else shape, as_blocks, columns, color)
    except ImportError:
        return _plain(table if as_blocks else shape, as_blocks, columns)


def _turned(table: Table) -> Table:
    """The same table with a column per run; long names take several lines."""
    names = [textwrap.wrap(row[0], _HEAD_WIDTH) for row in table.rows]
    high = max(len(lines) for lines in names)
    # Names stand on the line above the numbers, so that shorter ones start lower.
    names = [[""] * (high - len(lines)) + lines for lines in names]
    head = [("", *(lines[i] for lines in names)) for i in range(high)]
    body = [
        (name, *(row[i] for row in table.rows))
        for i, name in enumerate(table.long_header)
        if i > 0 and any(row[i] != units.MISSING for row in table.rows)
    ]
    return dataclasses.replace(
        table,
        header=tuple("\n".join(column) for column in zip(*head, strict=True)),
        rows=tuple(body),
        left=(True,) + (False,) * len(table.rows),
        marked=(),
    )


def _grid(table: Table) -> list[tuple[str, ...]]:
    """Every line of the table, a header of several lines split."""
    head = [cell.split("\n") for cell in table.header]
    high = max(len(lines) for lines in head)
    lines = [tuple(column[i] if i < len(column) else "" for column in head) for i in range(high)]
    return [*lines, *table.rows, *([table.footer] if table.footer else [])]


def _widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(*_grid(table), strict=True)]


def _natural_width(table: Table) -> int:
    widths = _widths(table)
    return sum(widths) + 2 * len(widths) + 2


def _rich(table: Table, as_blocks: bool, columns: int, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(
        file=io.StringIO(),
        width=columns,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        legacy_windows=False,
    )
    console.print(Text(table.title, style="bold"))
    if as_blocks:
        console.print(Text(_blocks(table, columns)))
    else:
        drawn = RichTable(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=bool(table.footer)
        )
        for i, name in enumerate(table.header):
            drawn.add_column(
                Text(name),
                footer=Text(table.footer[i]) if table.footer else "",
                justify="left" if table.left[i] else "right",
                no_wrap=True,
            )
        marked = table.marked or (False,) * len(table.rows)
        for row, mark in zip(table.rows, marked, strict=True):
            drawn.add_row(*map(Text, row), style="yellow" if mark else None)
        console.print(drawn)
    for line in table.lines:
        console.print(Text(line, style="dim"))
    # rich fills lines with spaces to the table's width; nobody needs them in a log.
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _plain(table: Table, as_blocks: bool, columns: int) -> str:
    if as_blocks:
        body = _blocks(table, columns)
    else:
        widths = _widths(table)
        lines = [
            "  ".join(
                cell.ljust(w) if left else cell.rjust(w)
                for cell, w, left in zip(row, widths, table.left, strict=True)
            ).rstrip()
            for row in _grid(table)
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines.insert(len(lines) - len(table.rows) - bool(table.footer), rule)
        if table.footer:
            lines.insert(-1, rule)
        body = "\n".join(lines) + "\n"
    notes = [part for line in table.lines for part in textwrap.wrap(line, columns) or [""]]
    return "\n".join([table.title, "", body, *notes]) + "\n"


def _blocks(table: Table, width: int) -> str:
    """One block per row, for a terminal that is too narrow for columns."""
    label = max(len(name) for name in table.header)
    lines = []
    for row in [*table.rows, *([table.footer] if table.footer else [])]:
        lines.append("")
        for name, cell in zip(table.header, row, strict=True):
            if cell and cell != units.MISSING:
                lines.extend(
                    textwrap.wrap(
                        cell, max(width, label + 22),
                        initial_indent=f"  {name.ljust(label)}  ",
                        subsequent_indent=" " * (label + 4),
                    )
                )  # fmt: skip
    return "\n".join(lines) + "\n"
