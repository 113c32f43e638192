"""What follows from decisions, and how they are kept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.paths import open_path
from stacking_jax.training import GrowthConfig, decisions
from stacking_jax.training.candidates import Candidate
from stacking_jax.training.decisions import (
    Decisions,
    alike,
    choice_of,
    decided_growth,
    decided_plan,
)

PLAN = Plan.prop(8, 4, 100, 1.0, "midas")  # 10, 20, 30 and 40 steps
GROWTH = GrowthConfig(operator="midas", num_stages=4)


def boundary(stage: int, step: int) -> dict:
    return {"kind": "boundary", "stage": stage, "step": step, "reason": "plateau"}


def lengths(plan: Plan) -> list[int]:
    return [stage.steps for stage in plan.stages]


def test_no_decision_leaves_the_plan_alone():
    assert decided_plan(PLAN, []) == PLAN


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([boundary(1, 4)], [4, 21, 32, 43]),
        ([boundary(2, 15)], [10, 5, 36, 49]),
        ([boundary(1, 4), boundary(2, 10)], [4, 6, 38, 52]),
        ([boundary(3, 59)], [10, 20, 29, 41]),
    ],
)
def test_steps_that_are_left_go_to_the_later_stages_in_proportion(taken, expected):
    plan = decided_plan(PLAN, taken)
    assert lengths(plan) == expected and plan.total_steps == 100
    assert [stage.depth for stage in plan.stages] == [2, 4, 6, 8]
    assert [s.grow_map for s in plan.stages] == [s.grow_map for s in PLAN.stages]
    assert plan.growth_steps == tuple(stage.start for stage in plan.stages[1:])


def test_a_boundary_at_its_own_step_changes_nothing():
    assert decided_plan(PLAN, [boundary(2, 30)]) == PLAN


def test_a_choice_changes_one_growth_and_no_length():
    way = Candidate.of({"operator": "gradstack", "init": "identity", "moments": "zero"})
    choice = choice_of(way, PLAN, 2, GROWTH)
    plan = decided_plan(PLAN, [boundary(1, 4), choice])
    assert plan.stages[2].grow_map.sources == (0, 1, 2, 3, 2, 3)
    assert plan.stages[2].operator == "gradstack"
    assert lengths(plan) == lengths(decided_plan(PLAN, [boundary(1, 4)]))
    assert decided_growth(GROWTH, [choice], 2).moments == "zero"
    assert decided_growth(GROWTH, [choice], 1) == GROWTH


def test_new_layers_survive_the_record():
    choice = json.loads(json.dumps(choice_of(Candidate.of("inherit_first"), PLAN, 1, GROWTH)))
    assert decided_plan(PLAN, [choice]).stages[1].grow_map.sources == (0, 1, -1, -1)


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ([boundary(4, 50)], "stage 5, but the plan has 4"),
        ([boundary(2, 10)], "cannot begin at step 10"),
        ([boundary(3, 100)], "cannot begin at step 100"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused(taken, said):
    with pytest.raises(UserError, match=said):
        decided_plan(PLAN, taken)


def test_candidates_that_are_the_same_growth_are_found():
    ways = [Candidate.of(way) for way in (
        "midas", "gradstack", "interleave", {"operator": "midas", "init": "identity"}
    )]
    assert alike(ways, PLAN, 1, GROWTH) == [
        ["midas", "gradstack"], ["interleave"], ["midas identity"]
    ]
    assert alike(ways, PLAN, 2, GROWTH) == [
        ["midas"], ["gradstack"], ["interleave"], ["midas identity"]
    ]


# ---- What is on disk --------------------------------------------------------------------


def test_what_is_recorded_is_read_again_in_the_order_of_the_run(tmp_path):
    kept = Decisions.open(tmp_path)
    assert kept.taken == () and decisions.read(tmp_path) == []
    kept.record(boundary(1, 4))
    kept.record(choice_of(Candidate.of("midas"), PLAN, 1, GROWTH))
    kept.record(boundary(2, 9))
    again = Decisions.open(tmp_path)
    assert again.taken == kept.taken and len(again.taken) == 3
    assert again.chosen(1)["candidate"] == "midas" and again.chosen(2) is None
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.jsonl"]


def test_where_the_file_is_gone_the_checkpoint_s_decisions_count(tmp_path):
    kept = [boundary(1, 4), boundary(2, 9)]
    assert Decisions.open(tmp_path, kept).taken == tuple(kept)
    Decisions.open(tmp_path, kept[:1]).record(boundary(2, 8))
    assert [d["step"] for d in Decisions.open(tmp_path, kept).taken] == [4, 8]


def test_a_failed_write_leaves_the_old_record_and_takes_no_decision(tmp_path, monkeypatch):
    kept = Decisions.open(tmp_path)
    kept.record(boundary(1, 4))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decisions.os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        kept.record(boundary(2, 9))
    monkeypatch.undo()
    assert kept.taken == Decisions.open(tmp_path).taken == (boundary(1, 4),)
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.jsonl"]


def test_a_record_that_cannot_be_read_stops_the_run(tmp_path):
    (tmp_path / "decisions.jsonl").write_text('{"kind": "bound')
    with pytest.raises(UserError, match="would decide anew"):
        Decisions.open(tmp_path)


def test_decisions_lie_in_object_stores_too(bucket):
    run_dir = open_path("gs://bucket/runs/a")
    kept = Decisions.open(run_dir)
    kept.record(boundary(1, 4))
    kept.record(boundary(2, 9))
    assert Decisions.open(run_dir).taken == kept.taken


PROGRAM = """
import sys
from pathlib import Path
import jax
process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from stacking_jax.training.decisions import Decisions, read
kept = Decisions.open(folder / str(process))  # Only process 0's is looked at.
taken = kept.record({"kind": "boundary", "stage": 1, "step": 5 + process, "spent": 0.1 + process})
assert read(folder / "0") == [taken], taken
print(taken["step"], taken["spent"], [d["step"] for d in kept.taken])
"""


@pytest.mark.slow
def test_two_processes_act_on_what_process_0_has_decided(tmp_path):
    """Although each has seen something else; and it is on disk before either goes on."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "1" / "decisions.jsonl").write_text(json.dumps(boundary(2, 7)) + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), str(port), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            said, messages = process.communicate(timeout=240)
            assert process.returncode == 0, messages
            assert said.split("\n")[0] == "5 0.1 [5]"
    finally:
        for process in processes:
            process.kill()
