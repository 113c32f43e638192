"""Held-out cross-entropy, against the same number worked out document by document."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stacking_jax.data import open_cache
from stacking_jax.errors import UserError
from stacking_jax.models import LAYOUT
from stacking_jax.training import sharding
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import abstract_state, model_graph, sharded_initial_state
from stacking_jax.training.step import make_eval_step


@pytest.fixture(scope="module")
def mesh(config):
    return sharding.make_mesh(config.mesh)


@pytest.fixture(scope="module")
def params(config, mesh):
    transform = optimizer(config.optimizer, LAYOUT)
    shape = abstract_state(config.model, transform, 2, mesh)
    return sharded_initial_state(config.model, transform, 0, shape).params


@pytest.fixture(scope="module")
def scores(config, mesh, params):
    step = jax.jit(make_eval_step(model_graph(config.model), constrain=sharding.constrainer(mesh)))
    held_out = HeldOut.open(open_cache(config.data), config)
    return held_out, held_out.evaluate(step, params, mesh)


def test_it_is_the_mean_over_every_held_out_token(config, params, scores):
    held_out, got = scores
    cache = open_cache(config.data)
    model = nnx.merge(model_graph(config.model), jax.device_get(params))
    forward = jax.jit(lambda inputs: model(inputs))
    nats = tokens = 0
    for step in range(held_out.batches.num_batches):
        batch = held_out.batches.batch(step)
        for row, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                piece = row[segments == segment]
                padded = np.zeros(config.data.sequence_length, np.int32)
                padded[1 : len(piece)] = piece[:-1]
                logits = forward(jnp.asarray(padded)[None])[0, : len(piece)]
                nats += float(
                    optax.softmax_cross_entropy_with_integer_labels(logits, piece).sum()
                )
                tokens += len(piece)
    split = cache.manifest.splits["validation"]
    assert tokens == split.tokens
    assert split.records % config.batch_size, "the last batch is to be a partial one"
    assert got["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    bits = nats / math.log(2) / split.text_bytes
    assert got["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_digest_tells_what_was_evaluated(config, change, scores):
    cache = open_cache(config.data)
    digest = scores[0].digest
    count = scores[0].count
    assert HeldOut.open(cache, config).digest == digest
    assert HeldOut.open(cache, change(config, seed=5)).digest == digest
    assert HeldOut.open(cache, change(config, eval_batches=count + 9)).digest == digest
    fewer = HeldOut.open(cache, change(config, eval_batches=1))
    assert (fewer.count, count > 1) == (1, True) and fewer.digest != digest
    longer = change(config, data={"sequence_length": 128})
    assert HeldOut.open(open_cache(longer.data), longer).digest != digest


def test_nothing_held_out_is_an_error(config, change):
    nothing = change(config, data={"held_out": 0.0})
    with pytest.raises(UserError, match="set held_out above 0"):
        HeldOut.open(open_cache(nothing.data), nothing)
