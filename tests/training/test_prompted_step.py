"""Steps on data with prompts: what carries loss, and that plain data do not change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.models.losses import inputs_from_targets, prompt_inputs
from stacking_jax.training import OptimizerConfig
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import initial_state, model_graph
from stacking_jax.training.step import make_eval_step, make_train_step

MODEL = DecoderConfig(vocab_size=40, num_layers=2, d_model=16, d_ff=24, num_heads=2)
BOTH_WAYS = dataclasses.replace(MODEL, bidirectional_prompts=True)
QUICKLY = {"xla_backend_optimization_level": 0}


def batch_of(seed=0):
    """Two segments a row with prompts of their own, and padding."""
    dice = np.random.default_rng(seed)
    segments = np.array([[1] * 7 + [2] * 6 + [0] * 3] * 4, np.int32)
    positions = np.array([[*range(7), *range(6), 0, 0, 0]] * 4, np.int32)
    prompts = dice.integers(0, 6, (4, 2))
    prefix = np.where(segments == 1, positions < prompts[:, :1], positions < prompts[:, 1:])
    tokens = np.where(segments > 0, dice.integers(1, 40, (4, 16)), 0)
    batch = {
        "tokens": tokens, "segment_ids": segments, "positions": positions,
        "prefix": prefix & (segments > 0),
    }
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


def state_of(model):
    transform = optimizer(OptimizerConfig(), LAYOUT)
    return transform, initial_state(model, transform, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, BOTH_WAYS], ids=["causal", "bidirectional"])
def test_targets_alone_carry_loss(model):
    transform, state = state_of(model)
    batch = batch_of()
    step = make_train_step(model_graph(model), transform, lambda n: 1e-3)
    _, metrics = jax.jit(step, compiler_options=QUICKLY)(state, batch)
    bidirectional = prompt_inputs(batch["prefix"], batch["segment_ids"])
    logits = nnx.merge(model_graph(model), state.params)(
        inputs_from_targets(batch["tokens"], batch["segment_ids"]),
        segment_ids=batch["segment_ids"], positions=batch["positions"],
        bidirectional=bidirectional if model.bidirectional_prompts else None,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
    counted = (batch["segment_ids"] > 0) & (batch["prefix"] == 0)
    assert int(metrics["tokens"]) == int(counted.sum())
    want = float((losses * counted).sum() / counted.sum())
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)
    nats, tokens = make_eval_step(model_graph(model))(state.params, batch)
    assert int(tokens) == int(counted.sum())
    assert float(nats) == pytest.approx(want * int(tokens), rel=1e-5)


def test_microbatches_add_up():
    transform, state = state_of(BOTH_WAYS)
    whole, parts = (
        jax.jit(
            make_train_step(
                model_graph(BOTH_WAYS), transform, lambda n: 1e-3, microbatches=count
            ), compiler_options=QUICKLY,
        )(state, batch_of())[1]
        for count in (1, 2)
    )
    for name in ("loss", "grad_norm", "tokens"):
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-5)


def test_plain_batches_run_the_same_program():
    """The setting is read only where a batch has prompts: not one operation differs."""
    plain = {name: value for name, value in batch_of().items() if name != "prefix"}
    texts = []
    for model in (MODEL, BOTH_WAYS):
        transform, state = state_of(MODEL)
        step = make_train_step(model_graph(model), transform, lambda n: 1e-3)
        texts.append(jax.jit(step).lower(state, plain).as_text())
    assert texts[0] == texts[1]


def test_no_prompt_in_the_batch_is_plain_bit_for_bit():
    transform, state = state_of(BOTH_WAYS)
    batch = batch_of()
    batch["prefix"] = jnp.zeros_like(batch["prefix"])
    plain = {name: value for name, value in batch.items() if name != "prefix"}
    evaluate = make_eval_step(model_graph(BOTH_WAYS))
    assert [float(x) for x in evaluate(state.params, batch)] == [
        float(x) for x in evaluate(state.params, plain)
    ]
