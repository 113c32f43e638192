"""grow, export, import and train without a gin file, as a person meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stacking_jax import cli
from stacking_jax.interop import stored_depth
from stacking_jax.training.run_directory import read_config

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refusal(run):
    def call(*argv) -> str:
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("error: ")

    return call


def test_a_folder_is_grown_by_name_of_an_operator(run, tmp_path, make_folder, load_folder):
    source = make_folder(tmp_path / "m")
    code, out, _ = run("grow", source, "out", "--operator", "midas", "--block", 2, "--to", 8,
                       "--init", "identity")
    assert (code, out) == (0, "grown: out\n")
    assert stored_depth("out") == 8
    before, after = load_folder(source), load_folder(tmp_path / "out")
    # 0 1 2 3 -> 0 1 0 1 2 3 -> 0 1 0 1 0 1 2 3: of three blocks, the second is duplicated.
    for number, source_layer in enumerate([0, 1, 0, 1, 0, 1, 2, 3]):
        for name in ("mlp.up_proj.weight", "mlp.down_proj.weight"):
            expected = before[f"model.layers.{source_layer}.{name}"]
            if name.startswith("mlp.down") and 2 <= number < 6:
                expected = np.zeros_like(expected)
            np.testing.assert_array_equal(after[f"model.layers.{number}.{name}"], expected)


@pytest.mark.parametrize(
    "arguments, depth",
    [
        (["--map", "0 1, 2 3 3"], 5),
        (["--operator", "gradstack", "--to", "6", "--keep_last", "1"], 6),
        (["--operator", "lidas", "--to", "6", "--block", "2", "--option", "reading=literal"], 6),
        (["--operator", "random_block", "--to", "6", "--block", "2", "--option", "seed=3"], 6),
        (["--operator", "drop_last", "--to", "3"], 3),
    ],
)
def test_other_ways_to_say_the_map(run, tmp_path, make_folder, arguments, depth):
    source = make_folder(tmp_path / "m")
    code, _, err = run("grow", source, "out", *arguments)
    assert code == 0, err
    assert stored_depth("out") == depth


def test_a_run_is_grown_trained_on_exported_and_imported(run, run_dir, tmp_path, load_folder):
    code, _, err = run("grow", run_dir, "deep", "--operator", "midas", "--to", 6, "--step", 6,
                       "--moments", "reset_copies", "--total_steps", 7)
    assert code == 0, err
    assert read_config("deep").growth.stage_depths == [2, 4, 6]
    code, out, err = run("train", "--run_dir", "deep")
    assert code == 0, err
    assert "deep: step 7" in out
    summary = json.loads((tmp_path / "deep" / "summary.json").read_text())
    assert (summary["depth"], summary["growths"]) == (6, [3, 6])
    assert run("export", "deep", "hf", "--dtype", "bfloat16", "--max_shard_size", "20KB")[0] == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert run("import", "hf", "back")[0] == 0
    code, out, err = run("generate", "--run_dir", "back", "--prompt", "ab", "--max_new_tokens", 3)
    assert code == 0 and out.startswith("ab")


def test_an_import_is_the_beginning_of_a_run_in_gin(run, run_dir, tmp_path):
    config = read_config(run_dir)
    model = config.model
    (tmp_path / "mine.gin").write_text(f"""
include 'gin/experiments/demo.gin'
DecoderConfig.vocab_size = {model.vocab_size}
DecoderConfig.num_layers = 4
DecoderConfig.d_model = {model.d_model}
DecoderConfig.d_ff = {model.d_ff}
DecoderConfig.num_heads = {model.num_heads}
DecoderConfig.num_kv_heads = {model.num_kv_heads}
DecoderConfig.rope_theta = {model.rope_theta}
NUM_STAGES = 2
TRAIN_STEPS = 4
SEQUENCE_LENGTH = 64
TEXT_DIR = '{config.data.text_dir}'
DataConfig.held_out = 0.2
""")
    assert run("export", run_dir, "hf", "--step", 3)[0] == 0
    code, _, err = run("import", "hf", "out", "--gin_file", "mine.gin")
    assert code == 0, err
    code, out, err = run("train", "--gin_file", "mine.gin", "--run_dir", "out", "--stop_at", 1)
    assert code == 0, err
    assert "going on from checkpoint 0 of" in err and "(2 layers)" in err
    assert "stopped at step 1" in err


@pytest.mark.parametrize(
    "argv, part",
    [
        (["grow", "m", "out"], "name an operator and the depth to reach"),
        (["grow", "m", "out", "--operator", "midas"], "name an operator and the depth"),
        (["grow", "m", "out", "--operator", "mides", "--to", "6"], "did you mean midas"),
        (["grow", "m", "out", "--operator", "midas", "--to", "7", "--block", "2"], "7"),
        (["grow", "m", "out", "--operator", "inherit_first", "--to", "6", "--option", "k=4"],
         "without a source"),
        (["grow", "m", "out", "--map", "0 x"], "--map holds numbers of layers"),
        (["grow", "m", "out", "--map", "0 9"], "names layer 9"),
        (["grow", "m", "out", "--map", "0 1", "--to", "2"], "there is no --to beside it"),
        (["grow", "m", "out", "--operator", "lidas", "--to", "6", "--option", "x"], "NAME=VALUE"),
        (["grow", "m", "m", "--map", "0 1"], "exists already and is not written over"),
        (["grow", "nowhere", "out", "--map", "0 1"], "nowhere/config.json cannot be read"),
        (["grow", "m", "out", "--map", "0 1", "--gin.SEED=3"], "grow takes no --gin bindings"),
        (["export", "m", "out"], "cannot be read by this version"),
        (["export", "nowhere", "out"], "holds no run"),
        (["import", "nowhere", "out"], "nowhere/config.json cannot be read"),
        (["import", "m", "out", "--gin.SEED=3"], "name it with --gin_file"),
        (["train", "--run_dir", "nowhere"], "holds no run to go on with"),
        (["train", "--run_dir", "m", "--gin.SEED=3"], "name it with --gin_file"),
        (["train", "--run_dir", "m"], "cannot be read by this version"),
    ],
)
def test_mistakes_are_one_line(refusal, tmp_path, make_folder, argv, part):
    make_folder(tmp_path / "m")
    assert part in refusal(*argv)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("module", ["stacking_jax.interop"])
def test_importing_pulls_in_nothing_foreign(module):
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "safetensors", "gin", "tensorflow", "seqio"}
