"""Which kernel computes attention, and what it is handed.

A kernel says itself why it cannot run what is asked (`refusal`). One that was named is then
refused; 'auto' takes the next, XLA's own attention at last, and says so once. Documents of a
row stay apart on every path, and prompts that see themselves whole do on every path:

A prompt leads its document, so that what a token of it sees is exactly the prompt. The
attention of a prefix LM is therefore two: the causal one within documents, and a full one
within prompts; each token takes its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from stacking_jax.console import say
from stacking_jax.errors import UserError
from stacking_jax.models import cudnn, splash, triton
from stacking_jax.models.asked import BLOCK, Asked, interpreted
from stacking_jax.models.attention import attend, blocks_of, document_mask
from stacking_jax.models.config import DecoderConfig
from stacking_jax.models.placement import Placement, unconstrained

__all__ = ["AttentionMask", "attention_mask", "check_documents", "choose", "interpreted",
           "self_attention"]

KERNELS = {"splash": splash, "cudnn": cudnn, "triton": triton}

PREFERRED = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}
"""What 'auto' tries on a platform, in this order."""

QUERIES = ("batch", "length", "heads", None)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("causal", "within_prompts", "bidirectional", "sound"),
    meta_fields=("kernel", "interpret", "blocks"),
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query sees, as one kernel takes it; a pytree.

    Attributes:
      causal: of the earlier keys of the same document. For XLA bool `[B, 1, L, L]`, which holds
        what prompts see as well; for 'splash' and 'triton' segment ids int `[B, L]`; for 'cudnn'
        the `cudnn.runs_of` the documents, None where each row is one.
      within_prompts: the same of the tokens of prompts and of those between them; None where
        everything is causal.
      bidirectional: bool `[B, L]`, tokens of prompts; None likewise.
      sound: bool `[B]`, rows of which the kernel is right; None where it always is.
      kernel: 'xla', 'splash', 'cudnn' or 'triton'.
      interpret: whether the kernel runs in Pallas's interpreter.
      blocks: of `attend`, for XLA.
    """

    causal: Any
    within_prompts: Any
    bidirectional: jax.Array | None
    sound: jax.Array | None
    kernel: str
    interpret: bool = False
    blocks: int = 1

    def guard(self, x: jax.Array) -> jax.Array:
        """`x` `[B, L, D]`, with NaN in the rows of which the kernel would be wrong."""
        if self.sound is None:
            return x
        return jnp.where(self.sound[:, None, None], x, jnp.nan)


def attention_mask(
    config: DecoderConfig,
    shape: tuple[int, int],
    segment_ids: jax.Array | None = None,
    bidirectional: jax.Array | None = None,
    placement: Any = unconstrained,
) -> AttentionMask:
    """Chooses the kernel and makes what it needs.

    Args:
      config: of the model; `attention` names the kernel.
      shape: of the tokens, `[B, L]`.
      segment_ids: int `[B, L]`, documents of a packed record, 0 on padding; None for one
        document per row.
      bidirectional: bool `[B, L]`, tokens that see each other within their document; None for
        causal. Kernels other than XLA's need them to lead their documents, as prompts do.
      placement: where activations lie.

    Raises:
      UserError: if the named kernel cannot run here.
    """
    packed = segment_ids is not None
    kernel, interpret = "xla", False
    if isinstance(placement, Placement):
        asked = Asked.of(config, shape, packed, bidirectional is not None, placement)
        kernel, interpret = choose(config.attention, asked), asked.interpreted
    elif config.attention not in ("auto", "xla"):
        raise UserError(
            f"DecoderConfig.attention = {config.attention!r} needs a Placement, which says what "
            "devices there are; the activations are placed by a plain function"
        )
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    if kernel == "xla":
        mask = document_mask(segment_ids, bidirectional)
        mask = placement(mask, ("batch", None, "length", "keys"))
        blocks = _blocks(shape[1], placement) if bidirectional is None else 1
        return AttentionMask(mask, None, None, None, kernel, blocks=blocks)

    within_prompts, sound = None, None
    if bidirectional is not None:
        # Ids are not negative: the tokens between two prompts are none of a prompt's.
        within_prompts = jnp.where(bidirectional, segment_ids, -1 - segment_ids)
        continued = ~cudnn.begins_run(segment_ids)
        behind = jnp.pad(~bidirectional[:, :-1], ((0, 0), (1, 0)))
        sound = ~jnp.any(bidirectional & continued & behind, axis=1)
    if kernel != "cudnn":
        return AttentionMask(
            segment_ids, within_prompts, bidirectional, sound, kernel, interpret
        )
    most = config.max_documents if packed else 1
    held = _documents_in_runs(segment_ids, most)
    sound = held if sound is None else held & sound
    # One document and padding behind it need no runs: no real token sees padding.
    causal = None if most == 1 else cudnn.runs_of(segment_ids, most + 1)
    if within_prompts is not None:
        within_prompts = cudnn.runs_of(within_prompts, 2 * most + 1)
    return AttentionMask(causal, within_prompts, bidirectional, sound, kernel)


