"""A teacher's most probable tokens for every training record, beside the token cache.

A folder: for each source and pass of the training text ArrayRecord shards, whose record i
belongs to record i of that pass, the records' scores (`teacher_scores`), and manifest.json.
A record is, little-endian:

    uint32                 tokens n
    uint16 or uint32 x n·K ids, the most probable first
    float x n·(K + 1)      their log-probabilities at temperature 1, and behind those of a token
                           the log of the mass of all others

with n the real tokens of the record (padding has no labels), ids as the token cache stores
them and floats of two or four bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stacking_jax.data.cache import PackedCache
from stacking_jax.data.manifest import Shard
from stacking_jax.data.mixture import MixedCache
from stacking_jax.data.records import LENGTHS, RecordReader, token_dtype
from stacking_jax.data.split_writer import file_sha256
from stacking_jax.errors import UserError

FILE = "manifest.json"
KIND = "teacher"
FORMAT = 1
IDS_KEY, LOG_PROBS_KEY = "teacher_ids", "teacher_log_probs"
"""The arrays of a batch: int32 `[B, L, K]` and float32 `[B, L, K + 1]`."""

FLOATS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclasses.dataclass(frozen=True)
class PassInfo:
    """The labels of one pass over one source.

    `data_digest` is that of the records they belong to; `scores` the file of their scores.
    """

    source: str
    number: int
    records: int
    data_digest: str
    shards: tuple[Shard, ...]
    scores: str
    scores_sha256: str


@dataclasses.dataclass(frozen=True)
class TeacherManifest:
    """What a cache of labels says of itself.

    Attributes:
      teacher: what made it, for people: `source`, `step`, `digest` (which see
        `training.teacher`), `params`.
      vocabulary: digest of the vocabulary; `vocab_size` rows of the teacher's head.
      sequence_length: tokens per record.
      top_k: K.
      dtype: of the log-probabilities.
      select_k: of the scores.
      forward_flops: of the teacher, per token.
      training_flops: that the teacher took; None where they are not known.
      passes: what there is.
      digest: of all of it, the content included.
    """

    teacher: dict[str, Any]
    vocabulary: str
    vocab_size: int
    sequence_length: int
    top_k: int
    dtype: str
    select_k: int
    forward_flops: float
    training_flops: float | None
    passes: tuple[PassInfo, ...]
    digest: str = ""

    def __post_init__(self):
        if not self.digest:
            object.__setattr__(self, "digest", self.content_digest())

    def content_digest(self) -> str:
        fields = dataclasses.asdict(self) | {"digest": ""}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        fields = {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)}
        (folder / FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A complete cache of labels on disk."""

    folder: Path
    manifest: TeacherManifest

    def check(self, cache: PackedCache | MixedCache) -> None:
        """Raises UserError unless these are labels of this cache's training records."""
        mine = self.manifest
        if mine.vocabulary != cache.manifest.vocabulary.digest:
            raise UserError(
                f"the labels of {self.folder} were made with another vocabulary than "
                f"{cache.manifest.vocabulary.name}: make them anew with `stacking-jax "
                "distill-cache`"
            )
        for name, source in cache.sources.items():
            found = self._info(name, 0)
            records = source.manifest.splits["train"]
            if (found.data_digest, found.records) != (records.digest, records.records):
                raise UserError(
                    f"the labels of {self.folder} belong to other records than those of {name} "
                    f"(digest {found.data_digest[:12]}, here {records.digest[:12]}): make them "
                    "anew with `stacking-jax distill-cache`"
                )

    def verify(self) -> None:
        """Compares every byte with the manifest.

        Raises:
          UserError: naming the first damaged file.
        """
        for info in self.manifest.passes:
            files = {shard.file: shard.sha256 for shard in info.shards}
            for name, sha256 in {**files, info.scores: info.scores_sha256}.items():
                if file_sha256(self.folder / name) != sha256:
                    raise UserError(f"{self.folder / name} is damaged: make the cache anew")

    def scores(self, source: str, number: int) -> np.ndarray:
        """float32, of all records of a pass; see `teacher_scores.record_scores`."""
        return np.load(self.folder / self._info(source, number).scores)

    def labels(
        self, places: Sequence[tuple[str, int, int]]
    ) -> dict[str, np.ndarray]:
        """Labels of records, zeros where a record has padding.

        Args:
          places: (source, pass, record) of each row.

        Returns:
          What `IDS_KEY` and `LOG_PROBS_KEY` name.
        """
        manifest = self.manifest
        shape = (len(places), manifest.sequence_length)
        ids = np.zeros((*shape, manifest.top_k), np.int32)
        log_probs = np.zeros((*shape, manifest.top_k + 1), np.float32)
        for source, number in sorted({place[:2] for place in places}):
            rows = [i for i, place in enumerate(places) if place[:2] == (source, number)]
            records = self._reader(source, number).read([places[i][2] for i in rows])
            for row, record in zip(rows, records, strict=True):
                some, their = decode_labels(record, manifest)
                ids[row, : len(some)], log_probs[row, : len(some)] = some, their
        return {IDS_KEY: ids, LOG_PROBS_KEY: log_probs}

    @functools.cached_property
    def _readers(self) -> dict[tuple[str, int], RecordReader]:
        return {
            (info.source, info.number): RecordReader(
                [self.folder / shard.file for shard in info.shards],
                [shard.records for shard in info.shards],
            )
            for info in self.manifest.passes
        }

    def _reader(self, source: str, number: int) -> RecordReader:
        self.check_pass(source, number)
        return self._readers[source, number]

    def check_pass(self, source: str, number: int) -> None:
        """Raises UserError if there are no labels of this pass."""
        self._info(source, number)

    def _info(self, source: str, number: int) -> PassInfo:
        for info in self.manifest.passes:
            if (info.source, info.number) == (source, number):
                return info
        raise UserError(
            f"the cache {self.folder} holds no labels of {source}, pass {number}: make them with "
            "`stacking-jax distill-cache` and the configuration of the run"
        )


