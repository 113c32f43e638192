"""Evaluation while a run trains gives what the command gives on its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from stacking_jax.cli import main
from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.training import Stopped, train

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

TASKS = "variable_assignment/code/depth_0/0_shot,variable_assignment/code/depth_0/rank/0_shot"


@pytest.fixture(scope="module")
def config(run_config):
    return dataclasses.replace(
        run_config, evaluate_tasks=TASKS, evaluate_every=5, total_steps=8, checkpoint_every=1,
        keep_checkpoints=9, evaluation=EvaluationConfig(limit=10, seed=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "run"
    with pytest.raises(Stopped):
        train(config, folder, stop_at=7)
    train(config, folder)
    return folder


def rows(folder, kind):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_every_so_many_steps_and_at_each_stages_end(config, trained):
    ends = [stage.end for stage in config.plan().stages]
    assert len(ends) == 2 and ends[0] not in (5, 8)
    steps = sorted({5, *ends})
    found = rows(trained, "task_eval")
    assert [row["step"] for row in found] == [step for step in steps for _ in range(2)]
    assert [row["task"] for row in found[:2]] == TASKS.split(",")
    # The loss that a score is read against is measured at the same steps.
    assert [row["step"] for row in rows(trained, "eval")] == steps


def test_the_numbers_are_those_of_the_command(trained, tmp_path, capsys):
    during = {
        (row["step"], row["task"]): (row["value"], row["interval"], row["n"])
        for row in rows(trained, "task_eval")
    }
    for step in sorted({step for step, _ in during}):
        arguments = ["--run_dir", str(trained), "--step", str(step), "--tasks", TASKS]
        settings = ["--limit", "10", "--seed", "2", "--out", str(tmp_path), "--json"]
        assert main(["evaluate", *arguments, *settings]) == 0
        for task, found in json.loads(capsys.readouterr().out).items():
            assert during[step, task] == (found["value"], found["interval"], found["n"])
        # Every prompt, prediction and likelihood, byte for byte.
        for path in (tmp_path / f"step-{step}").rglob("*.json*"):
            other = trained / "evaluations" / path.relative_to(tmp_path)
            assert other.read_bytes() == path.read_bytes(), path


def test_what_may_change_when_a_run_goes_on(config, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert train(dataclasses.replace(config, evaluate_tasks=None), copy)["final_step"] == 8


def test_a_task_that_does_not_exist_is_said_before_the_run_begins(config, tmp_path):
    with pytest.raises(UserError, match="did you mean primitives"):
        train(dataclasses.replace(config, evaluate_tasks="primitivs"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
