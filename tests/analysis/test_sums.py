"""Means over sources, and intervals of a change."""

from __future__ import annotations

import numpy as np
import pytest

from stacking_jax.analysis.sums import Sums, paired_change


def test_sources_count_by_their_rates_and_not_by_their_tokens():
    sums = Sums({"a": 0.25, "b": 0.75, "unread": 0.5})
    sums.add("a", 10, loss=20.0)
    sums.add("a", 30, loss=100.0)
    sums.add("b", 5, loss=20.0)
    assert sums.mean("loss") == pytest.approx(0.25 * 3 + 0.75 * 4)
    assert sums.tokens == 45


def test_the_interval_is_that_of_a_paired_t_test_where_batches_are_equal():
    from scipy import stats

    random = np.random.default_rng(0)
    base, changed = random.normal(3, 1, 6), random.normal(3.2, 1, 6)
    found = paired_change({"a": 100 * (changed - base)}, {"a": np.full(6, 100)}, {"a": 1.0})
    wanted = stats.ttest_rel(changed, base).confidence_interval(0.95)
    assert found.interval == pytest.approx((wanted.low, wanted.high))
    assert found.mean == pytest.approx((changed - base).mean())


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Batches of unlike size from two sources; 95 % ± what 2,000 trials leave open."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        tokens = {name: random.integers(50, 150, 5) for name in "ab"}
        moved = {
            name: count * random.normal(true, 0.3, 5)
            for (name, count), true in zip(tokens.items(), (0.1, 0.5), strict=True)
        }
        low, high = paired_change(moved, tokens, {"a": 0.5, "b": 0.5}).interval
        held += low < 0.3 < high
    assert 0.93 < held / 2000 < 0.985


def test_a_single_batch_has_no_interval():
    found = paired_change({"a": np.array([6.0])}, {"a": np.array([3])}, {"a": 1.0})
    assert (found.mean, found.interval) == (2.0, None)
