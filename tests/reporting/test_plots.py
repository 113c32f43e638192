from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from stacking_jax.reporting import compare_runs, read_run
from stacking_jax.reporting.plots import COLORS, draw_figures, run_style

MIDAS = {"depths": (2, 4, 6, 8), "steps": (10, 40, 90, 160)}


def _figures(*paths):
    comparison = compare_runs([read_run(path) for path in paths])
    return {figure.key: figure for figure in draw_figures(comparison)}


def test_every_figure_is_well_formed_and_the_same_each_time(demo_runs):
    first, again = _figures(*demo_runs), _figures(*demo_runs)
    assert first == again
    for figure in first.values():
        assert ElementTree.fromstring(figure.svg).tag == "svg"
        assert figure.title and figure.caption.endswith(".")


def test_each_run_has_its_colour_in_each_curve(demo_runs):
    figures = _figures(*demo_runs)
    for key in ("step", "model_flops", "train_seconds", "wall_seconds", "depth", "speed"):
        for color in COLORS[:3]:
            assert color.lower() in figures[key].svg.lower(), (key, color)
        assert COLORS[3].lower() not in figures[key].svg.lower()


def test_a_boundary_stands_where_the_run_grew(make_run):
    svg = _figures(make_run("midas", **MIDAS))["step"].svg
    dotted = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*stroke-dasharray', svg)
    xs = sorted({float(a) for a, b in dotted if a == b})
    assert len(xs) == 3
    # The white ground of the axes begins at step 0 and ends 2 % after the last step.
    ground = re.search(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*" style="fill: #ffffff', svg)
    left, right = map(float, ground.groups())
    steps = [306 * (x - left) / (right - left) for x in xs]
    assert steps == pytest.approx([10, 50, 140], abs=0.1)


def test_the_caption_says_what_is_out_of_view(demo_runs):
    figures = _figures(*demo_runs)
    assert re.search(r"loss axis ends at \d\.\d\d: the first steps, up to \d\.\d\d",
                     figures["step"].caption)  # fmt: skip
    assert "Strips" in figures["step"].caption


def test_full_depth_alone_has_no_strips(make_run):
    assert "Strips" not in _figures(make_run("full"))["step"].caption


def test_only_ends_that_may_be_compared_are_drawn_as_ends(demo_runs, make_run):
    live = make_run("live", until=97, summary=False, **MIDAS)
    svg = _figures(*demo_runs, live)["ends"].svg.lower()
    assert COLORS[2].lower() in svg and COLORS[3].lower() not in svg
    assert "ends" not in _figures(demo_runs[0], live), "one point is no comparison"


def test_more_runs_than_colours_still_differ():
    styles = [run_style(i) for i in range(2 * len(COLORS))]
    assert len({(s["color"], str(s["linestyle"])) for s in styles}) == len(styles)


def test_the_users_own_matplotlib_settings_stay_out(make_run):
    path = make_run("a")
    plain = _figures(path)["step"].svg
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.grid": False, "font.size": 30}):
        assert _figures(path)["step"].svg == plain
