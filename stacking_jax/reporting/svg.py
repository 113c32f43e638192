"""A figure as an `<svg>` element that can stand in a page beside others.

Letters are drawn as paths, so that a figure looks the same on every machine,
and nothing in it points outside the page.
"""

from __future__ import annotations

import html
import io
import re

INK, FAINT, GRID = "#222222", "#666666", "#E6E6E6"
STRIP = 12.5  # Height of a strip above the axes, with its gap, in points.


def new_axes(strips: int = 0):
    """A figure of 5.2 by 3.5 inches: readable on a phone's width, not coarse on a desk's.

    Args:
      strips: how many strips of `STRIP` points are to stand above the axes.

    Returns:
      (figure, axes) of matplotlib.
    """
    from matplotlib.figure import Figure

    wide, high = 5.2, 3.5
    figure = Figure(figsize=(wide, high))
    bottom, top = 0.125, 1 - (9 + STRIP * strips) / (72 * high)
    axes = figure.add_axes((0.125, bottom, 0.845, top - bottom))
    axes.set_facecolor("white")
    axes.grid(True, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(labelsize=9, colors=INK, length=3, color="#999999")
    axes.xaxis.label.set_size(9.5)
    axes.yaxis.label.set_size(9.5)
    return figure, axes


def inline_svg(figure, key: str, label: str) -> str:
    """The figure as an <svg> element for HTML: no prolog, no addresses, identifiers of its own."""
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "path", "svg.hashsalt": key, "path.simplify_threshold": 0.4}
    with matplotlib.rc_context(settings):
        figure.savefig(
            buffer, format="svg", facecolor="none",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    # Several figures stand in one page: what one defines, another must not answer for.
    prefix = f"{re.sub(r'[^a-z]+', '-', key)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda match: f'<svg class="plot" {match[1]} role="img" aria-label="{html.escape(label)}">',
        svg,
        count=1,
    )
    return _shorter(svg)


def _shorter(svg: str) -> str:
    """Coordinates to a hundredth of a point, and no identifiers that nothing refers to."""
    # Scales stay as they are: a glyph's is 1/64 of a number of points.
    svg = re.sub(
        r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d{2})\d+", r"\1", match[0]), svg
    )
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    return re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
