"""The clock of training at full depth over that of MIDAS, everything included, against theory.

    python -m benchmarks.stage_clock --out benchmarks/results/stage_clock_cpu.json

A run whose every stage has 2,000 steps takes hours, so its clock is put together from measured
parts: the seconds of a step at every depth, in interleaved windows, times the steps of the
plan; and what a whole process takes beside its steps (start, data, compiling every stage
without a cache of programs, growing, evaluating, saving), from short runs of both arms with
the same stages. Short stages hide less of the compiling behind steps than long ones would.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import Shape, initial_params, ours
from benchmarks.measure import interval, report, windows
from stacking_jax.growth import Plan

ROOT = Path(__file__).resolve().parents[1]
DEMO = Shape(320, 8, 96, 256, 2, 8, 256, "float32")


def measure(
    shape: Shape, stages: int, *, alphas: Sequence[int] = (1, 2), first_stage: int = 2000,
    short: int = 30, count: int = 5, steps: int = 10,
    add_loop: bool = True, **settings: str | int,
) -> dict:
    """Measures the parts and puts the clocks together.

    Args:
      shape: of the full depth.
      stages: k.
      alphas: of the schedules PROP-α.
      first_stage: steps of the first stage, the shortest one.
      short: steps of every stage of the runs that are carried out.
      count: windows.
      steps: in a window.
      add_loop: whether the steps of the loop, where they are slower than those of the windows,
        count in their place. Not on a machine that is busy with other things.
      **settings: of the decoder.
    """
    # First, while this process holds no accelerator.
    arms = {name: _run(shape, stages, short, name == "midas", settings) for name in
            ("full", "midas")}
    depths = [shape.layers * stage // stages for stage in range(1, stages + 1)]
    contenders = {}
    for depth in depths:
        at = dataclasses.replace(shape, layers=depth)
        contenders[str(depth)] = ours(at, initial_params(at), **settings)
    seconds = windows(contenders, count, steps)
    typical = {depth: statistics.median(times) for depth, times in seconds.items()}
    loop = {
        name: sum(arm["step_seconds"].values()) / sum(typical[d] for d in arm["step_seconds"])
        for name, arm in arms.items()
    }
    found = {}
    for alpha in alphas:
        lengths = [first_stage * stage**alpha for stage in range(1, stages + 1)]
        plan = Plan.prop(shape.layers, stages, sum(lengths), alpha=alpha)
        costs = shape.config().model.costs(shape.length)
        predicted = plan.describe(costs, shape.tokens)["speedup_model"]
        clocks = []
        for window in range(count):
            clock = {
                "midas": sum(
                    n * seconds[str(depth)][window]
                    for n, depth in zip(lengths, depths, strict=True)
                ),
                "full": sum(lengths) * seconds[str(shape.layers)][window],
            }
            clocks.append({
                name: arms[name]["beside_steps"] + value * (max(loop[name], 1) if add_loop else 1)
                for name, value in clock.items()
            })
        ratios = interval([clock["full"] / clock["midas"] for clock in clocks])
        found[f"prop{alpha}"] = {
            "steps": lengths, "predicted": predicted, "measured": ratios,
            "measured_over_predicted": {
                key: ratios[key] / predicted for key in ("median", "low", "high")
            },
            "hours": {name: statistics.median(c[name] for c in clocks) / 3600 for name in arms},
        }
    return {
        "shape": dataclasses.asdict(shape), "settings": settings, "num_stages": stages,
        "short_runs": arms, "seconds_per_step": typical, "windows": count,
        "steps_per_window": steps, "loop_over_windows": loop, "loop_added": add_loop, **found,
    }


def _run(shape: Shape, stages: int, short: int, grown: bool, settings: dict) -> dict:
    """One whole process of equal stages: seconds beside the steps, and of a step by depth."""
    growth = "midas_prop1" if grown else "baseline"
    bindings = {
        "TRAIN_STEPS": short * stages, "BATCH_SIZE": shape.rows,
        "SEQUENCE_LENGTH": shape.length, "NUM_STAGES": stages, "GrowthConfig.alpha": 0.0,
        "DecoderConfig.vocab_size": shape.vocab, "DecoderConfig.num_layers": shape.layers,
        "DecoderConfig.d_model": shape.width, "DecoderConfig.d_ff": shape.inner,
        "DecoderConfig.num_heads": shape.heads, "DecoderConfig.dtype": shape.dtype,
        **{f"DecoderConfig.{name}": value for name, value in settings.items()},
        "TrainConfig.log_every": 1, "TrainConfig.checkpoint_every": 0,
        "TrainConfig.eval_batches": 2, "TrainConfig.compilation_cache": "",
    }
    command = [
        sys.executable, "-m", "stacking_jax", "train", "--gin_file", "gin/train.gin",
        "--gin_file", "gin/data/stdlib.gin", "--gin_file", f"gin/growth/{growth}.gin",
        *(f"--gin.{name}={value!r}" for name, value in bindings.items()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        # The data are cached before either arm begins.
        _call([*command, "--run_dir", f"{folder}/first", "--stop_at", "1"])
        began = time.perf_counter()
        _call([*command, "--run_dir", f"{folder}/run"])
        process = time.perf_counter() - began
        summary = json.loads(Path(folder, "run/summary.json").read_text(encoding="utf-8"))
        with Path(folder, "run/metrics.jsonl").open(encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    taken: dict[str, list[float]] = {}
    for before, row in itertools.pairwise(rows):
        if row["depth"] == before["depth"]:
            taken.setdefault(str(row["depth"]), []).append(
                row["train_seconds"] - before["train_seconds"]
            )
    return {
        "process_seconds": process,
        "beside_steps": process - summary["train_seconds"],
        "parts": summary["seconds"],
        "step_seconds": {depth: statistics.median(times) for depth, times in taken.items()},
    }


def _call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # `--stop_at` is an interruption to whoever waits for the process.
    if done.returncode != 0 and "--stop_at" not in command:
        raise RuntimeError(f"the run failed: {done.stderr.strip()[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--short", type=int, default=30, help="steps of a stage of the runs")
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="in a window")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    found = measure(
        DEMO, arguments.stages, short=arguments.short, count=arguments.windows,
        steps=arguments.steps, add_loop=False,
    )
    report("stage_clock", found | {"goal": 0.95}, arguments.out)


if __name__ == "__main__":
    main()
