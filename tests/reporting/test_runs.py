from __future__ import annotations

import json
import math

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import read_run

MIDAS = {"depths": (2, 4, 6, 8), "steps": (10, 40, 90, 160)}


def _append(path, text):
    with open(path / "metrics.jsonl", "a") as file:
        file.write(text)


def test_a_finished_run_is_its_summary(make_run):
    path = make_run("a", name="MIDAS PROP-2", **MIDAS)
    summary = json.loads((path / "summary.json").read_text())
    run = read_run(path)
    assert run.finished and run.status == "finished"
    for key in ("tokens", "model_flops", "wall_seconds", "train_seconds", "compile_seconds",
                "eval_loss", "bits_per_byte", "train_loss", "params", "speedup_model"):  # fmt: skip
        assert getattr(run, key) == summary[key], key
    assert (run.name, run.method, run.step, run.depth) == ("MIDAS PROP-2", "midas", 300, 8)
    assert (run.first_depth, run.num_stages) == (2, 4)
    assert [row["step"] for row in run.growths] == summary["growths"] == [10, 50, 140]
    assert len(run.train) == 300 and run.versions["jax"] == "0.10.2"
    assert run.comparability == summary["comparability"] and run.seed == 0


def test_a_run_that_goes_on_is_read_from_its_last_rows(make_run):
    path = make_run("live", until=97, summary=False, **MIDAS)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    last_eval = [row for row in rows if row["kind"] == "eval"][-1]
    run = read_run(str(path))
    assert not run.finished and run.status == "unfinished at step 97"
    assert (run.tokens, run.model_flops) == (last["tokens"], last["model_flops"])
    assert run.wall_seconds == rows[-1]["wall_seconds"]
    assert (run.train_loss, run.eval_loss) == (last["loss"], last_eval["eval_loss"])
    assert (run.depth, run.total_steps) == (8, 300), "the plan says where it is going"
    assert run.comparability["batch_size"] == 16, "from config.json"


def test_a_run_that_has_just_begun(make_run):
    path = make_run("new", summary=False)
    (path / "metrics.jsonl").write_text("")
    run = read_run(path)
    assert run.status == "unfinished at step 0"
    assert run.eval_loss is None and run.tokens is None


def test_a_run_that_stopped_early_says_so(make_run):
    run = read_run(make_run("short", until=200))
    assert run.status == "stopped at step 200 of 300"


def test_a_truncated_last_line_is_left_out(make_run):
    path = make_run("a", summary=False)
    whole = read_run(path)
    _append(path, '{"kind": "train", "step": 301, "lo')
    cut = read_run(path)
    assert cut.train == whole.train and cut.step == whole.step
    assert any("incomplete" in note for note in cut.notes) and not whole.notes


def test_a_last_line_cut_inside_a_character(make_run):
    path = make_run("a", summary=False)
    with open(path / "metrics.jsonl", "ab") as file:
        file.write('{"kind": "note", "text": "é'.encode()[:-1])
    assert len(read_run(path).train) == 300


def test_a_broken_line_in_the_middle_names_file_and_line(make_run):
    path = make_run("a")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[6] = lines[6][:20]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:7 is not valid JSON"):
        read_run(path)


def test_a_line_cut_by_a_stop_and_followed_by_a_resume_is_left_out(make_run):
    path = make_run("a", until=100, summary=False)
    _append(path, '{"kind": "tra\n{"kind": "resume", "step": 90}\n')
    run = read_run(path)
    assert run.restarts == (90,) and run.train[-1]["step"] == 90
    assert any("cut off" in note for note in run.notes)


def test_steps_that_a_restart_did_again_count_once(make_run):
    path = make_run("a", until=100, summary=False)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    again = [dict(r, loss=9.0) for r in rows if r["kind"] == "train" and r["step"] in (91, 92)]
    _append(path, "".join(json.dumps(r) + "\n" for r in [{"kind": "resume", "step": 90}, *again]))
    run = read_run(path)
    assert [row["step"] for row in run.train] == list(range(1, 93))
    assert [row["loss"] for row in run.train[-2:]] == [9.0, 9.0]
    assert run.step == 92 and run.restarts == (90,)


def test_several_restarts_from_one_step_are_several(make_run):
    path = make_run("a", until=100, summary=False)
    _append(path, '{"kind": "resume", "step": 90}\n' * 2)
    assert read_run(path).restarts == (90, 90)


def test_a_directory_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="is not a run directory.*--run_dir"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        read_run(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["final_step", "eval_loss", "tokens", "train_seconds"])
def test_a_summary_without_a_key(make_run, key):
    path = make_run("a")
    summary = json.loads((path / "summary.json").read_text())
    del summary[key]
    (path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=f"summary.json lacks '{key}'"):
        read_run(path)


def test_a_row_without_a_key_or_with_a_text_for_a_number(make_run):
    path = make_run("a", summary=False)
    _append(path, '{"kind": "eval", "step": 300}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:\d+ lacks 'eval_loss', 'tokens'"):
        read_run(path)
    path = make_run("b", summary=False)
    _append(path, '{"kind": "resume", "step": "300"}\n')
    with pytest.raises(UserError, match="'step' is '300', not a number"):
        read_run(path)


def test_kinds_of_a_later_version_are_left_alone(make_run):
    path = make_run("a")
    before = read_run(path)
    _append(path, '{"kind": "gradient_noise", "value": 3}\n')
    assert read_run(path).train == before.train


@pytest.mark.parametrize("written", ["NaN", "null"])
def test_a_loss_that_is_not_a_number_is_kept_as_such(make_run, written):
    path = make_run("a", until=50, summary=False)
    row = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
    text = json.dumps(dict(row, step=51, loss="LOSS")).replace('"LOSS"', written)
    _append(path, text + "\n")
    assert math.isnan(read_run(path).train_loss)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("summary.json", '{"final_step": 3', "summary.json:1 is not valid JSON"),
        ("plan.json", "[1, 2]", "plan.json holds a list"),
        ("plan.json", '{"stages": 4}', "stages must be a list"),
        ("config.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_files(make_run, name, text, message):
    path = make_run("a")
    (path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(path)


def test_files_that_are_missing_are_not_fatal(make_run):
    path = make_run("a", **MIDAS)
    for name in ("plan.json", "config.json", "metrics.jsonl"):
        (path / name).unlink()
    run = read_run(path)
    assert run.depth == 8 and run.num_stages == 4 and run.train == ()
    assert any("metrics.jsonl is missing" in note for note in run.notes)
