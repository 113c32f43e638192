"""JAX's splash attention for TPUs, as a decoder calls it.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`: a flash attention (Dao 2023)
that leaves out the blocks which its mask hides. Documents are told apart within it, by
segment ids.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.models.asked import BLOCK, Asked
from stacking_jax.models.placement import Placement

LARGEST_BLOCK = 512
"""Tokens of a block at most: a common size, not tuned here, where no TPU was at hand."""

RESIDUALS = "context"
"""The name of what attention gives, and of its normalisers: what the backward pass needs of the
forward one. A rematerialisation that keeps it does not run the kernel again."""


def refusal(asked: Asked) -> str | None:
    """Why the kernel cannot run this attention; None if it can."""
    if asked.platform != "tpu" and not asked.interpreted:
        return f"it needs a TPU, and the program is compiled for {asked.platform!r}"
    parts = asked.cut("length")
    if parts > 1 and asked.length % (BLOCK * parts):
        return (
            f"{parts} devices along the length would have parts of {asked.length / parts:g} "
            f"tokens, no multiple of {BLOCK}"
        )
    return asked.undivided()


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, *,
    causal: bool, placement: Placement, names: Any, interpret: bool,
) -> jax.Array:
    """Attention within segments.

    Rows are padded to whole blocks, by a segment of its own.

    Args:
      query: `[B, L, H, W]`.
      key, value: `[B, L, K, W]`, with K dividing H.
      segment_ids: int `[B, L]`; a query sees keys of its own segment only.
      causal: whether it sees the earlier ones of these alone.
      placement: where the arrays lie.
      names: of the axes of (query, key).
      interpret: whether to run in Pallas's interpreter.

    Returns:
      `[B, L, H, W]`.
    """
    length, heads, width = query.shape[1:]
    parts = placement.parts("length")
    pad = -length % BLOCK if parts == 1 else 0
    rows = ((0, 0), (0, pad), (0, 0), (0, 0))
    query, key, value = (jnp.pad(x, rows) for x in (query * width**-0.5, key, value))
    # No segment of the data has this id.
    segment_ids = jnp.pad(segment_ids, rows[:2], constant_values=jnp.iinfo(jnp.int32).min)
    kernel = _kernel(
        length + pad, heads // placement.parts("heads"), parts, causal, interpret
    )
    # The full mask is the same for every part of the queries.
    where = placement.sharding((None, "length" if causal else None))
    shape_of = None if where is None else kernel.manual_sharding_spec(where)
    of_query, of_key = (placement.spec(axes) for axes in names)
    of_rows = placement.spec(("batch", "length")), placement.spec(("batch", "keys"))

    def run(kernel, query, key, value, q_segments, kv_segments):
        heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        mixed = jax.vmap(kernel)(*heads_first, _splash().SegmentIds(q_segments, kv_segments))
        return mixed.transpose(0, 2, 1, 3)

    run = placement.on_each_device(
        run, (shape_of, of_query, of_key, of_key, *of_rows), of_query
    )
    mixed = run(kernel, query, key, value, segment_ids, segment_ids)
    return mixed[:, :length].astype(value.dtype)


def block_size(length: int) -> int:
    """The largest multiple of 128 up to `LARGEST_BLOCK` that divides a length."""
    return next(
        size for size in range(LARGEST_BLOCK, 0, -BLOCK) if length % size == 0
    )


def _kernel(length: int, heads: int, parts: int, causal: bool, interpret: bool):
    splash = _splash()
    if causal:
        mask = splash.CausalMask((length, length))
    else:
        mask, parts = splash.FullMask((length // parts, length)), 1
    block_q, block = block_size(mask.shape[0] // parts), block_size(length)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block, block_kv_compute=block,
        block_q_dkv=block_q, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block_q, block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1,
        q_seq_shards=parts, residual_checkpoint_name=RESIDUALS, interpret=interpret,
    )


@functools.cache
def _splash():
    # Imported where it is used: no other backend needs Pallas for TPUs.
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention
