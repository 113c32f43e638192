"""Tables of the docs that are written from results, between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BEGIN, END = "<!-- from runs: begin -->\n", "<!-- from runs: end -->\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def between_marks(page: str, text: str) -> str:
    """The page with `text` between its marks, in place of what was there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the page has no marks"
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
