"""Prompts that see themselves whole: who sees whom, packed and decoded."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.models.losses import carries_loss, inputs_from_targets, prompt_inputs

CONFIG = DecoderConfig(
    vocab_size=40, num_layers=2, d_model=16, d_ff=24, num_heads=2, bidirectional_prompts=True
)
PROMPT, LENGTH = 6, 11  # targets 0..5 are prompt, 6..10 carry loss


@functools.cache
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


def logits(tokens, segments=None, prefix=None, positions=None):
    tokens = jnp.asarray(tokens)[None] if np.ndim(tokens) == 1 else jnp.asarray(tokens)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    bidirectional = None if prefix is None else prompt_inputs(jnp.asarray(prefix), segments)
    return np.asarray(
        model()(
            inputs_from_targets(tokens, segments), segment_ids=segments,
            positions=None if positions is None else jnp.asarray(positions),
            bidirectional=bidirectional,
        )
    )


def example(seed=0, length=LENGTH):
    return np.random.default_rng(seed).integers(1, 40, length).astype(np.int32)


def prefix_of(prompt=PROMPT, length=LENGTH):
    return (np.arange(length) < prompt).astype(np.int32)[None]


def test_the_input_that_holds_the_last_prompt_token_belongs_to_the_prompt():
    prefix = jnp.array([[1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3]])
    assert prompt_inputs(prefix, segments).astype(int).tolist() == [
        [1, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1],
    ]


def test_a_later_prompt_token_changes_earlier_prompt_positions():
    tokens = example()
    before = logits(tokens, prefix=prefix_of())[0]
    changed = tokens.copy()
    changed[PROMPT - 1] = tokens[PROMPT - 1] % 39 + 1
    after = logits(changed, prefix=prefix_of())[0]
    assert (np.abs(after - before).max(axis=-1)[: PROMPT + 1] > 1e-5).all()
    causal = logits(changed)[0] - logits(tokens)[0]
    assert not causal[:PROMPT].any()


@pytest.mark.parametrize("place", range(PROMPT, LENGTH))
def test_a_target_is_seen_by_nobody_before_it(place):
    tokens = example()
    before = logits(tokens, prefix=prefix_of())[0]
    changed = tokens.copy()
    changed[place] = tokens[place] % 39 + 1
    after = logits(changed, prefix=prefix_of())[0]
    # Target i is input i + 1: the logits up to its own place do not know it.
    assert np.array_equal(after[: place + 1], before[: place + 1])
    if place + 1 < LENGTH:
        assert np.abs(after[place + 1 :] - before[place + 1 :]).max() > 1e-5


@pytest.mark.slow
def test_packed_is_unpacked():
    parts = [(example(1, 5), 3), (example(2, 7), 0), (example(3, 4), 2)]
    width = 18
    tokens, segments, positions, prefix = np.zeros((4, 1, width), np.int32)
    start, want = 0, []
    for number, (part, prompt) in enumerate(parts, 1):
        here = slice(start, start + len(part))
        tokens[0, here], segments[0, here] = part, number
        positions[0, here] = np.arange(len(part))
        prefix[0, here] = np.arange(len(part)) < prompt
        want.append(logits(part, prefix=prefix_of(prompt, len(part)))[0])
        start += len(part)
    got = logits(tokens, segments, prefix, positions)[0]
    np.testing.assert_allclose(got[:start], np.concatenate(want), atol=1e-5)


def test_no_prompt_is_plain_causal_bit_for_bit():
    tokens = example()
    assert np.array_equal(logits(tokens, prefix=prefix_of(0)), logits(tokens))


@pytest.mark.slow
def test_decoding_a_prompt_at_once_is_the_whole_pass():
    """The cache is filled by the prompt, padded on the right; targets follow one by one."""
    tokens = example()
    want = logits(tokens, prefix=prefix_of())[0]
    inputs = np.concatenate([[0], tokens[:-1]]).astype(np.int32)
    count, width = PROMPT + 1, 9
    first = np.zeros((1, width), np.int32)
    first[0, :count] = inputs[:count]
    cache = model().init_cache(1, 16, CONFIG.num_layers)
    got, cache = model().decode(
        jnp.asarray(first), jnp.arange(width)[None], cache,
        bidirectional=jnp.arange(width)[None] < count,
    )
    np.testing.assert_allclose(got[0, :count], want[:count], atol=1e-5)
    for place in range(count, LENGTH):
        got, cache = model().decode(
            jnp.asarray(inputs[place : place + 1])[None], jnp.array([[place]]), cache
        )
        np.testing.assert_allclose(got[0, 0], want[place], atol=1e-5)


def test_prompts_and_padding_carry_no_loss():
    batch = {
        "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]]), "prefix": jnp.array([[1, 1, 0, 1, 0, 0]])
    }
    assert carries_loss(batch).tolist() == [[0, 0, 1, 0, 1, 0]]
    del batch["prefix"]
    assert carries_loss(batch).tolist() == [[1, 1, 1, 1, 1, 0]]


def test_the_setting_adds_no_parameter():
    shapes = [
        jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(jax.eval_shape(
            lambda c=config: Decoder(c, key=jax.random.key(0))
        ))))
        for config in (CONFIG, DecoderConfig(40, 2, 16, 24, 2))
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(UserError, match="bidirectional_prompts is True or False"):
        DecoderConfig(40, 2, 16, 24, 2, bidirectional_prompts="yes")
