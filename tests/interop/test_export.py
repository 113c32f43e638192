"""Our decoder as `LlamaForCausalLM`: names, transposes, dtypes, shards, tokenizers."""

from __future__ import annotations

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.interop import export_params, export_run, hugging_face
from stacking_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=50, num_layers=3, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=6,
    tied_embeddings=False, rope_theta=77.0,
)


@pytest.fixture(scope="module")
def params():
    model = Decoder(CONFIG, depth=2, key=jax.random.key(0))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_names_and_transposes(params, tmp_path, load_folder):
    export_params(params, CONFIG, tmp_path / "out")
    tensors = load_folder(tmp_path / "out")
    layers = params["stack"]["layers"]
    assert len(tensors) == 3 + 2 * 9
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"].T)
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["norm"]["scale"])
    for number in range(2):
        for name, leaf in {
            "self_attn.q_proj": layers["attention"]["query"],
            "self_attn.o_proj": layers["attention"]["out"],
            "mlp.gate_proj": layers["mlp"]["gate"],
            "mlp.up_proj": layers["mlp"]["up"],
            "mlp.down_proj": layers["mlp"]["down"],
        }.items():
            np.testing.assert_array_equal(
                tensors[f"model.layers.{number}.{name}.weight"], leaf[number].T
            )


def test_the_configuration_says_what_was_written(params, tmp_path):
    export_params(params, CONFIG, tmp_path / "out", max_positions=99, eos_id=1)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    # The depth is that of the parameters, not the final one.
    assert (values["num_hidden_layers"], values["head_dim"]) == (2, 6)
    assert (values["max_position_embeddings"], values["eos_token_id"]) == (99, 1)
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 77.0
    folder = hugging_face.read(tmp_path / "out")
    assert hugging_face.decoder_config(folder) == DecoderConfig(
        **{**vars(CONFIG), "num_layers": 2}
    )


def test_bfloat16_rounds_to_the_nearest(params, tmp_path, load_folder):
    export_params(params, CONFIG, tmp_path / "out", dtype="bfloat16")
    tensors = load_folder(tmp_path / "out")
    assert {values.dtype for values in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(
        tensors["lm_head.weight"], np.asarray(params["head"]).T.astype(ml_dtypes.bfloat16)
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_go_into_several_files(params, tmp_path, load_folder):
    export_params(params, CONFIG, tmp_path / "one")
    export_params(params, CONFIG, tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 4000 + 2000 for file in files)
    one, many = load_folder(tmp_path / "one"), load_folder(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


def test_a_run_is_written_from_its_checkpoint(run_dir, run_config, restore, tmp_path, load_folder):
    for step, depth in ((3, 2), (6, 4), (9, 6)):
        export_run(run_dir, tmp_path / f"{depth}", step=step)
        params = restore(run_dir, step).params
        export_params(params, run_config.model, tmp_path / f"{depth}_from_memory")
        ours, theirs = load_folder(tmp_path / f"{depth}"), load_folder(
            tmp_path / f"{depth}_from_memory"
        )
        assert ours.keys() == theirs.keys() and len(ours) == 2 + 9 * depth
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    newest = load_folder(tmp_path / "6")
    export_run(run_dir / "checkpoints" / "9", tmp_path / "by_path")
    assert all(np.array_equal(newest[n], v) for n, v in load_folder(tmp_path / "by_path").items())


def test_the_tokenizer_of_bytes_goes_along(run_dir, tmp_path):
    export_run(run_dir, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (described["tokenizer_class"], described["extra_ids"]) == ("ByT5Tokenizer", 0)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, 1)
    assert values["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": "float16"}, "written as float32 or bfloat16; got 'float16'"),
        ({"step": 5}, "holds no checkpoint of step 5; it has 3, 6, 9"),
        ({"max_shard_size": "big"}, "a size is a number of bytes"),
    ],
)
def test_bad_settings_leave_nothing(run_dir, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        export_run(run_dir, tmp_path / "out", **settings)
    assert os.listdir(tmp_path) == []


def test_no_run_and_an_existing_folder(run_dir, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already and is not written over"):
        export_run(run_dir, tmp_path / "out")


def test_a_parameter_that_is_missing_is_named(params, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, params)
    del broken["stack"]["layers"]["mlp"]["up"]
    with pytest.raises(UserError, match="no parameter stack/layers/mlp/up"):
        export_params(broken, CONFIG, tmp_path / "out")
