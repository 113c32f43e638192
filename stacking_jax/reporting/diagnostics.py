"""What `diagnose` found in runs: read, as a table for the terminal, and as a part of the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from stacking_jax.paths import open_path
from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison
from stacking_jax.reporting.markup import escape, header, legend, number
from stacking_jax.reporting.sections import name_cell
from stacking_jax.reporting.tables import Table, render

FOLDER = "diagnostics"
FORMAT = 1
"""Of the files; another one is left alone."""

Found = Mapping[str, Any]


def newest(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The diagnosis of a run's latest diagnosed step, or None; broken files are passed over."""
    folder = open_path(run_dir) / FOLDER
    if not folder.is_dir():
        return None
    files = {
        int(path.name.removesuffix(".json")): path
        for path in folder.iterdir()
        if path.name.endswith(".json") and path.name.removesuffix(".json").isdecimal()
    }
    for step in sorted(files, reverse=True):
        try:
            found = json.loads(files[step].read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("format") == FORMAT:
            return found
    return None


def changes(found: Found, kind: str, unit: str = "layer") -> list[dict[str, Any]]:
    """The interventions of one kind, nearest the input first; [] where maps were not run."""
    rows = (found.get("maps") or {}).get("interventions", ())
    return [row for row in rows if (row["kind"], row["unit"]) == (kind, unit)]


def r2_of(found: Found) -> list[float | None]:
    """Per layer; [] where no map was fitted."""
    return (found.get("linearity") or {}).get("r2") or []


# ---- The terminal ---------------------------------------------------------------------------


def diagnosis_table(
    name: str, found: Found, width: int | None = None, color: bool = False
) -> str:
    """One line per position, and under it what is said of the whole stack.

    Args:
      name: of the run.
      found: from `analysis.diagnose`.
      width: columns to fit into; None: as wide as it needs.
      color: whether to use a terminal's colours.
    """
    positions = found["positions"]
    columns: list[tuple[str, list[str]]] = [("layer", [str(i) for i in range(len(positions))])]
    if positions != list(range(len(positions))):
        columns.append(("stored", [str(source) for source in positions]))
    if "contributions" in found:
        for part in ("attention", "mlp"):
            columns.append((part, [f"{v:.3f}" for v in found["contributions"][part]]))
        lens = found["lens"]
        columns.append(("exit loss", [units.loss(v) for v in lens["loss"][1:]]))
        columns.append((f"top-{lens['top']}", [f"{v:.2f}" for v in lens["overlap"][1:]]))
    if r2_of(found):
        columns.append(("linear r2", [_maybe(v, ".3f") for v in r2_of(found)]))
    for kind in ("skip", "swap", "repeat"):
        rows = changes(found, kind)
        if rows:
            cells = [_change(row) for row in rows]
            columns.append((kind, cells + [""] * (len(positions) - len(cells))))
    if "effects" in found:
        columns.append(("output moves", [f"{v:.3f}" for v in found["effects"]["output"]]))
    return render(
        Table(
            title=f"{name}, step {found['step']}: inside the stack",
            header=tuple(title for title, _ in columns),
            rows=tuple(zip(*(cells for _, cells in columns), strict=True)),
            left=tuple(False for _ in columns),
            lines=tuple(_lines(found)),
            marked=tuple(False for _ in positions),
        ),
        width,
        color,
    )


def _lines(found: Found) -> list[str]:
    lines = []
    positions, block = found["positions"], found["block"]
    if "maps" in found:
        lines.append(
            f"held-out loss {units.loss(found['maps']['loss'])} on {found['batches']} batches of "
            f"{found['rows']}; skip, swap, repeat: change of it, ± half of the paired 95 % interval"
        )
        for kind in ("skip", "swap", "repeat", "reverse"):
            rows = changes(found, kind, "block")
            if rows:
                lines.append(
                    f"{kind} blocks of {block}: " + ", ".join(_change(row) for row in rows)
                )
    if "similarity" in found:
        distances = found["similarity"]["mean"]["by_distance"]
        shown = [d for d in sorted({1, 2, block, 2 * block}) if d < len(distances)]
        lines.append(
            "cosine of the weights of layers so far apart: "
            + ", ".join(f"{d}: {distances[d]:.3f}" for d in shown)
        )
    if "effects" in found:
        last = len(positions) - 1
        lines.append(
            f"depth score (0 to {last}): {_maybe(found['effects']['depth_score_layers'], '.2f')} "
            f"by later layers, {_maybe(found['effects']['depth_score_output'], '.2f')} by the "
            "output"
        )
    reason = (found.get("linearity") or {}).get("reason")
    if reason:
        lines.append(f"linearity is left out: {reason}")
    return lines


def _change(row: Mapping[str, Any]) -> str:
    if row["interval"] is None:
        return f"{row['change']:+.4f}"
    half = (row["interval"][1] - row["interval"][0]) / 2
    return f"{row['change']:+.4f} ± {half:.4f}"


def _maybe(value: float | None, form: str) -> str:
    return units.MISSING if value is None else format(value, form)


# ---- The report -----------------------------------------------------------------------------


def inside_section(comparison: Comparison) -> str:
    """Tables and pictures of the runs that were diagnosed; nothing where none was.

    Raises:
      ImportError: matplotlib is not installed.
    """
    found = {
        place: diagnosis
        for place, run in enumerate(comparison.runs)
        if (diagnosis := newest(run.path)) is not None
    }
    if not found:
        return ""
    from stacking_jax.reporting.diagnostics_figures import compared_figures, figures_of_run

    names = [row.label for row in comparison.rows]
    columns = (
        ("Run", ""), ("Step", ""), ("Layers", "as run"), ("Alike", "cosine, 1 apart"),
        ("Alike", "cosine, 1 block apart"), ("Depth score", "by output, 0 to 1"),
        ("Linear", "median r²"), ("Most needed layer", "loss without it"),
    )  # fmt: skip
    body = "".join(
        f"<tr>{name_cell(place, comparison.rows[place])}{_cells(here)}</tr>"
        for place, here in found.items()
    )
    drawn = "".join(
        f'<figure class="card"><h3>{escape(figure.title)}</h3>{legend(names)}'
        f'<div class="white">{figure.svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in compared_figures(found)
    )
    maps = "".join(
        f'<figure class="card"><h3>{escape(names[place])}: {escape(figure.title)}</h3>'
        f'<div class="white">{figure.svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for place, here in found.items()
        for figure in figures_of_run(here, place)
    )
    several = len({here.get("data_digest") for here in found.values()}) > 1
    note = (
        '<p class="note">These runs were diagnosed on different held-out tokens: losses and their '
        "changes are not comparable between them.</p>"
        if several
        else ""
    )
    return (
        "<h2>Inside the stack</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns)}<tbody>{body}</tbody></table></div>{note}"
        f'<div class="figures" style="margin-top:18px">{drawn}{maps}</div>'
        '<p class="small">From <code>stacking-jax diagnose</code>, of the latest step that was '
        "diagnosed. One seed of one run: none of it has an interval over seeds.</p>"
    )


def _cells(found: Found) -> str:
    positions, block = found["positions"], found["block"]
    distances = ((found.get("similarity") or {}).get("mean") or {}).get("by_distance", [])
    near = distances[1] if len(distances) > 1 else None
    far = distances[block] if len(distances) > block else None
    score = (found.get("effects") or {}).get("depth_score_output")
    score = None if score is None else score / max(len(positions) - 1, 1)
    known = sorted(value for value in r2_of(found) if value is not None)
    r2 = known[len(known) // 2] if known else None
    skips = changes(found, "skip")
    most = max(skips, key=lambda row: row["change"]) if skips else None
    needed = units.MISSING if most is None else f"layer {most['at']}: {_change(most)}"
    return (
        number(found["step"], units.integer(found["step"]))
        + number(len(positions), units.integer(len(positions)))
        + "".join(number(value, _maybe(value, ".3f")) for value in (near, far, score, r2))
        + number(None if most is None else most["change"], needed)
    )
