"""The loader alone, and whether a step would ever wait for it.

    python -m benchmarks.loader --out benchmarks/results/loader_cpu.json

What `train` does to get a batch onto the devices: records read from a cache in shuffled order,
decoded, placed on the mesh by a thread of their own. First as fast as it goes; then for a device
whose steps take as long as a given rate says, by a loop like that of `train`: it takes a batch,
dispatches the step and waits for the one before. Counted is how long the device has nothing to
do (what steps lose), and how long the host stands in `next` (what the device's queue hides).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.measure import report
from stacking_jax.data import DataConfig, PackedBatches, open_cache
from stacking_jax.training import MeshConfig, sharding


def batches_of(data: PackedBatches, mesh: sharding.LogicalMesh, placed: int) -> Iterator:
    rows = sharding.local_rows(data.batch_size, mesh)
    place = functools.partial(sharding.place_batch, mesh=mesh)
    return data.iterate(0, rows, place=place, placed=placed)


def alone(data: PackedBatches, mesh: sharding.LogicalMesh, placed: int, count: int) -> float:
    """Tokens per second with nobody to wait for."""
    with contextlib.closing(batches_of(data, mesh, placed)) as batches:
        for _ in range(5):
            jax.block_until_ready(next(batches)[2])
        began = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(next(batches)[2])
        seconds = time.perf_counter() - began
    return count * data.batch_size * data.sequence_length / seconds


def waiting(
    data: PackedBatches, mesh: sharding.LogicalMesh, placed: int, rate: float, count: int
) -> dict[str, float]:
    """How long steps of so many tokens per second wait for batches, and the host for `next`."""
    step_seconds = data.batch_size * data.sequence_length / rate
    waits, idle, ends = [], [], [0.0, 0.0]
    with contextlib.closing(batches_of(data, mesh, placed)) as batches:
        for step in range(count + 5):
            began = time.perf_counter()
            next(batches)
            dispatched = time.perf_counter()
            if step >= 5:
                waits.append(dispatched - began)
                idle.append(max(dispatched - ends[-1], 0.0))
            # The step begins when the one before is over, whose metrics are read meanwhile.
            ends = [ends[-1], max(dispatched, ends[-1]) + step_seconds]
            time.sleep(max(ends[0] - time.perf_counter(), 0.0))
    return {
        "share": sum(idle) / (count * step_seconds),
        "host_share": sum(waits) / (count * step_seconds),
        "median_milliseconds": 1e3 * statistics.median(waits),
        "worst_milliseconds": 1e3 * max(waits),
        "step_milliseconds": 1e3 * step_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=600e3, help="tokens per second of the steps")
    parser.add_argument("--steps", type=int, default=40, help="per window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    mesh = sharding.make_mesh(MeshConfig())
    windows: dict[str, list] = {"alone": [], "ahead": [], "in_turn": []}
    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(
            sequence_length=arguments.length, cache_dir=str(Path(folder) / "cache")
        )
        data = PackedBatches(open_cache(config), batch_size=arguments.batch_size)
        data.passes(arguments.steps + 10)
        for _ in range(arguments.rounds):
            windows["alone"].append(alone(data, mesh, 2, arguments.steps))
            for name, placed in (("ahead", 2), ("in_turn", 0)):
                windows[name].append(
                    waiting(data, mesh, placed, arguments.rate, arguments.steps)
                )
    report(
        "loader",
        {
            "shape": {name: value for name, value in vars(arguments).items() if name != "out"},
            "alone_tokens_per_second": statistics.median(windows["alone"]),
            **{
                key: {
                    name: statistics.median(window[share] for window in windows[name])
                    for name in ("ahead", "in_turn")
                }
                for key, share in (("waiting_share", "share"), ("host_share", "host_share"))
            },
            "goals": {"alone_over_demand": 1, "waiting_share": 0.001},
            "windows": windows,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
