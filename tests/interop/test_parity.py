"""`transformers` computes from exported and grown folders what we compute.

Needs torch and transformers (launch/parity.sh); they run in a process of their own,
once for all folders.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.data.vocabularies import Bytes
from stacking_jax.evaluation.model import RunModels
from stacking_jax.growth import DepthMap, gradstack, midas
from stacking_jax.interop import export_params, export_run, grow_folder, import_params
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.training import GrowthConfig, train
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.state import model_graph

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([f"{sys.prefix}/parity", os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
}
STEPS = {"run_2": 3, "run_4": 6, "run_6": 9}
LOOPS = {
    "run_looped": LoopConfig(loops=3),
    "run_middle_looped": LoopConfig(loops=2, first=1, last=1),
}
SHAPES = {
    "untied": DecoderConfig(
        vocab_size=264, num_layers=3, d_model=32, d_ff=48, num_heads=4, tied_embeddings=False,
        norm_epsilon=1e-5,
    ),
    "grouped": DecoderConfig(
        vocab_size=264, num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
        head_dim=10, rope_theta=500.0,
    ),
    "one_key_head": DecoderConfig(
        vocab_size=264, num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=1,
        tied_embeddings=False, rope_theta=1e6,
    ),
}
FAMILIES = {
    "mistral": dict(architectures=["MistralForCausalLM"], model_type="mistral"),
    "qwen2": dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2",
        biases=tuple(f"self_attn.{name}_proj" for name in "qkv"), max_window_layers=4,
    ),
    "qwen3": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=6,
        norms=("self_attn.q_norm", "self_attn.k_norm"), layer_types=["full_attention"] * 4,
    ),
    "smollm3": dict(
        architectures=["SmolLM3ForCausalLM"], model_type="smollm3",
        no_rope_layers=[1, 0, 1, 1], layer_types=["full_attention"] * 4, pad_token_id=0,
    ),
    "biased_llama": dict(
        attention_bias=True, mlp_bias=True,
        biases=tuple(f"self_attn.{name}_proj" for name in "qkvo")
        + tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    "new_rope": dict(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 33.0}),
    "old_rope": dict(rope_theta=33.0, rope_scaling=None),
}


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, (2, 17))


@pytest.fixture(scope="module")
def looped_runs(run_config, tmp_path_factory) -> dict[str, Path]:
    """Two stored layers run three times; and four, of which the middle two run twice."""
    plain = dataclasses.replace(run_config, growth=GrowthConfig(), total_steps=3)
    root = tmp_path_factory.mktemp("looped_runs")
    for name, loops in LOOPS.items():
        train(dataclasses.replace(plain, loops=loops), root / name)
    return {name: root / name for name in LOOPS}


@pytest.fixture(scope="module")
def folders(run_dir, make_folder, tmp_path_factory, request) -> Path:
    """Everything that `transformers` is to read, under one roof."""
    found = subprocess.run(
        [sys.executable, "-c", "import torch, transformers"], env=ENVIRONMENT,
        capture_output=True, text=True,
    )
    if found.returncode != 0:
        reason = found.stderr.strip().splitlines()[-1]
        pytest.skip(f"torch and transformers cannot be used ({reason}): bash launch/parity.sh")
    root = tmp_path_factory.mktemp("parity")
    for name, step in STEPS.items():
        export_run(run_dir, root / name, step=step, max_shard_size="30KB")
    # Asked for here, so that nothing is trained where the tests are skipped.
    for name, looped in request.getfixturevalue("looped_runs").items():
        export_run(looped, root / name)
    for name, config in SHAPES.items():
        model = Decoder(config, key=jax.random.key(1))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        export_params(params, config, root / name)
    # As an older transformers reads it, which knows no rope_parameters.
    export_run(run_dir, root / "old_style", step=3)
    old = root / "old_style" / "config.json"
    values = json.loads(old.read_text())
    del values["rope_parameters"]
    old.write_text(json.dumps(values))
    for name, changes in FAMILIES.items():
        folder = make_folder(root / name, vocab_size=264, **changes)
        grow_folder(folder, root / f"{name}_identity", gradstack(4, block=2), init="identity")
    grow_folder(root / "run_4", root / "run_4_midas", midas(4, block=2), init="identity")
    grow_folder(root / "run_4", root / "run_4_copied", DepthMap([0, 1, 0, 1, 2, 3, 3]))
    return root


@pytest.fixture(scope="module")
def theirs(folders, tokens, tmp_path_factory) -> dict[str, np.ndarray]:
    work = tmp_path_factory.mktemp("logits")
    np.save(work / "tokens.npy", tokens)
    done = subprocess.run(
        [
            sys.executable, Path(__file__).with_name("transformers_logits.py"),
            work / "tokens.npy", work / "out.npz", *sorted(folders.iterdir()),
        ],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(work / "out.npz") as file:
        return dict(file)


def _ours(params, config: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    model = nnx.merge(model_graph(config), jax.tree.map(jnp.asarray, params))
    return np.asarray(model(jnp.asarray(tokens, jnp.int32)))


def _assert_close(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(a).max())


@pytest.mark.parametrize("name", STEPS)
def test_every_stage_of_a_run(run_dir, run_config, restore, theirs, tokens, name):
    params = restore(run_dir, STEPS[name]).params
    ours = _ours(params, run_config.model, tokens)
    _assert_close(ours, theirs[name])
    assert theirs[f"{name}.class"] == "LlamaForCausalLM"
    assert theirs[f"{name}.depth"] == int(name[-1])
    # The agreement means something: the stages, and another rotary base, give other logits.
    assert np.abs(theirs[name] - theirs["untied"]).max() > 0.1


@pytest.mark.parametrize("name", LOOPS)
def test_a_looped_model_has_its_layers_as_often_as_they_run(theirs, looped_runs, tokens, name):
    model = RunModels(looped_runs[name]).load(3)
    decoder = nnx.merge(model.graph, model.params)
    _assert_close(np.asarray(decoder(jnp.asarray(tokens, jnp.int32), **model.runs)), theirs[name])
    assert theirs[f"{name}.depth"] == 6
    # The agreement means something: what is stored, run once, gives other logits.
    once = np.asarray(decoder(jnp.asarray(tokens, jnp.int32)))
    assert np.abs(theirs[name] - once).max() > 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_our_decoder(theirs, tokens, name):
    model = Decoder(SHAPES[name], key=jax.random.key(1))
    _assert_close(np.asarray(model(jnp.asarray(tokens, jnp.int32))), theirs[name])


def test_a_configuration_of_the_old_style_alone(theirs):
    np.testing.assert_array_equal(theirs["old_style"], theirs["run_2"])


@pytest.mark.parametrize("name", ["mistral", "new_rope", "old_rope"])
def test_foreign_models_compute_the_same_here(folders, theirs, tokens, name):
    params, config = import_params(folders / name)
    _assert_close(_ours(params, config, tokens), theirs[name])


def test_both_ways_to_write_the_rotary_base_mean_the_same(theirs):
    np.testing.assert_array_equal(theirs["new_rope"], theirs["old_rope"])
    assert np.abs(theirs["new_rope"] - theirs["mistral"]).max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_growing_with_silent_copies_changes_nothing(theirs, name):
    """In every family, biases of the output projections included; to the last bit."""
    assert theirs[f"{name}_identity.depth"] == theirs[f"{name}.depth"] + 2
    np.testing.assert_array_equal(theirs[name], theirs[f"{name}_identity"])


def test_grown_folders_compute_what_grown_parameters_do(folders, theirs, tokens):
    np.testing.assert_array_equal(theirs["run_4"], theirs["run_4_midas"])
    params, config = import_params(folders / "run_4")
    stack = params["stack"]
    stack["layers"] = jax.tree.map(lambda leaf: leaf[[0, 1, 0, 1, 2, 3, 3]], stack["layers"])
    _assert_close(_ours(params, config, tokens), theirs["run_4_copied"])
    assert np.abs(theirs["run_4"] - theirs["run_4_copied"]).max() > 1e-3


@pytest.mark.parametrize("name", [*STEPS, *LOOPS])
def test_the_tokenizer_gives_our_ids(theirs, name):
    assert theirs[f"{name}.ids"].tolist() == [*Bytes().encode("A byte: é"), Bytes.eos_id]
