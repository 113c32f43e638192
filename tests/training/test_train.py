"""Whole runs: what they leave behind, and that stopping them changes nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stacking_jax
from stacking_jax.data import PackedBatches, open_cache
from stacking_jax.errors import UserError
from stacking_jax.training import Stopped, train


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- What a run leaves behind -----------------------------------------------------------


def test_a_summary_tells_everything(config, reference, read_summary, read_rows):
    summary, plan = read_summary(reference), config.describe_plan()
    cache = open_cache(config.data)
    batches = PackedBatches(cache, "train", batch_size=8, seed=config.seed)
    real = [int((batches.batch(step)["segment_ids"] > 0).sum()) for step in range(9)]

    assert summary["final_step"] == summary["total_steps"] == 9
    assert summary["growths"] == [3] and summary["depth"] == 4 and summary["method"] == "midas"
    assert summary["tokens"] == sum(real) < 9 * 8 * 64
    per_token = [stage["flops_per_token"] for stage in plan["stages"]]
    assert summary["model_flops"] == pytest.approx(8 * 64 * (3 * per_token[0] + 6 * per_token[1]))
    assert summary["params"] == plan["stages"][-1]["params"]
    for key in ("speedup_blocks", "speedup_model"):
        assert summary[key] == plan[key]
    assert len(summary["params_digest"]) == 64 and summary["skipped_steps"] == 0
    assert 0 < summary["eval_loss"] < math.log(320) and summary["bits_per_byte"] > 0
    seconds = summary["seconds"]
    assert summary["train_seconds"] == seconds["step"] > 0
    assert summary["compile_seconds"] == seconds["compile"] > 0
    assert summary["wall_seconds"] == pytest.approx(sum(seconds.values()), rel=0.2)
    stages = [(s["depth"], s["steps"], s["tokens"]) for s in summary["stages"]]
    assert stages == [(2, 3, sum(real[:3])), (4, 6, sum(real[3:]))]
    assert sum(s["model_flops"] for s in summary["stages"]) == pytest.approx(summary["model_flops"])
    assert sum(s["seconds"] for s in summary["stages"]) <= summary["train_seconds"]
    assert all(s["compile_seconds"] > 0 for s in summary["stages"])
    compared = summary["comparability"]
    assert compared["data_digest"] == cache.manifest.digest
    assert compared["peak_learning_rate"] == 3e-3 and compared["optimizer"] == "adamw"
    assert "num_layers=4" in compared["model"] and "remat" not in compared["model"]
    last = read_rows(reference, "train")[-1]
    assert summary["train_loss"] == last["loss"]


def test_metrics_tell_the_story_in_order(reference, read_rows, read_summary):
    rows = read_rows(reference)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 1), ("train", 2), ("train", 3), ("grow", 3), ("train", 4), ("eval", 4),
        ("train", 5), ("boundary", 5), ("train", 6), ("train", 7), ("train", 8), ("eval", 8),
        ("train", 9), ("eval", 9),
    ]
    for key in ("tokens", "model_flops", "wall_seconds", "train_seconds"):
        values = [row[key] for row in rows]
        assert values == sorted(values) and values[0] > 0
    trained = [row for row in rows if row["kind"] == "train"]
    assert [(row["stage"], row["depth"]) for row in trained] == [(1, 2)] * 3 + [(2, 4)] * 6
    assert trained[-1]["learning_rate"] == pytest.approx(3e-4)
    # Growing restarts nothing: the rate only falls.
    rates = [row["learning_rate"] for row in trained]
    assert rates == sorted(rates, reverse=True)
    assert trained[-1]["loss"] < trained[0]["loss"]
    [growth] = [row for row in rows if row["kind"] == "grow"]
    assert (growth["from_depth"], growth["to_depth"], growth["operator"]) == (2, 4, "midas")
    assert growth["map"] == [0, 1, 0, 1] and growth["compile_seconds"] > 0
    summary = read_summary(reference)
    assert rows[-1]["eval_loss"] == summary["eval_loss"]
    assert rows[-1]["tokens"] == summary["tokens"]
    assert rows[-1]["model_flops"] == summary["model_flops"]


def test_the_run_directory_is_complete(reference, config):
    names = {path.name for path in reference.iterdir()}
    assert {"config.json", "plan.json", "metrics.jsonl", "summary.json", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((reference / "plan.json").read_text()) == config.describe_plan()
    assert {path.name for path in (reference / "checkpoints").iterdir()} == {"6", "8", "9"}


def test_training_needs_no_tensorflow(config, tmp_path):
    """In a process of its own, TensorBoard events included."""
    program = (
        "import dataclasses, sys\n"
        "from stacking_jax.training import train, Stopped\n"
        "from stacking_jax.training.run_directory import read_config\n"
        f"config = read_config({str(tmp_path / 'made')!r})\n"
        "try:\n"
        f"    train(config, {str(tmp_path / 'run')!r}, stop_at=1)\n"
        "except Stopped:\n"
        "    unwanted = ('tensorflow', 'seqio', 't5', 'gin')\n"
        "    print([name for name in unwanted if name in sys.modules])\n"
    )
    from stacking_jax.training import run_directory

    run_directory.prepare(tmp_path / "made", config, "abc")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.stdout == "[]\n", done.stderr
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


# ---- Stopped and resumed ------------------------------------------------------------------


def stop_and_go(config, run_dir, *stops) -> dict:
    for step in stops:
        with pytest.raises(Stopped) as caught:
            train(config, run_dir, stop_at=step)
        assert caught.value.step == step and caught.value.signal_number is None
    return train(config, run_dir)


def assert_same_run(summary, run_dir, reference, read_summary, read_rows):
    want = read_summary(reference)
    for key in ("params_digest", "train_loss", "eval_loss", "tokens", "model_flops", "final_step"):
        assert summary[key] == want[key], key
    for kind in ("train", "eval", "grow"):
        results = [
            [(row["step"], row.get("loss"), row.get("eval_loss"), row["tokens"]) for row in rows]
            for rows in (read_rows(run_dir, kind), read_rows(reference, kind))
        ]
        assert results[0] == results[1], kind
    for key in ("steps", "tokens"):
        assert [s[key] for s in summary["stages"]] == [s[key] for s in want["stages"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops", [(2,), (3,), (4,), (6,), (1, 2, 3, 4, 8)],
    ids=["one before a growth", "at a growth", "one after", "within a stage", "again and again"],
)
def test_a_resumed_run_is_bit_equal(
    stops, config, tmp_path, reference, read_summary, read_rows
):
    summary = stop_and_go(config, tmp_path / "run", *stops)
    assert_same_run(summary, tmp_path / "run", reference, read_summary, read_rows)
    assert [row["step"] for row in read_rows(tmp_path / "run", "resume")] == list(stops)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(
    config, change, tmp_path, reference, read_summary, read_rows
):
    """Also if every program is compiled afresh."""
    fresh = change(config, compilation_cache=str(tmp_path / "compiled"))
    summary = train(fresh, tmp_path / "run")
    assert_same_run(summary, tmp_path / "run", reference, read_summary, read_rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor"])
def test_another_optimiser_resumes_as_exactly(name, config, change, tmp_path):
    other = change(config, optimizer={"name": name}, eval_every=0, microbatches=1)
    one = train(other, tmp_path / "one")
    two = stop_and_go(other, tmp_path / "two", 3, 5)
    assert one["params_digest"] == two["params_digest"]


def test_a_kill_between_growth_and_the_next_checkpoint_grows_once_more(
    stopped, config, tmp_path, reference, read_summary, read_rows
):
    """What a kill after step 3 leaves: metrics of later steps, checkpoint 2 the newest."""
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    for step in (4, 6):
        shutil.rmtree(run_dir / f"checkpoints/{step}")
    assert_same_run(train(config, run_dir), run_dir, reference, read_summary, read_rows)


def test_a_kill_just_before_the_summary(config, reference, tmp_path, read_summary, read_rows):
    run_dir = Path(shutil.copytree(reference, tmp_path / "run"))
    (run_dir / "summary.json").unlink()
    assert_same_run(train(config, run_dir), run_dir, reference, read_summary, read_rows)


def test_how_a_run_is_watched_may_change_on_the_way(
    config, change, stopped, tmp_path, reference, read_summary, read_rows
):
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    other = change(config, log_every=9, checkpoint_every=0, eval_every=0, name="renamed")
    summary = train(other, run_dir)
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert summary["name"] == "renamed"
    assert [row["step"] for row in read_rows(run_dir, "train")] == [1, 2, 3, 4, 5, 6, 9]


@pytest.mark.slow
def test_a_run_may_move_to_another_mesh(config, change, stopped, tmp_path, reference, read_summary):
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    summary = train(change(config, mesh={"data": 2, "fsdp": 2, "tensor": 2}), run_dir)
    assert summary["eval_loss"] == pytest.approx(read_summary(reference)["eval_loss"], rel=1e-5)


def test_a_leaping_clock_changes_nothing_but_time_stamps(
    config, tmp_path, reference, monkeypatch, read_summary, read_rows
):
    real, leaps = time.time, iter(range(1 << 30))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(leaps) * 5 * 3600)
    summary = stop_and_go(config, tmp_path / "run", 5)
    assert_same_run(summary, tmp_path / "run", reference, read_summary, read_rows)
    stamps = [row["unix_time"] for row in read_rows(tmp_path / "run")]
    assert stamps != sorted(stamps) and 0 < summary["wall_seconds"] < 3600
    package = Path(stacking_jax.__file__).parent
    asks = {path.name for path in package.rglob("*.py") if "time.time(" in path.read_text()}
    assert asks == {"telemetry.py", "goodput.py"}  # Which stamp rows, and starts and ends.


def test_a_finished_run_is_left_as_it_is(
    config, tmp_path, reference, read_summary, snapshot, capsys
):
    run_dir = Path(shutil.copytree(reference, tmp_path / "run"))
    before = snapshot(run_dir)
    assert train(config, run_dir, gin_text="X = 1") == read_summary(reference)
    assert "already complete" in capsys.readouterr().err
    assert snapshot(run_dir) == before


def test_stopping_where_the_run_has_already_been(config, stopped, tmp_path, snapshot):
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    with pytest.raises(Stopped) as caught:
        train(config, run_dir, stop_at=5)
    assert caught.value.step == 6
    assert "stop_at counts steps from 1" in refusal(config, run_dir, stop_at=0)


# ---- What is refused, with nothing changed ------------------------------------------------


def test_another_configuration_is_refused(config, change, stopped, snapshot):
    before = snapshot(stopped)
    message = refusal(change(config, total_steps=12, optimizer={"clip_norm": 2.0}), stopped)
    assert message.endswith("optimizer.clip_norm: 1.0 -> 2.0; total_steps: 9 -> 12")
    assert snapshot(stopped) == before


def test_text_that_has_changed_is_refused(config, change, corpus, tmp_path, snapshot):
    texts = Path(shutil.copytree(corpus, tmp_path / "texts"))
    moved = change(config, data={"text_dir": str(texts)})
    with pytest.raises(Stopped):
        train(moved, tmp_path / "run", stop_at=1)
    (texts / "0.txt").write_text("something else entirely\n" * 50)
    before = snapshot(tmp_path / "run")
    assert "began with other data" in refusal(moved, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_a_directory_of_something_else_is_refused(config, corpus, snapshot):
    before = snapshot(corpus)
    assert "holds no run (no config.json)" in refusal(config, corpus)
    assert snapshot(corpus) == before


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"batch_size": 12}, "a batch of 12 .* use a multiple of 8, such as 16"),
        ({"batch_size": 8, "microbatches": 2}, "multiple of 16"),
        ({"growth": {"num_stages": 3}}, "cannot be reached in 3 equal stages"),
        ({"total_steps": 1}, "leave none for stage 1"),
        ({"model": {"vocab_size": 128}}, "bytes has 259 ids, but the model only 128"),
        ({"model": {"vocab_size": 322}, "mesh": {"tensor": 4}}, r"embedding \(322, 32\)"),
        ({"mesh": {"fsdp": 3}}, "needs 3 devices"),
        ({"model": {"attention": "splash"}}, "needs a TPU, and the program is compiled for 'cpu'"),
        ({"data": {"held_out": 0.0}}, "no 'validation' records"),
        ({"data": {"text_dir": "/no/such/folder"}}, "/no/such/folder"),
    ],
)
def test_what_cannot_run_leaves_no_directory_behind(config, change, tmp_path, settings, part):
    with pytest.raises(UserError, match=part) as caught:
        train(change(config, **settings), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_row_with_more_documents_than_were_promised_is_not_trained_on(config, change, tmp_path):
    # Forty texts of some 800 bytes leave ends that share records of 64.
    one = change(config, model={"max_documents": 1}, growth={"operator": None})
    with pytest.raises(UserError, match=r"the batch of step \d+: a row holds \d+ documents"):
        train(one, tmp_path / "run")


# ---- Numbers that are not finite -------------------------------------------------------------


@pytest.fixture(scope="module")
def wild(config, change):
    """A learning rate so large that step 2 overflows."""
    return change(
        config, growth={"operator": None}, checkpoint_every=1, eval_every=0, total_steps=30,
        optimizer={"peak_learning_rate": 1e38, "schedule": "constant", "warmup_fraction": 0.0},
    )


def test_a_run_that_diverges_names_the_step_and_the_last_good_checkpoint(wild, tmp_path):
    message = refusal(wild, tmp_path / "run")
    assert message.startswith("training diverged: loss ")
    assert "at step 2; the last good checkpoint is 1; lower the learning rate" in message
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["1"]
    # Nothing has been lost: it goes on from there, and says the same.
    assert refusal(wild, tmp_path / "run") == message


def test_parameters_that_are_not_finite_are_never_saved(wild, change, tmp_path):
    """Loss and gradient of the step are fine; the update itself overflows."""
    wilder = change(wild, optimizer={"peak_learning_rate": 3.4e38, "weight_decay": 10.0})
    message = refusal(wilder, tmp_path / "run")
    assert "parameters or moments are not finite at step 1; there is no checkpoint yet" in message
    assert not any((tmp_path / "run/checkpoints").iterdir())


def test_skipping_gives_up_after_twenty_steps_in_a_row(wild, change, tmp_path, capsys):
    message = refusal(change(wild, on_nan="skip", checkpoint_every=10), tmp_path / "run")
    assert "20 steps in a row were not finite" in message and "at step 21" in message
    assert "the last good checkpoint is 20" in message
    assert capsys.readouterr().err.count("warning: skipped a step") == 20


def test_a_held_out_loss_that_is_not_finite_ends_the_run(wild, change, tmp_path):
    wilder = change(
        wild, on_nan="skip", total_steps=3, optimizer={"peak_learning_rate": 1e15}
    )
    message = refusal(wilder, tmp_path / "run")
    assert "training diverged: held-out loss" in message and "at step 3" in message
    assert not (tmp_path / "run/summary.json").exists()
