"""Which tensors are outputs: patterns, presets, and what is refused."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import PRESETS, Part, Tensors
from stacking_jax.growth.outputs import check_outputs, matches, output_names, resolve, uncovered


def names(*paths: str) -> list[tuple[str, ...]]:
    return [tuple(path.split("/")) for path in paths]


# One layer of each family, and the tensors of it that write into the stream.
LAYERS = {
    "decoder": (
        "attention/query attention/key attention/value attention_norm/scale mlp/gate mlp/up "
        "mlp_norm/scale", "attention/out mlp/down"),
    "t5x": (
        "self_attention/query/kernel encoder_decoder_attention/query/kernel mlp/wi_0/kernel "
        "pre_mlp_layer_norm/scale relpos_bias/rel_embedding",
        "self_attention/out/kernel encoder_decoder_attention/out/kernel mlp/wo/kernel"),
    "maxtext": (
        "self_attention_local/query/kernel self_attention_global/key/kernel mlp_local/wi_0/kernel "
        "pre_self_attention_norm_local/scale post_ffw_norm_global/scale",
        "self_attention_local/out/kernel self_attention_global/out/kernel mlp_local/wo/kernel "
        "mlp_global/wo/kernel"),
    "maxtext, experts": (
        "self_attention/query/kernel DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel "
        "DeepSeekMoeBlock_0/MoeBlock_0/wi_0 DeepSeekMoeBlock_0/shared_experts/wi_0/kernel",
        "self_attention/out/kernel DeepSeekMoeBlock_0/MoeBlock_0/wo "
        "DeepSeekMoeBlock_0/shared_experts/wo/kernel"),
    "gemma": (
        "attn/q_einsum/w attn/kv_einsum/w attn/_query_norm/scale mlp/gating_einsum/w "
        "post_attention_norm/scale post_ffw_norm/scale", "attn/attn_vec_einsum/w mlp/linear/w"),
    "gpt2": (
        "ln_1/scale attn/c_attn/kernel attn/c_attn/bias mlp/c_fc/kernel",
        "attn/c_proj/kernel attn/c_proj/bias mlp/c_proj/kernel mlp/c_proj/bias"),
    "llama": (
        "self_attn/q_proj/kernel self_attn/q_norm/scale input_layernorm/weight mlp/up_proj/kernel",
        "self_attn/o_proj/kernel mlp/down_proj/kernel"),
    "llama, EasyLM": (
        "attention/wq/kernel attention_norm/kernel feed_forward/w1/kernel ffn_norm/kernel",
        "attention/wo/kernel feed_forward/w2/kernel"),
    "llama, experts": (
        "self_attn/q_proj/kernel mlp/gate/kernel mlp/experts/0/up_proj/kernel",
        "self_attn/o_proj/kernel mlp/experts/0/down_proj/kernel mlp/experts/11/down_proj/kernel"),
    "llama, joined names": (
        "self_attn.q_proj.weight input_layernorm.weight mlp.up_proj.weight",
        "self_attn.o_proj.weight mlp.down_proj.weight"),
    "vit": (
        "LayerNorm_0/scale MultiHeadDotProductAttention_0/query/bias MlpBlock_0/Dense_0/kernel",
        "MultiHeadDotProductAttention_0/out/kernel MultiHeadDotProductAttention_0/out/bias "
        "MlpBlock_0/Dense_1/kernel MlpBlock_0/Dense_1/bias"),
    "vit, Hugging Face": (
        "attention/attention/query/kernel intermediate/dense/kernel layernorm_before/scale",
        "attention/output/dense/kernel output/dense/kernel"),
}


@pytest.mark.parametrize("family", LAYERS)
def test_presets_name_what_writes_into_the_stream(family):
    others, outputs = (names(*part.split()) for part in LAYERS[family])
    for given in (family.split(",")[0], None):
        tensors = resolve(given, [*others, *outputs])
        assert sorted(output_names(tensors, [*others, *outputs])) == sorted(outputs)
        check_outputs(tensors, [*others, *outputs])


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        ("attention/out", "attention/out", True),
        ("attention/out", "attention/out/kernel", True),
        ("attention/out", "block/attention/out/bias", True),
        ("attention/out", "attention/output", False),
        ("attention/out", "attention/norm/out", False),
        ("*attention/out", "encoder_decoder_attention/out/kernel", True),
        ("/output/dense", "output/dense/kernel", True),
        ("/output/dense", "attention/output/dense/kernel", False),
        ("experts/*/w2", "moe/experts/7/w2/kernel", True),
        ("mlp/wo", "mlp", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(tuple(name.split("/")), pattern) is expected


def test_a_branch_that_nobody_declared_is_found():
    tensors = PRESETS["decoder"]
    layer = names("attention/query", "attention/out", "cross_attention/out", "mlp/down", "ln/w")
    assert uncovered(tensors, layer) == [("cross_attention",)]
    with pytest.raises(UserError, match="cross_attention looks like a branch of its own"):
        check_outputs(tensors, layer)
    with pytest.raises(UserError, match="no tensor of a layer matches the MLP outputs mlp/down"):
        check_outputs(tensors, names("attention/out"))


def test_unknown_and_ambiguous_layers_are_refused():
    with pytest.raises(UserError, match="no preset knows the outputs of a layer with a/w, b/w"):
        resolve(None, names("b/w", "a/w"))
    with pytest.raises(UserError, match="there is no preset 'bloom'.*choose from decoder, t5x"):
        resolve("bloom", names("a/w"))
    both = names("attention/out", "mlp/down", "attention/wo", "mlp/down_proj")
    with pytest.raises(UserError, match="disagree about the outputs"):
        resolve(None, both)
    own = Tensors({"all": ("a",)})
    assert resolve(own, both) is own


def test_parts_of_fused_tensors():
    assert Part("c_attn", 0, 2 / 3).span((768, 2304)) == (-1, 0, 1536)
    assert Part("c_attn", 0, 2 / 3).span((2304, 768)) == (-2, 0, 1536)
    assert Part("c_attn", 0, 2 / 3).span((2304,)) == (-1, 0, 1536)
    assert Part("kv_einsum", 0, 1 / 2, axis=-4).span((2, 4, 64, 16)) == (-4, 0, 1)
