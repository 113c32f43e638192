"""How long the reasoning primitives take: `evaluate` on a run, 0-shot and 5-shot.

    python -m benchmarks.primitive_time --run_dir R --out benchmarks/results/primitive_time_cpu.json

Whole commands, each in a process of its own, with an empty compilation cache: what a person
waits for who evaluates for the first time. R is a run of `gin/experiments/ul2_demo.gin`, the
demo model with a context that holds five demonstrations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import report

GOALS = {0: 600.0, 5: None}
"""Demonstrations -> seconds that it may take on two cores."""


def timed(run_dir: str, shots: int, limit: int) -> dict[str, object]:
    """The group `primitives` with so many demonstrations, once."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        said = subprocess.run(
            [
                sys.executable, "-m", "stacking_jax", "evaluate", "--run_dir", run_dir, "--tasks",
                "primitives", "--shots", str(shots), "--limit", str(limit), "--out",
                f"{folder}/out", "--json",
            ],
            check=True, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "STACKING_JAX_CACHE": f"{folder}/cache"},
        ).stdout
        seconds = time.monotonic() - began
    found = json.loads(said)
    return {
        "seconds": round(seconds, 1), "goal": GOALS.get(shots), "tasks": len(found),
        "examples": sum(result["n"] for result in found.values()),
        "skipped": sum(result["skipped"] for result in found.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--shots", type=int, nargs="+", default=sorted(GOALS))
    parser.add_argument("--out")
    arguments = parser.parse_args()
    result = {
        f"{shots}_shot": timed(arguments.run_dir, shots, arguments.limit)
        for shots in arguments.shots
    }
    report("primitive_time", result, arguments.out)


if __name__ == "__main__":
    main()
