"""Where the time went, in the report."""

from __future__ import annotations

import json
import re

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import compare_runs, read_run
from stacking_jax.reporting.goodput import CATEGORIES, goodput_section, seconds_of

SECONDS = {
    "init": 4.0, "restore": 1.0, "compile": 15.0, "data": 2.0, "step": 60.0, "grow": 1.0,
    "evaluate": 3.0, "checkpoint": 4.0, "recomputed": 4.0, "down": 6.0,
}
RESTART = {"step": 120, "unix_time": 1e9, "down_seconds": 6.0, "recomputed_seconds": 4.0}


def keep_account(path, seconds=None, restarts=(RESTART,)):
    account = {"seconds": seconds or SECONDS, "restarts": list(restarts)}
    (path / "goodput.json").write_text(json.dumps(account))
    return path


def section(*paths) -> str:
    return goodput_section(compare_runs([read_run(path) for path in paths]))


def test_bars_are_on_one_scale_and_add_up(make_run):
    slow = keep_account(make_run("slow"))
    fast = keep_account(make_run("fast"), {"step": 20.0, "init": 5.0}, restarts=())
    text = section(slow, fast)
    bars = [
        [float(width) for width in re.findall(r"width:([\d.]+)%;", bar)]
        for bar in re.findall(r'<div class="bar">(.*?)</div>', text)
    ]
    assert [sum(bar) for bar in bars] == pytest.approx([100, 25])
    assert bars[0][0] == pytest.approx(60)
    numbers = [float(value) for value in re.findall(r'<data value="([^"]+)"', text)]
    assert {0.6, 0.8, 100.0, 25.0, *SECONDS.values()} <= set(numbers)
    assert "slow went on at step 120, 6.0 s down and 4.0 s done again" in text


def test_a_run_without_an_account_shows_its_totals(make_run):
    run = read_run(make_run("old"))
    seconds = seconds_of(run)
    assert set(seconds) == {"step", "compile", "rest"}
    assert sum(seconds.values()) == pytest.approx(run.wall_seconds)
    text = section(make_run("other"))
    assert "Rest" in text and "Down" not in text.split("<table")[0]


def test_every_category_of_training_has_a_name():
    from stacking_jax.training.goodput import LOST
    from stacking_jax.training.telemetry import Clock

    assert {*Clock.CATEGORIES, *LOST} <= set(CATEGORIES)
    assert len({color for _, color in CATEGORIES.values()}) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("seconds", "restarts", "part"),
    [
        ({"step": "x"}, [], "'step' is 'x', not a number"),
        ([1], [], "seconds must be an object"),
        ({}, [{"step": 3}], "lacks 'down_seconds'"),
    ],
)
def test_a_broken_account_is_named(make_run, seconds, restarts, part):
    path = make_run("broken")
    (path / "goodput.json").write_text(json.dumps({"seconds": seconds, "restarts": restarts}))
    with pytest.raises(UserError, match="goodput.json") as caught:
        read_run(path)
    assert part in str(caught.value)
