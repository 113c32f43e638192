"""The table of a plan on a topology."""

from __future__ import annotations

import copy

import pytest

from stacking_jax.reporting.topology_table import (
    bytes_text,
    gibibytes,
    seconds_text,
    topology_cells,
    topology_table,
)

GIB = 2**30
COST = {"days": 10.0, "chip_hours": 2000.0, "price": 8000.0, "currency": "EUR"}


def stage(depth, **other):
    return {
        "depth": depth, "steps": 1000, "hbm_peak_bytes": 3 * GIB, "hbm_limit_bytes": 16 * GIB,
        "fits": True, "argument_bytes": GIB, "compile_seconds": 65.0, "bound_by": "compute",
        "collective_bytes": {"all-gather": 2e9, "all-reduce": 5e8}, "mfu_estimate": 0.61,
        "step_seconds_estimate": 0.432, "loops_known": True,
    } | other


@pytest.fixture
def plan():
    return copy.deepcopy({
        "topology": {
            "name": "v5e:2x2", "chips": 4, "method": "compiler", "label": "roofline, unverified",
            "rates": "published", "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        },
        "stages": [stage(2), stage(4)],
        "baseline": stage(4) | {"estimate": COST | {"days": 12.5, "chip_hours": 2500.0,
                                                    "price": 10_000.0}},
        "estimate": COST,
        "saving": {"days": 2.5, "chip_hours": 500.0, "price": 2000.0},
    })


def test_memory_time_and_money(plan):
    text = topology_table(plan)
    for part in (
        "On v5e:2x2: 4 chips, mesh fsdp=4", "3.00", "16.00", "1 m 05 s", "2.5 GB", "432 ms",
        "61.0 %", "roofline, unverified", "2 GB all-gather, 500 MB all-reduce",
        "10 days, 2,000 chip-hours, 8,000 EUR", "12.5 days, 2,500 chip-hours, 10,000 EUR",
        "growing saves 2.5 days, 500 chip-hours, 2,000 EUR: 20.0 % of it",
    ):
        assert part in text, part
    assert [row[0] for row in topology_cells(plan).rows] == ["1", "2", "full"]


def test_a_stage_that_does_not_fit_is_marked(plan):
    plan["stages"][1] |= {
        "fits": False, "hbm_peak_bytes": 40 * GIB, "collective_bytes": None, "bound_by": None,
        "step_seconds_estimate": None, "mfu_estimate": None,
    }
    plan["estimate"] = dict.fromkeys(COST)
    plan["saving"] = dict.fromkeys(("days", "chip_hours", "price"))
    cells = topology_cells(plan)
    assert cells.marked == (False, True, False)
    assert "40.00" in cells.rows[1] and "NO" in cells.rows[1]
    assert any("not known" in line for line in cells.lines)
    assert not any("saves" in line for line in cells.lines)
    assert any("the compiler's error" in line for line in cells.lines)
    plan["topology"]["method"] = "formula"
    assert not any("compiler's error" in line for line in topology_cells(plan).lines)


def test_what_was_measured_stands_beside_what_was_predicted(plan):
    for each in [*plan["stages"], plan["baseline"]]:
        each["step_seconds_measured"] = 0.864
    assert "864 ms" in topology_table(plan) and "2.00×" in topology_table(plan)


def test_a_run_without_growth_has_no_second_row(plan):
    plan["stages"] = plan["stages"][1:]
    cells = topology_cells(plan)
    assert len(cells.rows) == 1 and not any("growing" in line for line in cells.lines)


def test_a_loop_of_unknown_length_is_said(plan):
    plan["stages"][0]["loops_known"] = False
    assert "could not be read" in topology_table(plan)


@pytest.mark.parametrize(
    ("text", "value"),
    [("9.27 GB", 9.27e9), ("0 B", 0), ("999 B", 999), ("1 kB", 999.6), ("12.3 TB", 1.23e13),
     ("–", None)],
)  # fmt: skip
def test_bytes(text, value):
    assert bytes_text(value) == text


def test_small_and_large_numbers():
    assert gibibytes(95.74 * GIB) == "95.74" and gibibytes(0.019 * GIB) == "0.019"
    assert seconds_text(0.0123) == "12.3 ms" and seconds_text(1.389) == "1.39 s"


def test_what_the_steps_leave_out_is_said(plan):
    plan |= {"teacher": {"trained_within_the_run": True}, "choice_flops": 1e12}
    text = " ".join(topology_table(plan).split())
    assert "steps, without the training of its teacher and what trying candidates takes: 10" in text
    plan["teacher"]["trained_within_the_run"] = False
    text = " ".join(topology_table(plan | {"choice_flops": None}).split())
    assert "the run's steps: 10 days" in text


def test_what_runs_stands_beside_what_is_stored(plan):
    assert "runs" not in topology_cells(plan).header, "only where the two differ"
    looped = stage(2, run_depth=8)
    full = stage(8, run_depth=8) | {"estimate": plan["baseline"]["estimate"]}
    cells = topology_cells(plan | {"stages": [looped], "baseline": full})
    assert cells.header[:3] == ("stage", "depth", "runs")
    assert [row[:3] for row in cells.rows] == [("1", "2", "8"), ("full", "8", "8")]
    assert {len(row) for row in cells.rows} == {len(cells.header)} == {len(cells.left)}
    assert any("this method saves 2.5 days" in line for line in cells.lines)
    for each in (looped, full):
        each["step_seconds_measured"] = 0.864
    measured = topology_cells(plan | {"stages": [looped], "baseline": full})
    at = measured.header.index("measured")
    assert measured.header[at - 1] == "step" and measured.rows[0][at] == "864 ms"


def test_a_method_may_cost_more(plan):
    plan |= {"stages": [stage(4), stage(4)], "saving": {
        "days": -1.25, "chip_hours": -250.0, "price": None,
    }}
    plan["estimate"] = COST | {"price": None}
    [said] = [line for line in topology_cells(plan).lines if "this method" in line]
    assert said == "this method costs 1.25 days, 250 chip-hours more: 10.0 % of it"
