"""The Triton flash attention that comes with JAX, for NVIDIA GPUs.

The kernel is `jax.experimental.pallas.ops.gpu.attention`. It knows segment ids, any number
of them, and is the slower one of the two kernels for NVIDIA (`cudnn`).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.models.asked import BLOCK, Asked
from stacking_jax.models.placement import Placement

WIDTHS = (16, 32, 64, 128)
"""Widths of a head that its blocks fit."""

BLOCKS = {
    "block_q": 128, "block_k": 64, "block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64,
    "block_kv_dq": 64,
}
"""Tokens of its blocks; `benchmarks/gpu_attention.py` times others."""


def refusal(asked: Asked) -> str | None:
    """Why the kernel cannot run this attention; None if it can."""
    if asked.width not in WIDTHS:
        return f"heads of {asked.width} are none of {', '.join(map(str, WIDTHS))}"
    if asked.cut("length") > 1:
        return "the mesh divides the length of rows, which it needs whole"
    return asked.no_nvidia(8.0) or _missing() or asked.undivided()


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, *,
    causal: bool, placement: Placement, names: Any, interpret: bool,
) -> jax.Array:
    """Attention within segments; arguments and result as of `splash.attend`."""
    length, width = query.shape[1], query.shape[3]
    rows = ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0))
    query, key, value = (jnp.pad(x, rows) for x in (query, key, value))
    segment_ids = jnp.pad(segment_ids, rows[:2], constant_values=jnp.iinfo(jnp.int32).min)
    kernel = _kernel()

    def run(query, key, value, segments):
        # The kernel has one key head for each query head.
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        return kernel.mha(
            query, key, value, segments, sm_scale=width**-0.5, causal=causal,
            block_sizes=kernel.BlockSizes(**BLOCKS), interpret=interpret,
        )

    of_query, of_key = (placement.spec(axes) for axes in names)
    of_rows = placement.spec(("batch", "keys"))
    run = placement.on_each_device(run, (of_query, of_key, of_key, of_rows), of_query)
    return run(query, key, value, segment_ids)[:, :length]


def _missing() -> str | None:
    try:
        _kernel()
    except ImportError as error:
        return f"this JAX does not have it ({error})"
    return None


@functools.cache
def _kernel():
    with warnings.catch_warnings():
        # JAX 0.11 names another library in its place, which is not there on every machine.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention
    return attention
