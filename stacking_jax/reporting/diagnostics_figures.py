"""Pictures of a diagnosed stack: heat maps and lines, for the report and as one PNG.

Figures hold no text of the runs; see `plots`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.reporting.diagnostics import Found, changes, r2_of
from stacking_jax.reporting.drawn import save_png
from stacking_jax.reporting.plots import COLORS, Figure, run_style
from stacking_jax.reporting.svg import GRID, INK, inline_svg, new_axes

Style = dict[str, Any]


def compared_figures(found: Mapping[int, Found]) -> list[Figure]:
    """Lines of all diagnosed runs in one figure each.

    Args:
      found: place of a run in the comparison -> what was found in it.
    """
    from matplotlib import style

    wanted = (
        ("similar", "Similarity against distance", _distance, "layers apart", "mean cosine",
         "Cosine of the weights of two layers, mean over pairs so far apart and over the seven "
         "matrices of a layer. Copies of a block show as a peak at its length."),
        ("skip", "Loss without a layer", _skips, "layer", "change of loss, nats/token",
         "Change of the held-out loss when one layer is skipped, with paired 95 % intervals over "
         "batches."),
        ("lens", "Early exit", _exits, "layers run", "loss, nats/token",
         "Held-out loss when the stream is read through the final norm and head after so many "
         "layers (logit lens)."),
        ("share", "What a layer adds", _shares, "layer", "‖added‖ / ‖stream‖",
         "Norm of what attention (solid) and MLP (dotted) add to the stream, against that of the "
         "stream, mean over tokens."),
        ("linear", "Linearity", _linear, "layer", "r²",
         "How much of what a layer adds is a linear function of its input: r² on tokens that the "
         "map was not fitted on."),
        ("effect", "Output without a layer", _outputs, "layer", "‖change of probabilities‖",
         "How far the probabilities of the next token move when a layer is skipped; the depth "
         "score is the mean layer weighted by this."),
    )  # fmt: skip
    figures = []
    with style.context("default"):
        for key, title, draw, x, y, caption in wanted:
            figure, axes = new_axes()
            # Room for numbers of more digits than a loss has.
            _, bottom, _, height = axes.get_position().bounds
            axes.set_position((0.16, bottom, 0.81, height))
            drawn = [draw(axes, here, run_style(place)) for place, here in found.items()]
            if not any(drawn):
                continue
            _label(axes, x, y)
            figures.append(Figure(key, title, caption, inline_svg(figure, f"in-{key}", caption)))
    return figures


def figures_of_run(found: Found, place: int) -> list[Figure]:
    """The heat maps of one run.

    Args:
      found: what was found in it.
      place: of the run in the comparison; makes identifiers in the page differ.
    """
    from matplotlib import style

    figures = []
    with style.context("default"):
        for key, title, draw, caption in _HEAT_MAPS:
            figure, axes = new_axes()
            axes.grid(False)
            if not draw(axes, found):
                continue
            # Letters alone survive in identifiers.
            name = f"heat-{key}-{chr(97 + place // 26 % 26)}{chr(97 + place % 26)}"
            figures.append(Figure(name, title, caption, inline_svg(figure, name, caption)))
    return figures


def write_png(found: Found, out: str | os.PathLike) -> Path:
    """Everything that was found, as one picture.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UserError(
            f"pictures need matplotlib ({error}); install the 'train' extra"
        ) from error
    with style.context("default"):
        # How many there are must be known before they are laid out.
        panels = [panel for panel in _panels() if panel[1](Canvas().subplots(), found)]
        rows = -(-len(panels) // 3)
        figure = Canvas(figsize=(14.4, 3.9 * rows), layout="constrained", dpi=110)
        grid = figure.subplots(rows, 3, squeeze=False).flatten().tolist()
        for axes, (title, draw, labels) in zip(grid, panels, strict=False):
            axes.set_title(title, fontsize=10.5, color=INK)
            if labels:
                axes.grid(True, color=GRID, lw=0.7)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
            draw(axes, found)
            if labels:
                _label(axes, *labels)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        return save_png(figure, Path(out))


def _panels() -> list[tuple[str, Callable, tuple[str, str] | None]]:
    plain = {"color": COLORS[0], "marker": "o", "linestyle": "-"}

    def alone(draw):
        return lambda axes, found: draw(axes, found, plain)

    heat = [(title, draw, None) for _, title, draw, _ in _HEAT_MAPS]
    return [
        heat[0],
        heat[1],
        ("Similarity against distance", _groups, ("layers apart", "mean cosine")),
        ("Loss under changed layers", _layers_changed, ("layer", "change of loss, nats/token")),
        ("Loss under changed blocks", _blocks_changed, ("block", "change of loss, nats/token")),
        heat[2],
        ("Early exit", _exits_and_overlap, ("layers run", "loss, nats/token")),
        ("What a layer adds (dotted: MLP)", alone(_shares), ("layer", "‖added‖ / ‖stream‖")),
        ("Linearity", alone(_linear), ("layer", "r²")),
        heat[3],
        ("Output without a layer", alone(_outputs), ("layer", "‖change of probabilities‖")),
    ]


def _label(axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=9, colors=INK)


# ---- Lines ------------------------------------------------------------------------------------
# Each draws one run and says whether there was anything to draw.


def _line(axes, x, y, style: Style, **options) -> None:
    own = {"lw": 1.5, "ms": 3.6, "mec": "white", "mew": 0.5, **style, **options}
    axes.plot(x, y, **own)


def _distance(axes, found: Found, style: Style) -> bool:
    values = ((found.get("similarity") or {}).get("mean") or {}).get("by_distance", [])[1:]
    _line(axes, range(1, len(values) + 1), values, style)
    return bool(values)


def _groups(axes, found: Found) -> bool:
    groups = (found.get("similarity") or {}).get("groups", {})
    for place, (name, here) in enumerate(groups.items()):
        values = here["by_distance"][1:]
        _line(axes, range(1, len(values) + 1), values, run_style(place), label=name)
    if groups:
        axes.legend(
            fontsize=8, frameon=False, ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.17),
            handlelength=1.2, columnspacing=1.0,
        )  # fmt: skip
    return bool(groups)


