"""What a boundary cost, from the pieces of time that the clock has seen."""

from __future__ import annotations

import pytest

from stacking_jax.training.boundaries import account, seconds_between

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

# Old steps of 1 s, then 2 s of saving, 3 of evaluating, 4 of compiling, 0.5 of growing; new of 2 s.
SPANS = [
    ("step", 0.0, 10.0), ("checkpoint", 10.0, 12.0), ("evaluate", 12.0, 15.0),
    ("compile", 15.0, 19.0), ("grow", 19.0, 19.5), ("data", 19.5, 19.6), ("init", 19.6, 19.6001),
    ("step", 19.6001, 30.0),
]
DONE = [*((step, float(step)) for step in range(1, 11)), (11, 21.6), (12, 23.6), (13, 25.6)]


def test_a_stall_is_what_is_more_than_a_step():
    found = account(SPANS, DONE, 10, 13)
    assert found["step_seconds"] == pytest.approx(2.0)
    assert found["old_step_seconds"] == pytest.approx(1.0)
    assert sum(found["seconds"].values()) == pytest.approx(11.6)
    # All but the evaluation and one step: 11.6 - 3 - 2.
    assert found["stall_seconds"] == pytest.approx(6.6)
    assert found["stall_steps"] == pytest.approx(3.3)


def test_the_line_of_time_has_no_gaps_and_begins_and_ends_with_steps():
    found = account(SPANS, DONE, 10, 13)
    spans, steps = found["spans"], found["steps"]
    assert spans[0][1] == steps[0][1] == -2 and spans[-1][2] == steps[-1][1] == 15.6
    assert all(one[2] == other[1] for one, other in zip(spans, spans[1:], strict=False))
    assert [name for name, _, _ in spans] == [
        "step", "checkpoint", "evaluate", "compile", "grow", "data", "step"
    ]
    assert dict(steps)[10] == 0


def test_steps_are_counted_without_what_came_between_them():
    """An evaluation in the middle of the new stage's first steps is none of theirs."""
    spans = [("step", 0.0, 5.0), ("evaluate", 5.0, 50.0), ("step", 50.0, 60.0)]
    done = [(3, 2.0), (4, 3.0), (5, 4.0), (6, 51.0)]
    assert account(spans, done, 3, 6)["step_seconds"] == pytest.approx(1.5)


@pytest.mark.parametrize("missing", [10, 11, 12])
def test_what_has_not_been_seen_is_not_told(missing):
    done = [(step, when) for step, when in DONE if step != missing]
    assert account(SPANS, done, 10, 13) is None


def test_a_first_step_alone_tells_nothing():
    assert account(SPANS, DONE, 10, 11) is None


def test_seconds_between_are_cut_at_both_ends():
    assert seconds_between(SPANS, 9.5, 12.5) == {"step": 0.5, "checkpoint": 2.0, "evaluate": 0.5}


def test_a_run_tells_it_of_each_growth(reference, read_rows):
    [row] = read_rows(reference, "boundary")
    assert (row["start"], row["step"], row["stage"], row["depth"]) == (3, 5, 2, 4)
    assert {"compile", "grow", "step"} <= set(row["seconds"])
    ends = dict(map(tuple, row["steps"]))
    assert ends[3] == 0 and list(ends) == sorted(ends)
    assert sum(row["seconds"].values()) == pytest.approx(ends[4], abs=1e-5)
    assert row["stall_steps"] * row["step_seconds"] == pytest.approx(row["stall_seconds"])
