"""Growing a whole train state under jit, against copying the grown state under jit.

    python -m benchmarks.growth_time --out benchmarks/results/growth_time_cpu.json

Both run on the same device with output shardings. The copy writes each byte of the
grown state once, which is the least that growing can do; the goal is at most 1.5 times
its time. The growth is what training runs at a stage boundary, the old state donated.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import jax.numpy as jnp

from benchmarks.measure import interleaved, report, speed
from stacking_jax.growth import Stage, midas
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import GrowthConfig, OptimizerConfig, sharding
from stacking_jax.training.config import MeshConfig
from stacking_jax.training.growing import growth_program
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import (
    abstract_state,
    sharded_initial_state,
    shardings_of,
)


def measure(before: int, block: int, width: int, vocab: int, rounds: int) -> dict:
    """Times the growth of a state by one block against copies of the grown state.

    Args:
      before: layers, before the growth.
      block: layers that it adds.
      width: of the model, with heads of 64 and an MLP of four times the width.
      vocab: of the model.
      rounds: of each.
    """
    after = before + block
    config = DecoderConfig(
        vocab_size=vocab, num_layers=after, d_model=width, d_ff=4 * width, num_heads=width // 64,
    )
    settings = OptimizerConfig()
    update = optimizer(settings, LAYOUT)
    mesh = sharding.make_mesh(MeshConfig())
    shapes = {depth: abstract_state(config, update, depth, mesh) for depth in (before, after)}
    state = sharded_initial_state(config, update, 0, shapes[before])
    stage = Stage(after, 1, 1, midas(before, block))
    grow = growth_program(config, GrowthConfig(), update, stage, shapes[after])
    grown = jax.block_until_ready(grow(jax.tree.map(jnp.copy, state)))
    copy = jax.jit(
        lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings_of(shapes[after])
    )
    seconds = interleaved(
        {
            "grow": lambda state: jax.block_until_ready(grow(state)),
            "copy": lambda state: jax.block_until_ready(copy(grown)),
        },
        rounds,
        # The growth is given its argument away, as in training.
        prepare=lambda: (jax.block_until_ready(jax.tree.map(jnp.copy, state)),),
    )
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "grown_megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(grown)) // 10**6,
        "from_depth": before,
        "to_depth": after,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_a_copy": speed(seconds["grow"], seconds["copy"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=18, help="before the growth")
    parser.add_argument("--block", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    found = measure(
        arguments.layers, arguments.block, arguments.width, arguments.vocab, arguments.rounds
    )
    report("growth_time", found | {"goal": 1.5}, arguments.out)


if __name__ == "__main__":
    main()
