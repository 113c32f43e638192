"""Causal attention within documents, prompts that see themselves whole, rotary positions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_NEVER = -1e30
"""Added to the score of a key that must not be seen; finite, so that gradients are."""

_LEAST_BLOCK = 128


def document_mask(segment_ids: jax.Array, bidirectional: jax.Array | None = None) -> jax.Array:
    """Which keys each query may see: earlier ones of its own document.

    Args:
      segment_ids: int `[B, L]`; 0 marks padding, which sees nothing but padding
        and so never touches a document.
      bidirectional: bool `[B, L]`, inputs that belong to a prompt: those of one
        document see each other whatever their order (a prefix LM, Raffel et al.
        2020, §3.2.1). None leaves everything causal.

    Returns:
      bool `[B, 1, L, L]`, indexed by (query, key).
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = causal[None]
    if bidirectional is not None:
        seen = seen | (bidirectional[:, :, None] & bidirectional[:, None, :])
    return (same & seen)[:, None]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, blocks: int = 1
) -> jax.Array:
    """Softmax attention; grouped queries share keys.

    The backward pass keeps the softmax's weights, in the dtype of the values, and its products
    take factors in the dtype of the computation. By JAX's own rules they would take the float32
    gradients as they are, and so run in float32 where the model computes in bfloat16.

    Args:
      query: `[B, Q, H, W]`.
      key, value: `[B, S, K, W]`, with K dividing H.
      mask: bool `[B, 1, Q, S]`.
      blocks: parts of the queries, which divide Q, of which each is computed with the keys up
        to its end alone: of use where the mask lets no query see a later key, and Q = S. n of
        them compute a share (n + 1) / 2n of all scores.

    Returns:
      `[B, Q, H, W]` in the query's dtype; the softmax is computed in float32.
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    # Heads go to the front, so that every product is a plain batched matrix product;
    # query head h reads key head h // (H / K).
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    query = query.transpose(0, 2, 3, 1, 4) * width**-0.5
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    mixed = _attend(query, key, value, mask, blocks)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def blocks_of(length: int) -> int:
    """Parts of a causal attention over rows of this length on a CPU, see `attend`.

    Two or four, of 128 queries at least: more of them compile longer and spare little more.
    """
    return next((n for n in (4, 2) if length % n == 0 and length // n >= _LEAST_BLOCK), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, blocks):
    """`attend` with heads in front: queries `[B, K, G, Q, W]`, keys and values `[B, K, S, W]`."""
    return _attend_forward(query, key, value, mask, blocks)[0]


def _attend_forward(query, key, value, mask, blocks):
    mixed, kept = [], []
    for queries, keys in _blocks(query, key, blocks):
        scores = jnp.einsum(
            "bkgqw,bksw->bkgqs", query[:, :, :, queries], key[:, :, keys],
            preferred_element_type=jnp.float32,
        )
        scores = scores + jnp.where(mask[:, :, queries, keys], 0.0, _NEVER)[:, :, None]
        # Normalising after the second product touches W numbers a query instead of S.
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(value.dtype)
        part = jnp.einsum(
            "bkgqs,bksw->bkgqw", weights, value[:, :, keys], preferred_element_type=jnp.float32
        )
        mixed.append((part / total).astype(value.dtype))
        kept.append((weights, total))
    mixed = _joined(mixed, 3)
    return mixed, (query, key, value, mixed, kept)


def _attend_backward(blocks, residuals, gradient):
    query, key, value, mixed, kept = residuals
    gradient = gradient.astype(jnp.float32)
    pull = jnp.sum(gradient * mixed, axis=-1, keepdims=True)
    of_query, of_key, of_value = [], 0.0, 0.0
    for (queries, keys), (weights, total) in zip(
        _blocks(query, key, blocks), kept, strict=True
    ):
        here = gradient[:, :, :, queries] / total
        low = here.astype(value.dtype)
        of_weights = jnp.einsum(
            "bkgqw,bksw->bkgqs", low, value[:, :, keys], preferred_element_type=jnp.float32
        )
        of_scores = weights * (of_weights - pull[:, :, :, queries] / total)
        of_scores = of_scores.astype(query.dtype)
        of_query.append(jnp.einsum(
            "bkgqs,bksw->bkgqw", of_scores, key[:, :, keys], preferred_element_type=jnp.float32
        ))
        behind = [(0, 0), (0, 0), (0, key.shape[2] - keys.stop), (0, 0)]
        of_key += jnp.pad(_onto_keys(of_scores, query[:, :, :, queries]), behind)
        of_value += jnp.pad(_onto_keys(weights, low), behind)
    return (
        _joined(of_query, 3).astype(query.dtype), of_key.astype(key.dtype),
        of_value.astype(value.dtype), None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _onto_keys(weights: jax.Array, x: jax.Array) -> jax.Array:
    """What queries `[B, K, G, Q, W]` give to the keys that they see: float32 `[B, K, S, W]`."""
    return jnp.einsum("bkgqs,bkgqw->bksw", weights, x, preferred_element_type=jnp.float32)


def _blocks(query: jax.Array, key: jax.Array, blocks: int) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys that it needs."""
    if blocks == 1:
        return [(slice(0, query.shape[3]), slice(0, key.shape[2]))]
    size = query.shape[3] // blocks
    return [(slice(i * size, (i + 1) * size), slice(0, (i + 1) * size)) for i in range(blocks)]


def _joined(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def attend_behind(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array,
    cache: dict[str, jax.Array], start: jax.Array,
) -> jax.Array:
    """As `attend`, for tokens that stand behind others whose keys and values are kept.

    The kept ones are only read, so that a loop over tokens copies nothing.

    Args:
      query: `[B, Q, H, W]`.
      key, value: `[B, Q, K, W]`, of the same tokens.
      mask: bool `[B, 1, Q, Q]`, among these tokens.
      cache: "key" and "value" `[B, K, S, W]`.
      start: int `[B]`; the slots before it are seen, the others hold nothing yet.

    Returns:
      `[B, Q, H, W]` in the query's dtype.
    """
    batch, length, heads, width = query.shape
    kv_heads, slots = cache["key"].shape[1:3]
    if slots == 0:
        return attend(query, key, value, mask)
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    query = query.transpose(0, 2, 3, 1, 4) * width**-0.5
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    seen = jnp.arange(slots)[None, :] < start[:, None]
    both = []
    for keys, allowed in ((cache["key"], seen[:, None, None, None]), (key, mask[:, :, None])):
        scores = jnp.einsum("bkgqw,bksw->bkgqs", query, keys, preferred_element_type=jnp.float32)
        both.append(scores + jnp.where(allowed, 0.0, _NEVER))
    highest = jnp.max(jnp.concatenate([jnp.max(s, -1, keepdims=True) for s in both], -1), -1)
    mixed, total = 0.0, 0.0
    for scores, values in zip(both, (cache["value"], value), strict=True):
        weights = jnp.exp(scores - highest[..., None])
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = mixed + jnp.einsum(
            "bkgqs,bksw->bkgqw", weights.astype(values.dtype), values,
            preferred_element_type=jnp.float32,
        )
    mixed = (mixed / total).astype(value.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def rotary_angles(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE (Su et al. 2021), in float32.

    Args:
      positions: int `[B, L]`.
      width: of one head, even.
      theta: the base.

    Returns:
      Two arrays `[B, L, 1, width / 2]`.
    """
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turns `x` `[B, L, heads, W]` by its position.

    The first half of a head is paired with the second half, as in Hugging
    Face's Llama, so that exported weights need no permutation.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )
    return turned.astype(x.dtype)
