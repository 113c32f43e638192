"""Sampling against the plain forward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.models.decoding import generate, pick

CONFIG = DecoderConfig(vocab_size=24, num_layers=2, d_model=16, d_ff=24, num_heads=2)
MODEL = Decoder(CONFIG, key=jax.random.key(3))
GRAPH, STATE = nnx.split(MODEL)
PARAMS = nnx.to_pure_dict(STATE)
PROMPTS = [[5, 6, 7], [], [9] * 10]


def greedy(prompt, count, depth_map=None):
    """The likeliest continuation by full forward passes, one per token."""
    row = np.zeros((1, 20), np.int32)  # what stands behind a token does not matter to it
    row[0, 1 : len(prompt) + 1] = prompt
    for end in range(len(prompt), len(prompt) + count):
        row[0, end + 1] = jnp.argmax(forward(row, depth_map)[0, end])
    return row[0, len(prompt) + 1 :][:count].tolist()


@functools.partial(jax.jit, static_argnums=1)
def forward(tokens, depth_map):
    return MODEL(tokens, depth_map=depth_map)


@pytest.mark.parametrize("depth_map", [None, DepthMap([0, 1] * 3)], ids=["plain", "loop"])
def test_greedy_decoding_of_ragged_prompts_equals_full_forward_passes(depth_map):
    got = generate(
        GRAPH, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0, depth_map=depth_map
    )
    assert got == [greedy(prompt, 6, depth_map) for prompt in PROMPTS]


def test_narrow_sampling_is_greedy():
    want = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0)
    for settings in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        assert generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, **settings) == want


def test_a_continuation_ends_before_eos():
    want = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0)
    eos = want[0][2]
    got = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0, eos_id=eos)
    cut = [row[: row.index(eos)] if eos in row else row for row in want]
    assert got == cut and len(got[0]) <= 2


def test_sampling_follows_the_seed():
    def run(seed):
        return generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=12, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits[None], (20_000, 4))

    def shares(temperature=1.0, top_k=None, top_p=1.0):
        drawn = pick(many, jax.random.key(0), jnp.asarray(temperature), top_k, jnp.asarray(top_p))
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.02)
    # 0.5 alone is not 0.6 of the probability, 0.5 + 0.3 is the fewest that is.
    np.testing.assert_allclose(shares(top_p=0.6), [0.625, 0.375, 0, 0], atol=0.02)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.02)
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]


def test_nothing_to_continue():
    assert generate(GRAPH, PARAMS, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(temperature=-1.0), "temperature -1.0"),
        (dict(temperature=float("nan")), "temperature nan"),
        (dict(top_k=0), "top_k 0"),
        (dict(top_p=0.0), "top_p 0.0"),
        (dict(top_p=1.5), "top_p 1.5"),
    ],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(UserError, match=message):
        generate(GRAPH, PARAMS, PROMPTS, **dict(max_new_tokens=2) | settings)
