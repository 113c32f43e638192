"""`stacking-jax evaluate`, from the command line to the files it leaves."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import pytest

from stacking_jax.cli import main
from stacking_jax.errors import UserError
from stacking_jax.evaluation import registry
from stacking_jax.evaluation.results import read_results, rows_path, step_folder
from stacking_jax.evaluation.task import EvalTask, Example, Metric

GENERATED = "variable_assignment/code/depth_0/0_shot"
RANKED = "variable_assignment/code/depth_0/rank/0_shot"
COPYING = "copying/random_letters/0_shot"


@pytest.fixture
def known():
    """Registers tasks for one test."""
    added = []

    def add(*tasks: EvalTask) -> None:
        for task in tasks:
            registry.register(task)
            added.append(task.name)

    yield add
    for name in added:
        registry.unregister(name)


def evaluate(capsys, *arguments) -> dict:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def exact(predictions, examples):
    return [
        100.0 * (said == one.target) for said, one in zip(predictions, examples, strict=True)
    ]


def task_of(examples, **settings) -> EvalTask:
    return EvalTask(
        source=lambda split, count, seed: iter(examples[:count]),
        metrics=(Metric("exact_match", exact),),
        **{"name": "mine/one", "group": "mine", **settings},
    )


def test_an_oracle_scores_a_hundred(run_dir, tmp_path, capsys, with_oracle):
    names = [GENERATED, RANKED, COPYING, "variable_assignment/basic/depth_1/0_shot"]
    with_oracle(registry.find(names), limit=100, seed=3)
    found = evaluate(
        capsys, "--run_dir", run_dir, "--tasks", ",".join(names), "--limit", 100, "--seed", 3,
        "--out", tmp_path,
    )
    assert list(found) == names
    for name in names:
        assert found[name]["value"] == 100.0, name
        assert found[name]["interval"] == [100.0, 100.0] and found[name]["n"] == 100
    assert found[RANKED]["chance"] == 20.0 and found[GENERATED]["metric"] == "exact_match"


@pytest.mark.parametrize("name", [GENERATED, RANKED])
def test_shuffled_targets_score_chance(name, run_dir, tmp_path, capsys, with_oracle, known):
    (task,) = registry.find(name)
    with_oracle([task], limit=400)

    def shuffled(split, count, seed):
        dice = random.Random(7)
        for example in task.source(split, count, seed):
            choices = example.choices
            yield dataclasses.replace(example, target=dice.choice(choices))

    known(dataclasses.replace(task, name="shuffled", source=shuffled))
    found = evaluate(
        capsys, "--run_dir", run_dir, "--tasks", "shuffled", "--limit", 400, "--out", tmp_path
    )["shuffled"]
    low, high = found["interval"]
    assert low < 20.0 < high and high - low < 10


@pytest.mark.slow
def test_what_lies_on_disk_can_be_read_and_is_the_same_again(run_dir, tmp_path, capsys):
    arguments = ("--run_dir", run_dir, "--tasks", f"{GENERATED},{RANKED}", "--limit", 12)
    found = evaluate(capsys, *arguments, "--out", tmp_path)
    folder = step_folder(tmp_path, 4)
    for name in (GENERATED, RANKED):
        lines = rows_path(folder, name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 12
        metric = found[name]["metric"]
        for row in rows:
            assert row["prompt"].endswith("Answer:") and row["target"]
            assert row["scores"][metric] == 100.0 * (row["prediction"] == row["target"])
        assert sum(row["scores"][metric] for row in rows) / 12 == pytest.approx(
            found[name]["value"]
        )
    ranked = [json.loads(line) for line in rows_path(folder, RANKED).read_text().splitlines()]
    for row in ranked:
        best = row["log_probabilities"].index(max(row["log_probabilities"]))
        assert row["prediction"] == row["choices"][best]
        assert len(set(row["log_probabilities"])) > 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # In another order, one after the other: the same bytes, and nothing is lost.
    for name in (RANKED, GENERATED):
        evaluate(capsys, *arguments[:2], "--tasks", name, "--limit", 12, "--out", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert read_results(folder)[RANKED]["settings"]["limit"] == 12


def test_all_steps_and_the_table(run_dir, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    arguments = ["evaluate", "--run_dir", str(copy), "--tasks", GENERATED, "--limit", "5"]
    assert main([*arguments, "--all_steps"]) == 0
    out = capsys.readouterr()
    assert "Step 2" in out.out and "Step 4" in out.out and "exact_match" in out.out
    assert "every prompt, prediction and score" in out.err
    assert (copy / "evaluations" / "step-2" / f"{GENERATED}.jsonl").exists()
    by_step = evaluate(capsys, *arguments[1:], "--all_steps")
    assert list(by_step) == ["2", "4"]
    assert by_step["2"] == evaluate(capsys, *arguments[1:], "--step", 2)


@pytest.mark.slow
def test_long_prompts_are_counted_and_never_cut(run_dir, tmp_path, capsys, known):
    fitting = [Example(f"{number}:", "1") for number in range(199)]
    # 504 bytes and room for 8 is what a context of 512 holds.
    edge = Example("x" * 504, "1")
    known(
        task_of([*fitting, edge], name="all_fit", max_new_tokens=8),
        task_of([*fitting, Example("x" * 505, "1")], name="one_too_long", max_new_tokens=8),
        task_of([*fitting[:97], *[Example("y" * 600, "1")] * 2], name="two", max_new_tokens=8),
    )
    arguments = ("--run_dir", run_dir, "--tasks", "all_fit,one_too_long,two", "--out", tmp_path)
    found = evaluate(capsys, *arguments)
    assert (found["all_fit"]["skipped"], found["all_fit"]["n"]) == (0, 200)
    assert (found["one_too_long"]["skipped"], found["one_too_long"]["n"]) == (1, 199)
    assert found["one_too_long"]["value"] is not None
    assert found["two"]["value"] is None and found["two"]["interval"] is None
    assert "2 of 99 prompts do not fit into the context of 512" in found["two"]["reason"]
    last = rows_path(step_folder(tmp_path, 4), "one_too_long").read_text().splitlines()[-1]
    row = json.loads(last)
    assert row["prompt"] == "x" * 505 and row["prediction"] is None
    assert row["skipped"] == "needs 513 tokens, the context has 512"

    assert main(["evaluate", *map(str, arguments)]) == 0
    table = capsys.readouterr().out
    (line,) = [line for line in table.splitlines() if line.strip().startswith("two ")]
    assert " - " in line
    assert "two: no mean, 2 of 99 prompts" in table
    assert "one_too_long: 1 prompts do not fit" in table


def test_of_a_group_the_tasks_run_that_have_data(run_dir, tmp_path, capsys, known):
    def nothing(split, count, seed):
        raise UserError("facts.json is not there; name its folder")
        yield

    known(
        task_of([Example("a", "b")], name="some/a"),
        dataclasses.replace(task_of([], name="some/b"), source=nothing),
    )
    arguments = ("--run_dir", run_dir, "--out", tmp_path, "--tasks")
    found = evaluate(capsys, *arguments, "some")
    assert found["some/a"]["n"] == 1
    assert found["some/b"]["value"] is None and "facts.json" in found["some/b"]["reason"]
    assert not (tmp_path / "step-4" / "some" / "b.jsonl").exists()
    # Asked for by its own name it must be there.
    assert main(["evaluate", *map(str, arguments), "some/a,some/b"]) == 2
    assert "error: facts.json is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "variable_asignment"], "did you mean variable_assignment"),
        (["--tasks", "primitives", "--shots", "7"], "shots, none has 7"),
        (["--tasks", GENERATED, "--step", "3"], "no checkpoint of step 3; it has 2, 4"),
        (["--tasks", ","], "name the tasks"),
        (["--tasks", GENERATED, "--limit", "0"], "limit is None or a whole number"),
        (["--tasks", GENERATED, "--gin.EVAL_DATADIR=1"], "EVAL_DATA_DIR"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, run_dir, capsys):
    assert main(["evaluate", "--run_dir", str(run_dir), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_metric_out_of_its_range_is_refused(run_dir, tmp_path, capsys, known):
    broken = Metric("broken", lambda predictions, examples: [101.0 for _ in predictions])
    known(dataclasses.replace(task_of([Example("a", "b")]), name="broken", metrics=(broken,)))
    arguments = ["--run_dir", str(run_dir), "--tasks", "broken", "--out", str(tmp_path)]
    assert main(["evaluate", *arguments]) == 2
    assert "the metric broken of broken must give a number from 0 to 100" in capsys.readouterr().err


def test_a_second_question_stands_behind_the_first_answer(
    run_dir, tmp_path, capsys, with_oracle, known
):
    examples = [
        Example(f"{name}=", f"{number}\nand twice? {2 * number}", facts={"asked": "\nand twice?"})
        for number, name in enumerate("abcdefgh", start=10)
    ]
    task = task_of(examples, name="mine/twice", follow_up=lambda one: one.facts["asked"])
    known(task)
    with_oracle([task], limit=8)
    found = evaluate(
        capsys, "--run_dir", run_dir, "--tasks", task.name, "--out", tmp_path / "out"
    )
    assert found[task.name]["value"] == 100.0 and found[task.name]["n"] == 8
    (rows,) = (tmp_path / "out").rglob("*.jsonl")
    predictions = [json.loads(line)["prediction"] for line in rows.read_text().splitlines()]
    assert predictions == [example.target for example in examples]