def open_teacher_cache(folder: str | Path) -> TeacherCache:
    """Opens what `stacking-jax distill-cache` has made.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = Path(folder).expanduser()
    path = folder / FILE
    if not path.exists():
        raise UserError(
            f"{folder} holds no labels of a teacher (no {FILE}): make them with `stacking-jax "
            "distill-cache`"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind, written_as = fields.pop("kind", None), fields.pop("format", None)
        if (kind, written_as) != (KIND, FORMAT):
            raise UserError(f"{folder} holds no labels of a teacher that this version can read")
        fields["passes"] = tuple(
            PassInfo(**{**info, "shards": tuple(Shard(**shard) for shard in info["shards"])})
            for info in fields["passes"]
        )
        manifest = TeacherManifest(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): make the cache anew"
        ) from error
    if manifest.digest != manifest.content_digest():
        raise UserError(f"{path} is damaged, its digest does not fit: make the cache anew")
    for info in manifest.passes:
        for shard in info.shards:
            file = folder / shard.file
            if not file.exists() or file.stat().st_size != shard.size:
                raise UserError(f"{file} is missing or cut short: make the cache anew")
    return TeacherCache(folder, manifest)


def encode_labels(ids: np.ndarray, log_probs: np.ndarray, vocab_size: int, dtype: str) -> bytes:
    """Bytes of one record's labels: int `[n, K]` and float `[n, K + 1]`."""
    return b"".join([
        np.array([len(ids)], LENGTHS).tobytes(),
        np.ascontiguousarray(ids, token_dtype(vocab_size)).tobytes(),
        np.ascontiguousarray(log_probs, FLOATS[dtype]).tobytes(),
    ])


def decode_labels(record: bytes, manifest: TeacherManifest) -> tuple[np.ndarray, np.ndarray]:
    """`encode_labels` undone."""
    k, ids_as = manifest.top_k, token_dtype(manifest.vocab_size)
    count = int.from_bytes(record[: LENGTHS.itemsize], "little")
    ids = np.frombuffer(record, ids_as, count * k, LENGTHS.itemsize)
    rest = np.frombuffer(
        record, FLOATS[manifest.dtype], offset=LENGTHS.itemsize + ids.nbytes
    )
    return ids.reshape(count, k), rest.reshape(count, k + 1)


def shards_of(records: int, bytes_per_record: int) -> list[range]:
    """Which records go into which shard: a whole number each, of about 64 MB."""
    size = max(2**26 // max(bytes_per_record, 1), 1)
    return [
        range(start, min(start + size, records))
        for start in (part * size for part in range(math.ceil(records / size)))
    ]
