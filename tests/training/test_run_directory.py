"""Which directory a run may use, and what it finds there."""

from __future__ import annotations

import json

import pytest

from stacking_jax.errors import UserError
from stacking_jax.training import run_directory


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_directory_is_made_with_its_plan(config, tmp_path):
    run_dir = tmp_path / "deep" / "run"
    assert run_directory.check(run_dir, config) is None
    assert not run_dir.exists()
    run_directory.prepare(run_dir, config, "abc", "TRAIN_STEPS = 9\n")
    assert json.loads((run_dir / "plan.json").read_text()) == config.describe_plan()
    assert (run_dir / "config.gin").read_text() == "TRAIN_STEPS = 9\n"
    recorded = json.loads((run_dir / "config.json").read_text())
    assert recorded["config"]["total_steps"] == 9 and recorded["data_digest"] == "abc"
    assert {"jax", "flax", "optax", "python", "devices"} <= set(recorded["versions"])
    assert run_directory.read_config(run_dir) == config
    assert run_directory.read_summary(run_dir) is None


def test_the_same_run_may_go_on(config, change, tmp_path):
    run_directory.prepare(tmp_path, config, "abc")
    run_directory.prepare(tmp_path, config, "abc")
    other = change(config, log_every=3, checkpoint_every=5, mesh={"fsdp": 4, "tensor": 2})
    run_directory.prepare(tmp_path, other, "abc")


def test_another_run_is_refused_with_the_differences(config, change, tmp_path, snapshot):
    run_directory.prepare(tmp_path, config, "abc")
    before = snapshot(tmp_path)
    other = change(config, seed=3, optimizer={"peak_learning_rate": 0.5})
    message = refusal(run_directory.prepare, tmp_path, other, "abc", "text")
    assert message.endswith("Differences: optimizer.peak_learning_rate: 0.003 -> 0.5; seed: 0 -> 3")
    assert snapshot(tmp_path) == before


def test_changed_data_are_refused(config, tmp_path, snapshot):
    run_directory.prepare(tmp_path, config, "abc")
    before = snapshot(tmp_path)
    message = refusal(run_directory.prepare, tmp_path, config, "def")
    assert "began with other data (digest abc, now def)" in message
    assert snapshot(tmp_path) == before


def test_a_directory_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not empty and holds no run" in refusal(run_directory.check, tmp_path, config)
    assert "is a file" in refusal(run_directory.check, tmp_path / "thesis.tex", config)


def test_what_a_killed_process_left_is_no_hindrance(config, tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text("{")
    run_directory.prepare(tmp_path, config, "abc")


def test_a_place_that_cannot_be_made_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("x")
    message = refusal(run_directory.prepare, tmp_path / "file" / "run", config, "abc")
    assert "cannot be written: Not a directory" in message


def test_a_broken_configuration_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(run_directory.check, tmp_path, config)
    assert "config.json cannot be read" in refusal(run_directory.read_config, tmp_path)


def test_a_configuration_of_another_version_is_refused(config, tmp_path):
    run_directory.prepare(tmp_path, config, "abc")
    recorded = json.loads((tmp_path / "config.json").read_text())
    recorded["config"]["optimizer"]["momentum"] = 0.9
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    assert "by this version" in refusal(run_directory.read_config, tmp_path)
    assert "optimizer.momentum: 0.9 -> '(absent)'" in refusal(run_directory.check, tmp_path, config)


def test_a_directory_without_a_run(tmp_path):
    assert "holds no run" in refusal(run_directory.read_config, tmp_path / "nothing")
