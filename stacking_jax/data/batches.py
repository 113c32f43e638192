"""Batches as a pure function of seed and step.

Grain's `MapDataset` gives the order: position i of an endless stream of
records, shuffled over the whole split and anew in each pass, the sources of a
mixture taking turns. Step s is rows s * B .. (s + 1) * B of that stream. There is
no iterator state: a run that resumes at a step, on any number of hosts, sees the
batches it would have seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stacking_jax.data.cache import PackedCache
from stacking_jax.data.mixture import MixedCache, whole_rates
from stacking_jax.data.records import Batch, RecordReader, batch_keys, decode_batch, token_dtype
from stacking_jax.data.streams import RecordStream
from stacking_jax.data.turns import Turns
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
      keys: the arrays of a batch; "prefix" is among them where there are prompts.

    Args:
      cache: from `open_cache`; a mixture can only be read shuffled.
      split: "train" or "validation".
      batch_size: rows of the global batch, over all hosts.
      seed: order of the records; None takes the configuration's `shuffle_seed`.
      shuffle: whether to shuffle.
      prefetch: batches that `iterate` keeps ready.
      prompts: whether batches have "prefix"; None: where the data have prompts.
      chosen: source -> (pass -> the records of it that are read); None for all. Shuffled only.
      total_steps: of the run, by which data stages are placed; needed where there are some.

    Raises:
      UserError: the split has no records, or the batch size is not positive.
    """

    def __init__(
        self,
        cache: PackedCache | MixedCache,
        split: str = "train",
        *,
        batch_size: int,
        seed: int | None = None,
        shuffle: bool = True,
        prefetch: int = 8,
        prompts: bool | None = None,
        chosen: Mapping[str, Callable[[int], Sequence[int]]] | None = None,
        total_steps: int | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.sequence_length = cache.manifest.sequence_length
        self._prompts = cache.manifest.prompts if prompts is None else prompts
        self.keys = batch_keys(self._prompts)
        self._dtype = token_dtype(cache.manifest.vocab_size)
        self._prefetch = prefetch
        if seed is None:
            seed = cache.config.shuffle_seed if cache.config else 0
        if shuffle:
            self._names = list(cache.sources)
            alone = not isinstance(cache, MixedCache)
            self._streams = [
                RecordStream(
                    source, split, seed, "" if alone else name, (chosen or {}).get(name)
                )
                for name, source in cache.sources.items()
            ]
            rates = cache.rates if alone else cache.config.mixture
            parts = [(0, whole_rates([rates[name] for name in self._names]))]
            if not alone and cache.config.stages:
                if total_steps is None:
                    raise ValueError("data stages are shares of a run: name total_steps")
                for step, later in cache.config.stages_of(total_steps):
                    shares = whole_rates([later.get(name, 0.0) for name in self._names])
                    parts.append((step * batch_size, shares))
            self._turns = Turns(parts)
        else:
            self._reader = cache.reader(split)
        self.num_records = cache.num_records(split)
        self.num_batches = -(-self.num_records // batch_size)

    def batch(self, step: int, rows: slice | Sequence[int] | None = None) -> Batch:
        """The batch of a step.

        Args:
          step: counts from 0.
          rows: which rows of the global batch to read, rising; None reads all. The
            rows of all hosts, put together, are the global batch.

        Returns:
          "tokens", "segment_ids" and "positions", int32 [rows, length]; and
          "prefix" where the data have prompts, see `decode_batch`.

        Raises:
          IndexError: a negative step, or one after the last of an ordered pass.
        """
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0.")
        if not self.shuffle and step >= self.num_batches:
            raise IndexError(f"step {step}: the pass in order has {self.num_batches} batches.")
        if rows is None or isinstance(rows, slice):
            rows = range(self.batch_size)[slice(None) if rows is None else rows]
        places = [step * self.batch_size + row for row in rows]
        if self.shuffle:
            records = _read([self._locate(place) for place in places])
        else:
            # Padding rows come last in the batch, and so in any rising choice of rows.
            records = self._reader.read([place for place in places if place < self.num_records])
        return decode_batch(
            records, len(rows), self.sequence_length, self._dtype, self._prompts
        )

    def _locate(self, place: int) -> tuple[RecordReader, int]:
        source, position = self._turns.at(place)
        return self._streams[source].locate(position)

    def place_of(self, step: int, row: int) -> tuple[str, int, int]:
        """(source, pass of its cache, record in it) that a row of a shuffled batch is."""
        source, position = self._turns.at(step * self.batch_size + row)
        return self._names[source], *self._streams[source].place(position)

    def source_of(self, step: int, row: int) -> str:
        """The name of the source that a row of a shuffled batch comes from."""
        return self._names[self._turns.at(step * self.batch_size + row)[0]]

    def passes(self, steps: int) -> dict[str, float]:
        """How often each source is read in so many steps, from the first on.

        Opens, or makes, every pass that they need: afterwards nothing has to be made
        while the steps run.
        """
        counts = self._turns.counts(steps * self.batch_size)
        return {
            name: stream.passes(count)
            for name, stream, count in zip(self._names, self._streams, counts, strict=True)
        }

    def iterate(
        self, start_step: int = 0, rows: slice | Sequence[int] | None = None, *,
        place: Callable[[Batch], Any] | None = None, placed: int = 2,
        batch_of: Callable[[int, Any], Batch] | None = None,
    ) -> Iterator[tuple[int, Batch]] | Iterator[tuple[int, Batch, Any]]:
        """Pairs of step and batch from `start_step` on, read ahead in the background.

        Endless if shuffled; else to the end of the pass.

        Args:
          start_step: counts from 0.
          rows: as in `batch`.
          place: puts a batch on the devices; what it returns is the third of each item. It is
            called in the order of the steps, by one thread.
          placed: how many batches that thread keeps ready; 0: it is called when one is asked for.
          batch_of: in place of `batch`, where some steps have batches of another kind.
        """
        import grain

        stop = sys.maxsize if self.shuffle else self.num_batches
        if start_step >= stop:
            return iter(())
        steps = grain.MapDataset.range(start_step, stop)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=self._prefetch)
        batch_of = batch_of or self.batch
        batches = steps.map(lambda step: (int(step), batch_of(int(step), rows)))
        batches = batches.to_iter_dataset(options)
        if place is not None:
            batches = batches.map(lambda item: (*item, place(item[1])))
            batches = grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=placed
            )
        return iter(batches)


def _read(places: Sequence[tuple[RecordReader, int]]) -> list[bytes]:
    """The records at these places, in this order; in bulk from each reader."""
    records: list = [None] * len(places)
    for reader in {id(reader): reader for reader, _ in places}.values():
        mine = [i for i, (other, _) in enumerate(places) if other is reader]
        read = reader.read([places[i][1] for i in mine])
        for i, record in zip(mine, read, strict=True):
            records[i] = record
    return records
