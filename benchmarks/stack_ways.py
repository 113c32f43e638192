"""Ways to run the stack, side by side: scan or unroll, what is kept, and the loss in chunks.

    python -m benchmarks.stack_ways --what remat --out benchmarks/results/remat_cpu.json
    python -m benchmarks.stack_ways --what modes --out benchmarks/results/stack_modes_cpu.json
    python -m benchmarks.stack_ways --topology v5p:4x4x8 --out benchmarks/results/remat_v5p.json

Whole train steps: compiled, their memory by the compiler's word, and timed in turn. With
`--topology` the chips are not here: their compiler tells memory and what moves, no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time

import jax

from benchmarks.contenders import Shape, agree, initial_params, lowered, ours
from benchmarks.measure import report, speed, windows
from stacking_jax.console import say
from stacking_jax.host_memory import keep_freed_memory
from stacking_jax.models.config import REMAT_POLICIES
from stacking_jax.training import TrainConfig

WAYS = {
    # How much is kept, beside scanned layers.
    "remat": {name: {"stack": "scan", "remat": name} for name in REMAT_POLICIES},
    "modes": {
        "scan": {"stack": "scan"},
        "scan, 2 a turn": {"stack": "scan", "scan_unroll": 2},
        "scan, 4 a turn": {"stack": "scan", "scan_unroll": 4},
        "unroll": {"stack": "unroll"},
    },
    "loss": {"whole": {"loss": "whole"}, "chunked": {"loss": "chunked"}},
}


def with_model(config: TrainConfig, settings: dict) -> TrainConfig:
    """The same run, its model computed in another way."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))


def here(shape: Shape, ways: dict[str, dict], rounds: int, per_round: int) -> dict:
    """Compiles every way for the first device of this process and times them in turn."""
    rows, contenders = {}, {}
    params = initial_params(shape)
    for name, settings in ways.items():
        began = time.perf_counter()
        compiled = lowered(shape, **settings).compile()
        rows[name] = {
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "compile_seconds": time.perf_counter() - began,
        }
        if rounds:
            contenders[name] = ours(shape, params, **settings)
    if not rounds:
        return {"ways": rows}

    first, *others = ways
    computed = contenders[first].first()
    for name in others:
        agree(shape, computed, contenders[name].first())
    seconds = windows(contenders, rounds, per_round)
    for name, row in rows.items():
        row["median_seconds"] = statistics.median(seconds[name])
        row[f"speed_against_{first}"] = speed(seconds[first], seconds[name])
    return {"ways": rows, "seconds": seconds}


def described(experiment: str, topology: str, ways: dict[str, dict]) -> dict:
    """What the compiler of chips that are not here says of an experiment's last stage."""
    from stacking_jax import configurables, gin_config
    from stacking_jax.planning.compiler import Compiler
    from stacking_jax.planning.topology import parse

    gin_config.load([f"gin/experiments/{experiment}.gin"], (), configurables.register)
    config = configurables.configured()
    rows = {}
    with Compiler(parse(topology)) as compiler:
        for name, settings in ways.items():
            began = time.monotonic()
            found = compiler.stage(with_model(config, settings), len(config.plan().stages) - 1)
            moved: dict[str, int] = {}
            for row in found.get("collectives", ()):
                moved[row["kind"]] = moved.get(row["kind"], 0) + row["bytes"]
            kept = (
                "fits", "hbm_peak_bytes", "hbm_limit_bytes", "argument_bytes", "temporary_bytes",
                "traffic_bytes", "compile_seconds",
            )
            rows[name] = {key: found.get(key) for key in kept} | {"collective_bytes": moved}
            say(f"{name}: {rows[name]} ({time.monotonic() - began:.0f} s)")
    return {"experiment": experiment, "topology": topology, "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=WAYS, default="remat")
    parser.add_argument("--only", nargs="*", metavar="WAY", help="some of them; all by default")
    parser.add_argument("--topology", help="of chips that are not here, such as v5p:4x4x8")
    parser.add_argument("--experiment", default="pods/midas_1b_prop2_v5p")
    parser.add_argument("--vocab", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="0: memory alone")
    parser.add_argument("--per_round", type=int, default=4)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    ways = {
        name: settings for name, settings in WAYS[arguments.what].items()
        if arguments.only is None or name in arguments.only
    }
    if arguments.topology:
        found = described(arguments.experiment, arguments.topology, ways)
        report("stack_ways", found, arguments.out)
        return
    keep_freed_memory()  # As the commands that train do.
    jax.config.update("jax_enable_compilation_cache", False)
    shape = Shape(
        arguments.vocab, arguments.layers, arguments.d_model,
        arguments.d_model * 8 // 3 // 16 * 16, arguments.d_model // 64,
        arguments.rows, arguments.length, arguments.dtype,
    )
    found = here(shape, ways, arguments.rounds, arguments.per_round)
    load = os.getloadavg()[0]
    report("stack_ways", {"shape": vars(arguments), "load_after": load, **found}, arguments.out)


if __name__ == "__main__":
    main()
