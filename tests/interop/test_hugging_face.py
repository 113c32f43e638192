"""Folders of the Llama family: what is read, and what is refused and why."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap
from stacking_jax.interop import hugging_face
from stacking_jax.models import DecoderConfig

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


def _one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_llama_folder(tmp_path, make_folder):
    folder = hugging_face.read(make_folder(tmp_path / "m"))
    assert (folder.family, folder.depth, len(folder.layers)) == ("llama", 4, 4)
    assert set(folder.others) == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    }
    assert hugging_face.decoder_config(folder) == DecoderConfig(
        vocab_size=40, num_layers=4, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2,
        tied_embeddings=False, rope_theta=5000.0, norm_epsilon=1e-5,
    )


@pytest.mark.parametrize(
    "settings, theta",
    [
        ({"rope_theta": 77.0}, 77.0),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 88, "rope_type": "default"}}, 88.0),
        # transformers 5 turns the old way into the new one, which is then the newer.
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 99.0}}, 99.0),
        ({"rope_theta": ..., "rope_scaling": None, "rope_parameters": None}, 10_000.0),
    ],
)
def test_rotary_base_written_the_old_way_and_the_new(tmp_path, make_folder, settings, theta):
    folder = hugging_face.read(make_folder(tmp_path / "m", **settings))
    assert hugging_face.decoder_config(folder).rope_theta == theta


def test_an_explicit_head_width(tmp_path, make_folder):
    folder = hugging_face.read(make_folder(tmp_path / "m", head_dim=6))
    assert hugging_face.decoder_config(folder).head_dim == 6
    assert folder.layers[0]["self_attn.q_proj.weight"].shape == (24, 16)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"architectures": ["Qwen2ForCausalLM"], "biases": QKV}, "no biases on queries"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 4,
          "norms": ("self_attn.q_norm", "self_attn.k_norm")}, "no norms on queries and keys"),
        ({"architectures": ["SmolLM3ForCausalLM"]}, "no layers without rotary positions"),
        ({"attention_bias": True, "biases": (*QKV, "self_attn.o_proj")},
         r"no biases \(attention_bias = true\)"),
        ({"hidden_act": "gelu"}, "no activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
    ],
)
def test_what_our_decoder_cannot_compute_can_be_grown_only(
    tmp_path, make_folder, changes, reason
):
    folder = hugging_face.read(make_folder(tmp_path / "m", **changes))
    with pytest.raises(UserError, match=reason) as caught:
        hugging_face.decoder_config(folder)
    assert "can be grown" in _one_line(caught)


def test_a_window_is_told(tmp_path, make_folder, capsys):
    path = make_folder(tmp_path / "m", architectures=["MistralForCausalLM"], sliding_window=9)
    assert hugging_face.decoder_config(hugging_face.read(path)).num_layers == 4
    assert "attention reaches 9 tokens back" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not known"),
        ({"architectures": ..., "model_type": "gemma"}, "architecture 'gemma' is not known"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not known; known are Llama"),
    ],
)
def test_an_unknown_architecture(tmp_path, make_folder, changes, message):
    path = make_folder(tmp_path / "m", **changes)
    with pytest.raises(UserError, match=message) as caught:
        hugging_face.read(path)
    assert str(path) in _one_line(caught)


def _change_config(path, **changes):
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 5}, r"no tensors model\.layers\.4\.\*, but.*num_hidden_layers = 5"),
        ({"num_hidden_layers": 3}, r"holds the tensors model\.layers\.3\.\*"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be a positive whole number"),
        ({"hidden_size": 32}, r"tensor model\.embed_tokens\.weight has shape \[40, 16\].*40, 32"),
        ({"num_key_value_heads": 4}, r"model\.layers\.0\.self_attn\.k_proj\.weight has shape"),
        ({"attention_bias": True}, r"no tensor model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"vocab_size": 41}, r"embed_tokens\.weight has shape \[40, 16\].*\[41, 16\]"),
    ],
)
def test_tensors_and_configuration_that_do_not_fit(tmp_path, make_folder, changes, message):
    path = make_folder(tmp_path / "m")
    _change_config(path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        hugging_face.read(path)
    assert str(path) in _one_line(caught)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("model.layers.2.mlp.up_proj.weight", None, "no tensor model.layers.2.mlp.up_proj.weight"),
        ("model.layers.2.extra", np.zeros(3), "holds the tensor model.layers.2.extra, but none"),
        ("model.layers.3.mlp.up_proj.weight", np.zeros((3, 3)), r"has shape \[3, 3\], but"),
        ("lm_head.weight", None, "no tensor lm_head.weight"),
        ("model.norm.weight", np.zeros(17), r"model.norm.weight has shape \[17\]"),
    ],
)
def test_a_tensor_that_is_missing_or_of_another_shape(
    tmp_path, make_folder, load_folder, name, values, message
):
    path = make_folder(tmp_path / "m")
    tensors = load_folder(path) | {name: values}
    save_file({n: v for n, v in tensors.items() if v is not None}, path / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        hugging_face.read(path)
    _one_line(caught)


def test_a_folder_without_or_with_a_broken_config(tmp_path, make_folder):
    with pytest.raises(UserError, match="config.json cannot be read: No such file"):
        hugging_face.read(tmp_path)
    path = make_folder(tmp_path / "m")
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is no JSON file"):
        hugging_face.read(path)


# What a grown configuration says


def _grown(tmp_path, make_folder, sources, **changes):
    folder = hugging_face.read(make_folder(tmp_path / "m", **changes))
    return hugging_face.grown_config(folder, DepthMap(sources, stored=4))


def test_grown_lists_follow_the_map(tmp_path, make_folder):
    values = _grown(
        tmp_path, make_folder, [0, 1, 0, 1, 2, 3], architectures=["SmolLM3ForCausalLM"],
        layer_types=["a", "b", "c", "d"], no_rope_layers=[1, 1, 1, 0], eos_token_id=[1, 2, 3, 4],
    )
    assert values["num_hidden_layers"] == 6
    assert values["layer_types"] == ["a", "b", "a", "b", "c", "d"]
    assert values["no_rope_layers"] == [1, 1, 1, 1, 1, 0]
    assert values["eos_token_id"] == [1, 2, 3, 4], "four tokens, by chance as many as layers"
    assert values["rope_theta"] == 5000.0


def test_layers_without_rotary_positions_are_named_where_a_rule_made_them(tmp_path, make_folder):
    values = _grown(
        tmp_path, make_folder, [0, 1, 2, 3, 2, 3], architectures=["SmolLM3ForCausalLM"],
        no_rope_layer_interval=2,
    )
    assert values["no_rope_layers"] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("before, after", [(4, 6), (28, 30), (2, 4), (0, 0)])
def test_the_first_layer_with_a_window(tmp_path, make_folder, before, after):
    values = _grown(
        tmp_path, make_folder, [0, 1, 0, 1, 2, 3], architectures=["Qwen2ForCausalLM"],
        biases=QKV, max_window_layers=before, use_sliding_window=False,
    )
    assert values["max_window_layers"] == after
    assert "layer_types" not in values


def test_windows_stay_with_their_layers(tmp_path, make_folder):
    values = _grown(
        tmp_path, make_folder, [0, 1, 2, 3, 2, 3], architectures=["Qwen2ForCausalLM"],
        biases=QKV, max_window_layers=3, use_sliding_window=True, sliding_window=8,
    )
    full, window = "full_attention", "sliding_attention"
    assert values["layer_types"] == [full, full, full, window, full, window]


def test_a_list_of_another_length_is_refused(tmp_path, make_folder):
    with pytest.raises(UserError, match="layer_types has 3 entries for 4 layers"):
        _grown(tmp_path, make_folder, [0, 1, 2, 3, 3], layer_types=["a"] * 3)
