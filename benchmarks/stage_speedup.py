"""What growing saves on the clock, against what the plan predicts.

    python -m benchmarks.stage_speedup --out benchmarks/results/stage_speedup_cpu.json

Runs the demo at full depth and with MIDAS for equal steps, in turn, as whole
processes with a warm compilation cache. The first round fills it and is not counted; it
has as many steps, since the schedule's constants are part of the compiled programs.
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

DEMO = ["--gin_file", "gin/experiments/demo.gin"]
FULL = [*DEMO, "--gin_file", "gin/growth/baseline.gin"]


def run(files: list[str], run_dir: Path, steps: int, compiled: Path) -> dict[str, float]:
    began = time.perf_counter()
    subprocess.run(
        [
            sys.executable, "-m", "stacking_jax", "train", *files, "--run_dir", str(run_dir),
            f"--gin.TRAIN_STEPS={steps}", f'--gin.TrainConfig.compilation_cache="{compiled}"',
        ],
        check=True, capture_output=True,
    )
    process = time.perf_counter() - began
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return {
        "train_seconds": summary["train_seconds"],
        "process_seconds": process,
        "predicted": summary["speedup_model"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    steps_only, everything, predicted = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled"
        for turn in range(arguments.rounds + 1):
            pair = {
                name: run(files, Path(folder) / f"{name}_{turn}", arguments.steps, compiled)
                for name, files in (("midas", DEMO), ("full", FULL))
            }
            if turn:
                predicted = pair["midas"]["predicted"]
                steps_only.append(pair["full"]["train_seconds"] / pair["midas"]["train_seconds"])
                everything.append(
                    pair["full"]["process_seconds"] / pair["midas"]["process_seconds"]
                )
    report(
        "stage_speedup",
        {
            "steps": arguments.steps,
            "predicted": predicted,
            "measured_steps_only": {"median": statistics.median(steps_only), "all": steps_only},
            "measured_everything": {"median": statistics.median(everything), "all": everything},
            "steps_only_over_predicted": statistics.median(steps_only) / predicted,
            "everything_over_predicted": statistics.median(everything) / predicted,
            "goals": {"steps_only_over_predicted": 0.95, "everything_over_predicted": 0.9},
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
