from __future__ import annotations

import math

from stacking_jax.reporting import read_run
from stacking_jax.reporting.curves import depth_steps, loss_limits, smooth, thin


def test_smoothing_keeps_a_line_a_line():
    line = [3.0 - 0.1 * i for i in range(30)]
    # The last points lose half of their window and with it the exactness on a slope.
    assert all(math.isclose(a, b) for a, b in zip(smooth(line, [1] * 30, 4)[:-4], line))
    assert smooth([2.0] * 9, [1] * 9, 3) == [2.0] * 9


def test_smoothing_does_not_reach_across_a_growth():
    values = [1.0] * 10 + [5.0] * 10
    assert smooth(values, [1] * 10 + [2] * 10, 6) == values
    assert smooth(values, [1] * 20, 6) != values


def test_smoothing_passes_over_what_is_not_finite():
    assert smooth([1.0, math.nan, 1.0, math.inf, 1.0], [0] * 5, 2) == [1.0] * 5
    assert math.isnan(smooth([math.nan], [0], 2)[0])


def test_thinning_keeps_peaks_and_order():
    x = list(range(10_000))
    y = [0.0] * 10_000
    y[1234], y[8765] = 7.0, -7.0
    kept_x, kept_y = thin(x, y, 200)
    assert len(kept_x) <= 200 and kept_x == sorted(kept_x)
    assert (max(kept_y), min(kept_y)) == (7.0, -7.0)
    assert thin([1, 2], [3.0, 4.0], 200) == ([1, 2], [3.0, 4.0])


def test_the_loss_axis_shows_the_ends_and_says_what_it_cuts(demo_runs):
    runs = [read_run(path) for path in demo_runs]
    limits = loss_limits(runs)
    for run in runs:
        assert limits.low < run.eval_loss < limits.high
    assert limits.cut == max(row["loss"] for run in runs for row in run.train) > limits.high


def test_limits_of_runs_without_a_point(make_run):
    path = make_run("new", summary=False)
    (path / "metrics.jsonl").write_text("")
    limits = loss_limits([read_run(path)])
    assert limits.low < limits.high and limits.cut is None


def test_depth_steps(demo_runs):
    assert depth_steps(read_run(demo_runs[0])) == [(0, 2), (10, 4), (50, 6), (140, 8)]
    assert depth_steps(read_run(demo_runs[1])) == [(0, 8)]
