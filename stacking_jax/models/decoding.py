"""Sampling with a KV cache: one pass over the prompts, then one token at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop
from stacking_jax.models.decoder import Constrain, unconstrained

CHUNK = 32
"""Tokens between two looks of the host at what has been generated."""


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
    loop: Loop | None = None,
    stop_ids: Sequence[int] = (),
    stopped: Callable[[int, list[int]], bool] | None = None,
    row_seeds: Sequence[int] | None = None,
    width: int | None = None,
    max_length: int | None = None,
    place: Callable[[np.ndarray], jax.Array] = jnp.asarray,
    constrain: Constrain = unconstrained,
) -> list[list[int]]:
    """Continues every prompt.

    Where the model's configuration says `bidirectional_prompts`, the tokens of a prompt
    see one another.

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
      depth_map, loop: run another map than every layer once.
      stop_ids: tokens after which a row has ended; they are part of the result.
      stopped: (row, its new tokens) -> whether it has ended for a reason that no single
        token shows, such as a stop text over several tokens. Asked every `CHUNK` tokens,
        so that a row may hold some more than it needs.
      row_seeds: what is drawn for a row follows (seed, this number) and not the other
        rows; None for 0, 1, ...
      width: columns of the prompts' arrays; None for the least multiple of 64.
      max_length: the context; None for no bound.
      place: puts an array whose first axis is the batch onto the devices.
      constrain: places an activation on the mesh by the names of its axes.

    Returns:
      The new tokens of each prompt.

    Raises:
      UserError: for settings outside their range, a prompt that leaves no room for
        `max_new_tokens` in `max_length`, or a model whose logits are not numbers.
    """
    if not prompts:
        return []
    _check(max_new_tokens, temperature, top_k, top_p)
    longest = max(len(prompt) for prompt in prompts)
    if max_length is not None and longest + max_new_tokens > max_length:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into a context "
            f"of {max_length}; shorten the prompt or bind a smaller max_new_tokens"
        )
    inputs, lengths = pad_prompts(prompts, width)
    capacity = inputs.shape[1] + -(-max_new_tokens // CHUNK) * CHUNK
    seeds = np.arange(len(prompts)) if row_seeds is None else np.asarray(row_seeds)
    inputs, lengths, seeds = (place(array) for array in (inputs, lengths, seeds.astype(np.int32)))
    cache = prefill(
        graph, params, inputs, lengths, capacity=capacity, depth_map=depth_map, loop=loop,
        constrain=constrain,
    )  # fmt: skip
    last = jnp.take_along_axis(inputs, (lengths - 1)[:, None], axis=1)[:, 0]
    vocab = params["embedding"].shape[0]
    ends = np.zeros(vocab, bool)
    ends[[i for i in (*stop_ids, *([] if eos_id is None else [eos_id])) if i < vocab]] = True

    new: list[list[int]] = [[] for _ in prompts]
    done = place(np.zeros(len(prompts), bool))
    for start in range(0, max_new_tokens, CHUNK):
        cache, last, done, tokens, finite = _decode_chunk(
            graph, params, cache, last, done, lengths - 1 + start, jnp.asarray(ends), seeds,
            jax.random.key(seed), jnp.asarray(start, jnp.int32),
            jnp.asarray(min(CHUNK, max_new_tokens - start), jnp.int32),
            jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32),
            greedy=temperature == 0, top_k=top_k, depth_map=depth_map, loop=loop,
            constrain=constrain,
        )  # fmt: skip
        tokens, ended, finite = (to_host(array) for array in (tokens, done, finite))
        if not finite:
            raise UserError(
                "the model's logits are not numbers: its parameters are not finite, or it was run "
                "past the end of its cache"
            )
        ended = ended.copy()
        for row, (mine, ids) in enumerate(zip(new, tokens.tolist(), strict=True)):
            mine.extend(i for i in ids if i >= 0)
            if stopped is not None and not ended[row] and stopped(row, mine):
                ended[row] = True
        if ended.all():
            break
        done = place(ended)
    return [_until(row, eos_id) for row in new]


def _check(max_new_tokens, temperature, top_k, top_p):
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1; got "
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
        )


def pad_prompts(
    prompts: Sequence[Sequence[int]], width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as the model reads them: shifted by one as in training, padded on the right.

    Args:
      prompts: token ids.
      width: columns; None for the least multiple of 64, so that prompts of like lengths
        share a compiled program.

    Returns:
      int32 `[B, width]`, each row beginning with id 0, and int32 `[B]`, lengths with it.

    Raises:
      UserError: if a prompt is longer than `width` allows.
    """
    lengths = np.array([len(prompt) + 1 for prompt in prompts], np.int32)
    longest = int(lengths.max())
    if width is None:
        width = -(-longest // 64) * 64
    if longest > width:
        raise UserError(f"a prompt of {longest - 1} tokens does not fit into {width} columns")
    inputs = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(inputs, prompts, strict=True):
        row[1 : len(prompt) + 1] = prompt
    return inputs, lengths


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "depth_map", "loop", "constrain"))
def prefill(
    graph, params, inputs, lengths, *, capacity, depth_map=None, loop=None, constrain=unconstrained
):
    """The KV cache of padded prompts, with `capacity` slots a row.

    What padding writes into the cache lies at slots that no query sees before the row's
    own tokens have overwritten them. No logits are computed: whoever goes on feeds the
    last token of each prompt again, alone, and reads them there.
    """
    model = nnx.merge(graph, params)
    options = {}
    if model.config.bidirectional_prompts:
        # The inputs of a prompt: the begin-of-document id and every token of it.
        places = jnp.arange(inputs.shape[1])[None]
        options["bidirectional"] = (places < lengths[:, None]) & (lengths > 1)[:, None]
    return model.prefill(
        inputs, capacity, depth_map=depth_map, loop=loop, constrain=constrain, **options
    )


