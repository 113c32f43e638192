"""Our train step against one written by hand in plain JAX, interleaved in one process.

    python -m benchmarks.step_time --out benchmarks/results/step_time_cpu.json
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import plain_step
from benchmarks.measure import interleaved, ratio, report
from stacking_jax.data import DataConfig
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import MeshConfig, OptimizerConfig, TrainConfig, sharding
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.programs import compile_stage
from stacking_jax.training.schedules import learning_rate
from stacking_jax.training.state import abstract_state, initial_state, model_graph


def packed_batch(rows: int, length: int, vocab: int) -> dict[str, np.ndarray]:
    """Random tokens in two documents per row."""
    half = length // 2
    segments = np.repeat(np.array([1, 2], np.int32), [half, length - half])
    positions = np.concatenate([np.arange(half), np.arange(length - half)]).astype(np.int32)
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(3, vocab, (rows, length), dtype=np.int32),
        "segment_ids": np.tile(segments, (rows, 1)),
        "positions": np.tile(positions, (rows, 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--per_round", type=int, default=2)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out")
    arguments = parser.parse_args()

    config = TrainConfig(
        model=DecoderConfig(
            vocab_size=320, num_layers=arguments.layers, d_model=arguments.d_model,
            d_ff=arguments.d_model * 8 // 3 // 16 * 16, num_heads=arguments.d_model // 64,
        ),
        data=DataConfig(sequence_length=arguments.length),
        optimizer=OptimizerConfig(weight_decay=0.1),
        batch_size=arguments.rows,
    )
    rates = learning_rate(config.optimizer, config.total_steps)
    mesh = sharding.make_mesh(MeshConfig())
    layerwise = make_optimizer(config.optimizer, LAYOUT)
    graph = model_graph(config.model)
    batch = packed_batch(arguments.rows, arguments.length, 320)

    shapes = abstract_state(config.model, layerwise, arguments.layers, mesh)
    ours = compile_stage(config, config.plan(), graph, layerwise, mesh, shapes).train_step
    state = jax.jit(lambda: initial_state(config.model, layerwise, arguments.layers, 0))()
    params = jax.tree.map(jnp.copy, state.params)

    matrices = lambda p: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: path[-1].key != "scale", p
    )
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda n: rates(n + 1), 0.9, 0.95, 1e-8, weight_decay=0.1, mask=matrices),
    )
    as_list = jax.tree.map(jnp.copy, params)
    as_list["stack"] = {
        "layers": [
            jax.tree.map(lambda leaf, i=i: leaf[i], params["stack"]["layers"])
            for i in range(arguments.layers)
        ]
    }
    heads = config.model.num_heads
    step = jax.jit(plain_step.make_step(plain, heads, arguments.layers), donate_argnums=0)
    states = {
        "ours": state,
        "plain_stacked": (params, plain.init(params)),
        "plain_list": (as_list, plain.init(as_list)),
    }
    losses: dict[str, list[float]] = {name: [] for name in states}

    def runner(name):
        def run():
            if name == "ours":
                states[name], metrics = ours(states[name], sharding.place_batch(batch, mesh))
                loss = metrics["loss"]
            else:
                states[name], loss = step(states[name], batch)
            losses[name].append(float(loss))

        return run

    seconds = interleaved(
        {name: runner(name) for name in states}, arguments.rounds, arguments.per_round
    )
    # The same mathematics, or the comparison would be worth nothing. The first steps
    # tell; later, rounding grows as the one batch is learnt by heart.
    for name in ("plain_stacked", "plain_list"):
        np.testing.assert_allclose(losses["ours"][:8], losses[name][:8], rtol=1e-4)
    report(
        "step_time",
        {
            "shape": {**vars(arguments), "vocab": 320, "dtype": "float32"},
            "median_seconds": {name: float(np.median(times)) for name, times in seconds.items()},
            "speed_against_plain_stacked": ratio(seconds["plain_stacked"], seconds["ours"]),
            "speed_against_plain_list": ratio(seconds["plain_list"], seconds["ours"]),
            "goal": 0.97,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
