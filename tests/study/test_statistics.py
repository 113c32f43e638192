from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_jax.study import statistics

# Student's "Cushny and Peebles" data (Biometrika 1908): additional hours of sleep of ten
# patients. R: t.test(extra[1:10], extra[11:20], paired = TRUE).
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_students_own_data():
    found = statistics.paired(dict(enumerate(FIRST)), dict(enumerate(SECOND)))
    assert found.pairs == 10 and found.mean == pytest.approx(-1.58)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert found.p == pytest.approx(0.002832890, abs=5e-9)


@pytest.mark.parametrize(
    "freedom, quantile", [(1, 12.7062), (2, 4.3027), (5, 2.5706), (11, 2.2010), (30, 2.0423)]
)
def test_quantiles_are_those_of_printed_tables(freedom, quantile):
    assert statistics.t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)


def test_only_seeds_of_both_arms_form_pairs():
    found = statistics.paired({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.5, 0: 0.0, 7: 4.0})
    assert (found.pairs, found.mean) == (2, 0.75)
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None
    one = statistics.paired({0: 1.0}, {0: 3.0})
    assert (one.mean, one.low, one.p) == (-2.0, None, None)


def test_equal_differences_leave_no_doubt_and_no_difference_leaves_all():
    same = statistics.mean_of([0.5, 0.5, 0.5])
    assert (same.low, same.high, same.p) == (0.5, 0.5, 0.0)
    assert statistics.mean_of([0.0, 0.0]).p == 1.0


def test_holm_as_worked_by_hand():
    """0.01·4, 0.02·3, 0.03·2 and 0.04·1: the last two may not fall below the one before."""
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(ps):
    for p, adjusted in zip(ps, statistics.holm(ps), strict=True):
        assert p <= adjusted <= min(1.0, len(ps) * p)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [statistics.mean_of(row) for row in rng.normal(0.3, 1.0, (4000, 6)).tolist()]
    covered = np.mean([item.low <= 0.3 <= item.high for item in found])
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_halves_pair_seeds_in_their_order():
    found = statistics.halves({3: 1.0, 1: 4.0, 2: 2.0, 9: 3.0, 11: 50.0})
    assert (found.pairs, found.mean) == (2, ((4.0 - 1.0) + (2.0 - 3.0)) / 2)
    assert statistics.halves({0: 1.0}) is None


def test_power_is_that_of_a_published_example():
    """G*Power 3.1, matched pairs, two-sided: dz = 0.5 at alpha 0.05 needs 34 pairs (0.8078)."""
    assert statistics.t_power(0.5, 34) == pytest.approx(0.8077775, abs=1e-6)
    assert statistics.t_power(0.5, 33) < 0.8


def test_the_smallest_detectable_effect_is_found_with_that_power():
    rng = np.random.default_rng(1)
    effect = statistics.smallest_detectable(2.0, 6, alpha=0.01)
    draws = rng.normal(effect, 2.0, (4000, 6))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(6))
    found = np.mean(np.abs(t) > statistics.t_quantile(1 - 0.01 / 2, 5))
    assert abs(found - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 4000)
    assert statistics.smallest_detectable(2.0, 1) is None


def test_words_name_a_direction_only_with_an_interval():
    sure = statistics.mean_of([-1.0, -1.1, -0.9, -1.0])
    unsure = statistics.mean_of([-1.0, 1.1, -0.9, 1.2])
    assert statistics.words(sure) == "lower"
    assert statistics.words(unsure) == "not distinguishable"
    assert statistics.words(sure, adjusted=0.2) == "not distinguishable after the correction"
    assert statistics.words(statistics.mean_of([-5.0])) == "one pair of seeds: no interval"