def _skips(axes, found: Found, style: Style) -> bool:
    rows = changes(found, "skip")
    if rows:
        _points(axes, rows, style)
    return bool(rows)


def _points(axes, rows, style: Style, **options) -> None:
    x = [row["at"] for row in rows]
    y = [row["change"] for row in rows]
    bars = None
    if all(row["interval"] is not None for row in rows):
        bars = [
            [row["change"] - row["interval"][0] for row in rows],
            [row["interval"][1] - row["change"] for row in rows],
        ]
    own = {"lw": 1.2, "ms": 4, "mec": "white", "mew": 0.5, "elinewidth": 1, **style, **options}
    axes.errorbar(x, y, yerr=bars, **own)


def _changed(axes, found: Found, unit: str) -> bool:
    any_drawn = False
    for place, kind in enumerate(("skip", "swap", "repeat", "reverse")):
        rows = changes(found, kind, unit)
        if rows:
            # Side by side, so that their intervals can be told apart.
            moved = [{**row, "at": row["at"] + 0.12 * (place - 1.5)} for row in rows]
            _points(axes, moved, run_style(place), label=kind, linestyle="")
            any_drawn = True
    if any_drawn:
        axes.axhline(0, color="#999999", lw=0.8)
        axes.legend(fontsize=8, frameon=False)
    return any_drawn


def _layers_changed(axes, found: Found) -> bool:
    return _changed(axes, found, "layer")


def _blocks_changed(axes, found: Found) -> bool:
    return _changed(axes, found, "block")


def _exits(axes, found: Found, style: Style) -> bool:
    losses = (found.get("lens") or {}).get("loss", [])
    _line(axes, range(len(losses)), losses, style)
    return bool(losses)


def _exits_and_overlap(axes, found: Found) -> bool:
    lens = found.get("lens")
    if lens is None:
        return False
    _exits(axes, found, run_style(0))
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    _line(other, range(len(lens["overlap"])), lens["overlap"], run_style(1))
    other.set_ylim(0, 1.03)
    label = f"overlap of the top {lens['top']} with the model's"
    other.set_ylabel(label, fontsize=9.5, color=COLORS[1])
    return True


