"""Sampling against the plain forward pass."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.models.decoding import generate, pick

CONFIG = DecoderConfig(vocab_size=24, num_layers=2, d_model=16, d_ff=24, num_heads=2)
MODEL = Decoder(CONFIG, key=jax.random.key(3))
GRAPH, STATE = nnx.split(MODEL)
PARAMS = nnx.to_pure_dict(STATE)
PROMPTS = [[5, 6, 7], [], [9] * 10]


def greedy(prompt, count, depth_map=None, loop=None):
    """The likeliest continuation by full forward passes, one per token."""
    row = np.zeros((1, 20), np.int32)  # what stands behind a token does not matter to it
    row[0, 1 : len(prompt) + 1] = prompt
    for end in range(len(prompt), len(prompt) + count):
        row[0, end + 1] = jnp.argmax(forward(row, depth_map, loop)[0, end])
    return row[0, len(prompt) + 1 :][:count].tolist()


@functools.partial(jax.jit, static_argnums=(1, 2))
def forward(tokens, depth_map, loop):
    return MODEL(tokens, depth_map=depth_map, loop=loop)


@pytest.mark.parametrize("runs", [
    {}, {"depth_map": DepthMap([0, 1] * 3)}, {"loop": Loop(0, 1, 4, inject="input")},
], ids=["plain", "map", "loop with injection"])  # fmt: skip
def test_greedy_decoding_of_ragged_prompts_equals_full_forward_passes(runs):
    got = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0, **runs)
    assert got == [greedy(prompt, 6, **runs) for prompt in PROMPTS]


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


def test_prompts_that_see_themselves_whole():
    config = dataclasses.replace(CONFIG, bidirectional_prompts=True)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(3))))
    got = generate(graph, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0)

    @jax.jit
    def whole(tokens, prompt):
        return nnx.merge(graph, PARAMS)(tokens, bidirectional=prompt)

    for prompt, new in zip(PROMPTS, got, strict=True):
        row = np.zeros((1, 20), np.int32)
        row[0, 1 : len(prompt) + 7] = [*prompt, *new]
        inputs = (np.arange(20) <= len(prompt))[None] & bool(prompt)
        logits = whole(row, jnp.asarray(inputs))
        assert new == jnp.argmax(logits[0, len(prompt) : len(prompt) + 6], axis=-1).tolist()
    causal = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, temperature=0.0)
    assert got != causal and got[1] == causal[1]


def test_a_row_ends_by_itself_and_its_tokens_do_not_depend_on_the_others():
    want = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=40, temperature=0.0)
    stop = want[2][3]
    got = generate(
        GRAPH, PARAMS, PROMPTS, max_new_tokens=40, temperature=0.0, stop_ids=[stop]
    )
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in want]
    assert got == cut and len(got[2]) <= 4
    # Asked on the host between chunks, a row may be longer, never shorter.
    asked = generate(
        GRAPH, PARAMS, PROMPTS, max_new_tokens=40, temperature=0.0,
        stopped=lambda row, ids: row != 1,
    )  # fmt: skip
    assert [len(row) for row in asked] == [32, 40, 32]
    assert asked == [row[: len(part)] for row, part in zip(want, asked, strict=True)]
    drawn = generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=9, row_seeds=[4, 5, 6], seed=1)
    alone = generate(GRAPH, PARAMS, PROMPTS[1:2], max_new_tokens=9, row_seeds=[5], seed=1)
    assert drawn[1] == alone[0]


def test_decoding_past_the_end_of_the_cache_is_an_error():
    with pytest.raises(UserError, match="10 tokens and 7 new ones do not fit into a context of 16"):
        generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=7, max_length=16)
    assert generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=6, max_length=16)
    tokens = jnp.ones((2, 1), jnp.int32)
    cache = MODEL.init_cache(2, 8, 2)
    with pytest.raises(UserError, match="position 9 needs more than the 8 cached slots"):
        MODEL.decode(tokens, jnp.array([[3], [8]]), cache)
    with pytest.raises(UserError, match="prompts of 9 tokens do not fit into 8"):
        MODEL.prefill(jnp.ones((2, 9), jnp.int32), 8)
    # Where positions are known only when the program runs, the row's logits say so.
    decode = jax.jit(lambda positions: MODEL.decode(tokens, positions, cache)[0])
    logits = np.asarray(decode(jnp.array([[7], [8]])))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_a_model_that_is_not_finite_is_an_error():
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)
    with pytest.raises(UserError, match="logits are not numbers"):
        generate(GRAPH, broken, PROMPTS, max_new_tokens=2)


def test_a_width_that_is_too_small():
    with pytest.raises(UserError, match="a prompt of 10 tokens does not fit into 10 columns"):
        generate(GRAPH, PARAMS, PROMPTS, max_new_tokens=2, width=10)
