"""The verdicts of docs/lab.md, from what `stacking-jax lab icl` found.

    stacking-jax lab icl --out runs/icl
    python -m benchmarks.lab_table runs/icl

keeps icl.json and the docs' figures, and writes the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.doc_tables import between_marks, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/icl_cpu.json"
PAGE = ROOT / "docs/lab.md"
PICTURES = (
    "depth_linear_restricted", "depth_linear_full", "depth_softmax_restricted",
    "depth_softmax_full", "depth_to_reach_0_1", "depth_to_reach_0_2", "shift_wider_linear",
    "shift_larger_linear", "shift_wider_softmax", "shift_larger_softmax", "loops_linear",
    "loops_softmax", "preconditioner",
)  # fmt: skip
_HEAD = ("claim", "verdict", "mean (95 % interval)", "of")
_STEPS_HEAD = (
    "stack", "further loops or layers judged", "that raise the loss",
    "left out, between diverged losses",
)  # fmt: skip


def with_table(page: str, found: Mapping[str, Any]) -> str:
    """The page with a line per claim of `found`, which is what icl.json holds, and per stack."""
    rows = [
        (claim["text"], _verdict(claim), _interval(claim), claim["measure"])
        for claim in found["claims"]
    ]
    steps = [
        (arm, f"{of['judged']:,}", f"{of['raised']:,}", f"{of['left_out']:,}")
        for arm, of in found["violations"].items()
    ]
    return between_marks(page, markdown(_HEAD, rows) + "\n" + markdown(_STEPS_HEAD, steps))


def _verdict(claim: Mapping[str, Any]) -> str:
    return f"**{claim['verdict']}**" + (f": {claim['reason']}" if claim["reason"] else "")


def _interval(claim: Mapping[str, Any]) -> str:
    if claim["mean"] is None:
        return "–"
    text = f"{claim['mean']:.3g}"
    if claim["low"] is not None:
        text += f" ({claim['low']:.3g} to {claim['high']:.3g})"
    return text.replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("session", help="what --out named")
    session = Path(parser.parse_args().session)
    shutil.copy(session / "icl.json", RESULTS)
    for name in PICTURES:
        shutil.copy(session / f"figures/icl_{name}.png", ROOT / "docs/pictures")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
