"""Means over held-out tokens of several sources, and what a change of one is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

CONFIDENCE = 0.95


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


@dataclasses.dataclass(frozen=True)
class Change:
    """How far a mean over tokens moved.

    Attributes:
      mean: of the differences per token.
      interval: its 95 % interval; None with fewer than two batches of a source.
    """

    mean: float
    interval: tuple[float, float] | None


def paired_change(
    differences: Mapping[str, np.ndarray], tokens: Mapping[str, np.ndarray],
    rates: Mapping[str, float],
) -> Change:
    """The change of a loss between two networks that read the same batches.

    A ratio of sums over clusters (Cochran 1977, §6.3, §11.1), a batch being a cluster: tokens
    of a batch are not independent. Sources are strata that count by their rates; Student's t
    with as many degrees of freedom as batches less sources.

    Args:
      differences: source -> float `[batches]`, sums over the tokens of each batch.
      tokens: source -> int `[batches]`.
      rates: source -> its share.
    """
    from scipy.stats import t

    total = sum(rates[name] for name in differences)
    mean = variance = 0.0
    for name, summed in differences.items():
        share, count = rates[name] / total, np.asarray(tokens[name], np.float64)
        summed = np.asarray(summed, np.float64)
        here = summed.sum() / count.sum()
        spread = np.sum((summed - here * count) ** 2) / count.sum() ** 2
        mean += share * here
        variance += share**2 * spread * len(summed) / max(len(summed) - 1, 1)
    if min(map(len, differences.values())) < 2:
        return Change(float(mean), None)
    freedom = sum(map(len, differences.values())) - len(differences)
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance))
    return Change(float(mean), (float(mean) - half, float(mean) + half))
