"""Means over held-out tokens of several sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Sums:
    """Adds up what batches give; a source counts by its rate, as in `HeldOut.evaluate`.

    Args:
      rates: source -> its share.
    """

    def __init__(self, rates: Mapping[str, float]):
        self._rates = dict(rates)
        self._tokens = dict.fromkeys(rates, 0)
        self._sums: dict[str, dict[str, np.ndarray]] = {name: {} for name in rates}

    def add(self, source: str, tokens: int, **values: Any) -> None:
        """Adds sums over so many tokens of a source; arrays keep their shape."""
        self._tokens[source] += int(tokens)
        here = self._sums[source]
        for name, value in values.items():
            here[name] = here.get(name, 0.0) + np.asarray(value, np.float64)

    @property
    def tokens(self) -> int:
        return sum(self._tokens.values())

    def mean(self, name: str) -> np.ndarray:
        """Per token, float64 in the shape in which it was added."""
        used = {source: rate for source, rate in self._rates.items() if self._tokens[source]}
        weighted = sum(
            rate * self._sums[source][name] / self._tokens[source]
            for source, rate in used.items()
        )
        return weighted / sum(used.values())
