"""Fits find the law that made the numbers; intervals cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stacking_jax.lab.claims import Claim
from stacking_jax.lab.statistics import Interval, depth_to_reach, fit_law, interval

KAPPAS = (4, 16, 64, 256)


@pytest.mark.parametrize("law, other, f", [("sqrt", "log", math.sqrt), ("log", "sqrt", math.log)])
def test_the_law_that_made_the_depths_fits_them(law, other, f):
    depths = [1 + 0.5 * f(kappa) for kappa in KAPPAS]
    right, wrong = fit_law(KAPPAS, depths, law), fit_law(KAPPAS, depths, other)
    assert right["residual"] < 1e-9 and wrong["residual"] > 0.05
    assert math.isclose(right["slope"], 0.5) and math.isclose(right["offset"], 1.0)


def test_depth_is_interpolated_in_the_logarithm_of_the_loss():
    depth, sign = depth_to_reach([1, 3], [1.0, 0.01], 0.1)
    assert (depth, sign) == (pytest.approx(2.0), "=")
    # A deeper stack that diverged does not undo what a shallower one has reached.
    again = depth_to_reach([1, 2, 4], [0.9, 0.01, math.inf], 0.1)
    assert again == depth_to_reach([1, 2], [0.9, 0.01], 0.1) and again.known


def test_a_depth_outside_those_trained_is_a_bound():
    below, above = (
        depth_to_reach([2, 4], [0.05, 0.01], 0.1), depth_to_reach([1, 2, 4], [0.9, 0.5, 0.2], 0.1)
    )  # fmt: skip
    assert below == (2.0, "<=") and above == (4.0, ">")
    assert not below.known and not above.known


def test_an_interval_covers_its_mean_19_times_of_20():
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    inside = np.mean([of.low <= 0 <= of.high for of in map(interval, draws)])
    assert abs(inside - 0.95) < 0.02


def test_one_value_has_no_interval_and_is_no_evidence():
    found = interval([1.5, None, math.inf])
    assert found == Interval(1.5, None, None, 1)
    assert Claim("k", "t", "s", "m", found).verdict == "no evidence"


@pytest.mark.parametrize("low, high, below, verdict", [
    (0.1, 0.3, False, "holds"), (-0.3, -0.1, False, "does not hold"),
    (-0.1, 0.1, False, "no evidence"), (-0.3, -0.1, True, "holds"),
    (0.1, 0.3, True, "does not hold"),
])  # fmt: skip
def test_verdicts(low, high, below, verdict):
    value = Interval((low + high) / 2, low, high, 4)
    assert Claim("k", "t", "s", "m", value, below=below).verdict == verdict
