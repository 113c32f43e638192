"""What a step's time goes to, against what the machine can do.

    python -m benchmarks.floors --shape demo --out benchmarks/results/floors_demo_cpu.json
    python -m benchmarks.floors --shape 124m --rows 1 --length 256 --dtype float32

First the machine: the rate of a large matrix product, and the bandwidth of a copy (bytes read
and written). Then the step: its parts on the clock, and beside them the time that its matrix
products would take at that rate, the same products timed one by one in their own shapes, and
the bytes of the optimiser and of the whole program over that bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.contenders import Shape, initial_params, lowered, ours
from benchmarks.measure import report, windows
from stacking_jax.host_memory import keep_freed_memory
from stacking_jax.models import LAYOUT
from stacking_jax.planning.chips import chip_of_kind
from stacking_jax.training import MeshConfig, sharding
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import TrainState, model_graph
from stacking_jax.training.step import make_eval_step, make_train_step

SHAPES = {
    "demo": Shape(320, 8, 96, 256, 2, 8, 256, "float32"),
    "step_time": Shape(320, 8, 256, 672, 4, 4, 256, "float32"),
    "124m": Shape(50304, 12, 768, 2048, 12, 32, 1024),
}
BYTES_OF_OPTIMIZER = "optimizer's bytes at the machine's bandwidth"
OPTIMIZER_BYTES = 36
"""Per float32 parameter and step: the gradient is written, read for its norm and read again;
the parameter and two moments are read and written."""


def machine_floors(dtype: str, size: int, megabytes: int, count: int = 7) -> dict:
    """FLOP/s of a product of two random `[size, size]` matrices, bytes/s of a copy."""
    one, two = (
        jax.random.normal(jax.random.key(i), (size, size), jnp.float32).astype(dtype)
        for i in range(2)
    )
    long = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    seconds = windows({
        "product": _timed(lambda: product(one, two)), "copy": _timed(lambda: copy(long)),
    }, count, 5)
    best = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "matrix_rate": 2 * size**3 / best["product"], "matrix_dtype": dtype, "matrix_size": size,
        "bandwidth": 2 * long.nbytes / best["copy"], "copied_megabytes": megabytes,
        "seconds": seconds,
    }


def of_peak(floors: dict) -> dict[str, float] | None:
    """Both rates over those of the chip's data sheet; None for a chip that is not listed."""
    chip = chip_of_kind(jax.devices()[0].device_kind)
    if chip is None:
        return None
    return {
        "matrix_rate": floors["matrix_rate"] / chip.peak_flops,
        "bandwidth": floors["bandwidth"] / chip.hbm_bandwidth,
    }


def products(shape: Shape) -> list[tuple[str, int, tuple[int, ...], tuple[int, ...]]]:
    """The matrix products of one forward pass: name, how many, and the shapes of both sides."""
    tokens, width, inner = shape.tokens, shape.width, shape.inner
    each, layers = width // shape.heads, shape.layers
    pairs = shape.rows * shape.heads
    return [
        ("query, key, value, out", 4 * layers, (tokens, width), (width, width)),
        ("gate, up", 2 * layers, (tokens, width), (width, inner)),
        ("down", layers, (tokens, inner), (inner, width)),
        ("scores", layers, (pairs, shape.length, each), (pairs, each, shape.length)),
        ("values", layers, (pairs, shape.length, shape.length), (pairs, shape.length, each)),
        ("head", 1, (tokens, width), (width, shape.vocab)),
    ]


