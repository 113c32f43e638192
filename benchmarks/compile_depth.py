"""How long the train step of 48 scanned layers compiles, against that of 8.

    python -m benchmarks.compile_depth --out benchmarks/results/compile_depth_cpu.json

Tracing, lowering and compiling together, without any cache of programs, the two depths in turn.
A scan's body is compiled once whatever the depth, so that a deep model starts as fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax

from benchmarks.contenders import Shape, lowered
from benchmarks.measure import report, speed, windows

SHAPE = Shape(320, 8, 256, 672, 4, 4, 256, "float32", documents=2)


def measure(
    shallow: int, deep: int, rounds: int, shape: Shape = SHAPE, stack: str = "scan"
) -> dict:
    """Compiles the steps of two depths in turn.

    Args:
      shallow, deep: layers.
      rounds: of each.
      shape: of the rest.
      stack: as `DecoderConfig.stack`.
    """
    jax.config.update("jax_enable_compilation_cache", False)

    def compiling(layers: int):
        def run(times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                lowered(dataclasses.replace(shape, layers=layers), stack=stack).compile()
            return time.perf_counter() - began

        return run

    seconds = windows({"shallow": compiling(shallow), "deep": compiling(deep)}, rounds, 1)
    return {
        "shape": dataclasses.asdict(shape),
        "stack": stack,
        "layers": [shallow, deep],
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": seconds,
        "deep_over_shallow": speed(seconds["deep"], seconds["shallow"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shallow", type=int, default=8)
    parser.add_argument("--deep", type=int, default=48)
    parser.add_argument("--stack", default="scan", help="'scan' or 'unroll'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    found = measure(
        arguments.shallow, arguments.deep, arguments.rounds, stack=arguments.stack
    )
    report("compile_depth", found | {"goal": 1.3}, arguments.out)


if __name__ == "__main__":
    main()
