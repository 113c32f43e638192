"""What a train step on a pod needs by the TPU compiler's own figures: with splash attention and
the loss in chunks, and without.

    python -m benchmarks.tpu_attention --out benchmarks/results/tpu_attention.json

The full-depth stage of each experiment is compiled once per arm, for chips that are not here:
nothing is timed. An arm is a set of gin bindings; more are given by `--arm`:

    --arm 'chunked=DecoderConfig.attention="auto";TrainConfig.z_loss=0.0'
"""

from __future__ import annotations

import argparse

from benchmarks.measure import report
from stacking_jax import configurables, gin_config
from stacking_jax.console import say
from stacking_jax.planning import PlanConfig
from stacking_jax.planning.cache import ResultCache
from stacking_jax.planning.compiler import Compiler
from stacking_jax.planning.topology import parse
from stacking_jax.planning.topology_plan import full_depth

EXPERIMENTS = ("midas_1b_prop2_v5p", "midas_8b_prop2_v5p")
ARMS = {
    "without": "DecoderConfig.attention='xla';DecoderConfig.loss='whole'",
    "splash": "DecoderConfig.attention='splash';DecoderConfig.loss='whole'",
    "chunked": "DecoderConfig.attention='xla';DecoderConfig.loss='chunked'",
    "both": "DecoderConfig.attention='splash';DecoderConfig.loss='chunked'",
}
FIGURES = (
    "fits", "hbm_peak_bytes", "hbm_limit_bytes", "argument_bytes", "temporary_bytes",
    "traffic_bytes", "compile_seconds", "error",
)


def compiled(experiment: str, bindings: str) -> dict:
    """The compiler's figures of the full-depth step of one experiment."""
    gin_config.clear()
    gin_config.load(
        [f"gin/experiments/pods/{experiment}.gin"], [one for one in bindings.split(";") if one],
        configurables.register,
    )
    config = full_depth(configurables.configured())
    topology = parse(configurables.configured(PlanConfig).topology)
    cache = ResultCache()
    with Compiler(topology, cache) as compiler:
        result = compiler.stage(config, 0)
    text = cache.text(result["program"]) or ""
    return {name: result.get(name) for name in FIGURES} | {
        "topology": topology.name, "rows_of_a_chip": config.batch_size / topology.num_chips,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": result.get("collectives"),
        "collective_bytes": sum(row["bytes"] for row in result.get("collectives") or ()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", nargs="*", default=EXPERIMENTS)
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=BINDINGS")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    arms = ARMS | dict(arm.split("=", 1) for arm in arguments.arm)
    results: dict[str, dict] = {}
    for experiment in arguments.experiments:
        results[experiment] = {}
        for name, bindings in arms.items():
            say(f"{experiment}: {name}")
            results[experiment][name] = compiled(experiment, bindings) | {"bindings": bindings}
        plain = results[experiment]["without"]
        for one in results[experiment].values():
            one["against_without"] = {
                figure: one[figure] / plain[figure]
                for figure in ("temporary_bytes", "hbm_peak_bytes", "collective_bytes")
                if one[figure] and plain[figure]
            }
    report("tpu_attention", {"experiments": results}, arguments.out)


if __name__ == "__main__":
    main()
