"""Means over sources."""

from __future__ import annotations

import pytest

from stacking_jax.analysis.sums import Sums


def test_sources_count_by_their_rates_and_not_by_their_tokens():
    sums = Sums({"a": 0.25, "b": 0.75, "unread": 0.5})
    sums.add("a", 10, loss=20.0)
    sums.add("a", 30, loss=100.0)
    sums.add("b", 5, loss=20.0)
    assert sums.mean("loss") == pytest.approx(0.25 * 3 + 0.75 * 4)
    assert sums.tokens == 45