def step_floors(shape: Shape, floors: dict, count: int, steps: int, **settings) -> dict:
    """A step's parts on the clock, and how much of it is explained.

    Args:
      shape: of model and batch.
      floors: of the machine, see `machine_floors`.
      count: windows.
      steps: in a window.
      **settings: of the decoder.
    """
    config = shape.config(**settings)
    params = initial_params(shape)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    evaluate = make_eval_step(model_graph(config.model), constrain=sharding.constrainer(mesh))
    batch = sharding.place_batch(shape.batch(0), mesh)
    forward = jax.jit(lambda p: evaluate(p, batch)[0])
    nothing = optax.identity()
    plain = make_train_step(
        model_graph(config.model), nothing, lambda step: 1.0, constrain=sharding.constrainer(mesh)
    )

    @jax.jit
    def gradient(p):
        """As a step of plain descent: what it takes off each parameter."""
        state, _ = plain(TrainState(jnp.zeros((), jnp.int32), p, nothing.init(p)), batch)
        return jax.tree.map(jnp.subtract, p, state.params)

    change = optimizer(config.optimizer, LAYOUT)

    @jax.jit
    def update(gradients, moments, params):
        directions, moments = change.update(gradients, moments, params)
        return jax.tree.map(lambda leaf, step: leaf - 1e-4 * step, params, directions), moments

    gradients, moments = gradient(params), change.init(params)
    seconds = windows({
        "step": ours(shape, params, **settings),
        "forward": _timed(lambda: forward(params)),
        "forward_and_backward": _timed(lambda: gradient(params)),
        "optimizer": _timed(lambda: update(gradients, moments, params)),
    }, count, steps)
    typical = {name: statistics.median(times) for name, times in seconds.items()}

    alone = {}
    for name, number, left, right in products(shape):
        alone[name] = 3 * number * _product_seconds(left, right, shape.dtype, count)
    count_of_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    program = lowered(shape, **settings).compile()
    accessed = (program.cost_analysis() or {}).get("bytes accessed")
    explained = {
        "matrix products at the machine's rate": shape.flops_per_step() / floors["matrix_rate"],
        "matrix products in their own shapes": sum(alone.values()),
        BYTES_OF_OPTIMIZER: OPTIMIZER_BYTES * count_of_params / floors["bandwidth"],
    }
    if accessed:
        explained["bytes of the program, by the compiler's count, at the bandwidth"] = (
            accessed / floors["bandwidth"]
        )
    return {
        "shape": dataclasses.asdict(shape), "settings": settings,
        "flops_per_step": shape.flops_per_step(), "params": count_of_params,
        "seconds": typical, "windows": seconds,
        "products_alone": alone, "floors": explained,
        "share_of_the_step": {name: value / typical["step"] for name, value in explained.items()},
        "flops_per_second": shape.flops_per_step() / typical["step"],
        "of_the_matrix_rate": shape.flops_per_step() / typical["step"] / floors["matrix_rate"],
    }


def _product_seconds(left, right, dtype: str, count: int) -> float:
    """Seconds of one product, of random numbers."""
    random = np.random.default_rng(0)
    sides = [
        jnp.asarray(random.standard_normal(shape, np.float32)).astype(dtype)
        for shape in (left, right)
    ]
    product = jax.jit(jnp.matmul)
    return statistics.median(
        windows({"product": _timed(lambda: product(*sides))}, count, 3)["product"]
    )


def _timed(run: Callable[[], object]) -> Callable[[int], float]:
    def times(steps: int) -> float:
        began = time.perf_counter()
        last = None
        for _ in range(steps):
            last = run()
        jax.block_until_ready(last)
        return time.perf_counter() - began

    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--dtype", help="of the step; the product's is the same")
    parser.add_argument("--size", type=int, help="of the machine's matrices")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="in a window")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in ("rows", "length", "dtype")}
    shape = dataclasses.replace(
        SHAPES[arguments.shape], **{name: value for name, value in changes.items() if value}
    )
    keep_freed_memory()  # As the commands that train do.
    on_cpu = jax.default_backend() == "cpu"
    size = arguments.size or (2048 if on_cpu else 8192)
    floors = machine_floors(shape.dtype, size, 256 if on_cpu else 4096)
    step = step_floors(shape, floors, arguments.windows, arguments.steps)
    report(
        "floors", {"machine_floors": floors, "of_peak": of_peak(floors), "step": step},
        arguments.out,
    )


if __name__ == "__main__":
    main()
