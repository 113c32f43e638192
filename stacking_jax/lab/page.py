"""The page and the table of the claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stacking_jax.lab.claims import Claim
from stacking_jax.reporting.drawn import Drawn
from stacking_jax.reporting.markup import escape
from stacking_jax.reporting.style import CSS
from stacking_jax.reporting.tables import Table

_MORE = """
td.text { white-space: normal; min-width: 150px; }
"""


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def interval_text(claim: Claim) -> str:
    value = claim.value
    if value.low is None:
        return number(value.mean)
    return f"{number(value.mean)} [{number(value.low)}, {number(value.high)}]"


def claims_table(claims: Sequence[Claim]) -> Table:
    """The claims for the terminal."""
    return Table(
        title="In-context linear regression",
        header=("verdict", "claim", "mean [95 % interval]", "of"),
        rows=tuple((c.verdict, c.text, interval_text(c), c.measure) for c in claims),
        left=(True, True, False, True),
        lines=(
            "Intervals are Student's t over seeds; no evidence: they include the bound, or as said.",
            *(f"{c.text} {c.said.capitalize()}." for c in claims if c.reason),
        ),
        marked=tuple(c.verdict == "does not hold" for c in claims),
    )


def render_page(claims: Sequence[Claim], figures: Sequence[Drawn], said: dict[str, Any]) -> str:
    """One HTML page that fetches nothing.

    Args:
      said: `versions`, `settings`, `seconds` of the session.
    """
    rows = "".join(
        f'<tr><td class="text"><b>{escape(c.verdict)}</b>'
        f'{escape(f": {c.reason}" if c.reason else "")}</td>'
        f'<td class="text">{escape(c.text)}</td><td>{escape(interval_text(c))}</td>'
        f'<td class="text">{escape(c.measure)}</td>'
        f'<td class="text small">{escape(c.source)}</td></tr>'
        for c in claims
    )
    drawn = "".join(
        f'<figure class="card"><h3>{escape(f.title)}</h3><div class="white">{f.svg()}</div>'
        f"<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    )
    versions = " · ".join(f"{name} {version}" for name, version in said["versions"].items())
    settings = "".join(
        f'<tr><td class="text"><code>{escape(name)}</code></td>'
        f'<td class="text">{escape(value)}</td></tr>'
        for name, value in said["settings"].items()
    )
    head = "".join(
        f'<th scope="col" class="text">{name}</th>'
        for name in ("verdict", "claim", "mean [95 % interval]", "of", "source")
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';"
        " style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>In-context linear regression</title><style>{CSS}{_MORE}</style></head>\n"
        "<body><main><h1>In-context linear regression</h1>"
        f'<p class="meta">{escape(versions)} · {said["seconds"]:.0f} s of measuring</p>'
        "<p>Stacks of attention, tied (looped) and not, learn to solve linear regression from "
        "the pairs in a prompt. Each row holds a claim of a paper against an interval over "
        "seeds. The relative loss is 1 for a model that always predicts zero.</p>"
        f'<h2>Claims</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<h2>Figures</h2><div class="figures">{drawn}</div>'
        "<h2>Settings</h2><details><summary>all of them</summary>"
        f'<div class="card scroll"><table class="config"><tbody>{settings}</tbody></table></div>'
        "</details></main></body></html>\n"
    )
