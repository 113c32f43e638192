"""The time of an arm: what is in it, and that the machine that it ran on does not decide it."""

from __future__ import annotations

import json

import pytest

from stacking_jax import cli
from stacking_jax.study.results import read_study

STEPS = 50 * 0.04 + 50 * 0.08


def midas_of(study):
    return read_study(study).arms["midas"]


def test_boundaries_count_where_nothing_grows(make_study):
    """A path that grows longer, a teacher that leaves: there is an account, and no growth."""
    arm = midas_of(make_study(midas=lambda seed: {"grows": False}))
    assert arm.seconds == pytest.approx(STEPS + 1.0)
    assert [boundary.start for boundary in arm.clocks[0].boundaries] == [50]


def test_a_boundary_without_an_account_is_not_said_to_cost_nothing(make_study):
    folder = make_study(midas=lambda seed: {"grows": False})
    for metrics in folder.glob("cells/midas/*/metrics.jsonl"):
        lines = metrics.read_text().splitlines()
        metrics.write_text("\n".join(line for line in lines if '"boundary"' not in line) + "\n")
    arm = midas_of(folder)
    assert arm.clocks[0].boundaries == ((50, None, 0.0),)
    assert arm.seconds == pytest.approx(STEPS)


def test_a_teacher_has_a_time_of_its_own_that_a_busy_machine_does_not_decide(make_study):
    arm = midas_of(make_study(midas=lambda seed: {"teacher": True}, slow={2: 3.0}))
    assert arm.seconds == pytest.approx(100 * 0.02 + STEPS + 1.0)
    assert arm.clocks[0].at(0) == pytest.approx(2.0)  # It comes before the first step.


def test_trials_cost_their_steps_where_they_were_made(make_study):
    """Not the seconds that they took, of which the decisions here say ten thousand."""
    clock = midas_of(make_study(midas=lambda seed: {"tried": 20.0})).clocks[0]
    assert clock.at(50) == pytest.approx(2.0)
    assert clock.at(51) == pytest.approx(2.0 + 1.0 + 20 * 0.08 + 0.08)
    assert clock.total == pytest.approx(STEPS + 1.0 + 20 * 0.08)


def test_seeds_that_decide_when_to_grow_have_their_own_stages(make_study):
    shapes = {0: (40, 60), 1: (50, 50), 2: (60, 40), 3: (70, 30)}
    arm = midas_of(make_study(midas=lambda seed: {"shape": ((4, 8), shapes[seed])}))
    for seed, (first, second) in shapes.items():
        assert arm.clocks[seed].total == pytest.approx(first * 0.04 + second * 0.08 + 1.0)
    totals = sorted(clock.total for clock in arm.clocks.values())
    assert arm.seconds == pytest.approx((totals[1] + totals[2]) / 2)
    spent = [1e9 * (4 * first + 8 * second) for first, second in shapes.values()]
    assert arm.model_flops == pytest.approx((spent[1] + spent[2]) / 2)


def test_the_report_has_a_row_for_every_boundary(make_study):
    shapes = {0: (40, 60), 1: (50, 50), 2: (60, 40), 3: (70, 30)}
    folder = make_study(
        midas=lambda seed: {"grows": False, "tried": 20.0, "shape": ((4, 8), shapes[seed])}
    )
    assert cli.main(["study", "--report", "--run_dir", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "40 to 70" in page and ">1.6 s<" in page
    results = json.loads((folder / "results.json").read_text())
    assert results["arms"]["midas"]["seconds"] > 0
