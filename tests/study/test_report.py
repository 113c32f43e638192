from __future__ import annotations

import json
import re
import subprocess
import sys

from stacking_jax import cli
from stacking_jax.study.analysis import analyse
from stacking_jax.study.figures import study_figures
from stacking_jax.study.report import study_html
from stacking_jax.study.results import read_study


def page_of(folder) -> str:
    study = read_study(folder)
    analysis = analyse(study)
    return study_html(study, analysis, study_figures(study, analysis.declared))


def test_the_page_holds_every_part_and_fetches_nothing(make_study):
    page = page_of(make_study())
    for title in (
        "What was declared beforehand", "Arms", "Equal steps", "Equal FLOPs", "Equal time",
        "Time to equal loss", "Tasks", "Loss against tokens", "Loss against model FLOPs",
        "Loss against time", "Final held-out loss", "Final score", "Differences in held-out loss",
        "Primitives against loss", "Cost of the boundaries",
    ):
        assert f">{title}" in page, title
    assert not re.search(r'(?:src|href)="(?!#)|https?://', page)
    assert page.count("<svg") == page.count("</svg>")


def test_no_direction_without_an_interval(make_study):
    page = page_of(make_study(swing=0.5))
    table = page[page.index("What was declared"):page.index("<h2>Arms")]
    assert "not distinguishable" in table
    assert not re.search(r"<strong>(lower|higher)</strong>", table)
    one = page_of(make_study(folder="one", seeds=[0]))
    assert "one pair of seeds: no interval" in one and "<strong>lower" not in one


def test_only_arms_without_seeds_lack_an_interval(make_study):
    page = page_of(make_study(leave=[("midas", seed) for seed in range(4)]))
    assert "Fewer than two seeds, and so no interval: midas." in page


def test_names_are_text_whatever_they_hold(make_study):
    page = page_of(make_study(name="<script>alert(1)</script>"))
    assert "<script" not in page


def test_an_empty_study_has_a_report(make_study):
    cells = [(arm, s) for arm in ("full depth", "full depth, equal FLOPs", "midas")
             for s in range(4)]
    page = page_of(make_study(leave=cells))
    assert "0 of 12 cells complete" in page and "12 open" in page


def test_compare_reports_a_study(make_study, capsys):
    study = make_study()
    assert cli.main(["compare", str(study)]) == 0
    assert "midas − full depth, loss (equal steps): higher" in capsys.readouterr().out
    found = json.loads((study / "results.json").read_text())
    assert found["arms"]["midas"]["loss"]["0"] and (study / "report.html").exists()
    assert found["arms"]["midas"]["tasks"]["primitive/a"]["0"] is not None
    pictures = sorted((study / "figures").glob("*.png"))
    assert [path.stem for path in pictures] == [
        "study-differences-loss", "study-differences-score", "study-ends-loss",
        "study-ends-score", "study-model-flops", "study-time", "study-tokens",
    ]
    assert found["declared"][0]["found"]["pairs"] == 4
    assert cli.main(["compare", str(study), "--json", "--out", str(study / "other.html")]) == 0
    assert json.loads(capsys.readouterr().out) == found and (study / "other.html").exists()


def test_the_package_itself_is_light():
    code = "import sys, stacking_jax.study.config as c; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