@functools.partial(
    jax.jit,
    static_argnames=("graph", "greedy", "top_k", "depth_map", "loop", "constrain"),
    donate_argnames=("cache",),
)
def _decode_chunk(
    graph, params, cache, token, done, position, ends, seeds, key, begun, count, temperature,
    top_p, *, greedy, top_k, depth_map, loop, constrain,
):  # fmt: skip
    """Up to `count` tokens more; -1 stands where a row has ended."""
    model = nnx.merge(graph, params)

    def choose(logits, step):
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        row_key = lambda seed: jax.random.fold_in(jax.random.fold_in(key, seed), step)  # noqa: E731
        keys = jax.vmap(row_key)(seeds)
        draw = lambda row, key: pick(row[None], key, temperature, top_k, top_p)[0]  # noqa: E731
        return jax.vmap(draw)(logits, keys)

    def going(carry):
        step, _, _, done, _, _ = carry
        return (step < count) & ~jnp.all(done)

    def one_token(carry):
        step, token, cache, done, tokens, finite = carry
        logits, cache = model.decode(
            token[:, None], (position + step)[:, None], cache, depth_map=depth_map,
            loop=loop, constrain=constrain,
        )
        logits = logits[:, 0]
        finite = finite & jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)))
        token = choose(logits, begun + step)
        shown = jnp.where(done, -1, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, shown[:, None], step, 1)
        return step + 1, token, cache, done | jnp.take(ends, token), tokens, finite

    tokens = jnp.full((token.shape[0], CHUNK), -1, jnp.int32)
    start = (jnp.zeros((), jnp.int32), token, cache, done, tokens, jnp.ones((), bool))
    _, token, cache, done, tokens, finite = jax.lax.while_loop(going, one_token, start)
    return cache, token, done, tokens, finite


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


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array on every host."""
    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id is not None and eos_id in tokens else tokens
