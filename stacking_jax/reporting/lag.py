"""Does the loss after a lag say which way to grow is best? Table, picture and page of a study."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.reporting import units
from stacking_jax.reporting.drawn import save_png
from stacking_jax.reporting.html import page, write_page
from stacking_jax.reporting.markup import escape, header, legend, number, run_key, text_cell
from stacking_jax.reporting.plots import run_style
from stacking_jax.reporting.svg import FAINT, INK, inline_svg, new_axes
from stacking_jax.reporting.tables import Table, printable, render

_MEASURES = (("spearman", "Spearman", "#0072B2", "o"), ("kendall", "Kendall", "#D55E00", "s"))


def study_table(
    study: Mapping[str, Any], width: int | None = None, color: bool = False
) -> str:
    """The correlations by lag, and the candidates by their final loss."""
    rows = tuple(
        (
            units.integer(row["lag"]),
            *(
                text for name, *_ in _MEASURES
                for text in (_value(row[name]), _interval(row, name))
            ),
            "yes" if row["best_is_best"] else "no",
        )
        for row in study["curve"]
    )
    order = sorted(
        study["candidates"],
        key=lambda one: float("inf") if one["final_loss"] is None else one["final_loss"],
    )
    ends = ", ".join(f"{one['name']} {units.loss(one['final_loss'])}" for one in order)
    return render(
        Table(
            title=(
                f"Loss after a lag against the loss at step {study['total_steps']}, "
                f"{len(order)} ways to grow from {study['from_depth']} to {study['to_depth']} "
                f"layers at step {study['step']}"
            ),
            header=("lag", "Spearman", "95 %", "Kendall", "95 %", "best is best"),
            rows=rows,
            left=(False,) * 6,
            lines=(f"in the end, nats per token: {printable(ends)}", reading(study)),
        ),
        width,
        color,
    )


def reading(study: Mapping[str, Any]) -> str:
    """What the study says, and what it does not."""
    count, chance = len(study["candidates"]), study["chance"]
    beyond = [
        row["lag"] for row in study["curve"]
        if row["spearman"] is not None and row["spearman"] > chance
    ]
    said = (
        f"by chance alone, {count} candidates reach a Spearman correlation of {chance:.2f} or less "
        "in 95 % of all orders"
    )
    if chance >= 1:
        said = f"with {count} candidates no rank correlation is beyond chance at 95 %"
    elif beyond:
        said += f"; it is exceeded at lags {', '.join(map(str, beyond))}"
    else:
        said += "; it is exceeded at no lag"
    return f"{said}. One run and one seed: intervals are over held-out batches"


def draw(study: Mapping[str, Any]) -> list[tuple[str, str, str, Any]]:
    """(key, title, caption, figure) of the losses and of the correlations by lag."""
    from matplotlib import style

    with style.context("default"):
        return [_losses(study), _curve(study)]


def _losses(study):
    figure, axes = new_axes()
    for i, one in enumerate(study["candidates"]):
        look = run_style(i)
        known = [
            (at, loss) for at, loss in zip(study["lags"], one["losses"], strict=True)
            if loss is not None
        ]
        axes.plot(
            [at for at, _ in known], [loss for _, loss in known], color=look["color"],
            marker=look["marker"], ls=look["linestyle"], lw=1.4, ms=4, label=one["name"],
        )
    _lag_axis(axes, study)
    axes.set_ylabel("held-out loss [nats per token]")
    return (
        "lag-losses", "Loss after the growth",
        "Held-out loss of every candidate, on the same batches, from the growth (0) on.", figure,
    )


def _curve(study):
    figure, axes = new_axes()
    lags = [row["lag"] for row in study["curve"]]
    axes.axhline(0, color=FAINT, lw=0.7)
    axes.axhline(study["chance"], color=FAINT, lw=0.9, ls=(0, (4, 3)))
    for name, called, colour, marker in _MEASURES:
        known = [row for row in study["curve"] if row[name] is not None]
        at = [row["lag"] for row in known]
        axes.plot(
            at, [row[name] for row in known], color=colour, marker=marker, ms=4, lw=1.4,
            label=called,
        )
        banded = [row for row in known if row[f"{name}_low"] is not None]
        axes.fill_between(
            [row["lag"] for row in banded], [row[f"{name}_low"] for row in banded],
            [row[f"{name}_high"] for row in banded], color=colour, alpha=0.15, lw=0,
        )
    _lag_axis(axes, study)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("rank correlation with the final loss")
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="lower right")
    return (
        "lag-correlation", "Rank correlation with the final loss",
        f"Over {len(study['candidates'])} candidates, at lags {lags[0]} to {lags[-1]}. Bands: 95 % "
        "intervals from resampled held-out batches. Dashed: what a random order stays below with "
        "95 %, for Spearman.",
        figure,
    )


def _lag_axis(axes, study) -> None:
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.1, 1.1 * study["lags"][-1])
    ticks = [at for at in study["lags"] if at in (0, 1) or at == study["lags"][-1] or at % 10 == 0]
    axes.set_xticks(ticks, [str(at) for at in ticks])
    axes.minorticks_off()
    axes.set_xlabel("steps after the growth")


def write_png(study: Mapping[str, Any], out: Path) -> None:
    """Both figures in one picture.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.image import imread
    except ImportError as error:
        raise _no_matplotlib(error) from error
    import io

    with style.context("default"):
        pictures = []
        for _, _, _, figure in draw(study):
            if figure.axes[0].get_legend() is None:
                figure.axes[0].legend(fontsize=8.5, frameon=False, labelcolor=INK)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160, facecolor="white")
            buffer.seek(0)
            pictures.append(imread(buffer))
        high, wide = pictures[0].shape[:2]
        both = Figure(figsize=(2 * wide / 160, high / 160))
        for place, picture in enumerate(pictures):
            axes = both.add_axes((place / 2, 0, 0.5, 1))
            axes.imshow(picture, interpolation="none", aspect="auto")
            axes.axis("off")
        save_png(both, out, dpi=160, facecolor="white")


