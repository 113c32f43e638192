from __future__ import annotations

import json

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import compare_runs, read_run

MIDAS = {"depths": (2, 4, 6, 8), "steps": (10, 40, 90, 160)}


def _compare(*paths):
    return compare_runs([read_run(path) for path in paths])


def test_the_demo(demo_runs):
    comparison = _compare(*demo_runs)
    midas, full_steps, full_flops = comparison.rows
    assert all(not row.not_comparable for row in comparison.rows)
    assert comparison.eligible == (True, True, True)
    runs = comparison.runs
    assert midas.speedup_reference == "full depth, equal steps"
    assert midas.measured_speedup == runs[1].train_seconds / runs[0].train_seconds
    assert midas.measured_speedup_wall == runs[1].wall_seconds / runs[0].wall_seconds
    assert midas.predicted_speedup == json.loads((demo_runs[0] / "plan.json").read_text())[
        "speedup_model"
    ]
    assert any("same number of steps as full depth, equal steps" in n for n in midas.notes)
    assert any("same model FLOPs" in n and "equal FLOPs (-0.2 %)" in n for n in midas.notes)
    assert any("same model FLOPs" in n and "MIDAS" in n for n in full_flops.notes)
    assert not any("FLOPs" in note for note in full_steps.notes)
    # Full depth needs no speed-up over itself, and has no peer of 251 steps.
    assert full_steps.measured_speedup is None and full_flops.speedup_reference is None


def test_one_seed_is_called_one_seed_and_nobody_wins(demo_runs):
    comparison = _compare(*demo_runs)
    text = json.dumps(comparison.to_dict()).lower()
    assert "says nothing about significance" in text and "paired by seed" in text
    for word in ("winner", "best", "better", "worse", "outperform"):
        assert word not in text


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"data_digest": "77aa0b2c99"}, "data digest 77aa0b2c, but 9f2c4be1 in a"),
        ({"vocabulary": "sp32k"}, "vocabulary sp32k, but bytes in a"),
        ({"eval_digest": "00"}, "evaluation set digest 00, but 51b7d0aa in a"),
        ({"batch_size": 32}, "batch size 32, but 16 in a"),
        ({"sequence_length": 512}, "sequence length 512, but 256 in a"),
        ({"optimizer": "adafactor"}, "optimizer adafactor, but adamw in a"),
        ({"peak_learning_rate": 0.01}, "peak learning rate 0.01, but 0.003 in a"),
        ({"schedule": "wsd"}, "learning-rate schedule wsd, but cosine in a"),
        ({"optimizer_settings": "beta2=0.9"}, "optimizer settings beta2=0.9, but defaults in a"),
        ({"model": "wide"}, "model wide, but decoder d_model 256"),
        ({"data_digest": None}, "data digest is not recorded"),
    ],
)
def test_what_differs_is_marked_with_both_values(make_run, change, reason):
    told = {"schedule": "cosine", "optimizer_settings": "defaults"}
    paths = [make_run(name, compare=told) for name in "ab"]
    rows = _compare(*paths, make_run("c", compare=told | change)).rows
    assert not rows[0].not_comparable and not rows[1].not_comparable
    assert len(rows[2].not_comparable) == 1 and reason in rows[2].not_comparable[0]
    assert not any("same" in note for note in rows[2].notes), "no budget is shared across a mark"


def test_runs_that_do_not_say_their_schedule_are_compared_as_ever(make_run):
    """Those of versions that did not record it, beside one another and beside new ones."""
    told = {"schedule": "cosine", "optimizer_settings": "defaults"}
    rows = _compare(make_run("a"), make_run("b"), make_run("c", compare=told)).rows
    assert not any(row.not_comparable for row in rows)


def test_digests_are_shown_as_long_as_tells_them_apart(make_run):
    change = {"data_digest": "9f2c4be1d7a1" + "0" * 12}
    rows = _compare(make_run("a"), make_run("b"), make_run("c", compare=change)).rows
    assert rows[2].not_comparable == ("data digest 9f2c4be1d7a1, but 9f2c4be1d7a0 in a",)


def test_several_reasons_are_all_given(make_run):
    change = {"batch_size": 32, "optimizer": "adafactor", "seed": 3}
    row = _compare(make_run("a"), make_run("b"), make_run("c", compare=change)).rows[2]
    assert len(row.not_comparable) == 2


def test_the_majority_is_the_reference_whatever_the_order(make_run):
    odd = make_run("odd", compare={"batch_size": 8})
    rows = _compare(odd, make_run("a"), make_run("b")).rows
    assert rows[0].not_comparable == ("batch size 8, but 16 in a",)
    assert not rows[1].not_comparable and not rows[2].not_comparable


def test_of_two_the_first_is_the_reference(make_run):
    rows = _compare(make_run("a"), make_run("b", compare={"batch_size": 8})).rows
    assert not rows[0].not_comparable and rows[1].not_comparable