def _shares(axes, found: Found, style: Style) -> bool:
    shares = found.get("contributions")
    if shares is None:
        return False
    _blocks_of(axes, found)
    _line(axes, range(len(shares["attention"])), shares["attention"], style, linestyle="-")
    _line(axes, range(len(shares["mlp"])), shares["mlp"], style, linestyle=(0, (1.5, 1.2)))
    if min(*shares["attention"], *shares["mlp"]) > 0:
        axes.set_yscale("log")  # The first layer adds many times what the others do.
    return True


def _linear(axes, found: Found, style: Style) -> bool:
    values = r2_of(found)
    known = [(layer, value) for layer, value in enumerate(values) if value is not None]
    if known:
        _blocks_of(axes, found)
        _line(axes, *zip(*known, strict=True), style)
    return bool(known)


def _outputs(axes, found: Found, style: Style) -> bool:
    values = (found.get("effects") or {}).get("output", [])
    if values:
        _line(axes, range(len(values)), values, style)
        axes.set_ylim(bottom=0)
    return bool(values)


def _blocks_of(axes, found: Found) -> None:
    """Faint lines where a block begins, so that a period shows."""
    if found["block"] > 1:
        for start in range(found["block"], len(found["positions"]), found["block"]):
            axes.axvline(start - 0.5, color="#BBBBBB", lw=0.7, ls=(0, (1, 2)), zorder=0)


# ---- Heat maps ----------------------------------------------------------------------------------


def _heat(
    axes, matrix, x: str, y: str, low: float, high: float, colors: str, later: bool = False
) -> None:
    """A square of colours, blank for a layer with itself; `later`: also with those before it."""
    matrix = [
        [math.nan if i == j or (later and j < i) else value for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
    from matplotlib import colormaps

    # As many colours as an eye tells apart: the scale beside it is a rectangle for each.
    drawn = axes.pcolormesh(
        matrix, cmap=colormaps[colors].resampled(49), vmin=low, vmax=high, edgecolors="white",
        linewidth=0.4 if len(matrix) <= 24 else 0,
    )
    count = len(matrix)
    # Numbers of layers stand in the middle of their squares.
    step = -(-count // 12)
    axes.set_xticks([i + 0.5 for i in range(0, count, step)], range(0, count, step))
    axes.set_yticks([i + 0.5 for i in range(0, count, step)], range(0, count, step))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.9)
    # An image would be an address in the page, which its policy forbids.
    bar.solids.set(rasterized=False, edgecolor="face")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)


def _spread(matrix) -> float:
    """The largest size of an entry, the diagonal aside: what colours should be able to show."""
    values = [abs(v) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j]
    return max([*values, 1e-3])


def _cosines(unit: str, called: str) -> Callable:
    def draw(axes, found: Found) -> bool:
        matrix = ((found.get("similarity") or {}).get("mean") or {}).get(unit, [])
        if len(matrix) < 2:
            return False
        # Small similarities are to show as well as large ones.
        limit = min(1.0, _spread(matrix))
        _heat(axes, matrix, called, called, -limit, limit, "RdBu_r")
        return True

    return draw


def _later(axes, found: Found) -> bool:
    matrix = (found.get("effects") or {}).get("later", [])
    if len(matrix) < 2:
        return False
    _heat(axes, matrix, "effect at layer", "layer skipped", 0, _spread(matrix), "viridis", True)
    return True


def _neurons(axes, found: Found) -> bool:
    matrix = (found.get("neurons") or {}).get("iou", [])
    if len(matrix) < 2:
        return False
    _heat(axes, matrix, "layer", "layer", 0, min(1.0, _spread(matrix)), "viridis")
    return True


_HEAT_MAPS = (
    ("layers", "Similarity of layers", _cosines("layers", "layer"),
     "Cosine of the weights of every two layers, mean over the seven matrices. The scale ends at "
     "the largest of them."),
    ("blocks", "Similarity of blocks", _cosines("blocks", "block"),
     "The same of blocks of layers, their weights put end to end."),
    ("later", "Effect of skipping on later layers", _later,
     "Relative change of what each later layer adds to the stream, when an earlier one is "
     "skipped."),
    ("neurons", "Overlap of active neurons", _neurons,
     "Intersection over union of the most active hundredth of MLP neurons of every two layers. "
     "The scale ends at the largest of them."),
)  # fmt: skip
