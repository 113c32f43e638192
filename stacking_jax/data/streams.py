"""The endless order in which one source gives its training records.

Grain's `MapDataset` shuffles each pass over the records anew. Under UL2 every
pass has records of its own, and how many differs a little from pass to pass.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from stacking_jax.data.cache import PackedCache
from stacking_jax.data.records import RecordReader


class RecordStream:
    """Position in the stream -> where the record lies; a pure function of the seed.

    Args:
      cache: of one source.
      split: usually "train".
      seed: of the order.
      name: of the source within a mixture; "" for a source alone. Sources of one
        mixture have orders of their own.
      chosen: from the number of a pass to the records of it that are read; None for all.
    """

    def __init__(
        self, cache: PackedCache, split: str, seed: int, name: str = "",
        chosen: Callable[[int], Sequence[int]] | None = None,
    ):
        self._cache, self._split, self._chosen = cache, split, chosen
        # A hash keeps runs with neighbouring seeds from replaying each other's passes,
        # since Grain shuffles pass e with seed + e.
        text = f"records {seed} {name}" if name else f"records {seed}"
        self._seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        self._starts = [0]
        self._passes: list[tuple[RecordReader, Any]] = []
        self._lock = threading.Lock()
        self._add_pass()
        self.records_per_pass = self._starts[1]

    def locate(self, position: int) -> tuple[RecordReader, int]:
        """(the reader, the record's number in it) of a position counted from 0."""
        number, record = self.place(position)
        return self._passes[number][0], record

    def place(self, position: int) -> tuple[int, int]:
        """(the cache's pass, the record's number in it) of a position counted from 0."""
        if not self._cache.varies:
            return 0, int(self._passes[0][1][position])
        self.reach(position)
        number = bisect.bisect_right(self._starts, position) - 1
        return number, int(self._passes[number][1][position - self._starts[number]])

    def reach(self, position: int) -> None:
        """Opens, or makes, every pass up to the one that holds `position`."""
        while self._cache.varies and self._starts[-1] <= position:
            with self._lock:
                if self._starts[-1] <= position:
                    self._add_pass()

    def passes(self, records: int) -> float:
        """How often the source is read when so many records are taken from it."""
        if not self._cache.varies:
            return records / self.records_per_pass
        if records == 0:
            return 0.0
        self.reach(records - 1)
        number = bisect.bisect_right(self._starts, records - 1) - 1
        size = self._starts[number + 1] - self._starts[number]
        return number + (records - self._starts[number]) / size

    def _add_pass(self) -> None:
        import grain

        number = len(self._passes)
        reader = self._cache.train_pass(number).reader(self._split)
        if self._chosen is None:
            order = grain.MapDataset.range(len(reader))
        else:
            order = grain.MapDataset.source(list(self._chosen(number)))
        records = len(order)
        if self._cache.varies:
            order = order.shuffle(seed=(self._seed + number) % 2**32)
        else:
            order = order.shuffle(seed=self._seed).repeat()
        self._passes.append((reader, order))
        self._starts.append(self._starts[-1] + records)
