"""Runs whose stages end by what is seen of them."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from stacking_jax.training import Stopped, decisions, train
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.triggers import Watch

run_module = importlib.import_module("stacking_jax.training.run")

# Everything counts as a plateau: it comes as soon as a window is full.
PLATEAU = ChoiceConfig(trigger="plateau", check_every=1, window=2, threshold=0.99)


@pytest.fixture(scope="module")
def plan(config, change):
    """Planned to grow after step 3 of 9; the rate is warmed up again after it."""
    return change(config, choice=PLATEAU, growth={"rewarm_steps": 3})


@pytest.fixture(scope="module")
def triggered(plan, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trigger") / "run"
    train(plan, run_dir)
    return run_dir


def test_it_is_the_run_whose_plan_says_so(
    triggered, plan, change, tmp_path, read_summary, read_rows
):
    """To the bit, the learning rate after the growth too."""
    [decision] = decisions.read(triggered)
    assert (decision["kind"], decision["stage"], decision["step"]) == ("boundary", 1, 2)
    assert decision["reason"] == "plateau" and decision["improvement"] < 0.99
    growth = {"operator": None, "stages": [(2, 2), (4, 7, "midas")]}
    by_hand = train(change(plan, choice=ChoiceConfig(), growth=growth), tmp_path / "run")
    summary = read_summary(triggered)
    assert summary["params_digest"] == by_hand["params_digest"]
    assert summary["growths"] == by_hand["growths"] == [2]
    assert summary["model_flops"] == by_hand["model_flops"]
    assert [s["steps"] for s in summary["stages"]] == [2, 7]
    rates, theirs = (
        [row["learning_rate"] for row in read_rows(run, "train")]
        for run in (triggered, tmp_path / "run")
    )
    assert rates == theirs and rates[2] < rates[1]
    assert [row["step"] for row in read_rows(triggered, "grow")] == [2]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_stopped_before_at_and_after_it(plan, triggered, tmp_path, read_summary, stop):
    with pytest.raises(Stopped):
        train(plan, tmp_path / "run", stop_at=stop)
    train(plan, tmp_path / "run")
    assert read_summary(tmp_path / "run")["params_digest"] == (
        read_summary(triggered)["params_digest"]
    )
    assert decisions.read(tmp_path / "run") == decisions.read(triggered)


class Killed(BaseException):
    """What ends a process without a word."""


def test_what_a_clock_said_is_replayed(plan, triggered, tmp_path, monkeypatch, read_summary):
    """Killed after the record, before anything else: the clock is not asked again."""
    clock = ChoiceConfig(trigger="seconds", budget=1e-3, budget_shares=[0.5], check_every=2)
    timed = dataclasses.replace(plan, choice=clock)

    def die(setup):
        if setup.decisions:
            raise Killed

    monkeypatch.setattr(run_module, "write_decided_plan", die)
    with pytest.raises(Killed):
        train(timed, tmp_path / "run")
    monkeypatch.undo()
    [decision] = decisions.read(tmp_path / "run")
    assert decision["step"] == 2 and decision["spent"] > decision["budget"]
    monkeypatch.setattr(Watch, "look", lambda *args, **options: None)
    train(timed, tmp_path / "run")
    assert decisions.read(tmp_path / "run") == [decision]
    assert read_summary(tmp_path / "run")["params_digest"] == (
        read_summary(triggered)["params_digest"]
    )


@pytest.mark.slow
def test_what_is_on_record_holds_though_it_would_come_sooner_now(plan, tmp_path, read_rows):
    """As of a clock, which runs otherwise after a restart."""
    with pytest.raises(Stopped):
        train(plan, tmp_path / "run", stop_at=1)
    taken = [{"kind": "boundary", "stage": 1, "step": 3, "reason": "plateau"}]
    decisions.write(tmp_path / "run" / decisions.FILE, taken)
    with pytest.raises(Stopped):
        train(plan, tmp_path / "run", stop_at=4)
    assert decisions.read(tmp_path / "run") == taken
    assert [row["step"] for row in read_rows(tmp_path / "run", "grow")] == [3]


def test_a_plateau_of_the_held_out_loss_evaluates_at_its_looks(plan, change, tmp_path, read_rows):
    held_out = change(plan, choice={"plateau_on": "held_out"}, eval_every=0)
    with pytest.raises(Stopped):
        train(held_out, tmp_path / "run", stop_at=3)
    assert [row["step"] for row in read_rows(tmp_path / "run", "eval")] == [1, 2]
    assert decisions.read(tmp_path / "run")[0]["step"] == 2
