"""Batches as a pure function of seed and step.

Grain's `MapDataset` gives the order: position i of an endless stream of
records, shuffled over the whole split and anew in each pass. Step s is rows
s * B .. (s + 1) * B of that stream. There is no iterator state: a run that
resumes at a step, on any number of hosts, sees the batches it would have seen.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

from stacking_jax.data.cache import PackedCache
from stacking_jax.data.records import Batch, decode_batch, token_dtype
from stacking_jax.errors import UserError


class PackedBatches:
    """Batches of a split of a cache.

    Shuffled, the stream is endless; a batch may straddle two passes. In order,
    it is one pass: the last batch is filled up with rows of padding
    (segment ids 0) and no record is left out.

    Attributes:
      batch_size: rows of the global batch.
      sequence_length: columns of a batch.
      num_records: records of the split.
      num_batches: steps of one pass, the last one counted if it is partial.

    Args:
      cache: from `open_cache`.
      split: "train" or "validation".
      batch_size: rows of the global batch, over all hosts.
      seed: order of the records; None takes the configuration's `shuffle_seed`.
      shuffle: whether to shuffle.
      prefetch: batches that `iterate` keeps ready.

    Raises:
      UserError: the split has no records, or the batch size is not positive.
    """

    def __init__(
        self,
        cache: PackedCache,
        split: str = "train",
        *,
        batch_size: int,
        seed: int | None = None,
        shuffle: bool = True,
        prefetch: int = 8,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.sequence_length = cache.manifest.sequence_length
        self._reader = cache.reader(split)
        self._dtype = token_dtype(cache.manifest.vocab_size)
        self._prefetch = prefetch
        self.num_records = len(self._reader)
        self.num_batches = -(-self.num_records // batch_size)
        if seed is None:
            seed = cache.config.shuffle_seed if cache.config else 0
        self._order = self._make_order(seed)

    def _make_order(self, seed: int):
        import grain

        # Record numbers rather than records pass through Grain, so that a
        # batch's records can be read in bulk.
        order = grain.MapDataset.range(self.num_records)
        if self.shuffle:
            # Grain shuffles pass e with seed + e. A hash in between keeps runs
            # with neighbouring seeds from replaying each other's passes.
            mixed = hashlib.sha256(f"records {seed}".encode()).digest()[:4]
            order = order.shuffle(seed=int.from_bytes(mixed)).repeat()
        return order

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step.

        Args:
          step: counts from 0.
          rows: which rows of the global batch to read; None reads all. The
            rows of all hosts, put together, are the global batch.

        Returns:
          "tokens", "segment_ids" and "positions", int32 [rows, length].

        Raises:
          IndexError: a negative step, or one after the last of an ordered pass.
        """
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0.")
        if not self.shuffle and step >= self.num_batches:
            raise IndexError(f"step {step}: the pass in order has {self.num_batches} batches.")
        chosen = range(self.batch_size)[slice(None) if rows is None else rows]
        places = [step * self.batch_size + row for row in chosen]
        if not self.shuffle:
            # Padding rows come last in the batch, and so in any rising choice of rows.
            places = [place for place in places if place < self.num_records]
        records = self._reader.read([int(self._order[place]) for place in places])
        return decode_batch(records, len(chosen), self.sequence_length, self._dtype)

    def iterate(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """Pairs of step and batch from `start_step` on, read ahead in the background.

        Endless if shuffled; else to the end of the pass.
        """
        import grain

        stop = sys.maxsize if self.shuffle else self.num_batches
        if start_step >= stop:
            return iter(())
        steps = grain.MapDataset.range(start_step, stop)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=self._prefetch)
        batches = steps.map(lambda step: (int(step), self.batch(int(step), rows)))
        return iter(batches.to_iter_dataset(options))
