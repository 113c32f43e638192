"""Choosing how to grow within a run: that it is chosen once, and changes nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math

import jax
import pytest

from stacking_jax.errors import UserError
from stacking_jax.training import Stopped, decisions, lag, train, trials
from stacking_jax.training.choice_config import ChoiceConfig

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

run_module = importlib.import_module("stacking_jax.training.run")

WAYS = [
    "midas", "interleave",
    # Planted: copies that begin far from their source are worse for a while.
    {"operator": "midas", "init": "noise", "init_options": {"relative": 4.0}, "name": "noisy"},
]


@pytest.fixture(scope="module")
def plan(config):
    """Grown from two layers to four after step 3 of 9, in one of three ways."""
    choice = ChoiceConfig(candidates=WAYS, lag=2, lag_batches=3)
    return dataclasses.replace(config, choice=choice)


@pytest.fixture(scope="module")
def chosen(plan, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("lag") / "run"
    train(plan, run_dir)
    return run_dir


def test_the_worst_is_last_and_the_best_goes_on(chosen):
    [decision] = decisions.read(chosen)
    names = [row["name"] for row in decision["ranking"]]
    assert names[-1] == "noisy" and decision["candidate"] == names[0]
    assert decision["ranking"][-1]["distinguishable"]
    assert (decision["stage"], decision["step"], decision["lag"]) == (1, 3, 2)
    losses = [row["loss"] for row in decision["ranking"]]
    assert losses == sorted(losses)
    assert all(row["loss"] < row["loss_at_growth"] for row in decision["ranking"])


def test_the_run_is_that_of_the_chosen_operator(chosen, plan, change, read_summary, tmp_path):
    """To the bit: the trials leave no trace in the state, and the lag is the stage's own."""
    operator = decisions.read(chosen)[0]["operator"]
    plain = change(plan, choice=ChoiceConfig(), growth={"operator": operator})
    alone = train(plain, tmp_path / "run")
    assert alone["params_digest"] == read_summary(chosen)["params_digest"]


def test_what_the_chosen_one_scored_is_what_the_run_then_has(plan, chosen, tmp_path, read_rows):
    every_step = dataclasses.replace(plan, eval_every=1, eval_batches=3)
    train(every_step, tmp_path / "run")
    [decision] = decisions.read(tmp_path / "run")
    found = {row["step"]: row["eval_loss"] for row in read_rows(tmp_path / "run", "eval")}
    assert found[5] == decision["ranking"][0]["loss"]
    assert decision["map"] == decisions.read(chosen)[0]["map"]


def test_the_trials_are_charged(plan, chosen, read_summary, read_rows):
    summary, described = read_summary(chosen), plan.describe_plan()
    # Three ways, two steps and twice three held-out batches of a forward pass each.
    steps = 3 * (2 + 2 * 3 / 3)
    per_step = described["stages"][1]["flops_per_token"] * plan.tokens_per_step
    assert summary["choice_flops"] == pytest.approx(steps * per_step)
    assert summary["model_flops"] == pytest.approx(described["model_flops"])
    plain = dataclasses.replace(plan, choice=ChoiceConfig()).describe_plan()
    assert described["model_flops"] == pytest.approx(plain["model_flops"] + steps * per_step)
    assert described["speedup_model"] < 1 < plain["speedup_model"]
    one = described["stages"][-1]["flops_per_token"] * plan.tokens_per_step
    for each in (described, plain):  # A stage of full depth comes last.
        assert each["full_depth_steps"] == round(each["model_flops"] / one)
    stages = [stage["model_flops"] for stage in summary["stages"]]
    assert sum(stages) == pytest.approx(summary["model_flops"])
    rows = {(row["kind"], row["step"]): row["model_flops"] for row in read_rows(chosen)}
    assert rows["train", 4] - rows["train", 3] == pytest.approx((steps + 1) * per_step)
    assert summary["seconds"]["choose"] > 0 and summary["method"].startswith("lag(")
    assert json.loads((chosen / "plan.json").read_text())["choice_flops"] > 0
    [growth] = read_rows(chosen, "grow")
    [decision] = read_rows(chosen, "decision")
    assert growth["map"] == decision["map"] and decision["decision"] == "choice"


# ---- Killed, and taken up ---------------------------------------------------------------


class Killed(BaseException):
    """What ends a process without a word."""


def same(run_dir, chosen, read_summary) -> None:
    assert read_summary(run_dir)["params_digest"] == read_summary(chosen)["params_digest"]
    [one], [other] = decisions.read(run_dir), decisions.read(chosen)
    for decision in (one, other):
        decision["cost"].pop("seconds")
    assert one == other


def test_killed_while_trying(plan, chosen, tmp_path, monkeypatch, read_summary):
    tried = []

    def die(setup, number, *args, **options):
        if tried:
            raise Killed
        tried.append(number)
        return trials.try_out(setup, number, *args, **options)

    monkeypatch.setattr(lag, "try_out", die)
    with pytest.raises(Killed):
        train(plan, tmp_path / "run")
    assert not (tmp_path / "run" / "decisions.jsonl").exists()
    monkeypatch.undo()
    train(plan, tmp_path / "run")
    same(tmp_path / "run", chosen, read_summary)


