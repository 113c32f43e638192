"""From process start to the end of the first training step, cold and with compiled programs kept.

    python -m benchmarks.startup --out benchmarks/results/startup_cpu.json

Each trial is a process of its own: `stacking-jax train` on the demo, stopped after
one step. The data cache is ready; 'cold' has an empty compilation cache. The end of
the first step is the time stamp that the run itself writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import report


def first_step_seconds(run_dir: Path, compiled: Path) -> float:
    began = time.time()
    subprocess.run(
        [
            sys.executable, "-m", "stacking_jax", "train",
            "--gin_file", "gin/experiments/demo.gin", "--run_dir", str(run_dir),
            "--stop_at", "1", "--gin.TrainConfig.log_every=1",
            f'--gin.TrainConfig.compilation_cache="{compiled}"',
        ],
        check=True, capture_output=True,
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    return next(row["unix_time"] for row in rows if row["kind"] == "train") - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    subprocess.run(
        [sys.executable, "-m", "stacking_jax", "cache", "--gin_file", "gin/experiments/demo.gin"],
        check=True, capture_output=True,
    )
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            compiled = Path(folder) / f"compiled_{turn}"
            cold.append(first_step_seconds(Path(folder) / f"cold_{turn}", compiled))
            warm.append(first_step_seconds(Path(folder) / f"warm_{turn}", compiled))
    report(
        "startup",
        {
            "cold_seconds": {"median": statistics.median(cold), "all": cold, "goal": 15},
            "warm_seconds": {"median": statistics.median(warm), "all": warm, "goal": 8},
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
