"""cuDNN's flash attention on NVIDIA GPUs, with documents kept apart.

`jax.nn.dot_product_attention(implementation="cudnn")` knows no segment ids: it would let a
packed document see those before it. Where rows are packed the kernel is therefore told where
each document begins and how long it is (cuDNN's packed layout, for Hopper and later), through
the function below the public one. Its program is compiled for a number of documents a row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.models.asked import Asked
from stacking_jax.models.placement import Placement

PACKED_SINCE = 90600
"""The first version of cuDNN with the packed layout that JAX asks for: 9.6."""

_OWN_STRIDE_SINCE = (0, 11, 2)
# Older ones multiply the keys' offsets by the number of query heads (jax-ml/jax#39521).


def refusal(asked: Asked) -> str | None:
    """Why the kernel cannot run this attention; None if it can."""
    widest = 256 if (asked.capability or 0.0) >= 9.0 else 128
    if asked.width % 8 or asked.width > widest:
        return f"heads of {asked.width} are no multiple of 8 up to {widest}"
    if asked.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16, and DecoderConfig.dtype is {asked.dtype!r}"
    if asked.cut("length") > 1:
        return "the mesh divides the length of rows, which it needs whole"
    if asked.max_documents is None:
        return (
            "rows may hold any number of documents, and its program is compiled for some; bind "
            "DecoderConfig.max_documents"
        )
    if asked.interpreted:
        return "it has no interpreter"
    packed = asked.max_documents > 1 or asked.prompts
    return asked.no_nvidia(9.0 if packed else 8.0) or _missing(packed) or asked.undivided()


def attend_causal(
    query: jax.Array, key: jax.Array, value: jax.Array, *, placement: Placement, names: Any
) -> jax.Array:
    """Causal attention over whole rows; shapes as of `attend`."""

    def run(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )

    of_query, of_key = (placement.spec(axes) for axes in names)
    return placement.on_each_device(run, (of_query, of_key, of_key), of_query)(query, key, value)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, runs: tuple[jax.Array, jax.Array], *,
    causal: bool, placement: Placement, names: Any,
) -> jax.Array:
    """Attention within the runs of a row.

    Args:
      query: `[B, L, H, W]`.
      key, value: `[B, L, K, W]`, with K dividing H.
      runs: from `runs_of`; together they must cover every token, since what they leave out is
        not written.
      causal: whether a query sees the earlier keys of its run alone.
      placement: where the arrays lie.
      names: of the axes of (query, key).

    Returns:
      `[B, L, H, W]`.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    shared = jax.__version_info__ >= _OWN_STRIDE_SINCE

    def run(query, key, value, offsets, lengths):
        if not shared:
            key, value = (
                jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value)
            )
        return cudnn.dot_product_attention(
            query, key, value, None, None, lengths, lengths, offsets, offsets,
            scale=query.shape[3] ** -0.5,
            mask_type=cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.NO_MASK,
        )

    of_query, of_key = (placement.spec(axes) for axes in names)
    of_runs = placement.spec(("batch", None))
    run = placement.on_each_device(
        run, (of_query, of_key, of_key, of_runs, of_runs), of_query
    )
    return run(query, key, value, *runs)


def runs_of(segment_ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Where runs of equal ids begin, and how long they are.

    Args:
      segment_ids: int `[B, L]`.
      most: runs that a row may have, at least 2. Those of a row beyond them are left out.

    Returns:
      offsets int32 `[B, most + 1]` and lengths int32 `[B, most]`; -1 where a row has fewer.
    """
    batch, length = segment_ids.shape
    begins = begins_run(segment_ids)
    places = jnp.where(begins, jnp.arange(length, dtype=jnp.int32)[None], length)
    places = jnp.pad(
        jnp.sort(places, axis=1), ((0, 0), (0, most + 1)), constant_values=length
    )[:, : most + 1]
    offsets = jnp.where(places < length, places, -1)
    lengths = jnp.where(places[:, :-1] < length, places[:, 1:] - places[:, :-1], -1)
    # The last one is no run: its place says where the one before it ends.
    return offsets.at[:, most].set(-1), lengths


def begins_run(segment_ids: jax.Array) -> jax.Array:
    """Bool `[B, L]`: whether a token's id is another than that of the token before it."""
    first = jnp.ones_like(segment_ids[:, :1], bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def _missing(packed: bool) -> str | None:
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        version = cudnn.check_cudnn_version()
    except (ImportError, RuntimeError) as error:
        return f"cuDNN is not at hand ({error})"
    if packed and version < PACKED_SINCE:
        return f"packed rows need cuDNN 9.6, and here is {version}"
    return None