def self_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
    placement: Any = unconstrained,
) -> jax.Array:
    """Softmax attention of tokens to each other; grouped queries share keys.

    Args:
      query: `[B, L, H, W]`.
      key, value: `[B, L, K, W]`, with K dividing H.
      mask: from `attention_mask`, made with the same placement.
      placement: where the arrays lie.

    Returns:
      `[B, L, H, W]` in the query's dtype; the softmax is computed in float32.
    """
    if mask.kernel == "splash":
        return _by_kernel(query, key, value, mask, placement)  # Names itself what it gives.
    if mask.kernel == "xla":
        mixed = attend(query, key, value, mask.causal, mask.blocks)
    else:
        mixed = _by_kernel(query, key, value, mask, placement)
    return checkpoint_name(mixed, splash.RESIDUALS)


def _by_kernel(query, key, value, mask, placement):
    key, value, names = _dealt_out(query, key, value, placement)
    options = {"placement": placement, "names": names}
    if mask.kernel != "cudnn":
        options["interpret"] = mask.interpret
    run = KERNELS[mask.kernel].attend
    if mask.causal is None:
        mixed = cudnn.attend_causal(query, key, value, **options)
    else:
        mixed = run(query, key, value, mask.causal, causal=True, **options)
    if mask.bidirectional is None:
        return mixed
    whole = run(query, key, value, mask.within_prompts, causal=False, **options)
    return jnp.where(mask.bidirectional[:, :, None, None], whole, mixed)


def choose(name: str, asked: Asked) -> str:
    """The kernel for an attention: 'xla', 'splash', 'cudnn' or 'triton'.

    Raises:
      UserError: if a kernel is named that cannot run it.
    """
    if name == "xla":
        return name
    if name != "auto":
        reason = KERNELS[name].refusal(asked)
        if reason is not None:
            raise UserError(
                f"DecoderConfig.attention = {name!r} cannot run this: {reason}; "
                "or bind 'auto' or 'xla'"
            )
        return name
    refused = []
    for candidate in PREFERRED.get(asked.platform, ()):
        reason = KERNELS[candidate].refusal(asked)
        if reason is None and asked.length < BLOCK:
            reason = f"rows of {asked.length} tokens are shorter than a block of {BLOCK}"
        if reason is None:
            _say_once(candidate, tuple(refused))
            return candidate
        refused.append(f"not {candidate}: {reason}")
    _say_once("xla", tuple(refused))
    return "xla"


def check_documents(segment_ids: np.ndarray, limit: int | None, where: str) -> None:
    """Raises UserError if a row holds more documents than the program is compiled for.

    Args:
      segment_ids: int `[rows, L]`, 0 on padding.
      limit: `DecoderConfig.max_documents`.
      where: the rows come from, for the message.
    """
    if limit is None:
        return
    begins = np.diff(segment_ids, axis=1, prepend=0) != 0
    most = int(np.max(np.sum(begins & (segment_ids != 0), axis=1), initial=0))
    if most > limit:
        raise UserError(
            f"{where}: a row holds {most} documents, and DecoderConfig.max_documents = {limit}; "
            f"bind at least {most}, or None, which takes a kernel for any number"
        )


def _blocks(length: int, placement: Any) -> int:
    """Parts in which XLA computes a causal attention: more than one on CPUs alone."""
    whole = isinstance(placement, Placement) and placement.parts("length") == 1
    return blocks_of(length) if whole and placement.device.platform == "cpu" else 1


def _documents_in_runs(segment_ids: jax.Array, most: int) -> jax.Array:
    """Bool `[B]`: whether documents stand one behind the other, no more than `most`.

    Ids must not fall, and padding come last: each document is then one run.
    """
    rising = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).max, segment_ids)
    in_order = jnp.all(rising[:, 1:] >= rising[:, :-1], axis=1)
    documents = jnp.sum(cudnn.begins_run(segment_ids) & (segment_ids != 0), axis=1)
    return in_order & (documents <= most)


def _dealt_out(query, key, value, placement):
    """Keys and values with as many heads as can be dealt out as the queries are."""
    kv_heads = "kv_heads"
    fits = key.shape[2] % placement.parts(kv_heads) == 0
    if not fits or placement.spec(("kv_heads",)) != placement.spec(("heads",)):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        kv_heads = "heads"
    return key, value, (QUERIES, ("batch", "keys", kv_heads, None))


@functools.cache
def _say_once(kernel: str, refused: tuple[str, ...]) -> None:
    if refused and jax.process_index() == 0:
        say(f"attention is computed by {kernel}; " + "; ".join(refused))
