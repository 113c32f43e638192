"""The tables under "Results" in study.md, and its figures, from the depth reasoning study.

    stacking-jax study --gin_file gin/studies/depth_reasoning.gin \\
      --run_dir runs/reasoning_study --jobs 2
    python -m benchmarks.depth_reasoning_table runs/reasoning_study

keeps what the study found in results/depth_reasoning_cpu.json, with machine and date, copies its
figures to docs/pictures, and writes the tables; without a study the tables are written from what
is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.doc_tables import between_marks, markdown
from benchmarks.measure import report
from stacking_jax.reporting import units

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/depth_reasoning_cpu.json"
PAGE = ROOT / "benchmarks/study.md"
PICTURES = ("tokens", "model-flops", "ends-loss", "ends-score", "differences-loss")
_ARMS = (
    "arm", "steps", "FLOPs", "time", "held-out loss (of seeds)", "score", "depth 0", "depth 1",
    "depth 2", "depth 3", "seeds",
)
_TESTS = (
    "comparison", "endpoint", "difference (95 %)", "p", "p, Holm", "smallest effect", "found",
)


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: the arms, the declared tests with the A/A rows, equal time, time to equal loss.

    Args:
      results: what results.json of the study holds; its first arm is full depth.
    """
    first = next(iter(results["arms"].values()))
    arms = [_arm_row(name, arm, first) for name, arm in results["arms"].items()]
    tests = [_test_row(line) for line in (*results["declared"], *results["noise"])]
    time = [
        (
            line["arm"], line["endpoint"], _difference(line), line["says"],
            line["note"] or f"{line['reference']} ended within 2 % of its time",
        )
        for line in results["equal_time"]
    ]
    sooner = [_time_row(row) for row in results["time_to_loss"]]
    return "\n".join((
        markdown(_ARMS, arms),
        "FLOPs and time (median step × steps + boundaries) are over those of full depth; means over "
        "seeds.\n",
        markdown(_TESTS, tests),
        "Equal time (the reference is full depth, interpolated where none ended there):\n",
        markdown(("arm", "endpoint", "difference (95 %)", "found", "how"), time),
        "Time of the reference's whole run over the time at which the arm has its final loss:\n",
        markdown(("arm", "reference", "ratio (95 %)", "seeds that reach it"), sooner),
    ))


def _arm_row(name: str, arm: Mapping[str, Any], first: Mapping[str, Any]) -> tuple[str, ...]:
    losses, scores = list(arm["loss"].values()), list(arm["score"].values())
    if not losses:
        return (name, f"{arm['steps']:,}", *["–"] * 8, "0")
    tasks = [
        f"{statistics.fmean(of.values()):.1f}" for _, of in sorted(arm["tasks"].items())
    ]
    return (
        name, f"{arm['steps']:,}", f"{arm['model_flops'] / first['model_flops']:.2f}",
        f"{arm['seconds'] / first['seconds']:.2f}",
        f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})",
        f"{statistics.fmean(scores):.1f}", *tasks, str(len(losses)),
    )


def _test_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    called = f"{line['arm']} − {line['reference']}"
    if line["arm"] == line["reference"]:
        called = f"A/A: {line['arm']}, {line['note']}"
    found = line["found"] or {}
    return (
        called, line["endpoint"], _difference(line), units.p_value(found.get("p")),
        units.p_value(line["adjusted"]),
        _number(line["detectable"], line["endpoint"], sign=False), f"**{line['says']}**",
    )


def _time_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = "–"
    if row["low"] is not None:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    return row["arm"], row["reference"], ratio, f"{row['reached']} of {row['pairs']}"


def _difference(line: Mapping[str, Any]) -> str:
    found, endpoint = line["found"], line["endpoint"]
    if found is None or found["low"] is None:
        return "–"
    low, high = _number(found["low"], endpoint), _number(found["high"], endpoint)
    return f"{_number(found['mean'], endpoint)} ({low} to {high})"


def _number(value: float | None, endpoint: str, sign: bool = True) -> str:
    return units.difference(value, endpoint, sign).replace("-", "−")


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """The page with the tables between its two marks."""
    return between_marks(page, tables(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", help="folder of the study")
    study = parser.parse_args().study
    if study:
        found = json.loads((Path(study) / "results.json").read_text(encoding="utf-8"))
        report("depth_reasoning", found, str(RESULTS))
        for name in PICTURES:
            shutil.copy(
                Path(study) / f"figures/study-{name}.png",
                ROOT / f"docs/pictures/depth_reasoning_{name.replace('-', '_')}.png",
            )
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
