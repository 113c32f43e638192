"""Whole runs: UL2 on a mixture, a task with prompts from a package of the user's own."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from stacking_jax.analysis.diagnose import diagnose
from stacking_jax.data import DataConfig, UL2Config, mode_ids, open_cache, tokenizer
from stacking_jax.errors import UserError
from stacking_jax.evaluation.model import RunModels
from stacking_jax.evaluation.scoring import likelihoods
from stacking_jax.interop import export_run
from stacking_jax.training import MeshConfig, Stopped, sharding, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.generation import sample_from_run
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.run_directory import read_config
from stacking_jax.training.state import abstract_params, model_graph

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RATES = {"web": 3, "code": 1}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpora")
    dice = random.Random(0)
    for name, words in (("web", "one two three four"), ("code", "def return ( ) = + x")):
        rows = (" ".join(dice.choices(words.split(), k=60)) for _ in range(80))
        (place / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": row}) for row in rows)
        )
    return place


@pytest.fixture(scope="module")
def ul2_config(config, change, corpora):
    return change(
        config,
        model={"vocab_size": 384, "num_layers": 2, "bidirectional_prompts": True},
        growth={"num_stages": 2},
        data=DataConfig(
            text_dir=str(corpora), mixture=RATES, objective="ul2", extra_ids=60,
            sequence_length=64, held_out=0.1,
        ),
        total_steps=4, eval_every=2, eval_batches=2,
    )


@pytest.fixture(scope="module")
def run(ul2_config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("ul2") / "run"
    train(ul2_config, run_dir)
    return run_dir


def test_losses_are_causal_by_source_and_ul2_by_objective(run, read_rows, read_summary):
    summary = read_summary(run)
    assert summary["eval_loss"] == pytest.approx(
        (3 * summary["eval_loss/web"] + summary["eval_loss/code"]) / 4
    )
    assert summary["ul2_loss/causal"] == summary["eval_loss"]
    parts = [summary[f"ul2_loss/{name}"] for name in ("causal", "prefix", "span")]
    assert min(parts) <= summary["ul2_loss"] <= max(parts) and len(set(parts)) == 3
    shares = summary["data"]["share_of_loss_tokens"]
    weighted = sum(shares[name] * summary[f"ul2_loss/{name}"] for name in shares)
    assert summary["ul2_loss"] == pytest.approx(weighted)
    names = {"eval_loss", "bits_per_byte", "ul2_loss"}
    names |= {f"{what}/{source}" for what in ("eval_loss", "bits_per_byte") for source in RATES}
    names |= {f"ul2_loss/{name}" for name in shares}
    for row in read_rows(run, "eval"):
        assert names <= set(row) and all(math.isfinite(row[name]) for name in names)


def test_the_summary_says_how_often_a_source_is_read_and_who_carries_loss(run, read_summary):
    about = read_summary(run)["data"]
    assert list(about["epochs"]) == list(RATES)
    text, loss = about["share_of_chunk_tokens"], about["share_of_loss_tokens"]
    for name, share in UL2Config().shares.items():
        assert text[name] == pytest.approx(share, abs=0.02)
    assert loss["causal"] > 0.7 and loss["span"] < 0.12
    assert sum(loss.values()) == pytest.approx(1)
    assert json.loads((run / "config.json").read_text())["data"] == about


def test_tokens_count_those_that_carry_loss(run, read_summary, ul2_config):
    summary = read_summary(run)
    positions = ul2_config.total_steps * ul2_config.tokens_per_step
    assert 0.5 * positions < summary["tokens"] < 0.9 * positions


def test_a_run_goes_on_where_it_stopped(run, ul2_config, tmp_path, read_summary):
    with pytest.raises(Stopped):
        train(ul2_config, tmp_path / "two", stop_at=2)
    train(ul2_config, tmp_path / "two")
    assert read_summary(tmp_path / "two")["params_digest"] == read_summary(run)["params_digest"]


def test_the_configuration_reads_back_from_the_run(run, ul2_config):
    assert read_config(run) == ul2_config


def test_the_held_out_digest_knows_sources_and_rows(ul2_config, change):
    cache = open_cache(ul2_config.data)
    held_out = HeldOut.open(cache, ul2_config)
    assert [(part.objective, part.source) for part in held_out.parts] == [
        (objective, source) for objective in ("causal", "prefix", "span") for source in RATES
    ]
    one = HeldOut.open(cache, change(ul2_config, eval_batches=1))
    assert one.digest != held_out.digest
    rates = change(ul2_config, data={"mixture": {"web": 1, "code": 1}})
    other = open_cache(rates.data)
    assert HeldOut.open(other, rates).digest == held_out.digest  # the same rows ..
    assert other.manifest.digest != cache.manifest.digest  # .. of other training data


def test_a_single_causal_source_has_the_keys_it_always_had(reference, read_rows, read_summary):
    rows = read_rows(reference, "eval")
    scores = {key for row in rows for key in row if "loss" in key or "bits" in key}
    assert scores == {"eval_loss", "bits_per_byte"}
    assert "data" not in read_summary(reference)


PACKAGE = '''
import seqio
import tensorflow as tf

def rows(split, shuffle_files=False):
    numbers = range(40) if split == "train" else range(40, 50)
    return tf.data.Dataset.from_tensor_slices({
        "inputs": [f"twice {n} is" for n in numbers],
        "targets": [f" {2 * n}" for n in numbers],
    })

feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
seqio.TaskRegistry.add(
    "twice",
    source=seqio.FunctionDataSource(rows, splits=("train", "validation")),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={"inputs": feature, "targets": feature},
)
seqio.MixtureRegistry.add("twice_alone", ["twice"], default_rate=1.0)
'''

GIN = """
include 'gin/train.gin'
include 'gin/models/tiny.gin'
TRAIN_STEPS = 2
BATCH_SIZE = 2
SEQUENCE_LENGTH = 64
DataConfig.task = %TASK
DecoderConfig.num_layers = 2
DecoderConfig.d_model = 16
DecoderConfig.d_ff = 16
DecoderConfig.bidirectional_prompts = True
TrainConfig.compilation_cache = ''
TASK = 'twice'
"""


def command(folder, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1",
        "STACKING_JAX_CACHE": str(folder / "caches"), "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.run(
        [sys.executable, "-m", "stacking_jax", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )


def test_a_task_of_a_package_elsewhere_trains_by_name(tmp_path):
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "mine.gin").write_text(GIN)
    done = command(
        tmp_path, "train", "--gin_import", "my_tasks", "--gin_file", "mine.gin",
        "--run_dir", "run",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # Two records of 64 bytes a step; of each example only the answer and its end count.
    assert 0 < summary["tokens"] < 2 * 2 * 64 * 0.35
    mixed = command(
        tmp_path, "cache", "--gin_import", "my_tasks", "--gin_file", "mine.gin",
        "--gin.TASK='twice_alone'",
    )
    assert mixed.returncode == 0, mixed.stderr
    assert "train: 40 documents" in mixed.stdout and "read" in mixed.stdout
    missing = command(tmp_path, "cache", "--gin_import", "my_taks", "--gin_file", "mine.gin")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: --gin_import my_taks failed (ModuleNotFoundError")
    assert len(missing.stderr.strip().splitlines()) == 1


def test_examples_that_do_not_fit_are_counted_and_named(tmp_path):
    from stacking_jax.data import tasks

    seqio = tasks.import_seqio()

    def rows(split, shuffle_files=False):
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(
            {"inputs": ["short", "long " * 40], "targets": [" a", " b"]}
        )

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        "some_too_long", source=seqio.FunctionDataSource(rows, splits=("train",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
    )
    config = DataConfig(
        task="some_too_long", sequence_length=32, held_out=0, cache_dir=str(tmp_path / "c")
    )
    manifest = open_cache(config).manifest
    assert manifest.notes == {"too_long": 1}
    info = manifest.splits["train"]
    assert (info.documents, info.tokens, info.prompt_tokens) == (1, len("short a") + 1, 5)


def test_ul2_without_sentinels_is_refused_before_a_run_begins(ul2_config, change, tmp_path):
    with pytest.raises(UserError, match="0 sentinels"):
        train(change(ul2_config, data={"extra_ids": 0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sample_continues_as_causal_text(run, ul2_config):
    """Behind [NLG], and its prompt read causally: what UL2 calls its causal objective."""
    reader = Checkpoints(run / "checkpoints", read_only=True)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = reader.restore_params(
        reader.steps()[-1], lambda depth: abstract_params(ul2_config.model, depth, mesh)
    )
    model = nnx.merge(model_graph(ul2_config.model), params)
    codec = tokenizer(ul2_config.data)
    inputs = [0, mode_ids(codec.info)["causal"], *codec.encode("abc ")]
    logits = model(jnp.asarray([inputs]))[0, -1]
    first = int(jnp.argmax(logits))
    [text] = sample_from_run(run, "abc ", max_new_tokens=1, temperature=0.0)
    assert text == codec.decode([] if first == codec.eos_id else [first])


def test_a_prompt_is_scored_behind_its_mode_token_and_read_both_ways(run, ul2_config):
    loaded = RunModels(run).load(ul2_config.total_steps)
    [[scored]] = likelihoods(loaded, ["one two "], [["three"]])
    codec, decoder = tokenizer(ul2_config.data), nnx.merge(loaded.graph, loaded.params)
    prompt = [mode_ids(codec.info)["prefix"], *codec.encode("one two ")]
    target = codec.encode("three")
    inputs = jnp.asarray([[0, *prompt, *target[:-1]]])

    def score(**options) -> float:
        likely = jax.nn.log_softmax(decoder(inputs, **options)[0, len(prompt) :])
        return sum(float(likely[place, token]) for place, token in enumerate(target))

    of_prompt = (jnp.arange(inputs.shape[1]) <= len(prompt))[None]
    assert scored.log_probability == pytest.approx(score(bidirectional=of_prompt), abs=1e-4)
    assert abs(scored.log_probability - score()) > 1e-3


def test_what_is_looked_into_reads_the_causal_text_of_every_source(run, ul2_config, read_summary):
    """At the rates of the mixture: so the loss of the whole network is that of the run."""
    found = diagnose(run, batches=ul2_config.eval_batches)
    loss = read_summary(run)["eval_loss"]
    assert found["batches"] == 2 * ul2_config.eval_batches
    assert found["maps"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["lens"]["loss"][-1] == pytest.approx(loss, rel=1e-5)
    assert all(row["interval"] is not None for row in found["maps"]["interventions"])
    assert found["effects"]["depth_score_output"] is not None
    json.dumps(found, allow_nan=False)


def test_exporting_says_that_prompts_are_read_causally_there(run, tmp_path, capsys):
    export_run(run, tmp_path / "llama")
    assert "prompts whose tokens see one another" in capsys.readouterr().err
