"""Stage boundaries in the report: lines of time on one scale."""

from __future__ import annotations

import json
import re

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import compare_runs, read_run
from stacking_jax.reporting.boundaries import boundaries_section

ROW = {
    "kind": "boundary", "step": 102, "start": 100, "depth": 8, "stage": 2,
    "seconds": {"step": 2.0, "compile": 1.0, "grow": 0.05}, "step_seconds": 2.0,
    "old_step_seconds": 1.0, "stall_seconds": 1.05, "stall_steps": 0.525,
    "spans": [["step", -1.0, 0.0], ["compile", 0.0, 1.0], ["grow", 1.0, 1.05],
              ["step", 1.05, 4.0]],
    "steps": [[99, -1.0], [100, 0.0], [101, 3.05], [102, 4.0]],
}  # fmt: skip


def with_row(path, **changes):
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROW | changes) + "\n")
    return path


def section(*paths) -> str:
    return boundaries_section(compare_runs([read_run(path) for path in paths]))


def test_a_line_is_as_long_as_its_time_and_zero_is_in_one_place(make_run):
    longer = [["step", -2.0, 0.0], ["step", 0.0, 8.0]]
    text = section(
        with_row(make_run("short", depths=(4, 8), steps=(100, 20))),
        with_row(make_run("long", depths=(4, 8), steps=(100, 20)), spans=longer, steps=[[100, 0]]),
    )
    lines = [
        [tuple(map(float, part)) for part in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", line)]
        for line in re.findall(r'<div class="times">(.*?)</div>', text)
    ]
    assert [sum(width for _, width in line) for line in lines] == pytest.approx([50, 100], abs=0.1)
    for line in lines:
        ends = [left + width for left, width in line]
        assert ends[:-1] == pytest.approx([left for left, _ in line[1:]], abs=0.01)
    zeros = re.findall(r'<u style="left:([\d.]+)%"', text)
    assert len(zeros) == 2 and set(zeros) == {"20.000"}
    assert text.count("end of step") == 4 + 1


def test_numbers_are_those_of_the_row(make_run):
    text = section(with_row(make_run("one", depths=(4, 8), steps=(100, 20))))
    numbers = [float(value) for value in re.findall(r'<data value="([^"]+)"', text)]
    assert numbers == [0.525, 1.05, 1.0, 0.05, 0.0, 1.0, 2.0]
    assert "to 8 layers, after step 100" in text and "50 ms" in text


def test_runs_without_a_boundary_have_no_section(make_run):
    assert section(make_run("flat")) == ""


@pytest.mark.parametrize(
    "changes",
    [{"spans": None}, {"spans": [["step", 1]]}, {"steps": [[1, "x"]]}, {"seconds": {"grow": "x"}},
     {"stall_steps": None}],
)
def test_a_row_that_cannot_be_drawn_is_named(make_run, changes):
    path = with_row(make_run("broken", depths=(4, 8), steps=(100, 20)), **changes)
    with pytest.raises(UserError, match="metrics.jsonl"):
        read_run(path)