def test_equal_values_of_another_type_are_equal(make_run):
    rows = _compare(make_run("a"), make_run("b", compare={"batch_size": 16.0})).rows
    assert not rows[1].not_comparable


def test_another_seed_is_noted_and_no_mark(make_run):
    comparison = _compare(make_run("a"), make_run("b", compare={"seed": 7}))
    assert not any(row.not_comparable for row in comparison.rows)
    assert any("Seeds differ: 0 and 7" in note for note in comparison.notes)
    assert any("Several seeds in an arm" in note for note in comparison.notes)


def test_a_marked_run_is_no_further_seed(make_run):
    other = make_run("b", compare={"seed": 7, "batch_size": 8})
    notes = _compare(make_run("a"), make_run("c", **MIDAS), other).notes
    assert any(note.startswith("One seed per arm") for note in notes)


def test_speed_is_measured_against_the_same_seed(make_run):
    paths = [make_run(f"full{s}", compare={"seed": s}, speed=(5 + s) * 1e11) for s in (0, 1)]
    midas = make_run("midas", compare={"seed": 1}, **MIDAS)
    assert _compare(*paths, midas).rows[2].speedup_reference == "full1"
    alone = _compare(paths[0], midas).rows[1]
    assert alone.speedup_reference == "full0"


@pytest.mark.parametrize(
    "options",
    [
        {"steps": (299,)},
        {"depths": (6,), "steps": (300,)},
        {"compare": {"batch_size": 8}},
        {"summary": False},
        {"until": 299},
        {"depths": (4, 8), "steps": (100, 200)},
    ],
)
def test_what_is_no_reference_for_speed(make_run, options):
    row = _compare(make_run("midas", **MIDAS), make_run("other", **options)).rows[0]
    assert row.speedup_reference is None and row.measured_speedup is None


@pytest.mark.parametrize("steps, equal", [(247, True), (255, True), (244, False), (258, False)])
def test_equal_flops_means_within_two_percent(make_run, steps, equal):
    rows = _compare(make_run("midas", **MIDAS), make_run("full", steps=(steps,))).rows
    for row in rows:
        assert any("same model FLOPs" in note for note in row.notes) == equal
    assert any("neither its steps nor its FLOPs" in n for n in rows[0].notes) != equal


def test_an_unfinished_run_never_shares_a_budget(make_run):
    # It has the FLOPs and the steps of the finished one, but is still going on.
    live = make_run("live", steps=(600,), until=300, summary=False)
    comparison = _compare(make_run("a", steps=(300,)), live)
    assert comparison.rows[1].model_flops == comparison.rows[0].model_flops
    assert comparison.rows[1].status == "unfinished at step 300"
    assert not any("same" in note for row in comparison.rows for note in row.notes)
    assert any("unfinished at step 300" in note for note in comparison.rows[1].notes)
    assert comparison.eligible == (True, False)


def test_a_run_that_was_read_early_never_shares_a_budget(make_run):
    early = make_run("early", steps=(300,), until=251)
    comparison = _compare(make_run("midas", **MIDAS), early)
    assert not any("same model FLOPs" in n for row in comparison.rows for n in row.notes)
    assert any("stopped at step 251 of 300" in note for note in comparison.rows[1].notes)


def test_a_learning_rate_that_still_falls_is_no_end(make_run):
    undecayed = make_run("undecayed", steps=(251,), decayed=False)
    comparison = _compare(make_run("midas", **MIDAS), undecayed)
    assert comparison.eligible == (True, False)
    assert any("still falling" in note for note in comparison.rows[1].notes)
    assert not any("same model FLOPs" in n for row in comparison.rows for n in row.notes)


def test_a_constant_learning_rate_has_an_end(make_run):
    path = make_run("constant")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "learning_rate" in row:
            row["learning_rate"] = 0.003
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _compare(path, make_run("b")).eligible == (True, True)


def test_one_name_for_two_runs_is_told_apart_by_directory(make_run):
    rows = _compare(make_run("x", name="same"), make_run("y", name="same")).rows
    assert [row.label for row in rows] == ["same (x)", "same (y)"]


def test_one_run_alone(make_run):
    comparison = _compare(make_run("a", compare={"data_digest": None}))
    assert comparison.notes == () and not comparison.rows[0].not_comparable


def test_no_run_and_a_run_given_twice(make_run):
    with pytest.raises(UserError, match="at least one"):
        compare_runs([])
    path = make_run("a")
    with pytest.raises(UserError, match="given 2 times"):
        _compare(path, path)


def test_json_is_strict_and_complete(make_run):
    path = make_run("a")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "train_loss": float("nan")}))
    found = json.loads(json.dumps(_compare(path).to_dict(), allow_nan=False))
    row = found["rows"][0]
    assert row["train_loss"] is None and row["eval_loss"] == summary["eval_loss"]
    assert row["path"] == str(path)
