"""One training step against the same thing done by hand, on one device and on eight."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stacking_jax.growth import Stage, midas
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.models.losses import inputs_from_targets
from stacking_jax.training import GrowthConfig, MeshConfig, OptimizerConfig, sharding
from stacking_jax.training.growing import growth_program
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import (
    abstract_state,
    model_graph,
    sharded_initial_state,
    shardings_of,
)
from stacking_jax.training.step import all_finite, make_eval_step, make_train_step

MODEL = DecoderConfig(
    vocab_size=64, num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2
)
RATE = 3e-3
# Compiling is nearly all of the time that these tests take.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def batch_of(seed: int, rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    """Two documents and some padding in every row; one row is all padding."""
    dice = np.random.default_rng(seed)
    ends = dice.integers(4, length // 2, rows), dice.integers(length // 2 + 1, length, rows)
    at = np.arange(length)[None]
    segments = 1 + (at >= ends[0][:, None]).astype(np.int32)
    segments[at >= ends[1][:, None]] = 0
    segments[-1] = 0
    starts = np.where(segments == 2, ends[0][:, None], 0)
    tokens = np.where(segments > 0, dice.integers(1, 64, (rows, length)), 0)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(segments > 0, at - starts, 0).astype(np.int32),
    }


def single():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def transform_of(name):
    return optimizer(OptimizerConfig(name=name, weight_decay=0.1), LAYOUT)


@functools.cache
def initial(depth, name):
    """On the host, once for all tests."""
    shape = abstract_state(MODEL, transform_of(name), depth, single())
    return jax.device_get(sharded_initial_state(MODEL, transform_of(name), 0, shape))


def begin(mesh, depth=2, name="adamw"):
    transform = transform_of(name)
    where = shardings_of(abstract_state(MODEL, transform, depth, mesh))
    return transform, jax.device_put(initial(depth, name), where)


def make_step(mesh, transform, model=MODEL, rate=lambda step: RATE, **settings):
    return jax.jit(
        make_train_step(
            model_graph(model), transform, rate, constrain=sharding.constrainer(mesh), **settings
        ),
        compiler_options=QUICKLY,
    )


@functools.cache
def train(mesh, steps=3, grow_after=0, model=MODEL, name="adamw", **settings):
    """A few steps, perhaps with a growth in between: losses, and parameters on the host."""
    depth = 1 if grow_after else 2
    transform, state = begin(mesh, depth, name)
    step = make_step(mesh, transform, model, **settings)
    losses = []
    for number in range(steps):
        if grow_after and number == grow_after:
            after = abstract_state(model, transform, 2, mesh)
            stage = Stage(2, 1, 1, midas(1, 1))
            state = growth_program(model, GrowthConfig(), transform, stage, after)(state)
        state, metrics = step(state, sharding.place_batch(batch_of(number), mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=str(path))


def assert_same_training(got, want):
    """Equal losses, and parameters that went the same way.

    AdamW moves a parameter by about the learning rate however small its gradient, so
    where that is mostly rounding a single one may differ by a part of a step.
    """
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=RATE / 5, err_msg=str(path))
        assert np.abs(one - other).mean() < RATE / 1000, path


def loss_by_hand(params, batch, model=MODEL):
    logits = nnx.merge(model_graph(model), params)(
        inputs_from_targets(batch["tokens"], batch["segment_ids"]),
        segment_ids=batch["segment_ids"], positions=batch["positions"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
    real = batch["segment_ids"] > 0
    return jnp.sum(jnp.where(real, losses, 0)) / jnp.sum(real)


@pytest.mark.slow
def test_a_step_is_plain_adamw_on_the_mean_loss():
    transform, state = begin(single())
    batch = jax.tree.map(jnp.asarray, batch_of(0))
    after, metrics = make_step(single(), transform, clip_norm=0.5)(state, batch)

    decayed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: "scale" not in jax.tree_util.keystr(path), state.params
    )
    plain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(RATE, b2=0.95, weight_decay=0.1, mask=decayed),
    )

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def by_hand(params):
        loss, gradients = jax.value_and_grad(loss_by_hand)(params, batch)
        updates, _ = plain.update(gradients, plain.init(params), params)
        return loss, optax.tree.norm(gradients), optax.apply_updates(params, updates)

    loss, norm, params = by_hand(state.params)
    assert float(norm) > 0.5
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], RATE)
    assert int(metrics["tokens"]) == (batch_of(0)["segment_ids"] > 0).sum()
    assert int(metrics["skipped"]) == 0 and int(after.step) == 1
    assert_close(after.params, params)


@pytest.mark.slow
def test_sharded_training_with_adafactor_equals_one_device():
    """Its factored moments are whole everywhere; AdamW on any mesh is in test_parallel.py."""
    settings = {"grow_after": 1, "name": "adafactor", "z_loss": 1e-3, "clip_norm": 1.0}
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert_same_training(train(mesh, **settings), train(single(), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_scanned_and_unrolled_training_agree(name):
    scanned, unrolled = (dataclasses.replace(MODEL, stack=how) for how in ("scan", "unroll"))
    settings = {"grow_after": 1, "name": name, "z_loss": 1e-3, "clip_norm": 1.0}
    assert_same_training(
        train(single(), model=scanned, **settings), train(single(), model=unrolled, **settings)
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat):
    model = dataclasses.replace(MODEL, remat=remat)
    assert_same_training(train(single(), model=model), train(single()))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_add_up_to_the_batch(microbatches):
    """Although their shares of padding differ: the last row of each batch is empty."""
    settings = {"z_loss": 1e-2, "clip_norm": 1.0}
    assert_same_training(
        train(single(), microbatches=microbatches, **settings), train(single(), **settings)
    )


def test_microbatches_on_a_mesh():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same_training(train(mesh, microbatches=2), train(single()))


def test_z_loss_moves_the_parameters_and_not_the_reported_loss():
    plain, with_z = (train(single(), steps=1, z_loss=z) for z in (0.0, 1.0))
    assert plain[0] == pytest.approx(with_z[0], rel=1e-6)
    assert not np.allclose(plain[1]["embedding"], with_z[1]["embedding"])


def test_the_rate_is_that_of_the_update_counted_from_one():
    transform, state = begin(single())
    step = make_step(single(), transform, rate=lambda number: number / 100)
    for wanted in (0.01, 0.02, 0.03):
        state, metrics = step(state, batch_of(0))
        np.testing.assert_allclose(metrics["learning_rate"], wanted, rtol=1e-6)


@pytest.mark.parametrize("where", ["embedding", "norm"])
def test_a_step_that_is_not_finite_can_be_left_out(where):
    transform, state = begin(single())
    step = make_step(single(), transform, skip_nonfinite=True)
    state, _ = step(state, batch_of(0))
    sick_part = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), state.params[where])
    sick = dataclasses.replace(state, params=state.params | {where: sick_part})
    after, metrics = step(sick, batch_of(1))
    assert int(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
    assert int(after.step) == int(sick.step) + 1
    for one, other in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((sick.params, sick.opt_state)), strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_otherwise_it_is_reported():
    transform, state = begin(single())
    sick = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
    state = dataclasses.replace(state, params=sick)
    _, metrics = make_step(single(), transform)(state, batch_of(0))
    assert int(metrics["skipped"]) == 1


def test_the_evaluation_step_sums_over_real_tokens():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, state = begin(mesh)
    evaluate = jax.jit(make_eval_step(model_graph(MODEL), constrain=sharding.constrainer(mesh)))
    nats, tokens = evaluate(state.params, sharding.place_batch(batch_of(5), mesh))
    assert int(tokens) == (batch_of(5)["segment_ids"] > 0).sum()
    want = jax.jit(loss_by_hand)(jax.device_get(state.params), batch_of(5))
    np.testing.assert_allclose(nats / tokens, want, rtol=1e-5)


def test_padding_alone_gives_no_loss_and_no_nan():
    transform, state = begin(single())
    empty = jax.tree.map(jnp.zeros_like, batch_of(0))
    after, metrics = make_step(single(), transform, clip_norm=1.0)(state, empty)
    assert float(metrics["loss"]) == 0 and int(metrics["tokens"]) == 0
    assert all_finite(after)


def test_whether_everything_is_finite():
    tree = {"a": jnp.ones((2, 3)), "n": jnp.arange(3)}
    assert all_finite(tree)
    assert not all_finite(tree | {"a": tree["a"].at[1, 2].set(jnp.inf)})
    assert not all_finite(tree | {"b": jnp.asarray(jnp.nan)})
