"""The shape of a decoder, and what it costs."""

from __future__ import annotations

import dataclasses

from stacking_jax.errors import UserError
from stacking_jax.growth import ModelCosts

DTYPES = ("float32", "bfloat16")
STACK_MODES = ("auto", "scan", "unroll")
REMAT_POLICIES = ("none", "dots", "minimal", "full", "offload")
LOSS_MODES = ("auto", "whole", "chunked")
ATTENTIONS = ("auto", "xla", "splash", "cudnn", "triton")
HOW_COMPUTED = (
    "stack", "scan_unroll", "remat", "loss", "loss_chunk", "attention", "max_documents",
)
"""Settings that change how the model is computed, and not what: of no account to a result."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder that Hugging Face's Llama classes can read.

    Attributes:
      vocab_size: rows of the embedding, V.
      num_layers: the *final* depth. Growth stores fewer layers on the way; the
        depth at hand is an argument of whatever builds or runs the model.
      d_model: width of the residual stream, D.
      d_ff: inner width of the gated MLP (three matrices), F.
      num_heads: query heads, H.
      num_kv_heads: key and value heads, K; None for as many as query heads.
      head_dim: width of one head; None for D / H.
      tied_embeddings: whether the head is the embedding, transposed.
      rope_theta: base of the rotary position embedding.
      norm_epsilon: added to the mean square in RMSNorm.
      dtype: of the computation, 'float32' or 'bfloat16'; parameters are float32.
      stack: 'scan' (flat compile time), 'unroll' (faster on CPU), or 'auto':
        unroll on CPU up to 24 layers, scan elsewhere.
      scan_unroll: layers that one turn of a scan runs; 1 compiles fastest.
      remat: what a layer keeps for its backward pass: 'none' (rematerialises
        nothing), 'dots' (keeps matrix products), 'minimal' (keeps its input, what attention
        reads and gives, and the stream behind it), 'full' (keeps its input only),
        'offload' (keeps on the device nothing: what 'minimal' does, in the host's memory).
      loss: 'whole' (the logits of all tokens at once), 'chunked' (those of a few thousand
        tokens at a time, see `head_loss`), or 'auto': chunked where the float32 logits
        of a device would take more than `head_loss.LOGIT_BYTES`.
      loss_chunk: tokens of a device in a chunk; None for as many as have logits of
        `LOGIT_BYTES`.
      bidirectional_prompts: whether the tokens of a prompt see each other, in
        training (prefix LM, span corruption) and at evaluation alike. Plain causal
        data have no prompts and run the same program. Off by default, since the
        Llama classes that read an exported model are causal.
      attention: the kernel in training: 'auto' (by the platform that the program is
        compiled for), 'xla', 'splash' (TPU), 'cudnn' or 'triton' (NVIDIA); see
        docs/attention.md. Decoding is XLA's.
      max_documents: the most documents that a row of the data holds, which cuDNN's
        program is compiled for; a row with more is refused. None where it is not known.

    Raises:
      UserError: where the sizes do not fit together.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    tied_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    dtype: str = "float32"
    stack: str = "auto"
    scan_unroll: int = 1
    remat: str = "none"
    loss: str = "auto"
    loss_chunk: int | None = None
    bidirectional_prompts: bool = False
    attention: str = "auto"
    max_documents: int | None = None

    def __post_init__(self):
        optional = ("num_kv_heads", "head_dim", "loss_chunk", "max_documents")
        needed = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "scan_unroll")
        for name in (*needed, *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"DecoderConfig.{name} must be a positive whole number; got {value!r}"
                )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise UserError(
                f"{self.num_heads} heads do not divide a width of {self.d_model}; change num_heads "
                "or d_model, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"{self.kv_heads} key/value heads do not divide {self.num_heads} query heads"
            )
        if self.head_width % 2:
            raise UserError(
                f"rotary embeddings turn pairs: a head width of {self.head_width} must be even"
            )
        for name in ("rope_theta", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"DecoderConfig.{name} must be positive; got {getattr(self, name)!r}"
                )
        for name, known in (
            ("dtype", DTYPES), ("stack", STACK_MODES), ("remat", REMAT_POLICIES),
            ("loss", LOSS_MODES), ("attention", ATTENTIONS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"DecoderConfig.{name} is one of {', '.join(known)}; got {value!r}"
                )

        if not isinstance(self.bidirectional_prompts, bool):
            raise UserError(
                "DecoderConfig.bidirectional_prompts is True or False; got "
                f"{self.bidirectional_prompts!r}"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    def costs(self, sequence_length: int) -> ModelCosts:
        """Parameters and FLOPs of a layer and of the rest, attention in full."""
        queries = self.num_heads * self.head_width
        keys = self.kv_heads * self.head_width
        matrices = self.d_model * (2 * queries + 2 * keys) + 3 * self.d_model * self.d_ff
        embedding = self.vocab_size * self.d_model
        return ModelCosts(
            layer_params=matrices + 2 * self.d_model,
            other_params=embedding * (1 if self.tied_embeddings else 2) + self.d_model,
            layer_flops=2.0 * matrices,
            attention_flops=4.0 * sequence_length * queries,
            head_flops=2.0 * embedding,
        )