def write_report(study: Mapping[str, Any], out: Path, now: datetime.datetime | None = None) -> Path:
    """The study as one HTML page that needs nothing but itself.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    now = now or datetime.datetime.now().astimezone()
    names = [one["name"] for one in study["candidates"]]
    try:
        figures = draw(study)
    except ImportError as error:
        raise _no_matplotlib(error) from error
    drawn = "".join(
        f'<figure class="card"><h3>{escape(title)}</h3>'
        f"{legend(names) if key == 'lag-losses' else ''}"
        f'<div class="white">{inline_svg(figure, key, caption)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for key, title, caption, figure in figures
    )
    title = "Choosing by the loss after a lag"
    about = (
        f"{study['run']}: {study['from_depth']} to {study['to_depth']} layers at step "
        f"{study['step']}, trained to step {study['total_steps']}, seed {study['seed']}, made "
        f"{now:%Y-%m-%d %H:%M %Z}"
    )
    parts = [
        f"<h1>{escape(title)}</h1>", f'<p class="meta">{escape(about)}</p>',
        lag_section(study), f'<div class="figures">{drawn}</div>',
    ]
    return write_page(out, page(title, parts))


def lag_section(study: Mapping[str, Any]) -> str:
    """The tables of a study, for a page."""
    order = sorted(
        enumerate(study["candidates"]),
        key=lambda item: (
            float("inf") if item[1]["final_loss"] is None else item[1]["final_loss"]
        ),
    )
    last = study["lags"][-1]
    ends = "".join(
        f'<tr><td class="text">{run_key(i)}{escape(one["name"])}</td>'
        + "".join(
            number(loss, units.loss(loss))
            for loss in (one["losses"][0], one["losses"][-1], one["final_loss"])
        )
        + "</tr>"
        for i, one in order
    )
    curve = "".join(
        "<tr>" + number(row["lag"], units.integer(row["lag"]))
        + "".join(
            number(row[name], _value(row[name])) + f"<td>{escape(_interval(row, name))}</td>"
            for name, *_ in _MEASURES
        )
        + text_cell("yes" if row["best_is_best"] else "no") + "</tr>"
        for row in study["curve"]
    )
    first = (("Candidate", ""), ("Loss", "at growth"), ("Loss", f"after {last} steps"),
             ("Loss", "in the end"))  # fmt: skip
    second = (("Lag", "steps"), ("Spearman", ""), ("95 %", "by batches"), ("Kendall", ""),
              ("95 %", "by batches"), ("Best is best", ""))  # fmt: skip
    return (
        f'<div class="card scroll"><table>{header(first)}<tbody>{ends}</tbody></table></div>'
        f'<div class="card scroll"><table>{header(second, text_columns=0)}<tbody>{curve}</tbody>'
        f'</table></div><p class="small">{escape(reading(study))}.</p>'
    )


def _value(value: float | None) -> str:
    return units.MISSING if value is None else f"{value:+.2f}"


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return units.MISSING if low is None else f"{low:+.2f} to {high:+.2f}"


def _no_matplotlib(error: ImportError) -> UserError:
    return UserError(
        f"the figures need matplotlib ({error}); install the 'train' extra; the numbers are in "
        "lag.json"
    )
