"""How a packed record lies on disk, and reading many of them at once.

A record holds its real tokens and the lengths of its segments, little-endian:

    uint32            number of segments n
    uint32 x n        tokens of each segment
    uint16 or uint32  the tokens, segment after segment

Padding, segment ids and positions follow from the lengths and are made when
it is read. Tokens take two bytes for vocabularies up to 65,536 ids. Records
lie in ArrayRecord shards, one record to a chunk, so that any of them is read
without its neighbours; ArrayRecord compresses and checksums each.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stacking_jax.errors import UserError

LENGTHS = np.dtype("<u4")
Batch = dict[str, np.ndarray]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored integer that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def encode_record(segments: Sequence[np.ndarray], dtype: np.dtype) -> bytes:
    """Bytes of a record with the given segments (one-dimensional integer arrays)."""
    header = np.array([len(segments), *map(len, segments)], LENGTHS)
    return b"".join([header.tobytes(), *(np.asarray(s, dtype).tobytes() for s in segments)])


def decode_record(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n], lengths of the segments) of a record."""
    count = int.from_bytes(record[: LENGTHS.itemsize], "little")
    lengths = np.frombuffer(record, LENGTHS, count, LENGTHS.itemsize)
    tokens = np.frombuffer(record, dtype, offset=LENGTHS.itemsize * (1 + count))
    if int(lengths.sum()) != len(tokens):
        raise ValueError("the segments of a record do not add up to its tokens.")
    return tokens, lengths


def decode_batch(records: Sequence[bytes], rows: int, length: int, dtype: np.dtype) -> Batch:
    """Unpacks records into a batch; rows beyond them are all padding.

    Returns:
      "tokens", "segment_ids" (0 on padding, then 1, 2, ..) and "positions"
      (from 0 in each segment), int32 [rows, length].
    """
    tokens, segment_ids, positions = np.zeros((3, rows, length), np.int32)
    line = np.arange(length, dtype=np.int32)
    for row, record in enumerate(records):
        ids, lengths = decode_record(record, dtype)
        n = len(ids)
        tokens[row, :n] = ids
        if len(lengths) == 1:
            segment_ids[row, :n] = 1
            positions[row, :n] = line[:n]
        else:
            ends = np.cumsum(lengths, dtype=np.int32)
            segment_ids[row, :n] = np.repeat(line[: len(lengths)] + 1, lengths)
            positions[row, :n] = line[:n] - np.repeat(ends - lengths.astype(np.int32), lengths)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


class RecordReader:
    """Random access to the records of several shards. Safe to share among threads.

    Args:
      paths: the shards, in order.
      counts: records in each.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self._paths = list(paths)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._readers: list = [None] * len(self._paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The records of these numbers, in this order.

        One call per shard: reading in bulk is several times faster than one by one.
        """
        wanted = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        records: list = [None] * len(wanted)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            positions = (wanted[places] - self._starts[shard]).tolist()
            for place, record in zip(places.tolist(), self._read(shard, positions), strict=True):
                records[place] = record
        return records

    def _read(self, shard: int, positions: list[int]) -> Sequence[bytes]:
        try:
            return self._reader(shard).read(positions)
        except (RuntimeError, IndexError, OSError) as error:
            raise UserError(
                f"the cache shard {self._paths[shard]} is damaged "
                f"({' '.join(str(error).split())}): delete its folder, it will be made again."
            ) from error

    def _reader(self, shard: int):
        if self._readers[shard] is None:
            from array_record.python import array_record_module

            with self._lock:
                if self._readers[shard] is None:
                    # No read-ahead: access is random.
                    self._readers[shard] = array_record_module.ArrayRecordReader(
                        str(self._paths[shard]), "readahead_buffer_size:0,max_parallelism:0"
                    )
        return self._readers[shard]
