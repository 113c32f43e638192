"""Our train step against one written by hand in plain JAX, interleaved in one process.

    python -m benchmarks.step_time --out benchmarks/results/step_time_cpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

from benchmarks.contenders import Shape, agree, initial_params, ours, plain
from benchmarks.measure import report, speed, windows


def measure(
    shape: Shape, count: int, steps: int, *, kernel: str | None = None,
    stacked: tuple[bool, ...] = (True, False), **settings: Any,
) -> dict:
    """Times our step and the plain one, after they have been found to agree.

    Args:
      shape: of model and batch.
      count: windows of each contender.
      steps: in a window.
      kernel: of the plain step's attention; None masks packed documents.
      stacked: which plain steps: on stacked layers (True), on a list of them (False).
      **settings: of our decoder.
    """
    params = initial_params(shape)
    contenders = {"ours": ours(shape, params, **settings)}
    found = contenders["ours"].first()
    agreement = {}
    for stack in stacked:
        name = "plain_stacked" if stack else "plain_list"
        contenders[name] = plain(shape, params, kernel=kernel, stacked=stack)
        agreement[name] = agree(shape, found, contenders[name].first())
    seconds = windows(contenders, count, steps)
    return {
        "shape": dataclasses.asdict(shape),
        "settings": settings,
        "kernel_of_the_plain_step": kernel,
        "steps_per_window": steps,
        "largest_relative_differences": agreement,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": seconds,
        **{
            f"speed_against_{name}": speed(seconds[name], seconds["ours"])
            for name in contenders if name != "ours"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="in a window")
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    shape = Shape(
        320, arguments.layers, arguments.d_model, arguments.d_model * 8 // 3 // 16 * 16,
        arguments.d_model // 64, arguments.rows, arguments.length, "float32", documents=2,
    )
    report(
        "step_time", measure(shape, arguments.windows, arguments.steps) | {"goal": 0.97},
        arguments.out,
    )


if __name__ == "__main__":
    main()
