"""A teacher's most probable tokens: found in its logits, tempered, and made soft targets.

Shapes: B batch, L length, D width of the teacher, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stacking_jax.models.decoder import Constrain, unconstrained
from stacking_jax.models.head_loss import TopTargets, cut, join, parts_of
from stacking_jax.models.losses import head_logits

_PLACES = ("batch", "length")


def top_log_probs(
    hidden: jax.Array, kernel: jax.Array, *, vocab_axis: int, k: int, chunk: int | None = None,
    constrain: Constrain = unconstrained,
) -> tuple[jax.Array, jax.Array]:
    """The K most probable next tokens, their log-probabilities, and that of all others together.

    Args:
      hidden: `[B, L, D]`, normed, before the teacher's head.
      kernel: the head, `[V, D]` or `[D, V]`.
      vocab_axis: of the kernel, 0 or 1.
      k: K, at most V.
      chunk: tokens of a device that have logits at a time; None for all of them.
      constrain: places an activation on the mesh by the names of its axes.

    Returns:
      Ids int32 `[B, L, K]`, the most probable first, and float32 `[B, L, K + 1]` at temperature
      1, whose last entry is the log of the tail's mass (−inf where none is left).
    """
    if chunk is None:
        logits = constrain(head_logits(hidden, kernel, vocab_axis), (*_PLACES, "vocab"))
        return _top(logits, k)
    parts = parts_of(hidden.shape[:2], constrain)
    kernel = constrain(kernel, ("vocab", "stream") if vocab_axis == 0 else ("stream", "vocab"))

    def one_chunk(hidden):
        logits = head_logits(hidden, kernel, vocab_axis)
        return _top(constrain(logits, (*_PLACES, None, "vocab")), k)

    ids, log_probs = jax.lax.map(one_chunk, cut(hidden, parts, chunk, constrain))
    shape = hidden.shape[:2]
    return (
        join(ids, (*shape, k), parts, constrain, last=None),
        join(log_probs, (*shape, k + 1), parts, constrain, last=None),
    )


def _top(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values, ids = jax.lax.top_k(logits, k)
    # Less the highest first: what is left is small, and keeps its digits.
    highest = values[..., :1]
    total = jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)
    log_probs = values - highest - jnp.log(total)
    tail = jnp.maximum(1.0 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True), 0.0)
    return ids.astype(jnp.int32), jnp.concatenate([log_probs, jnp.log(tail)], axis=-1)


def top_targets(
    ids: jax.Array, log_probs: jax.Array, *, vocab: int, temperature: float, tail: str
) -> TopTargets:
    """Soft targets from what `top_log_probs` gives, live or out of a cache.

    The teacher is taken to be the K tokens as they are and the tail spread evenly over all
    others; the temperature ρ is applied to that: p^(1/ρ), normed to 1.

    Args:
      ids: int `[B, L, K]`.
      log_probs: float `[B, L, K + 1]`.
      vocab: V.
      temperature: ρ.
      tail: 'drop' leaves the others at 0, and so the sum below 1; 'renormalise' makes it 1
        again; 'uniform' keeps the others.
    """
    k = ids.shape[-1]
    others = vocab - k
    log_probs = log_probs.astype(jnp.float32)
    tops = log_probs[..., :k] / temperature
    if others == 0 or tail == "renormalise":
        return TopTargets(ids, jax.nn.softmax(tops, axis=-1))
    each = (log_probs[..., k:] - jnp.log(float(others))) / temperature
    norm = jax.nn.logsumexp(
        jnp.concatenate([tops, each + jnp.log(float(others))], axis=-1), axis=-1, keepdims=True
    )
    elsewhere = jnp.exp(each - norm)[..., 0] if tail == "uniform" else None
    return TopTargets(ids, jnp.exp(tops - norm), elsewhere)
