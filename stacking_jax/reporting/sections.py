"""The parts of the report that are tables: results, speed-up, stages, configuration."""

from __future__ import annotations

import json
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.comparison import Comparison, Row
from stacking_jax.reporting.markup import breakable, escape, header, number, run_key, text_cell
from stacking_jax.reporting.runs import Run
from stacking_jax.reporting.tables import cost_shares, depth_text, layers_text, row_lines

_MOST_NUMBERED = 32


def results_section(comparison: Comparison) -> str:
    """The main table, and under it what may be compared with what."""
    # Loss and cost first: on a phone the rest is reached by scrolling.
    columns = (
        ("Run", ""), ("Held-out loss", "nats/token"), ("Held-out loss", "bits/byte"),
        ("Model FLOPs", ""), ("Training time", "steps only"), ("Wall time", "everything"),
        ("Steps", ""), ("Tokens", ""), ("Depth", "layers"), ("Parameters", ""), ("Method", ""),
    )  # fmt: skip
    body = "".join(
        "<tr>"
        + name_cell(i, row)
        + number(row.eval_loss, units.loss(row.eval_loss))
        + number(row.bits_per_byte, units.loss(row.bits_per_byte))
        + number(row.model_flops, units.flops(row.model_flops))
        + number(row.train_seconds, units.duration(row.train_seconds))
        + number(row.wall_seconds, units.duration(row.wall_seconds))
        + number(row.steps, units.integer(row.steps))
        + number(row.tokens, units.count(row.tokens))
        + f"<td>{escape(depth_text(row))}</td>"
        + number(row.params, units.count(row.params))
        + f"<td>{escape(row.method)}</td>"
        + "</tr>"
        for i, row in enumerate(comparison.rows)
    )
    items = "".join(
        f"<li>{run_key(i)}<strong>{escape(row.label)}</strong>{_sentences(row)}</li>"
        for i, row in enumerate(comparison.rows)
    )
    title = "What may be compared with what" if len(comparison.rows) > 1 else "Notes"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in comparison.notes)
    return (
        "<h2>Results</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns)}<tbody>{body}</tbody></table></div>{notes}"
        f'<h2>{title}</h2><ul class="stand">{items}</ul>'
    )


def name_cell(index: int, row: Row) -> str:
    """A run's key, name and marks, at the head of its line."""
    marks = [] if row.status == "finished" else [row.status]
    marks += ["not comparable"] if row.not_comparable else []
    badges = "".join(f'<br><span class="badge">{escape(mark)}</span>' for mark in marks)
    return f'<th scope="row" class="name">{run_key(index)}{escape(row.label)}{badges}</th>'


def _sentences(row: Row) -> str:
    lines = row_lines(row) or [row.status]
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def speedup_section(comparison: Comparison) -> str:
    """Predicted against measured speed-up, for runs whose plan has more than one stage."""
    staged = [
        (i, row) for i, row in enumerate(comparison.rows) if (row.num_stages or 1) > 1
    ]
    if not staged:
        return ""
    columns = (
        ("Run", ""), ("Measured against", ""), ("Predicted", "whole model"),
        ("Predicted", "blocks alone"), ("Measured", "training time"),
        ("÷ predicted", "training time"), ("Measured", "wall time"),
        ("÷ predicted", "wall time"),
    )  # fmt: skip
    body = "".join(
        "<tr>"
        + name_cell(i, row)
        + text_cell(row.speedup_reference or _no_reference(row))
        + number(row.predicted_speedup, units.ratio(row.predicted_speedup))
        + number(row.predicted_speedup_blocks, units.ratio(row.predicted_speedup_blocks))
        + "".join(
            number(measured, units.ratio(measured))
            + number(share, units.MISSING if share is None else f"{share:.2f}")
            for measured in (row.measured_speedup, row.measured_speedup_wall)
            for share in (_over(measured, row.predicted_speedup),)
        )
        + "</tr>"
        for i, row in staged
    )
    return (
        "<h2>Speed-up over full depth from the start</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=2)}<tbody>{body}</tbody></table></div>"
        '<p class="small">Predicted from the FLOPs of the plan at equal steps; the whole model'
        " includes head and attention, which do not shrink with depth as the blocks do."
        " Measured: time of"
        " the full-depth run of as many steps over the run's own.</p>"
    )


def _no_reference(row: Row) -> str:
    return "no such run is here" if row.status == "finished" else row.status


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def stages_section(comparison: Comparison) -> str:
    """Per run, its stages: what was planned and, where the run is finished, what was measured."""
    columns = (
        ("Stage", ""), ("Depth", "layers"), ("Runs", "layers"), ("Steps", ""), ("Tokens", ""),
        ("Parameters", ""), ("Training loss", "first steps"), ("Training loss", "last steps"),
        ("Held-out loss", "at the end"), ("Cost", "planned share"), ("Model FLOPs", "measured"),
        ("Training time", "measured"),
        ("Compiling", "waited for"), ("Compiling", "in the background"),
    )  # fmt: skip
    groups = []
    for i, (run, row) in enumerate(zip(comparison.runs, comparison.rows, strict=True)):
        lines = _stage_rows(run)
        if lines:
            title = f"{run_key(i)}{escape(row.label)}"
            groups.append(
                f'<tbody><tr class="group"><th scope="rowgroup" class="text"'
                f' colspan="{len(columns) + 1}">{title}</th></tr>{lines}</tbody>'
            )
    if not groups:
        return ""
    head = header(columns, text_columns=0).replace(
        "</tr></thead>", '<th scope="col" class="text">Layers</th></tr></thead>'
    )
    return (
        '<h2>Stages</h2><div class="card scroll"><table class="stages">'
        f"{head}{''.join(groups)}</table></div>"
        '<p class="small">Layers: for each layer the layer of the stage before from which it was'
        " made, counted from 0 at the input; blue: the further copy. Runs: layers that a training"
        " step computes. Training loss: means of the first and of the last ten steps of a stage (of"
        " half of them, if it is shorter), by the layers that ran; held-out loss: by the whole"
        " network. A run without a summary has"
        " only its plan here.</p>"
    )


