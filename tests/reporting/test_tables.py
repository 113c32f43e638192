from __future__ import annotations

import builtins
import json

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import compare_runs, comparison_table, plan_table, read_run, units

MIDAS = {"depths": (2, 4, 6, 8), "steps": (10, 40, 90, 160)}


@pytest.fixture(params=["rich", "plain"])
def drawing(request, monkeypatch):
    """Both ways of drawing; without rich as on a machine that lacks it."""
    if request.param == "plain":
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name.split(".")[0] == "rich":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
    return request.param


def _words(line):
    return [word.strip() for word in line.split("  ") if word.strip()]


def test_numbers_are_those_of_the_summaries(drawing, demo_runs):
    comparison = compare_runs([read_run(path) for path in demo_runs])
    summaries = [json.loads((path / "summary.json").read_text()) for path in demo_runs]
    lines = {}
    for line in comparison_table(comparison, width=110).splitlines():
        words = _words(line)
        if len(words) == 4:
            lines[words[0]] = words[1:]
    for name, key, show in (
        ("tokens", "tokens", units.count),
        ("model FLOPs", "model_flops", units.flops),
        ("training time", "train_seconds", units.duration),
        ("wall time", "wall_seconds", units.duration),
        ("held-out loss [nats/token]", "eval_loss", units.loss),
        ("held-out loss [bits/byte]", "bits_per_byte", units.loss),
        ("predicted speed-up", "speedup_model", units.ratio),
    ):
        assert lines[name] == [show(summary[key]) for summary in summaries], name
    assert lines["steps"] == ["300", "300", "251"]
    assert lines["depth [layers]"] == ["2→8", "8", "8"]


@pytest.mark.parametrize("width", [40, 80, 110, 200, None])
def test_no_number_is_cut_whatever_the_width(drawing, demo_runs, width):
    comparison = compare_runs([read_run(path) for path in demo_runs])
    text = comparison_table(comparison, width)
    for row in comparison.rows:
        for shown in (units.loss(row.eval_loss), units.flops(row.model_flops)):
            assert shown in text
    assert "…" not in text
    if width is not None:
        assert max(map(len, text.splitlines())) <= width
    assert "One seed per arm" in " ".join(text.split())


def test_wide_terminals_get_a_line_per_run(drawing, demo_runs):
    text = comparison_table(compare_runs([read_run(p) for p in demo_runs]), width=200)
    assert ("─" in text) == (drawing == "rich"), "drawn by the other one"
    row = next(line for line in text.splitlines() if line.strip().startswith("MIDAS PROP-2  "))
    assert "129 TFLOP" in row and "1.20×" in row


def test_marks_and_reasons_are_on_the_screen(drawing, make_run):
    paths = [
        make_run("a"),
        make_run("odd", compare={"batch_size": 8}),
        make_run("live", until=97, summary=False),
    ]
    text = " ".join(
        comparison_table(compare_runs([read_run(p) for p in paths]), width=200).split()
    )
    assert "odd [not comparable]" in text
    assert "odd: not comparable: batch size 8, but 16 in a" in text
    assert "live [unfinished at step 97]" in text


def test_names_are_text_and_not_orders_to_the_terminal(drawing, make_run):
    path = make_run("a", name="[red]x[/red] \x1b[31m")
    text = comparison_table(compare_runs([read_run(path)]), width=150)
    assert "[red]x[/red]" in text and "\x1b" not in text


def test_colour_only_where_it_is_asked_for(make_run):
    comparison = compare_runs([read_run(make_run("a"))])
    assert "\x1b[" in comparison_table(comparison, 120, color=True)
    assert "\x1b[" not in comparison_table(comparison, 120, color=False)


def test_a_plan_with_everything(drawing, make_run):
    plan = json.loads((make_run("a", **MIDAS) / "plan.json").read_text())
    plan["stages"][1]["map_text"] = "0 1 | 0 1"
    lines = plan_table(plan).splitlines()
    stages = [_words(line) for line in lines if _words(line)[:1] and _words(line)[0].isdigit()]
    assert [words[1] for words in stages] == ["2", "4", "6", "8"]
    assert [words[2] for words in stages] == ["10", "40", "90", "160"]
    assert stages[1][-1] == "0 1 | 0 1" and stages[2][-1] == "midas" and stages[0][-1] == "new"
    shares = [float(words[6].split()[0]) for words in stages]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares)
    total = next(_words(line) for line in lines if line.strip().startswith("all"))
    assert "300" in total and "100.0 %" in total
    last = " ".join(lines[-2:])
    assert f"{plan['speedup_model']:.2f}×" in last and f"{plan['speedup_blocks']:.2f}×" in last


