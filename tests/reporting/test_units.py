from __future__ import annotations

import math

import pytest

from stacking_jax.reporting import units


@pytest.mark.parametrize(
    "value, text",
    [
        (1.23e15, "1.23 PFLOP"),
        (0, "0 FLOP"),
        (999.4e12, "999 TFLOP"),
        (999.6e12, "1.00 PFLOP"),  # Never "1000 TFLOP".
        (12.34e9, "12.3 GFLOP"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_flops(value, text):
    assert units.flops(value) == text


@pytest.mark.parametrize(
    "value, text", [(12_345_678, "12.3 M"), (512, "512"), (1.48e9, "1.48 B"), (614_400, "614 K")]
)
def test_count(value, text):
    assert units.count(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (4.24, "4.2 s"),
        (59.96, "1 m 00 s"),  # Never "60.0 s".
        (92, "1 m 32 s"),
        (3599.7, "1 h 00 m"),
        (7512, "2 h 05 m"),
        (86_400 * 3 + 4 * 3600, "3 d 04 h"),
        (-92, "-1 m 32 s"),
        (None, "–"),
    ],
)
def test_duration(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    "largest, unit, expected",
    [
        (90.0, "time", (1.0, "seconds")),
        (260.0, "time", (60.0, "minutes")),
        (3600.0 * 9, "time", (3600.0, "hours")),
        (86400.0 * 5, "time", (86400.0, "days")),
        (155e12, "FLOP", (1e12, "TFLOP")),
        (4800, "tokens/s", (1e3, "K tokens/s")),
        (0, "tokens/s", (1, "tokens/s")),
    ],
)
def test_axis_scale(largest, unit, expected):
    assert units.axis_scale(largest, unit) == expected


def test_a_diverged_loss_is_not_hidden():
    assert [units.loss(v) for v in (math.nan, math.inf, None)] == ["NaN", "NaN", "–"]


def test_what_is_no_number_is_a_dash():
    assert {units.loss("2.1"), units.ratio(True), units.percent(math.inf)} == {"–"}


def test_groups_are_named_as_their_papers_do():
    assert units.group_title("gsm8k") == "GSM8K" and units.group_title("") == "Tasks"
    assert units.group_title("math_word") == "Math word"


def test_differences_and_p_values():
    assert units.difference(-0.04494, "loss") == "-0.0449"
    assert units.difference(4.7, "score") == "+4.7"
    assert units.difference(0.0889, "loss", sign=False) == "0.0889"
    assert units.p_value(0.03394) == "0.0339" and units.p_value(5e-5) == "< 0.0001"
    for nothing in (None, math.nan):
        assert units.difference(nothing, "loss") == units.p_value(nothing) == units.MISSING
