"""The comparison table of docs/methods.md, from the runs of `gin/studies/methods.gin`.

    stacking-jax study --gin_file gin/studies/methods.gin --run_dir runs/methods --jobs 2
    python -m benchmarks.methods_table runs/methods

keeps what the study found in results/methods_cpu.json, with machine and date, and writes the table
from it; without a study the table is written from what is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.doc_tables import between_marks, markdown
from benchmarks.measure import report

RESULTS = Path(__file__).parent / "results" / "methods_cpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
_HEAD = (
    "method", "held-out loss, nats per token", "less that of the baseline, as many steps (95 %)",
    "less that of full depth with as many FLOPs", "FLOPs over the baseline's",
    "time over the baseline's",
)


def table(results: Mapping[str, Any]) -> str:
    """Markdown, a line per arm.

    Args:
      results: what results.json of a study holds; its first arm is the baseline.
    """
    arms = results["arms"]
    baseline = arms[next(iter(arms))]
    steps, flops = (
        {line["arm"]: line for line in results[name] if line["endpoint"] == "loss"}
        for name in ("equal_steps", "equal_flops")
    )
    rows = []
    for name, arm in arms.items():
        losses = list(arm["loss"].values())
        if not losses:
            rows.append((name, "no complete run", "", "", "", ""))
            continue
        rows.append((
            name,
            f"{statistics.fmean(losses):.3f}",
            _difference(steps.get(name)),
            _difference(flops.get(name)),
            f"{arm['model_flops'] / baseline['model_flops']:.2f}",
            f"{arm['seconds'] / baseline['seconds']:.2f}",
        ))
    return markdown(_HEAD, rows)


def _difference(line: Mapping[str, Any] | None) -> str:
    if line is None or line["found"] is None:
        return ""
    found = line["found"]
    if found["low"] is None:
        return f"{found['mean']:+.3f}".replace("-", "−")
    text = f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
    return text.replace("-", "−")


def with_table(page: str, results: Mapping[str, Any]) -> str:
    """The page with the table between its two marks."""
    seeds = len(next(iter(results["arms"].values()))["loss"])
    return between_marks(page, f"{table(results)}\nMeans over {seeds} seeds.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", help="folder of the study")
    arguments = parser.parse_args()
    if arguments.study:
        found = json.loads((Path(arguments.study) / "results.json").read_text(encoding="utf-8"))
        kept = {key: found[key] for key in ("name", "arms", "equal_steps", "equal_flops", "notes")}
        report("methods", kept, str(RESULTS))
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, results), encoding="utf-8")


if __name__ == "__main__":
    main()
