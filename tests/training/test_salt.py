"""Whole runs with a teacher: what they learn from, cost and save, and that they go on exactly."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from stacking_jax.data.teacher_scores import record_scores
from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap
from stacking_jax.growth.layouts import path_keys
from stacking_jax.interop import export_run, stored_state
from stacking_jax.interop.run_files import grown_config
from stacking_jax.interop.runs import RunCheckpoint
from stacking_jax.models import LAYOUT
from stacking_jax.training import GrowthConfig, Stopped, sharding, teach_cache, teacher, train
from stacking_jax.training.checkpoints import as_stored
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.setup import Setup
from stacking_jax.training.state import initial_state
from stacking_jax.training.teach_cache import make_teacher_cache
from stacking_jax.training.telemetry import Clock

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def salted(config, reference):
    """Five of nine steps by the word of the finished run, through the growth after step 3."""
    return dataclasses.replace(
        config, distill=DistillConfig(fraction=0.5, teacher=str(reference), weight=0.6)
    )


@pytest.fixture(scope="module")
def undisturbed(salted, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("salted") / "run"
    train(salted, run_dir)
    return run_dir


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_teacher_leaves_at_a_boundary(salted, undisturbed, read_rows, read_summary):
    stages = salted.plan().stages
    assert [(s.depth, s.start, s.steps, s.taught) for s in stages] == [
        (2, 0, 3, True), (4, 3, 1, True), (4, 4, 5, False),
    ]
    assert [stage.grows for stage in stages] == [False, True, False]
    rows = read_rows(undisturbed, "train")
    assert ["soft_loss" in row for row in rows] == [True] * 4 + [False] * 5
    summary = read_summary(undisturbed)
    assert summary["method"] == "midas + salt" and summary["growths"] == [3]
    assert json.loads((undisturbed / "teacher.json").read_text())["step"] == 9


def test_it_teaches_something(undisturbed, reference, read_rows):
    """The same seed and data: the first loss is that of the plain run, the others are not."""
    plain, taught = read_rows(reference, "train"), read_rows(undisturbed, "train")
    assert plain[0]["loss"] == taught[0]["loss"] != taught[0]["soft_loss"]
    assert all(a["loss"] != b["loss"] for a, b in zip(plain[1:], taught[1:], strict=True))
    assert taught[3]["soft_loss"] < taught[0]["soft_loss"]


@pytest.mark.parametrize("stop_at", [2, 4])
def test_it_goes_on_as_if_nothing_had_been(salted, undisturbed, read_summary, tmp_path, stop_at):
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        train(salted, run_dir, stop_at=stop_at)
    train(salted, run_dir)
    assert read_summary(run_dir)["params_digest"] == read_summary(undisturbed)["params_digest"]


def test_nothing_of_the_teacher_is_saved(salted, undisturbed):
    """A checkpoint of a taught step, as Orbax reads it without being told what to expect."""
    folder = sorted((undisturbed / "checkpoints").iterdir())[0]
    saved = stored_state.StoredState(folder).shapes()
    abstract = jax.eval_shape(
        lambda: initial_state(salted.model, optimizer(salted.optimizer, LAYOUT), 4, seed=0)
    )
    want = jax.tree_util.tree_flatten_with_path(as_stored(abstract))[0]
    assert {keys: leaf.shape for keys, leaf in saved.items()} == {
        path_keys(path): leaf.shape for path, leaf in want
    }


def test_the_teachers_passes_are_charged(config, salted, undisturbed, read_rows, read_summary):
    plain, taught = config.describe_plan(), salted.describe_plan()
    tokens, forward = 8 * 64, plain["stages"][-1]["flops_per_token"] / 3
    assert taught["model_flops"] == pytest.approx(plain["model_flops"] + 4 * tokens * forward)
    assert taught["teacher"]["training_flops"] == pytest.approx(plain["model_flops"])
    both = [taught[f"model_flops_{how}_teacher_training"] for how in ("without", "with")]
    assert both == [taught["model_flops"], taught["model_flops"] + plain["model_flops"]]
    assert taught["speedup_model"] < plain["speedup_model"]
    rows = read_rows(undisturbed, "train")
    per_token = [stage["flops_per_token"] for stage in taught["stages"]]
    assert rows[3]["model_flops"] == pytest.approx(tokens * (3 * per_token[0] + per_token[1]))
    summary = read_summary(undisturbed)
    assert summary["model_flops"] == rows[-1]["model_flops"] == taught["model_flops"]
    assert summary["teacher"]["kind"] == "run" and summary["teacher"]["steps"] == 4


# ---- Labels out of a cache ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(salted, tmp_path_factory):
    """The labels of the finished run for all training records, four tokens each."""
    folder = tmp_path_factory.mktemp("labels") / "made"
    asked = dataclasses.replace(salted, distill=dataclasses.replace(salted.distill, top_k=4))
    return asked, make_teacher_cache(asked, folder)


def from_cache(asked, labels, **settings):
    distill = dataclasses.replace(
        asked.distill, teacher=None, teacher_step=None, cache=str(labels.folder), **settings
    )
    return dataclasses.replace(asked, distill=distill)


def test_a_cache_is_as_good_as_the_live_teacher(
    labelled, read_rows, read_summary, tmp_path
):
    asked, labels = labelled
    asked = dataclasses.replace(
        asked, growth=GrowthConfig(), total_steps=5, eval_every=0,
        distill=dataclasses.replace(asked.distill, fraction=1.0),
    )
    live, cached = tmp_path / "live", tmp_path / "cached"
    train(asked, live)
    train(from_cache(asked, labels), cached)
    a, b = (
        [[row[name] for name in ("loss", "grad_norm")] for row in read_rows(run, "train")]
        for run in (live, cached)
    )
    np.testing.assert_allclose(a, b, rtol=1e-4)
    soft = [
        [row["soft_loss"] for row in read_rows(run, "train")] for run in (live, cached)
    ]
    np.testing.assert_allclose(*soft, rtol=1e-5)
    charged = [read_summary(run)["model_flops"] for run in (live, cached)]
    assert charged[0] == pytest.approx(charged[1])
    assert read_summary(cached)["teacher"]["kind"] == "cache"


def test_a_cache_that_was_killed_is_gone_on_with(labelled, tmp_path, monkeypatch):
    asked, whole = labelled
    monkeypatch.setattr(
        teach_cache, "shards_of",
        lambda records, size: [range(i, min(i + 24, records)) for i in range(0, records, 24)],
    )
    one_shard, written = teach_cache._one_shard, []

    def killed(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[2].name)
        return one_shard(*arguments)

    monkeypatch.setattr(teach_cache, "_one_shard", killed)
    folder = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        make_teacher_cache(asked, folder)
    assert not folder.exists()
    before, written[:] = list(written), []
    monkeypatch.setattr(
        teach_cache, "_one_shard", lambda *a: (written.append(a[2].name), one_shard(*a))[1]
    )
    made = make_teacher_cache(asked, folder)
    assert written and not set(written) & set(before)
    made.verify()
    name = made.manifest.passes[0].source
    np.testing.assert_array_equal(made.scores(name, 0), whole.scores(name, 0))
    places = [(name, 0, i) for i in range(made.manifest.passes[0].records)]
    for key, array in made.labels(places).items():
        np.testing.assert_array_equal(array, whole.labels(places)[key])
    assert make_teacher_cache(asked, folder).manifest == made.manifest
    other = dataclasses.replace(asked, distill=dataclasses.replace(asked.distill, top_k=5))
    with pytest.raises(UserError, match="was made differently .top_k: 4 there, 5 asked for"):
        make_teacher_cache(other, folder)


def test_scores_are_those_of_ten_tokens_though_four_are_kept(labelled):
    asked, labels = labelled
    label = teach_cache._label_program(asked)
    data = Setup.of(asked, labels.folder, Clock()).data
    batch = data.batch(0)
    ids, log_probs = label(batch)
    assert ids.shape[-1] == 10
    want = record_scores(batch["tokens"], batch["segment_ids"] > 0, ids, log_probs[..., :10])
    places = [data.place_of(0, row) for row in range(8)]
    scores = labels.scores(places[0][0], 0)[[place[2] for place in places]]
    np.testing.assert_allclose(scores, want, rtol=1e-5)
    assert np.isfinite(want).all()


def test_chosen_records_are_read_while_the_teacher_is_there(labelled, tmp_path):
    asked, labels = labelled
    setup = Setup.of(from_cache(asked, labels, select=0.3), tmp_path / "run", Clock())
    assert setup.about["method"] == "midas + salt_ds (score)"
    for skipped in (0, 3):
        batches = setup.iterate(2, skipped, range(8), place=lambda batch: None, placed=0)
        got = [next(batches) for _ in range(4)]
        for number, (step, batch, _) in enumerate(got, start=2 + skipped):
            source = setup.taught if number < 4 + skipped else setup.data
            assert step == number and batch.keys() == source.batch(number).keys()
            np.testing.assert_array_equal(batch["tokens"], source.batch(number)["tokens"])


@pytest.mark.parametrize("select_by", ["score", "random"])
def test_a_run_on_chosen_records_goes_on_exactly_where_it_stopped(
    select_by, labelled, read_rows, read_summary, tmp_path
):
    """Stopped among the taught steps, which read the chosen records."""
    asked, labels = labelled
    asked = from_cache(asked, labels, select=0.3, select_by=select_by)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(asked, whole)
    with pytest.raises(Stopped):
        train(asked, cut, stop_at=2)
    train(asked, cut)
    losses = [[row["loss"] for row in read_rows(run, "train")] for run in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == asked.total_steps
    digests = [read_summary(run)["params_digest"] for run in (whole, cut)]
    assert digests[0] == digests[1]


# ---- A teacher of its own ----------------------------------------------------------------------


def test_a_run_without_a_teacher_trains_one_and_is_charged_for_it(
    config, read_rows, read_summary, tmp_path
):
    salted = dataclasses.replace(
        config, distill=DistillConfig(fraction=1.0, teacher_steps=0.8), eval_every=0,
        total_steps=5, growth=GrowthConfig(),
    )
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        train(salted, run_dir, stop_at=1)
    own = read_summary(run_dir / "teacher")
    train(salted, run_dir)
    assert read_summary(run_dir / "teacher") == own and own["total_steps"] == 4
    summary, rows = read_summary(run_dir), read_rows(run_dir, "train")
    plan = salted.describe_plan()
    # What it is held against has as many FLOPs, the teacher's training among them.
    full = dataclasses.replace(config, growth=GrowthConfig(), total_steps=5).describe_plan()
    one = full["model_flops"] / 5
    assert plan["full_depth_steps"] == round(plan["model_flops"] / one) > 5
    assert plan["speedup_model"] == pytest.approx(5 * one / plan["model_flops"])
    assert plan["speedup_blocks"] < 1
    training = own["model_flops"]
    assert plan["teacher"]["training_flops"] == pytest.approx(training)
    assert summary["model_flops"] == pytest.approx(
        summary["model_flops_without_teacher_training"] + training
    )
    assert rows[0]["model_flops"] > training
    assert rows[-1]["model_flops"] == pytest.approx(summary["model_flops"])
    assert summary["seconds"]["teacher"] == own["wall_seconds"]
    assert summary["train_seconds"] == pytest.approx(
        own["train_seconds"] + summary["seconds"]["step"]
    )
    assert summary["teacher"]["trained"]["total_steps"] == 4


# ---- Which teacher it is -----------------------------------------------------------------------


def test_a_hugging_face_folder_teaches_what_the_run_teaches(salted, reference, tmp_path):
    export_run(reference, tmp_path / "hf")
    mesh = sharding.make_mesh(salted.mesh)
    run, folder = teacher.at(str(reference), None), teacher.at(str(tmp_path / "hf"), None)
    assert (run.kind, folder.kind, folder.stage.depth) == ("run", "hugging_face", 4)
    assert folder.training_flops() is None and run.params == folder.params
    for a, b in zip(
        jax.tree.leaves(run.load(mesh)), jax.tree.leaves(folder.load(mesh)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding


def test_a_run_learns_from_a_hugging_face_folder_as_from_the_run(
    salted, undisturbed, reference, read_rows, read_summary, tmp_path
):
    export_run(reference, tmp_path / "hf")
    distill = dataclasses.replace(salted.distill, teacher=str(tmp_path / "hf"))
    train(dataclasses.replace(salted, distill=distill), tmp_path / "run")
    a, b = ([row["loss"] for row in read_rows(run, "train")] for run in
            (undisturbed, tmp_path / "run"))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    summary = read_summary(tmp_path / "run")
    assert summary["teacher"]["kind"] == "hugging_face"
    # What it took to train a folder is not known, and is not guessed.
    assert summary["model_flops_with_teacher_training"] is None


def test_a_teacher_that_decided_is_charged_for_what_it_did(config, read_summary, tmp_path):
    """Its trials, and the boundary where it came to be."""
    choice = ChoiceConfig(candidates=["midas", "interleave"], lag=1, lag_batches=1)
    train(dataclasses.replace(config, choice=choice), tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert teacher.at(str(tmp_path / "run"), None).training_flops() == pytest.approx(
        summary["model_flops"]
    )


def test_another_teacher_than_the_run_began_with_is_refused(
    salted, undisturbed, reference, tmp_path
):
    begun = tmp_path / "run"
    shutil.copytree(undisturbed, begun)
    (begun / "summary.json").unlink()
    other = dataclasses.replace(
        salted, distill=dataclasses.replace(salted.distill, teacher_step=8)
    )
    assert "began with another teacher (run of step 9" in refusal(other, begun)
    # Where it lies is of no account.
    moved = tmp_path / "moved"
    shutil.copytree(reference, moved)
    there = dataclasses.replace(
        salted, distill=dataclasses.replace(salted.distill, teacher=str(moved))
    )
    assert teacher.settle(there, begun).distill.teacher_step == 9


def test_a_teacher_with_another_vocabulary_is_one_line(salted, change, tmp_path):
    wider = change(salted, model={"vocab_size": 400})
    assert "a teacher with another vocabulary" in refusal(wider, tmp_path / "run")
    tokens = change(salted, data={"extra_ids": 7})
    message = refusal(tokens, tmp_path / "run")
    assert "a teacher with another vocabulary: the tokens of" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": "nowhere"}, "neither a run directory"),
        ({"teacher_step": 5}, "holds no checkpoint of step 5; it has 6, 8, 9"),
        ({"top_k": 321}, "more than the 320 ids"),
        ({"teacher": None, "cache": "nowhere"}, "holds no labels of a teacher"),
    ],
)
def test_what_cannot_teach_is_one_line(salted, change, settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(change(salted, distill=settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_grows_on_disk_once_its_teacher_has_left(salted, undisturbed):
    twice = DepthMap([0, 1, 2, 3, 0, 1, 2, 3], 4)

    def at(step):
        folder = undisturbed / "checkpoints" / str(step)
        return RunCheckpoint(undisturbed, folder, salted, {"step": step, "depth": 4})

    with pytest.raises(UserError, match="checkpoint 3 .* still has its teacher; .* of step 4"):
        grown_config(at(3), twice)
    grown = grown_config(at(6), twice, total_steps=12)
    assert not grown.distill.on
    assert [(s.depth, s.steps) for s in grown.plan().stages] == [(2, 3), (4, 1), (4, 2), (8, 6)]
