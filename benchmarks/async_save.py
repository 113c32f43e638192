"""How long an asynchronous save holds training up, against the device-to-host copy alone.

    python -m benchmarks.async_save --out benchmarks/results/async_save_cpu.json

The state must be out of the devices' memory before the next step may overwrite it: less than
one copy of it to the host is not possible. The save before has ended when the next begins.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.measure import interleaved, ratio, report
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import OptimizerConfig, sharding
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.config import MeshConfig
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import abstract_state, sharded_initial_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    config = DecoderConfig(
        vocab_size=8192, num_layers=arguments.layers, d_model=arguments.width,
        d_ff=4 * arguments.width, num_heads=arguments.width // 64,
    )
    update, mesh = optimizer(OptimizerConfig(), LAYOUT), sharding.make_mesh(MeshConfig())
    abstract = abstract_state(config, update, arguments.layers, mesh)
    state = jax.block_until_ready(sharded_initial_state(config, update, 0, abstract))
    bump = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))
    steps, writing = iter(range(1, 10**6)), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)

        def fresh() -> tuple:
            """A state that no host has seen: JAX keeps copies that have been made."""
            began = time.perf_counter()
            checkpoints.wait()
            writing.append(time.perf_counter() - began)
            return (jax.block_until_ready(bump(state)),)

        seconds = interleaved(
            {
                # On CPU devices the array that JAX hands out is their own memory: copy it.
                "copy": lambda tree: jax.tree.map(
                    lambda leaf: np.array(leaf, copy=True), jax.device_get(tree)
                ),
                "save": lambda tree: checkpoints.save(tree, {"step": next(steps)}),
            },
            arguments.rounds, prepare=fresh,
        )
        checkpoints.close()
    blocked = ratio(seconds["save"], seconds["copy"])
    report(
        "async_save",
        {
            "device": jax.devices()[0].device_kind,
            "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 10**6,
            "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
            "waiting_for_the_disk_afterwards": max(writing),
            "times_a_copy": blocked,
            "goals": {"times_a_copy": [2, 1.1]},
            "all": seconds,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
