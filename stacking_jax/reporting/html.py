"""The report: one HTML page that needs nothing but itself.

No script, font or image is fetched, and a content security policy in the page
forbids it, whatever a run's name may hold.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Sequence
from pathlib import Path

import stacking_jax
from stacking_jax.errors import UserError
from stacking_jax.reporting.boundaries import boundaries_section
from stacking_jax.reporting.choices import choices_section
from stacking_jax.reporting.comparison import EQUAL_FLOPS, Comparison
from stacking_jax.reporting.diagnostics import inside_section
from stacking_jax.reporting.goodput import goodput_section
from stacking_jax.reporting.isoplot import isoplot_figures, isoplots
from stacking_jax.reporting.markup import escape, legend
from stacking_jax.reporting.plots import Figure, draw_figures
from stacking_jax.reporting.runs import Run
from stacking_jax.reporting.sections import (
    config_section,
    results_section,
    speedup_section,
    stages_section,
)
from stacking_jax.reporting.style import CSS
from stacking_jax.reporting.tasks import isoplot_section, tasks_section

_HOW_TO_READ = f"""
<h2>How to read this page</h2>
<dl>
<div><dt>Held-out loss</dt>
<dd>Cross-entropy alone, without z-loss or any regulariser, on documents kept apart from training;
in nats per token, and in bits per byte of text, which does not depend on the vocabulary.</dd></div>
<div><dt>The same budget</dt>
<dd>Two runs share a budget if they end there: as many steps, or model FLOPs within
{100 * EQUAL_FLOPS:g} %. A point in the middle of a curve is not the result of a shorter run: its
learning rate had not yet come down, and its loss is higher than a run planned for that budget would
reach.
Compare ends with ends.</dd></div>
<div><dt>Model FLOPs</dt>
<dd>Forward and backward, head and attention included, at the depth of each stage.</dd></div>
<div><dt>Training time and wall time</dt>
<dd>Training time counts steps alone. Wall time counts everything since the run began: compiling,
growing, evaluating, saving. Short runs compile for a large part of their time; long ones do
not.</dd></div>
<div><dt>Not comparable</dt>
<dd>The run differs from the others in its data, vocabulary, evaluation set, batch, sequence length,
optimizer, peak learning rate or model; the reason stands beside it. Its loss says nothing about the
method.</dd></div>
</dl>
"""


def write_report(
    comparison: Comparison,
    out: str | os.PathLike,
    command: str | None = None,
    now: datetime.datetime | None = None,
) -> Path:
    """Writes the comparison as one HTML file, whole or not at all.

    Args:
      comparison: from `compare_runs`.
      out: the file; what is there is replaced, missing directories are made.
      command: what was typed, to be shown in the page.
      now: the time of the report; by default now.

    Returns:
      The path of the file.

    Raises:
      UserError: the figures cannot be drawn without matplotlib, or the file cannot be written.
    """
    return write_page(out, report_html(comparison, command, now))


def write_page(out: str | os.PathLike, text: str) -> Path:
    """Writes an HTML page, whole or not at all; returns its path.

    Raises:
      UserError: the file cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a directory; give the report a file name, such as report.html")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode("utf-8"))
        os.replace(temporary, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the report {out}: {error.strerror}; choose another --out"
        ) from error
    return out


def report_html(
    comparison: Comparison,
    command: str | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """The whole page as text. Arguments and errors as `write_report`."""
    iso = isoplots(comparison.runs)
    try:
        figures = [*draw_figures(comparison), *isoplot_figures(comparison.runs, iso)]
    except ImportError as error:
        raise UserError(
            f"the report's figures need matplotlib ({error}); install the 'train' extra, or leave"
            " --out away to see the table alone"
        ) from error
    labels = [row.label for row in comparison.rows]
    title = "Comparison of " + str(len(labels)) + " runs" if len(labels) > 1 else "One run"
    drawn = figure_cards(figures, labels)
    parts = [
        f"<h1>{escape(title)}</h1>",
        meta_line(comparison.runs, now or datetime.datetime.now().astimezone()),
        f"<pre><code>{escape(command)}</code></pre>" if command else "",
        results_section(comparison),
        speedup_section(comparison),
        tasks_section(comparison),
        isoplot_section(iso),
        f'<h2>Curves</h2><div class="figures">{drawn}</div>' if drawn else "",
        inside_section(comparison),
        goodput_section(comparison),
        boundaries_section(comparison),
        choices_section(comparison),
        stages_section(comparison),
        config_section(comparison),
        _HOW_TO_READ,
        _footer(comparison),
    ]
    return page(f"{title}: {', '.join(labels)}", parts)


def figure_cards(figures: Sequence[Figure], labels: Sequence[str]) -> str:
    """Each figure under its title and the legend that is common to all."""
    return "".join(
        f'<figure class="card"><h3>{escape(figure.title)}</h3>{legend(labels)}'
        f'<div class="white">{figure.svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of these pieces of HTML; the title is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';"
        " style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f"<style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def meta_line(runs: Sequence[Run], now: datetime.datetime) -> str:
    """When a page was made, and by which versions its runs were."""
    versions: dict[str, list[str]] = {}
    for run in runs:
        for name, version in run.versions.items():
            versions.setdefault(name, []).append(version)
    versions.pop("stacking_jax", None)
    said = [f"{name} {' / '.join(dict.fromkeys(found))}" for name, found in versions.items()]
    made = f"{now:%Y-%m-%d %H:%M %Z}".strip()
    line = " · ".join([made, f"stacking_jax {stacking_jax.__version__}", *said])
    return f'<p class="meta">{escape(line)}</p>'


def _footer(comparison: Comparison) -> str:
    places = "".join(
        f"<li>{escape(row.label)}: <code>{escape(row.path)}</code></li>" for row in comparison.rows
    )
    return f'<footer class="small">Run directories<ul>{places}</ul></footer>'
