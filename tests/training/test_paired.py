"""Paired differences of held-out losses, against values known from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from stacking_jax.training.paired import (
    BatchLoss,
    mean_loss,
    paired_difference,
    ranking,
    verdict,
    weights_of,
)


def batches(losses, tokens=None, source="text", rate=1.0):
    tokens = tokens or [100] * len(losses)
    return [
        BatchLoss(source, rate, loss * count, count)
        for loss, count in zip(losses, tokens, strict=True)
    ]


def test_with_equal_batches_of_one_source_it_is_the_paired_t_interval():
    dice = np.random.default_rng(0)
    one, other = dice.normal(3.0, 0.5, 12), dice.normal(2.9, 0.5, 12)
    found = paired_difference(batches(one), batches(other))
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found["difference"] == pytest.approx((one - other).mean())
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high))
    assert found["batches"] == 12


def test_batches_count_by_their_tokens_and_sources_by_their_rates():
    mixed = batches([2.0, 4.0], [100, 300], "a", 0.75) + batches([1.0], [7], "b", 0.25)
    assert mean_loss(mixed) == pytest.approx(0.75 * 3.5 + 0.25 * 1.0)
    weights = weights_of(mixed)
    assert weights.sum() == pytest.approx(1)
    assert weights @ np.array([2.0, 4.0, 1.0]) == pytest.approx(mean_loss(mixed))


def test_what_is_common_to_both_does_not_widen_the_interval():
    hard = np.linspace(1, 9, 10)
    found = paired_difference(batches(hard + 0.25), batches(hard))
    assert (found["low"], found["high"]) == pytest.approx((0.25, 0.25))


def test_a_single_batch_says_nothing_of_its_own_uncertainty():
    found = paired_difference(batches([2.0]), batches([1.0]))
    assert found["difference"] == pytest.approx(1) and found["low"] is None


def test_coverage_is_near_its_promise():
    dice = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        counts = [int(count) for count in dice.integers(50, 150, 15)]
        one = dice.normal(0.1, 1.0, 15) + 5
        found = paired_difference(batches(one, counts), batches([5.0] * 15, counts))
        hits += found["low"] <= 0.1 <= found["high"]
    assert 0.91 <= hits / 400 <= 0.98


def test_the_ranking_names_what_cannot_be_told_apart_and_what_diverged():
    dice = np.random.default_rng(2)
    base, wobble = dice.normal(3, 1, 20), dice.normal(0, 0.3, 20)
    losses = {
        "worse": batches(base + 0.5 + 0.01 * wobble), "best": batches(base),
        "like it": batches(base + 0.001 + wobble - wobble.mean()),
        "gone": batches([math.nan] * 20),
    }
    rows = ranking(losses)
    assert [row["name"] for row in rows] == ["best", "like it", "worse", "gone"]
    assert [row.get("distinguishable") for row in rows] == [None, False, True, None]
    assert rows[-1]["loss"] is None
    said = verdict(rows)
    assert "cannot tell it from like it" in said and "gone diverged" in said
    assert "worse" not in said


def test_more_comparisons_need_wider_intervals():
    dice = np.random.default_rng(3)
    base = dice.normal(3, 1, 20)
    others = {f"c{i}": batches(base + 1 + dice.normal(0, 0.2, 20)) for i in range(4)}
    two = ranking({"best": batches(base), "c0": others["c0"]})
    many = ranking({"best": batches(base), **others})
    alone = next(row for row in two if row["name"] == "c0")
    among = next(row for row in many if row["name"] == "c0")
    assert among["high"] - among["low"] > alone["high"] - alone["low"]


# ---- Sums of differences per batch, of sources with rates ------------------------------------


def change_of(moved, tokens, rates):
    """The paired difference of networks whose losses on a batch differ by these sums."""
    one, other = (
        [
            BatchLoss(name, rates[name], float(nats) * times, int(count))
            for name in moved for nats, count in zip(moved[name], tokens[name], strict=True)
        ]
        for times in (1, 0)
    )
    return paired_difference(one, other)


def test_the_interval_is_that_of_a_paired_t_test_where_batches_are_equal():
    from scipy import stats

    random = np.random.default_rng(0)
    base, changed = random.normal(3, 1, 6), random.normal(3.2, 1, 6)
    found = change_of({"a": 100 * (changed - base)}, {"a": np.full(6, 100)}, {"a": 1.0})
    wanted = stats.ttest_rel(changed, base).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
    assert found["difference"] == pytest.approx((changed - base).mean())


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
        found = change_of(moved, tokens, {"a": 0.5, "b": 0.5})
        held += found["low"] < 0.3 < found["high"]
    assert 0.93 < held / 2000 < 0.985


def test_a_single_batch_has_no_interval():
    found = change_of({"a": np.array([6.0])}, {"a": np.array([3])}, {"a": 1.0})
    assert (found["difference"], found["low"], found["high"]) == (2.0, None, None)
