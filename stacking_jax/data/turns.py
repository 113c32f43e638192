"""Which source gives each record of a mixture whose rates change on the way.

Within a part of the stream sources take turns by `mixture.interleave`; each goes on where it
stood when the part before ended. So every source is still read in order, without gaps, and a
batch stays a pure function of its step.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from stacking_jax.data.mixture import interleave


class Turns:
    """Position in the stream -> source and position within it.

    Args:
      parts: (first position, rates from `mixture.whole_rates`) of each part, the first at 0.
    """

    def __init__(self, parts: Sequence[tuple[int, Sequence[int]]]):
        self._begins = [begin for begin, _ in parts]
        self._rates = [tuple(rates) for _, rates in parts]
        self._taken = [[0] * len(self._rates[0])]
        ends = zip(self._begins, self._begins[1:], strict=False)
        for (begin, end), rates in zip(ends, self._rates, strict=False):
            self._taken.append(_added(self._taken[-1], end - begin, rates))

    def at(self, place: int) -> tuple[int, int]:
        """(source, position within that source) of a position of the stream."""
        part = bisect.bisect_right(self._begins, place) - 1
        source, position = interleave(place - self._begins[part], self._rates[part])
        return source, self._taken[part][source] + position

    def counts(self, records: int) -> list[int]:
        """Records of each source among the first so many of the stream."""
        part = max(bisect.bisect_left(self._begins, records) - 1, 0)
        return _added(self._taken[part], records - self._begins[part], self._rates[part])


def _added(counts: Sequence[int], records: int, rates: Sequence[int]) -> list[int]:
    """The counts after so many more records at these rates."""
    found, remaining, left = [], sum(rates), records
    for before, rate in zip(counts, rates, strict=True):
        rest = left * (remaining - rate) // remaining if remaining else 0
        found.append(before + left - rest)
        remaining, left = remaining - rate, rest
    return found
