"""Hugging Face folders as parameters and as runs of ours."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from stacking_jax.errors import UserError
from stacking_jax.interop import export_params, export_run, import_folder, import_params
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import GrowthConfig, OptimizerConfig, train
from stacking_jax.training.generation import sample_from_run
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import initial_state


def _assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in jax.tree_util.tree_flatten_with_path(a)[0]:
        other = b
        for key in path:
            other = other[key.key]
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


@pytest.mark.parametrize("step", [3, 6, 9])
def test_export_and_import_give_the_same_bits(run_dir, restore, tmp_path, step):
    export_run(run_dir, tmp_path / "hf", step=step, max_shard_size="20KB")
    params, config = import_params(tmp_path / "hf")
    _assert_same_trees(params, restore(run_dir, step).params)
    assert config.num_layers == 2 * step // 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_float_is_read_as_float32(tmp_path, make_folder, load_folder, dtype):
    folder = make_folder(tmp_path / "m", dtype=dtype, head_dim=6)
    params, config = import_params(folder)
    tensors = load_folder(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["stack"]["layers"]["attention"]["key"][3],
        tensors["model.layers.3.self_attn.k_proj.weight"].astype(np.float32).T,
    )
    np.testing.assert_array_equal(
        params["head"], tensors["lm_head.weight"].astype(np.float32).T
    )
    assert (config.head_dim, config.num_kv_heads) == (6, 2)


def test_a_folder_becomes_a_run_that_generates_and_exports(
    run_dir, restore, tmp_path, load_folder, snapshot_of
):
    export_run(run_dir, tmp_path / "hf")
    before = snapshot_of(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    assert snapshot_of(tmp_path / "hf") == before
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"]
    _assert_same_trees(restore(tmp_path / "run", 0).params, restore(run_dir, 9).params)
    said = sample_from_run(tmp_path / "run", "abc", max_new_tokens=5, temperature=0.0)
    assert said == sample_from_run(run_dir, "abc", max_new_tokens=5, temperature=0.0)
    export_run(tmp_path / "run", tmp_path / "again")
    one, again = load_folder(tmp_path / "hf"), load_folder(tmp_path / "again")
    assert one.keys() == again.keys()
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert (tmp_path / "again" / "tokenizer_config.json").read_text() == (
        tmp_path / "hf" / "tokenizer_config.json"
    ).read_text()


def test_foreign_settings_and_files_survive_the_round_trip(tmp_path, make_folder):
    source = make_folder(
        tmp_path / "m", bos_token_id=7, eos_token_id=[8, 9], max_position_embeddings=321
    )
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("weights of another kind")
    import_folder(source, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (7, [8, 9])
    assert (values["max_position_embeddings"], values["model_type"]) == (321, "llama")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_training_goes_on_from_an_import(run_dir, run_config, restore, tmp_path):
    """As the beginning of a run that grows further, with a fresh optimiser."""
    export_run(run_dir, tmp_path / "hf", step=3)
    digest = json.loads((run_dir / "config.json").read_text())["data_digest"]
    config = dataclasses.replace(
        run_config, total_steps=2,
        model=dataclasses.replace(run_config.model, num_layers=4),
        growth=GrowthConfig(operator="midas", num_stages=2, alpha=0.0),
    )
    import_folder(tmp_path / "hf", tmp_path / "run", config=config, data_digest=digest)
    state = restore(tmp_path / "run", 0)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((state.step, state.opt_state)))
    fresh = jax.eval_shape(
        lambda: initial_state(config.model, optimizer(config.optimizer, LAYOUT), 2, 0)
    )
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    summary = train(config, tmp_path / "run")
    assert (summary["final_step"], summary["depth"], summary["growths"]) == (2, 4, [1])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimisers_begin_with_zeros(run_config, name):
    """What `import_folder` writes for them."""
    made = optimizer(OptimizerConfig(name=name, weight_decay=0.1), LAYOUT)
    state = initial_state(run_config.model, made, 2, 0)
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"d_ff": 32}}, "d_ff: 32, there 48"),
        ({"model": {"rope_theta": 1e4}}, "rope_theta: 10000.0, there 5000.0"),
        ({"model": {"num_kv_heads": None}}, "kv_heads: 4, there 2"),
        ({"growth": {"num_stages": 2}}, "has 2 layers, but the run begins with 3"),
    ],
)
def test_a_run_of_another_model_is_refused(run_dir, run_config, tmp_path, changes, message):
    export_run(run_dir, tmp_path / "hf", step=3)
    changed = {
        part: dataclasses.replace(getattr(run_config, part), **values)
        for part, values in changes.items()
    }
    with pytest.raises(UserError, match=message):
        import_folder(
            tmp_path / "hf", tmp_path / "out", config=dataclasses.replace(run_config, **changed)
        )
    assert os.listdir(tmp_path) == ["hf"]


def test_a_tensor_without_a_place_is_refused(tmp_path, make_folder, load_folder):
    folder = make_folder(tmp_path / "m")
    tensors = load_folder(folder)
    save_file(tensors | {"model.extra.weight": np.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="the tensor model.extra.weight, for which our decoder"):
        import_folder(folder, tmp_path / "out")


def test_what_old_files_hold_beside_is_left_out(tmp_path, make_folder, load_folder):
    folder = make_folder(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_folder(folder)
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    import_folder(folder, tmp_path / "run")
    params, config = import_params(folder)
    assert config.tied_embeddings and "head" not in params


def test_whole_numbers_are_no_weights(tmp_path, make_folder, load_folder):
    folder = make_folder(tmp_path / "m")
    tensors = load_folder(folder)
    tensors["model.norm.weight"] = np.ones(16, np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight holds I8, no floats"):
        import_folder(folder, tmp_path / "run")
    assert os.listdir(tmp_path) == ["m"]


def test_an_unknown_vocabulary_is_told_and_not_guessed(tmp_path, make_folder, capsys):
    folder = make_folder(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    import_folder(folder, tmp_path / "run")
    assert "no vocabulary that our data can use" in capsys.readouterr().err
    with pytest.raises(UserError, match="vocabulary file .*tokenizer.json does not exist"):
        sample_from_run(tmp_path / "run", "abc")


def test_parameters_in_memory_make_the_round_trip(tmp_path, make_folder):
    params, config = import_params(make_folder(tmp_path / "m"))
    export_params(params, config, tmp_path / "out")
    again, same = import_params(tmp_path / "out")
    _assert_same_trees(params, again)
    assert config == same == DecoderConfig(**vars(config))