def test_a_plan_tells_how_many_layers_run_where_not_all_do(drawing):
    stages = [
        {"depth": 8, "run_depth": 4, "steps": 80}, {"depth": 8, "run_depth": 8, "steps": 240}
    ]
    text = plan_table({"stages": stages, "full_depth_steps": 280})
    lines = [_words(line) for line in text.splitlines()]
    [head] = [words for words in lines if words[:1] == ["stage"]]
    assert head[1:4] == ["depth", "runs", "steps"]
    assert [words[1:4] for words in lines if words[:1] in (["1"], ["2"])] == [
        ["8", "4", "80"], ["8", "8", "240"]
    ]
    assert "280 steps at full depth" in text and "--gin.TRAIN_STEPS=280" in text
    # A plan that runs all it stores has no such column, and needs no other budget.
    text = plan_table({"stages": stages[1:], "full_depth_steps": 240})
    assert "runs" not in text and "at full depth" not in text


def test_a_plan_with_the_least(drawing):
    text = plan_table({"stages": [{"depth": 8, "steps": 1500}]})
    assert "1,500" in text and "8" in text


@pytest.mark.parametrize("width", [36, 60, 100])
def test_a_plan_fits(drawing, make_run, width):
    plan = json.loads((make_run("a", **MIDAS) / "plan.json").read_text())
    text = plan_table(plan, width)
    assert max(map(len, text.splitlines())) <= width and "MFLOP" in text


@pytest.mark.parametrize(
    "plan, message",
    [
        ({}, "no stages"),
        ({"stages": []}, "no stages"),
        ({"stages": [{"depth": 8}]}, "stage 1 of the plan lacks"),
        ({"stages": [{"depth": 8, "steps": "many"}]}, "must be numbers"),
    ],
)
def test_a_plan_that_is_none(plan, message):
    with pytest.raises(UserError, match=message):
        plan_table(plan)


def test_a_plan_of_loops_shows_the_map_that_runs(drawing):
    stage = {"depth": 3, "steps": 10, "map_text": "0..2", "run_map_text": "0 (1)×4 2"}
    plain = {"depth": 6, "steps": 10, "map_text": "0 1 1 1 1 2"}
    first, second = plan_table({"stages": [stage, plain]}).splitlines()[4:6]
    assert first.endswith("0..2 · run as 0 (1)×4 2")
    assert "run as" not in second


@pytest.mark.parametrize(
    ("training", "own", "words"),
    [
        (None, False, "its training is not known"),
        (2e12, False, "its training, 2.00 TFLOP, is not counted"),
        (2e12, True, "trained within the run for 2.00 TFLOP, which is counted"),
    ],
)
def test_a_plan_says_what_its_teacher_costs(training, own, words):
    teacher = {
        "params": 1000, "steps": 5, "forward_flops_per_token": 4e6, "training_flops": training,
        "trained_within_the_run": own,
    }
    text = plan_table({"stages": [{"depth": 2, "steps": 5}], "teacher": teacher})
    assert "in the first 5 steps: 4.00 MFLOP/token, counted" in " ".join(text.split())
    assert words in " ".join(text.split())


def test_a_plan_says_what_its_method_leaves_open(drawing):
    stages = [
        {"depth": 0, "steps": 10, "map_text": "none"},
        {"depth": 8, "steps": 10, "map_text": "(+)×8", "path": 4, "taught": True},
        {"depth": 8, "steps": 10, "map_text": "0..7", "path": 8, "taught": False},
    ]
    plan = {
        "stages": stages, "method": "lag(midas) + salt", "trigger": "plateau",
        "choice_flops": 1e12, "model_flops": 4e12,
    }
    lines = plan_table(plan).splitlines()
    assert lines[0].strip() == "Plan: lag(midas) + salt"
    first, second, third = lines[4:7]
    assert first.endswith("none") and third.endswith("0..7")
    assert second.endswith("(+)×8 · 4 drawn each step · taught")
    text = " ".join(" ".join(lines).split())
    assert "1.00 TFLOP of the run's 4.00 TFLOP (25.0 %) try candidates" in text
    assert "steps or earlier" in text and "ChoiceConfig.trigger = 'plateau'" in text
    assert "+: a new layer" in text
    plain = plan_table({"stages": stages[2:], "trigger": None})
    assert plain.splitlines()[0].strip() == "Plan"
    assert "+" not in plain and "trigger" not in plain
