"""A step with a teacher against arithmetic by hand, in parts, in chunks and on eight devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stacking_jax.data import DataConfig
from stacking_jax.data.teacher_cache import IDS_KEY, LOG_PROBS_KEY
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.models.losses import inputs_from_targets
from stacking_jax.models.soft_targets import top_log_probs
from stacking_jax.training import MeshConfig, TrainConfig, sharding, teacher
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.programs import lower_train_step
from stacking_jax.training.state import (
    abstract_state,
    initial_state,
    model_graph,
    shardings_of,
)
from stacking_jax.training.step import make_train_step
from stacking_jax.training.teaching import Cached, Live

CONFIG = TrainConfig(
    model=DecoderConfig(vocab_size=64, num_layers=2, d_model=32, d_ff=48, num_heads=4),
    data=DataConfig(sequence_length=16),
    total_steps=10, batch_size=8, z_loss=1e-3,
    distill=DistillConfig(fraction=0.5, weight=0.4),
)
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
TRANSFORM = optimizer(CONFIG.optimizer, LAYOUT)


def with_(config=CONFIG, model=None, **distill):
    """The configuration with other settings of its model or its teacher."""
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **(model or {})),
        distill=dataclasses.replace(config.distill, **distill),
    )


@functools.cache
def batch():
    """Two documents and some padding in every row."""
    dice = np.random.default_rng(0)
    at = np.arange(16)[None]
    segments = np.where(at < 6, 1, np.where(at < dice.integers(8, 16, (8, 1)), 2, 0))
    positions = np.where(segments == 2, at - 6, np.where(segments > 0, at, 0))
    return {
        "tokens": np.where(segments > 0, dice.integers(1, 64, (8, 16)), 0).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


@functools.cache
def values(model, seed):
    """A fresh state, on the host."""
    return jax.device_get(
        jax.jit(lambda: initial_state(model, TRANSFORM, model.num_layers, seed))()
    )


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def step_with(config, teaching, mesh, arguments, extra=None, microbatches=1):
    """Metrics and parameters after one update."""
    state = values(CONFIG.model, 0)
    abstract = abstract_state(config.model, TRANSFORM, config.model.num_layers, mesh)
    train_step = jax.jit(
        make_train_step(
            model_graph(config.model), TRANSFORM, lambda step: 1e-2, z_loss=config.z_loss,
            microbatches=microbatches, teaching=teaching, constrain=sharding.constrainer(mesh),
        ),
        compiler_options=QUICKLY,
    )
    state = jax.device_put(state, shardings_of(abstract))
    new, metrics = train_step(
        state, sharding.place_batch(batch() | (extra or {}), mesh), *arguments
    )
    return jax.device_get(metrics), jax.device_get(new.params)


def teach(config=CONFIG, mesh=None, microbatches=1):
    """A step with the live teacher of the configuration, whose values are always the same."""
    mesh = mesh or one_device()
    model = teacher.find(config)
    plain = teacher.find(CONFIG).model
    params = jax.device_put(values(plain, 7).params, shardings_of(model.abstract(mesh)))
    return step_with(config, Live(config, model), mesh, (params,), microbatches=microbatches)


def logits_of(model, params):
    return nnx.merge(model_graph(model), params)(
        inputs_from_targets(batch()["tokens"], batch()["segment_ids"]),
        segment_ids=batch()["segment_ids"], positions=batch()["positions"],
    )


def by_hand(params, temperature):
    """Objective, cross-entropy and soft cross-entropy, of the mean token."""
    logits = logits_of(CONFIG.model, params)
    small = teacher.find(CONFIG).model
    wanted = jax.nn.softmax(logits_of(small, values(small, 7).params) / temperature)
    real = batch()["segment_ids"] > 0
    cross = optax.softmax_cross_entropy_with_integer_labels(logits, batch()["tokens"])
    soft = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)
    z = CONFIG.z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    mean = lambda each: jnp.sum(jnp.where(real, each, 0)) / jnp.sum(real)  # noqa: E731
    return mean(0.6 * cross + 0.4 * soft + z), (mean(cross), mean(soft))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_step_learns_from_both(temperature):
    params = values(CONFIG.model, 0).params
    (_, (cross, soft)), gradient = jax.value_and_grad(by_hand, has_aux=True)(params, temperature)
    metrics, _ = teach(with_(temperature=temperature))
    np.testing.assert_allclose(metrics["loss"], cross, rtol=1e-5)
    np.testing.assert_allclose(metrics["soft_loss"], soft, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)


@functools.cache
def reference(top_k):
    return teach(with_(top_k=top_k))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("way", ["chunked", "eight devices, chunked, microbatches"])
def test_how_it_is_computed_makes_no_difference(way, top_k):
    config, mesh, microbatches = with_(top_k=top_k), None, 1
    if "chunked" in way:
        config = with_(config, model={"loss": "chunked", "loss_chunk": 5})
    if "microbatches" in way:
        microbatches = 2
    if "eight" in way:
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    metrics, params = teach(config, mesh, microbatches)
    want, wanted = reference(top_k)
    for name in ("loss", "soft_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want[name], rtol=2e-5, err_msg=name)
    for got, like in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        # Where a gradient is mostly rounding, Adam may move by a part of a step.
        np.testing.assert_allclose(got, like, rtol=0, atol=2e-3)
        assert np.abs(got - like).mean() < 1e-5


@functools.cache
def labels(k):
    small = teacher.find(CONFIG).model
    model = nnx.merge(model_graph(small), values(small, 7).params)
    hidden = model.hidden_states(
        inputs_from_targets(batch()["tokens"], batch()["segment_ids"]),
        segment_ids=batch()["segment_ids"], positions=batch()["positions"],
    )
    kernel, axis = model.head_matrix()
    found = top_log_probs(hidden, kernel, vocab_axis=axis, k=k)
    return dict(zip((IDS_KEY, LOG_PROBS_KEY), jax.device_get(found), strict=True))


@pytest.mark.parametrize("stored", [5, 9])
def test_labels_out_of_a_cache_are_as_good_as_the_live_teacher(stored):
    """Cut to the same five tokens, be it in the cache or in the step."""
    config = with_(top_k=5)
    metrics, params = step_with(config, Cached(config, stored), one_device(), (), labels(stored))
    want, wanted = reference(5)
    for name in ("loss", "soft_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)
    for got, like in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, like, rtol=0, atol=2e-3)


def test_the_weight_falls_to_nothing():
    constant, falling = Live(CONFIG, teacher.find(CONFIG)), Live(
        with_(anneal=True), teacher.find(CONFIG)
    )
    assert [float(constant.weight(step)) for step in (0, 4)] == [0.4, 0.4]
    found = [float(falling.weight(jnp.int32(step))) for step in range(6)]
    np.testing.assert_allclose(found, [0.4, 0.32, 0.24, 0.16, 0.08, 0.0], atol=1e-7)


def lowered(config, number):
    """The train step of a stage as training has it."""
    mesh, plan = one_device(), config.plan()
    stage = plan.stages[number]
    abstract = abstract_state(config.model, TRANSFORM, stage.depth, mesh)
    return lower_train_step(
        config, plan, stage, model_graph(config.model), TRANSFORM, mesh, abstract
    ), abstract


def test_behind_the_boundary_it_is_the_very_program_without_a_teacher():
    taught, plain = (lowered(CONFIG, number)[0].as_text() for number in (0, 1))
    never = dataclasses.replace(CONFIG, distill=DistillConfig())
    assert lowered(never, 0)[0].as_text() == plain != taught


def test_the_teacher_is_neither_given_away_nor_given_back():
    program, abstract = lowered(CONFIG, 0)
    compiled = program.compile(QUICKLY)
    state_bytes = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(abstract))
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes
    model = teacher.find(CONFIG)
    params = jax.device_put(
        values(model.model, 7).params, shardings_of(model.abstract(one_device()))
    )
    before = jax.device_get(params)
    state = jax.device_put(values(CONFIG.model, 0), shardings_of(abstract))
    placed = sharding.place_batch(batch(), one_device())
    for _ in range(2):
        state, metrics = compiled(state, placed, params)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert np.isfinite(metrics["soft_loss"])
    for leaf, was in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(leaf, was)


def test_a_teacher_in_bfloat16_holds_its_matrices_in_it():
    model = teacher.find(with_(model={"dtype": "bfloat16"}))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(model.abstract(one_device()))}
    assert kinds == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
