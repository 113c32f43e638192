"""Sampling with a KV cache: one pass over the prompt, then one token at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap


def generate(
    graph: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    depth_map: DepthMap | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
      graph: the decoder's graph definition.
      params: nested dicts.
      prompts: token ids; lengths may differ, and an empty prompt starts a document.
      max_new_tokens: the most that is added to each.
      eos_id: where a continuation ends; it is not part of the result.
      temperature: 0 takes the likeliest token; above 1 flattens.
      top_k: samples among the k likeliest tokens.
      top_p: samples among the fewest tokens that hold this share of probability.
      seed: of the sampling.
      depth_map: runs another map than every layer once.

    Returns:
      The new tokens of each prompt.

    Raises:
      UserError: for settings outside their range.
    """
    if not prompts:
        return []
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1; got "
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
        )
    # Inputs are shifted by one as in training: a document begins with id 0. Widths
    # come in steps of 64, so that prompts of like lengths share a compiled program.
    lengths = np.array([len(prompt) + 1 for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // 64) * 64
    inputs = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(inputs, prompts, strict=True):
        row[1 : len(prompt) + 1] = prompt
    tokens = _generate(
        graph, params, jnp.asarray(inputs), jnp.asarray(lengths), jax.random.key(seed),
        jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32),
        max_new_tokens=max_new_tokens, eos_id=-1 if eos_id is None else eos_id,
        top_k=top_k, depth_map=depth_map,
    )
    return [_until(row.tolist(), eos_id) for row in np.asarray(tokens)]


@functools.partial(
    jax.jit, static_argnames=("graph", "max_new_tokens", "eos_id", "top_k", "depth_map")
)
def _generate(
    graph, params, inputs, lengths, key, temperature, top_p, *,
    max_new_tokens, eos_id, top_k, depth_map,
):
    model = nnx.merge(graph, params)
    batch, width = inputs.shape
    stored = jax.tree.leaves(params["stack"])[0].shape[0]
    cache = model.init_cache(
        batch, width + max_new_tokens, stored if depth_map is None else len(depth_map)
    )
    # Rows are padded on the right. What padding writes into the cache lies at slots
    # that no query sees before the row's own tokens have overwritten them.
    positions = jnp.broadcast_to(jnp.arange(width)[None], inputs.shape)
    logits, cache = model.decode(inputs, positions, cache, depth_map=depth_map)
    logits = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def choose(logits, step):
        return pick(logits, jax.random.fold_in(key, step), temperature, top_k, top_p)

    def going(carry):
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def one_token(carry):
        step, logits, cache, done, tokens = carry
        token = choose(logits, step)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, 1)
        done = done | (token == eos_id)
        logits, cache = model.decode(
            token[:, None], (lengths + step)[:, None], cache, depth_map=depth_map
        )
        return step + 1, logits[:, 0], cache, done, tokens

    # A row that has ended goes on with the others; `generate` cuts it at its eos.
    tokens = jnp.full((batch, max_new_tokens), eos_id, jnp.int32)
    done = jnp.zeros((batch,), bool)
    start = (jnp.zeros((), jnp.int32), logits, cache, done, tokens)
    return jax.lax.while_loop(going, one_token, start)[4]


def pick(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int | None, top_p: jax.Array
) -> jax.Array:
    """Draws a token from logits `[B, V]`; temperature 0 takes the likeliest.

    `top_k` and then `top_p` (nucleus sampling, Holtzman et al. 2020) narrow the
    choice; the likeliest token is always in it.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    descending = jnp.sort(scaled, axis=-1)[:, ::-1]
    if top_k is not None and top_k < logits.shape[-1]:
        floor = descending[:, top_k - 1 : top_k]
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
        descending = jnp.where(descending < floor, -jnp.inf, descending)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    floor = jnp.take_along_axis(descending, jnp.maximum(last, 0), axis=-1)
    scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
    drawn = jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id is not None and eos_id in tokens else tokens
