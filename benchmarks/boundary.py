"""What a stage boundary costs: the stall, and how compiling ahead slows the steps before it.

    python -m benchmarks.boundary --out benchmarks/results/boundary_cpu.json

Whole runs of `stacking-jax train` of several stages, by turns with and without
`TrainConfig.compile_ahead`, each with an empty compilation cache. Everything is read from what the
runs write. Every boundary is a window. The stall is that of the row 'boundary' of metrics.jsonl.
The slowdown is the median step while the next stage was being compiled over the median step of the
same stage after it; of the runs that compile nothing then, the same steps are the control.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import report

_BEGINS = 7  # `compile_ahead.FIRST_STEPS`, and the step that shows them to be done.


def run(folder: Path, arguments: argparse.Namespace, ahead: bool) -> dict[str, list]:
    """One run: its rows by kind."""
    depths = [arguments.depth + i * arguments.block for i in range(arguments.stages)]
    steps = arguments.steps
    stages = [(depths[0], steps), *((depth, steps, "midas") for depth in depths[1:])]
    settings = {
        "TRAIN_STEPS": steps * len(stages), "BATCH_SIZE": arguments.batch_size,
        "SEQUENCE_LENGTH": arguments.length, "GrowthConfig.stages": stages,
        "DecoderConfig.num_layers": depths[-1], "DecoderConfig.d_model": arguments.width,
        "DecoderConfig.d_ff": 4 * arguments.width, "TrainConfig.log_every": 1,
        "TrainConfig.eval_every": 0, "TrainConfig.checkpoint_every": steps,
        "TrainConfig.compile_ahead": ahead, "TrainConfig.compilation_cache": str(folder / "cache"),
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "stacking_jax", "train", "--gin_file", "gin/experiments/demo.gin",
            "--gin_file", "gin/growth/baseline.gin", "--run_dir", str(folder / "run"),
            *(f"--gin.{name}={value!r}" for name, value in settings.items()),
        ],
        check=False, capture_output=True, text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr.strip()}")
    rows: dict[str, list] = {}
    for line in (folder / "run/metrics.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        rows.setdefault(row["kind"], []).append(row)
    return rows


def read(rows: dict[str, list], steps: int, compiling: list[float]) -> list[dict]:
    """The stall and the slowdown before it, of every boundary of a run.

    Args:
      rows: of metrics.jsonl by kind.
      steps: of a stage.
      compiling: per boundary the seconds for which the next stage was compiled in the
        background; for the control those of the run that it belongs to.
    """
    done = {row["step"]: row["train_seconds"] for row in rows["train"]}
    found = []
    for boundary, grow, seconds in zip(rows["boundary"], rows["grow"], compiling, strict=True):
        start = boundary["start"]
        began = start - steps + _BEGINS
        taken = {step: done[step] - done[step - 1] for step in range(began + 2, start)}
        during = [taken[step] for step in taken if done[step] <= done[began] + seconds]
        after = [taken[step] for step in taken if done[step] > done[began] + seconds]
        found.append({
            "depth": boundary["depth"],
            "stall_steps": boundary["stall_steps"],
            "stall_seconds": boundary["stall_seconds"],
            "seconds": boundary["seconds"],
            "step_seconds": boundary["step_seconds"],
            "waited_for_programs": grow["compile_seconds"],
            "compile_ahead_seconds": grow["compile_ahead_seconds"],
            "steps_while_compiling": len(during),
            # With fewer steps on a side their median says nothing.
            "slowdown": (
                statistics.median(during) / statistics.median(after)
                if min(len(during), len(after)) >= 5 else None
            ),
        })
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300, help="per stage")
    parser.add_argument("--depth", type=int, default=2, help="of the first stage")
    parser.add_argument("--block", type=int, default=1, help="layers that a growth adds")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {"ahead": [], "in_turn": []}
    for turn in range(arguments.rounds):
        rows, loads = {}, {}
        for ahead in (True, False) if turn % 2 == 0 else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                rows[ahead] = run(Path(folder), arguments, ahead)
            loads[ahead] = round(os.getloadavg()[0], 1)
            print(f"round {turn + 1}, load {loads[ahead]}", file=sys.stderr, flush=True)
        compiling = [grow["compile_ahead_seconds"] for grow in rows[True]["grow"]]
        for name, ahead in (("ahead", True), ("in_turn", False)):
            found[name] += [
                one | {"load": loads[ahead]}
                for one in read(rows[ahead], arguments.steps, compiling)
            ]

    def median(name: str, what: str) -> float | None:
        values = [one[what] for one in found[name] if one[what] is not None]
        return statistics.median(values) if values else None

    report(
        "boundary",
        {
            "shape": {name: value for name, value in vars(arguments).items() if name != "out"},
            "stall_steps": {name: median(name, "stall_steps") for name in found},
            "slowdown_while_compiling": {
                "ahead": median("ahead", "slowdown"), "control": median("in_turn", "slowdown"),
            },
            "goals": {"stall_steps": 2, "slowdown_while_compiling": 1.1},
            "windows": found,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
