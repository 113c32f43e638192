"""Our decoder's parameters under the names and in the layout of `LlamaForCausalLM`.

Hugging Face stores a matrix as [out, in], we as [in, out], so matrices are
transposed; the embedding is [vocabulary, stream] in both. Heads and rotary halves
are in the same order, so nothing is permuted.
"""

from __future__ import annotations

from stacking_jax.models import LAYOUT, DecoderConfig

Path = tuple[str, ...]

OUTSIDE: dict[Path, str] = {
    ("embedding",): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}
"""Path of a parameter outside the layers -> name of the tensor."""

LAYER: dict[Path, str] = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "query"): "self_attn.q_proj.weight",
    ("attention", "key"): "self_attn.k_proj.weight",
    ("attention", "value"): "self_attn.v_proj.weight",
    ("attention", "out"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate"): "mlp.gate_proj.weight",
    ("mlp", "up"): "mlp.up_proj.weight",
    ("mlp", "down"): "mlp.down_proj.weight",
}
"""Path of a parameter within a layer -> the rest of the tensor's name."""

STACK: Path = LAYOUT.keys


def is_transposed(path: Path) -> bool:
    return path[-1] not in ("embedding", "scale")


def outside(config: DecoderConfig) -> dict[Path, str]:
    """`OUTSIDE` without the head where the embedding takes its place."""
    return {
        path: name for path, name in OUTSIDE.items()
        if not (config.tied_embeddings and path == ("head",))
    }


def layer_tensor(number: int, rest: str) -> str:
    return f"model.layers.{number}.{rest}"
