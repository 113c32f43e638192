"""What the looping-inspired regulariser adds to a train step, at the shape of GPT-2 124M.

    python -m benchmarks.similarity_cost --out benchmarks/results/similarity_cost_cpu.json

The regulariser is a function of the parameters alone, so it costs the same whatever the batch,
and its share of a step falls with the tokens. Three contenders take turns: the step without it,
the step with it, and what it adds, alone: its gradient, added to a gradient that is there. A
machine's drift is larger than the difference of two steps, so the share is that of the third.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks.contenders import Jitted, Shape, initial_params
from benchmarks.measure import interval, report, windows
from stacking_jax.growth import Stage
from stacking_jax.host_memory import keep_freed_memory
from stacking_jax.models import LAYOUT
from stacking_jax.training import MeshConfig, sharding
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.programs import lower_train_step
from stacking_jax.training.similarity import similarity_term
from stacking_jax.training.similarity_config import SimilarityConfig
from stacking_jax.training.state import TrainState, abstract_state, model_graph

GOAL = 0.02


def step_of(shape: Shape, params, settings: SimilarityConfig, **decoder) -> Jitted:
    """The train step as a run compiles it, on one device."""
    config = dataclasses.replace(shape.config(**decoder), similarity=settings)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    abstract = abstract_state(config.model, optimizer, shape.layers, mesh)
    plan, graph = config.plan(), model_graph(config.model)
    step = lower_train_step(config, plan, plan.stages[0], graph, optimizer, mesh, abstract)
    params = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    return Jitted(
        step.compile(), state, lambda batch: sharding.place_batch(batch, mesh), shape
    )


class Alone:
    """The gradient of the regulariser, added to another: what a step has more."""

    def __init__(self, shape: Shape, params, settings: SimilarityConfig):
        config = dataclasses.replace(shape.config(), similarity=settings)
        term = similarity_term(config, Stage(shape.layers, 1, 0))

        def add(params, gradients):
            pull, found = jax.grad(term, has_aux=True)(params)
            return jax.tree.map(jnp.add, gradients, pull), found

        self._run = jax.jit(add, donate_argnums=1)
        self._params = params
        self._gradients = jax.tree.map(jnp.zeros_like, params)

    def __call__(self, steps: int) -> float:
        jax.block_until_ready(self._gradients)
        began = time.perf_counter()
        for _ in range(steps):
            self._gradients, _ = self._run(self._params, self._gradients)
        jax.block_until_ready(self._gradients)
        return time.perf_counter() - began


def measure(
    shape: Shape, settings: SimilarityConfig, count: int, steps: int, run_tokens: int, **decoder
) -> dict:
    """Times the three, after the regulariser has been seen to change the gradient.

    Args:
      shape: of model and batch.
      settings: of the regulariser.
      count: windows of each contender.
      steps: in a window.
      run_tokens: tokens of a step of the experiment whose model this is.
      **decoder: of our decoder.

    Raises:
      AssertionError: the two steps compute other losses, or the same gradient.
    """
    params = initial_params(shape)
    contenders = {
        "without": step_of(shape, params, SimilarityConfig(), **decoder),
        "with": step_of(shape, params, settings, **decoder),
    }
    first = {name: run.first(1) for name, run in contenders.items()}
    assert abs(first["with"]["loss"][0] / first["without"]["loss"][0] - 1) < 1e-4
    assert first["with"]["grad_norm"][0] > first["without"]["grad_norm"][0]
    contenders["alone"] = Alone(shape, params, settings)
    seconds = windows(contenders, count, steps)
    pairs = list(zip(*(seconds[name] for name in ("without", "with", "alone")), strict=True))
    share = interval([alone / without for without, _, alone in pairs])
    per_token = statistics.median(seconds["without"]) / shape.tokens
    return {
        "shape": dataclasses.asdict(shape), "tokens": shape.tokens, "settings": decoder,
        "similarity": dataclasses.asdict(settings), "steps_per_window": steps,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": seconds,
        "share_of_step": share,
        "difference_of_steps": interval([after / before - 1 for before, after, _ in pairs]),
        # Not measured: as if the time of a step were in proportion to its tokens.
        "share_extrapolated": {
            "tokens": run_tokens,
            "share": statistics.median(seconds["alone"]) / (per_token * run_tokens),
        },
        "goal": GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="in a window")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--tiny", action="store_true", help="a small model: does it run at all?")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    keep_freed_memory()  # As the commands that train do.
    # gin/models/gpt2_124m.gin; the experiment has 480 rows of 1024 tokens a step.
    shape = Shape(
        50_304, 12, 768, 2048, 12, arguments.rows, arguments.length, arguments.dtype
    )
    if arguments.tiny:
        shape = Shape(320, 4, 64, 160, 2, rows=2, length=64, dtype="float32")
    found = measure(
        shape, SimilarityConfig(weight=10.0, block=2), arguments.windows, arguments.steps,
        run_tokens=480 * 1024,
    )
    report("similarity_cost", found, arguments.out)


if __name__ == "__main__":
    main()