def test_killed_between_the_record_and_the_growth(
    plan, chosen, tmp_path, monkeypatch, read_summary, read_rows
):
    def die(setup):
        if setup.decisions:
            raise Killed

    monkeypatch.setattr(run_module, "write_decided_plan", die)
    with pytest.raises(Killed):
        train(plan, tmp_path / "run")
    monkeypatch.undo()
    recorded = (tmp_path / "run" / "decisions.jsonl").read_bytes()
    monkeypatch.setattr(lag, "try_out", die)  # Nothing is tried again.
    summary = train(plan, tmp_path / "run")
    assert (tmp_path / "run" / "decisions.jsonl").read_bytes() == recorded
    same(tmp_path / "run", chosen, read_summary)
    assert summary["choice_flops"] == read_summary(chosen)["choice_flops"]
    assert summary["seconds"]["choose"] == json.loads(recorded)["cost"]["seconds"]
    assert len(read_rows(tmp_path / "run", "decision")) == 1


@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_at_the_boundary_or_within_the_lag(plan, chosen, tmp_path, read_summary, stop):
    with pytest.raises(Stopped):
        train(plan, tmp_path / "run", stop_at=stop)
    train(plan, tmp_path / "run")
    same(tmp_path / "run", chosen, read_summary)


def test_the_checkpoint_knows_what_the_lost_file_said(plan, chosen, tmp_path, read_summary):
    with pytest.raises(Stopped):
        train(plan, tmp_path / "run", stop_at=6)
    (tmp_path / "run" / "decisions.jsonl").unlink()
    summary = train(plan, tmp_path / "run")
    assert summary["params_digest"] == read_summary(chosen)["params_digest"]
    assert summary["choice_flops"] == read_summary(chosen)["choice_flops"]


def test_a_signal_between_trials_saves_and_stops(plan, chosen, tmp_path, monkeypatch, read_summary):
    whole = lag.choose

    def interrupted(run, number, programs, stop):
        whole(run, number, programs, lambda: 15)

    monkeypatch.setattr(lag, "choose", interrupted)
    with pytest.raises(Stopped) as caught:
        train(plan, tmp_path / "run")
    assert (caught.value.step, caught.value.signal_number) == (3, 15)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    monkeypatch.undo()
    train(plan, tmp_path / "run")
    same(tmp_path / "run", chosen, read_summary)


# ---- What it takes ----------------------------------------------------------------------


def test_beside_the_old_state_lies_one_candidate_at_a_time(plan, tmp_path, monkeypatch):
    """And after the trials nothing of them."""
    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def bytes_of(state) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    seen, whole = [], trials.try_out

    def watched(setup, number, state, **options):
        before, after = held(), options["after_step"]
        old, new = (bytes_of(setup.shapes(depth)) for depth in (2, 4))

        def look(step, metrics):
            seen.append((held() - before, old, new))
            after(step, metrics)

        found = whole(setup, number, state, **options | {"after_step": look})
        seen.append((held() - before, old, new))
        return found

    monkeypatch.setattr(lag, "try_out", watched)
    with pytest.raises(Stopped):
        train(dataclasses.replace(plan, device_batches=0), tmp_path / "run", stop_at=4)
    assert len(seen) == 9
    batches = 4 * 3 * 8 * 64 * 4  # Those on their way, at most.
    for more, old, new in seen:
        assert more <= new + batches < new + old


def test_what_is_the_same_growth_is_tried_once(plan, change, tmp_path):
    same_growth = ["midas", "gradstack", "interleave"]
    with pytest.raises(Stopped):
        train(change(plan, choice={"candidates": same_growth}), tmp_path / "a", stop_at=4)
    [decision] = decisions.read(tmp_path / "a")
    assert decision["cost"]["steps"] == pytest.approx(2 * (2 + 2 * 3 / 3))
    assert len(decision["ranking"]) == 3
    with pytest.raises(Stopped):
        train(change(plan, choice={"candidates": same_growth[:2]}), tmp_path / "b", stop_at=4)
    [decision] = decisions.read(tmp_path / "b")
    assert "cost" not in decision and "nothing to try" in decision["verdict"]


def test_when_all_diverge_it_says_so(plan, change, tmp_path, monkeypatch):
    def nothing(setup, number, state, *, until, **options):
        start = setup.plan.stages[number].start
        batch = lag.BatchLoss("text", 1.0, math.nan, 10)
        return {start: [batch] * 2, until: [batch] * 2}

    monkeypatch.setattr(lag, "try_out", nothing)
    with pytest.raises(UserError, match="all candidates at step 3 diverged within 2 steps"):
        train(plan, tmp_path / "run")


@pytest.mark.slow
def test_a_run_with_gates_compiles_each_candidate_s_own(plan, change, tmp_path):
    gated = change(plan, growth={"ramp_steps": 3}, compile_ahead=False)
    with pytest.raises(Stopped):
        train(gated, tmp_path / "run", stop_at=6)
    [decision] = decisions.read(tmp_path / "run")
    plain = change(
        gated, choice=ChoiceConfig(), growth={"operator": decision["operator"]}
    )
    whole = train(gated, tmp_path / "run")
    assert train(plain, tmp_path / "plain")["params_digest"] == whole["params_digest"]