def _stage_rows(run: Run) -> str:
    planned = run.plan.get("stages") or ()
    lines = []
    shares = cost_shares(planned)
    for place in range(max(len(planned), len(run.stages))):
        plan = planned[place] if place < len(planned) else {}
        done = run.stages[place] if place < len(run.stages) else {}
        both = {**plan, **done}
        runs = plan.get("run_depth", both.get("depth"))
        share = shares[place] if place < len(shares) else None
        compiling, ahead = (
            done.get(name) for name in ("compile_seconds", "compile_ahead_seconds")
        )
        lines.append(
            "<tr>"
            + f"<td>{place + 1}</td>"
            + number(both.get("depth"), units.integer(both.get("depth")))
            + number(runs, units.integer(runs))
            + number(both.get("steps"), units.integer(both.get("steps")))
            + number(both.get("tokens"), units.count(both.get("tokens")))
            + number(plan.get("params"), units.count(plan.get("params")))
            + "".join(
                number(done.get(name), units.loss(done.get(name)))
                for name in ("first_loss", "last_loss", "eval_loss")
            )
            + number(share, units.percent(share))
            + number(done.get("model_flops"), units.flops(done.get("model_flops")))
            + number(done.get("seconds"), units.duration(done.get("seconds")))
            + number(compiling, units.duration(compiling))
            + number(ahead, units.duration(ahead))
            + f'<td class="text middle">{_layers(run, place, plan)}</td>'
            + "</tr>"
        )
    return "".join(lines)


_NEW = -1  # `growth.NEW`, without loading JAX for it.


def _layers(run: Run, place: int, plan: dict[str, Any]) -> str:
    """The map of the growth into this stage, layer by layer; the plan's own picture otherwise."""
    growth = {}
    if "start" in plan:
        # By its step: between two growths there may be stages that only run other layers.
        growth = next((g for g in run.growths if place and g["step"] == plan["start"]), {})
    elif 0 < place <= len(run.growths):
        growth = run.growths[place - 1]
    sources = growth.get("map", plan.get("map"))
    if not isinstance(sources, list) or not all(isinstance(s, int) for s in sources):
        return escape(layers_text(plan) or ("new" if place == 0 else units.MISSING))
    seen: set[int] = set()
    cells = []
    for source in sources:
        new = source == _NEW
        kind = ' class="new"' if new else ' class="copy"' if source in seen else ""
        shown = ("+" if new else source) if len(sources) <= _MOST_NUMBERED else ""
        cells.append(f"<b{kind}>{shown}</b>")
        seen.add(source)
    bare = "" if len(sources) <= _MOST_NUMBERED else " bare"
    run_map = plan.get("run_map_text")
    below = f'<div class="runs">run as {escape(run_map)}</div>' if run_map else ""
    return f'<div class="layers{bare}">{"".join(cells)}</div>{below}'


def config_section(comparison: Comparison) -> str:
    """Every setting of every run; those that differ first and highlighted, the rest folded away."""
    flat = [flatten(run.config) for run in comparison.runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return ""
    differing = [key for key in keys if len({_shown(settings, key) for settings in flat}) > 1]
    same = [key for key in keys if key not in set(differing)]
    labels = [row.label for row in comparison.rows]
    out = ["<h2>Configuration</h2>"]
    if differing:
        out.append(_config_table(differing, flat, labels, "differs"))
    elif len(flat) > 1:
        out.append("<p>The runs have the same configuration.</p>")
    if same:
        title = (
            f"{len(same)} settings that are the same in all runs"
            if len(flat) > 1
            else f"{len(same)} settings"
        )
        table = _config_table(same, flat[:1], ["value"], "")
        out.append(f"<details><summary>{title}</summary>{table}</details>")
    return "".join(out)


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{'model': {'depth': 8}} as {'model.depth': 8}; lists stay as they are."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings} if prefix else {}
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return out


def _shown(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return units.MISSING
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _config_table(
    keys: list[str], flat: list[dict[str, Any]], labels: list[str], kind: str
) -> str:
    head = "".join(f'<th scope="col" class="text">{escape(label)}</th>' for label in labels)
    body = "".join(
        f'<tr{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>'
        f'<th scope="row"><code>{breakable(key, "._")}</code></th>'
        + "".join(f"<td><code>{escape(_shown(settings, key))}</code></td>" for settings in flat)
        + "</tr>"
        for key in keys
    )
    return (
        '<div class="card scroll"><table class="config"><thead><tr>'
        f'<th scope="col" class="text">setting</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
