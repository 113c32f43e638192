"""Train steps of looped stages: their loss, their FLOPs, and the same on eight devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stacking_jax.growth import Loop, Stage
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.models.losses import carries_loss, cross_entropy, inputs_from_targets
from stacking_jax.training import MeshConfig, OptimizerConfig, sharding
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.similarity import similarity
from stacking_jax.training.stack_runs import looped
from stacking_jax.training.state import abstract_state, initial_state, model_graph, shardings_of
from stacking_jax.training.step import make_eval_step, make_train_step

MODEL = DecoderConfig(
    vocab_size=64, num_layers=6, d_model=16, d_ff=24, num_heads=8, stack="scan"
)
TRANSFORM = optimizer(OptimizerConfig(epsilon=1e-3), LAYOUT)
LOOP = Loop(1, 1, 4, inject="stream", backprop=3, exits=2)
STORED = 3
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def stack(step):
    return {"depth_map": LOOP.depth_map(STORED), "loop": LOOP}


def batch_of(rows=8, length=16):
    dice = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[:, 12:] = 0
    return {
        "tokens": dice.integers(1, 64, (rows, length)).astype(np.int32) * segments,
        "segment_ids": segments,
        "positions": np.broadcast_to(np.arange(length), (rows, length)).astype(np.int32),
    }


@pytest.mark.slow
def test_the_objective_is_the_mean_over_exits_and_the_loss_that_of_the_network():
    batch = jax.tree.map(jnp.asarray, batch_of())
    state = initial_state(MODEL, TRANSFORM, STORED, 0)
    graph = model_graph(MODEL)
    weights = carries_loss(batch).astype(jnp.float32)

    def by_hand(params):
        model = nnx.merge(graph, params)
        hidden = model.hidden_states(
            inputs_from_targets(batch["tokens"], batch["segment_ids"]),
            segment_ids=batch["segment_ids"], positions=batch["positions"], **stack(0),
        )
        assert hidden.shape == (2, 8, 16, 16)
        losses = [
            cross_entropy(model._logits(each, lambda x, names: x), batch["tokens"], weights)[0]
            for each in hidden
        ]
        return (losses[0] + losses[1]) / 2 / weights.sum(), losses[1] / weights.sum()

    gradients, final = jax.jit(jax.grad(by_hand, has_aux=True))(state.params)
    step = make_train_step(graph, TRANSFORM, lambda step: 1e-2, stack=stack)
    _, metrics = jax.jit(step)(state, batch)
    np.testing.assert_allclose(metrics["loss"], final, rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    # What is evaluated is that network.
    cross, tokens = jax.jit(
        make_eval_step(graph, lambda step: looped(LOOP, STORED))
    )(state.params, batch)
    np.testing.assert_allclose(cross / tokens, final, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    dict(stack=stack, microbatches=2),
    dict(similarity=lambda params: _pull(params)),
], ids=["looped", "regularised"])
def test_eight_devices_train_as_one(settings):
    def train(mesh_config, devices):
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
        shape = abstract_state(MODEL, TRANSFORM, STORED, mesh)
        host = jax.device_get(initial_state(MODEL, TRANSFORM, STORED, 0))
        state = jax.device_put(host, shardings_of(shape))
        step = jax.jit(
            make_train_step(
                model_graph(MODEL), TRANSFORM, lambda step: 1e-2, clip_norm=1.0,
                constrain=sharding.constrainer(mesh), **settings,
            ),
            compiler_options=QUICKLY,
        )
        rows = []
        for _ in range(2):
            state, metrics = step(state, sharding.place_batch(batch_of(), mesh))
            rows.append({name: float(value) for name, value in metrics.items()})
        return rows, jax.device_get(state.params)

    alone = train(MeshConfig(fsdp=1), 1)
    spread = train(MeshConfig(fsdp=2, tensor=2, data=2), 8)
    for one, other in zip(alone[0], spread[0], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), alone[1], spread[1]
    )


def _pull(params):
    found = similarity(params["stack"]["layers"], 1)
    return 3.0 * (1.0 - found), found


@pytest.mark.parametrize("loop", [
    Loop(1, 1, 4), Loop(1, 1, 4, inject="stream", backprop=2, exits=2)
], ids=["plain", "truncated, two exits"])  # fmt: skip
def test_flops_counted_are_flops_compiled(loop):
    """Positions, not stored layers; every exit's layers and head; no backward where none is."""
    model = DecoderConfig(
        vocab_size=512, num_layers=6, d_model=256, d_ff=768, num_heads=2, stack="unroll",
        loss="whole",
    )
    run_map = loop.depth_map(STORED)
    stage = Stage(STORED, 1, 0, run_map=run_map, loop=loop)
    shape = jax.eval_shape(lambda: initial_state(model, TRANSFORM, STORED, 0))
    rows = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), rows)
    runs = {"depth_map": run_map, "loop": loop}
    step = make_train_step(
        model_graph(model), _plain_descent(), lambda step: 1e-2, stack=lambda step: runs
    )
    shape = dataclasses.replace(shape, opt_state=())
    compiled = jax.jit(step).lower(shape, batch).compile(QUICKLY)
    counted = stage.flops_per_token(model.costs(64)) * 64
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.06)


def _plain_descent():
    """Without a state, whose update would count as well."""
    return optax.GradientTransformation(
        lambda params: (), lambda gradients, state, params=None: (gradients, state)
    )
