"""Small pieces of HTML. Everything that comes from a run passes through `escape`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.plots import DASHES, run_style

# Control characters and lone surrogates are not allowed in HTML, escaped or not.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(value: Any) -> str:
    """Text that is safe between tags and inside a quoted attribute."""
    return html.escape(_NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def run_key(index: int) -> str:
    """The line and mark by which figures show the run at this place."""
    style = run_style(index)
    dash = ("", "6 2", "2 2")[DASHES.index(style["linestyle"])]
    shapes = {
        "o": '<circle cx="15" cy="6" r="3.6"/>',
        "s": '<rect x="11.8" y="2.8" width="6.4" height="6.4"/>',
        "^": '<path d="M15 1.8L19 9.2H11Z"/>',
        "D": '<path d="M15 1.4L19.4 6L15 10.6L10.6 6Z"/>',
        "v": '<path d="M15 10.2L11 2.8H19Z"/>',
        "P": '<path d="M13.4 2H16.6V4.4H19V7.6H16.6V10H13.4V7.6H11V4.4H13.4Z"/>',
        "X": '<path d="M12 1.8L15 4.5L18 1.8L19.4 3.2L16.8 6L19.4 8.8L18 10.2L15 7.5L12 10.2'
        'L10.6 8.8L13.2 6L10.6 3.2Z"/>',
    }
    return (
        f'<svg class="key" viewBox="0 0 30 12" aria-hidden="true" fill="{style["color"]}">'
        f'<path d="M2 6H28" fill="none" stroke="{style["color"]}" stroke-width="2"'
        f'{f" stroke-dasharray={chr(34)}{dash}{chr(34)}" if dash else ""}/>'
        f"{shapes[style['marker']]}</svg>"
    )


def legend(labels: Sequence[str]) -> str:
    """Every run's key and name, in a line that wraps."""
    items = "".join(
        f"<span>{run_key(i)}{escape(label)}</span>" for i, label in enumerate(labels)
    )
    return f'<div class="legend">{items}</div>'


def number(value: float | None, text: str) -> str:
    """A table cell that shows `text` and holds the exact number for machines and for hovering."""
    if not units.known(value):
        return f"<td>{escape(text)}</td>"
    exact = repr(value)
    return f'<td><data value="{exact}" title="{exact}">{escape(text)}</data></td>'


def breakable(name: str, after: str = "/_") -> str:
    """A long name, escaped, that a narrow cell may break behind each of these characters."""
    text = escape(name)
    for character in after:
        text = text.replace(character, f"{character}<wbr>")
    return text


def text_cell(value: Any) -> str:
    return f'<td class="text">{escape(value)}</td>'


def header(columns: Iterable[tuple[str, str]], text_columns: int = 1) -> str:
    """A table head of (name, unit) columns, the first `text_columns` of them to the left."""
    cells = []
    for place, (name, unit) in enumerate(columns):
        side = ' class="text"' if place < text_columns else ""
        under = f'<span class="unit">{escape(unit)}</span>' if unit else ""
        cells.append(f'<th scope="col"{side}>{escape(name)}{under}</th>')
    return f"<thead><tr>{''.join(cells)}</tr></thead>"
