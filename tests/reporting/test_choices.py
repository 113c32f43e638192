"""Decisions as tables, and the page of a study of lags."""

from __future__ import annotations

import datetime
import json

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting.choices import choices_section, ranking_table, reason
from stacking_jax.reporting.comparison import compare_runs
from stacking_jax.reporting.lag import draw, reading, study_table, write_png, write_report
from stacking_jax.reporting.runs import read_run

CHOICE = {
    "kind": "choice", "stage": 1, "step": 3, "from_depth": 2, "to_depth": 4, "lag": 2,
    "candidate": "midas", "operator": "midas", "map": [0, 1, 0, 1], "growth": {},
    "verdict": "midas has the lowest held-out loss, below every other one (95% intervals)",
    "cost": {"steps": 8.0, "flops": 1e9, "seconds": 2.0},
    "ranking": [
        {"name": "midas", "loss": 3.0, "loss_at_growth": 3.5},
        {
            "name": "<b>other</b>", "loss": 3.25, "loss_at_growth": 3.4, "difference": 0.25,
            "low": 0.2, "high": 0.3, "batches": 4, "distinguishable": True,
        },
        {"name": "gone", "loss": None, "loss_at_growth": None},
    ],
}
BOUNDARY = {
    "kind": "boundary", "stage": 2, "step": 8, "reason": "plateau", "improvement": 0.001,
    "threshold": 0.005, "window": 4,
}


def test_the_ranking_shows_both_losses_and_how_sure_the_order_is():
    text = ranking_table(CHOICE)
    assert "Step 3, 2 to 4 layers, after 2 steps" in text and "below every other one" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "midas", "3.5000", "3.0000"] in lines
    other = next(line for line in lines if "<b>other</b>" in line)
    assert other[-4:] == ["+0.2500", "+0.2000", "to", "+0.3000"]
    assert any("gone" in line and "diverged" in line for line in lines)


@pytest.fixture
def run(tmp_path):
    """A run directory with two decisions."""
    plan = {"stages": [{"depth": depth, "steps": 4} for depth in (2, 4, 6)], "total_steps": 12}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    text = "".join(json.dumps(decision) + "\n" for decision in (CHOICE, BOUNDARY))
    (tmp_path / "decisions.jsonl").write_text(text)
    return tmp_path


def test_the_report_tells_every_decision_and_escapes_names(run):
    page = choices_section(compare_runs([read_run(run)]))
    assert "Decided while running" in page and "begins at a plateau" in page
    assert "&lt;b&gt;other&lt;/b&gt;" in page and "<b>other" not in page
    assert "+0.2000 to +0.3000" in page and "diverged" in page


def test_a_run_without_decisions_has_no_such_part(run):
    (run / "decisions.jsonl").unlink()
    assert choices_section(compare_runs([read_run(run)])) == ""


@pytest.mark.parametrize("text", ["{", '{"kind": "choice"}', '{"kind":"x","stage":1,"step":2}'])
def test_a_broken_record_is_named(run, text):
    (run / "decisions.jsonl").write_text(text)
    with pytest.raises(UserError, match="decisions.jsonl") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def test_why_a_stage_begins_is_said_in_words():
    assert "fell by 0.10%" in reason(BOUNDARY) and "less than 0.50%" in reason(BOUNDARY)
    spent = {"reason": "seconds", "spent": 61.0, "budget": 60.0}
    assert "61 seconds of 60" in reason(spent)
    assert reason({"reason": "select"}) == "begins here (select)"


@pytest.fixture
def study() -> dict:
    lags = [0, 1, 4, 16]
    curve = [
        {
            "lag": lag, "spearman": value, "spearman_low": value - 0.1,
            "spearman_high": min(value + 0.1, 1.0), "kendall": value / 2,
            "kendall_low": None, "kendall_high": None, "best_is_best": lag > 1,
        }
        for lag, value in zip(lags, (-0.4, 0.2, 0.8, 1.0), strict=True)
    ]
    candidates = [
        {"name": name, "losses": [4.0, 3.9, 3.8, 3.7], "final_loss": final}
        for name, final in (("midas", 3.0), ("gradstack", 2.9), ("<i>x</i>", None), ("lidas", 3.1))
    ]
    return {
        "run": "runs/demo", "step": 100, "stage": 2, "from_depth": 4, "to_depth": 6,
        "total_steps": 320, "lags": lags, "seed": 0, "candidates": candidates, "curve": curve,
        "chance": 0.8, "resamples": 1000, "same": [],
    }


def test_a_study_says_what_is_beyond_chance_and_what_is_not(study):
    assert "0.80 or less" in reading(study) and "exceeded at lags 16" in reading(study)
    for row in study["curve"]:
        row["spearman"] = 0.5
    assert "exceeded at no lag" in reading(study)
    study["chance"] = 1.0
    assert "no rank correlation is beyond chance" in reading(study)
    assert "one seed" in reading(study)


def test_the_table_of_a_study_has_a_line_per_lag_and_the_ends_in_order(study):
    text = study_table(study)
    assert "gradstack 2.9000, midas 3.0000, lidas 3.1000" in text
    assert any(line.split()[:2] == ["16", "+1.00"] for line in text.splitlines())


def test_the_page_stands_alone_and_the_picture_is_one(study, tmp_path):
    now = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    page = write_report(study, tmp_path / "lag.html", now).read_text(encoding="utf-8")
    assert page.count("<svg class=\"plot\"") == 2 and "2026-01-02" in page
    assert "&lt;i&gt;x&lt;/i&gt;" in page and "<i>x" not in page
    assert "http" not in page.replace("http-equiv", "")
    write_png(study, tmp_path / "lag.png")
    assert (tmp_path / "lag.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_drawn_curve_is_that_of_the_data(study):
    *_, figure = draw(study)[1]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["Spearman"].get_ydata()) == [-0.4, 0.2, 0.8, 1.0]
    assert list(lines["Kendall"].get_xdata()) == [0, 1, 4, 16]
