"""What a cache says about itself: manifest.json.

The manifest holds no time and no machine: the same text, cached twice, gives
the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from stacking_jax.data.vocabularies import VocabularyInfo
from stacking_jax.errors import UserError

FILE = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """An ArrayRecord file: its name, records, bytes on disk and SHA-256."""

    file: str
    records: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split. `tokens` counts real ones, each document's EOS among them;
    `text_bytes` is the UTF-8 size of the text; `digest` is the SHA-256 of the
    records in order, before ArrayRecord compresses them."""

    documents: int
    records: int
    tokens: int
    text_bytes: int
    digest: str
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Everything that decides the content of a cache: equal identity, equal content.

    `fingerprint` stands for the documents and `vocabulary` is a digest; both
    are empty for a task registered elsewhere, whose name stands for them.
    """

    task: str
    fingerprint: str
    vocabulary: str
    sequence_length: int
    held_out: float

    @property
    def key(self) -> str:
        return _sha256({"format": FORMAT, **dataclasses.asdict(self)})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a cache.

    Attributes:
      task: the task's name, or that of the text folder.
      source: where the documents came from, for people.
      identity: what the cache was made from.
      vocabulary: name, digest and sizes of the vocabulary.
      sequence_length: tokens per record, padding included.
      held_out: the share asked for.
      split_method: how documents were assigned to the splits.
      splits: "train" and, unless nothing was held out, "validation".
      notes: how many documents or files were not UTF-8, binary, empty, ..
      digest: SHA-256 of the content (vocabulary, record length and every
        record): equal digests are equal data, whatever they were read from.
    """

    task: str
    source: str
    identity: Identity
    vocabulary: VocabularyInfo
    sequence_length: int
    held_out: float
    split_method: str
    splits: dict[str, SplitInfo]
    notes: dict[str, int]
    digest: str = ""

    def __post_init__(self):
        if not self.digest:
            object.__setattr__(self, "digest", self.content_digest())

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.vocab_size

    def content_digest(self) -> str:
        splits = {
            name: {**dataclasses.asdict(split), "shards": None}
            for name, split in self.splits.items()
        }
        return _sha256(
            {
                "vocabulary": self.vocabulary.digest,
                "sequence_length": self.sequence_length,
                "splits": splits,
            }
        )

    def save(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads and checks folder/manifest.json.

        Raises:
          UserError: it cannot be read, is of another format, or does not
            agree with itself or with the sizes of the shards beside it.
        """
        path = folder / FILE
        remedy = "delete the folder, it will be made again."
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            written_as = fields.pop("format")
            if written_as != FORMAT:
                raise UserError(
                    f"the cache {folder} has format {written_as}, this version reads {FORMAT}: "
                    + remedy
                )
            manifest = cls._from_dict(fields)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the manifest {path} is damaged ({type(error).__name__}: {error}): " + remedy
            ) from error
        if manifest.digest != manifest.content_digest():
            raise UserError(f"the manifest {path} is damaged: its digest does not fit: " + remedy)
        for split in manifest.splits.values():
            for shard in split.shards:
                manifest._check_shard(folder / shard.file, shard, remedy)
        return manifest

    @staticmethod
    def _check_shard(path: Path, shard: Shard, remedy: str) -> None:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"the cache shard {path} is missing: " + remedy) from error
        if size != shard.size:
            raise UserError(
                f"the cache shard {path} is damaged: {size} bytes instead of {shard.size}: "
                + remedy
            )

    @classmethod
    def _from_dict(cls, fields: dict[str, Any]) -> Manifest:
        splits = {
            name: SplitInfo(**{**split, "shards": tuple(Shard(**s) for s in split["shards"])})
            for name, split in fields["splits"].items()
        }
        return cls(
            **{
                **fields,
                "identity": Identity(**fields["identity"]),
                "vocabulary": VocabularyInfo(**fields["vocabulary"]),
                "splits": splits,
            }
        )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
