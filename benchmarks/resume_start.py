"""Process start to the end of the first step: a run that goes on against one that begins.

    python -m benchmarks.resume_start --out benchmarks/results/resume_start_cpu.json

Each trial is a process of its own, `stacking-jax train` on the demo for one step, with
the data cache and the compiled programs ready. The end of the first step is the time stamp
that the run itself writes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ratio, report


def first_step_seconds(run_dir: Path, compiled: Path, step: int) -> float:
    """Seconds from process start to the end of update `step`, at which the run leaves off."""
    began = time.time()
    subprocess.run(
        [
            sys.executable, "-m", "stacking_jax", "train",
            "--gin_file", "gin/experiments/demo.gin", "--run_dir", str(run_dir),
            "--stop_at", str(step), "--gin.TrainConfig.log_every=1",
            f'--gin.TrainConfig.compilation_cache="{compiled}"',
        ],
        check=True, capture_output=True,
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    return next(
        row["unix_time"] for row in rows if row["kind"] == "train" and row["step"] == step
    ) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    fresh, resumed = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled = folder / "compiled"
        first_step_seconds(folder / "begun", compiled, 1)
        for turn in range(-1, arguments.rounds):
            goes_on = Path(shutil.copytree(folder / "begun", folder / "goes_on"))
            pair = [
                lambda: fresh.append(first_step_seconds(folder / "begins", compiled, 1)),
                lambda: resumed.append(
                    first_step_seconds(goes_on, compiled, 2)  # noqa: B023
                ),
            ]
            for measure in pair if turn % 2 else pair[::-1]:
                measure()
            for place in ("begins", "goes_on"):
                shutil.rmtree(folder / place)
            if turn < 0:  # What only the first of its kind compiles.
                fresh.clear(), resumed.clear()
    report(
        "resume_start",
        {
            "fresh_seconds": {"median": statistics.median(fresh), "all": fresh},
            "resumed_seconds": {"median": statistics.median(resumed), "all": resumed},
            "resumed_over_fresh": ratio(resumed, fresh) | {"goal": "at most 1.2"},
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
