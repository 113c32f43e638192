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

from benchmarks.measure import interleaved, ratio, report
from benchmarks.step_time import packed_batch
from stacking_jax.console import say
from stacking_jax.data import DataConfig
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.models.config import REMAT_POLICIES
from stacking_jax.planning.compiled import compile_stage, lower_stage
from stacking_jax.training import MeshConfig, OptimizerConfig, TrainConfig, sharding
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.state import sharded_initial_state

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


def here(config: TrainConfig, ways: dict[str, dict], rounds: int, per_round: int) -> dict:
    """Compiles every way for the first device of this process and times them in turn."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    jax.config.update("jax_enable_compilation_cache", False)
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    model = config.model
    batch = sharding.place_batch(
        packed_batch(config.batch_size, config.data.sequence_length, model.vocab_size), mesh
    )
    programs, states, rows, losses = {}, {}, {}, {}
    for name, settings in ways.items():
        lowered = lower_stage(with_model(config, settings), 0, mesh)
        result, _, programs[name] = compile_stage(lowered, mesh, lambda group: 1.0)
        states[name] = sharded_initial_state(model, optimizer, 0, lowered.abstract)
        rows[name] = {
            "temporary_bytes": result["temporary_bytes"],
            "lower_seconds": result["lower_seconds"],
            "compile_seconds": result["compile_seconds"],
        }

    if not rounds:
        return {"ways": rows}

    busy: dict[str, list[float]] = {name: [] for name in ways}

    def runner(name):
        def run():
            began = time.process_time()
            states[name], metrics = programs[name](states[name], batch)
            losses.setdefault(name, float(metrics["loss"]))
            jax.block_until_ready(states[name])
            busy[name].append(time.process_time() - began)

        return run

    seconds = interleaved({name: runner(name) for name in ways}, rounds, per_round)
    first = next(iter(ways))
    apart = max(abs(loss / losses[first] - 1) for loss in losses.values())
    assert apart < (1e-5 if model.dtype == "float32" else 1e-2), f"the losses differ: {losses}"
    for name, row in rows.items():
        row["median_seconds"] = statistics.median(seconds[name])
        # Of all threads: on a machine that others load it tells more than the clock does.
        row["median_cpu_seconds"] = statistics.median(busy[name][1:])
        row[f"speed_against_{first}"] = ratio(seconds[first], seconds[name])
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
    parser.add_argument("--per_round", type=int, default=2)
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
    config = TrainConfig(
        model=DecoderConfig(
            vocab_size=arguments.vocab, num_layers=arguments.layers, d_model=arguments.d_model,
            d_ff=arguments.d_model * 8 // 3 // 16 * 16, num_heads=arguments.d_model // 64,
            dtype=arguments.dtype,
        ),
        data=DataConfig(sequence_length=arguments.length),
        optimizer=OptimizerConfig(weight_decay=0.1),
        batch_size=arguments.rows,
    )
    found = here(config, ways, arguments.rounds, arguments.per_round)
    load = os.getloadavg()[0]
    report("stack_ways", {"shape": vars(arguments), "load_after": load, **found}, arguments.out)


if __name__ == "__main__":
    main()
