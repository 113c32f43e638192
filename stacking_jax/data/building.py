"""Writing a cache: documents to tokens to packed records in shards."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from stacking_jax import console
from stacking_jax.data.config import DataConfig
from stacking_jax.data.documents import Corpus, Document, ReadingNotes
from stacking_jax.data.manifest import Identity, Manifest, Shard, SplitInfo
from stacking_jax.data.packing import pack
from stacking_jax.data.records import encode_record, token_dtype
from stacking_jax.data.splits import SPLITS, TRAIN, split_corpus
from stacking_jax.data.vocabularies import Bytes, SentencePiece, VocabularyInfo
from stacking_jax.errors import UserError

VOCABULARY_FILE = "vocabulary.model"
# Documents are packed in windows of this many tokens, which bounds the memory.
WINDOW_TOKENS = 2**24
SHARD_BYTES = 2**28
_ENCODE_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class TokenDocument:
    """One document, encoded and ended by EOS. `source_bytes` moves the progress bar."""

    split: str
    tokens: np.ndarray
    text_bytes: int
    source_bytes: int


@dataclasses.dataclass
class Encoded:
    """A corpus as tokens, ready to be packed, and what the manifest says of it.

    `model` is the SentencePiece file to keep in the cache; `total_bytes` is
    what `source_bytes` will add up to, None if unknown. `split_method` and
    `notes` are complete once `documents` has been read to its end.
    """

    task: str
    source: str
    vocabulary: VocabularyInfo
    documents: Iterator[TokenDocument]
    split_method: str
    notes: ReadingNotes = dataclasses.field(default_factory=ReadingNotes)
    model: bytes | None = None
    total_bytes: int | None = None


def encode_corpus(
    corpus: Corpus, tokenizer: Bytes | SentencePiece, config: DataConfig
) -> Encoded:
    """Reads and encodes a corpus directly: the same tokens as its seqio Task gives.

    Raises:
      UserError: the corpus is empty or too small to split.
    """
    notes = ReadingNotes()
    documents = corpus.read(notes)
    first = next(documents, None)
    if first is None:
        met = "; ".join(notes.lines()) or "all files are empty"
        raise UserError(f"the corpus {corpus.root} is empty: {met}.")
    documents, method = split_corpus(
        itertools.chain([first], documents), config.held_out, f"the corpus {corpus.root}"
    )
    return Encoded(
        task=corpus.name,
        source=f"{corpus.name} ({corpus.salt})" if corpus.salt else os.fspath(corpus.root),
        vocabulary=tokenizer.info,
        documents=_encode(documents, tokenizer),
        split_method=method,
        notes=notes,
        model=getattr(tokenizer, "model", None),
        total_bytes=corpus.size,
    )


def _encode(
    documents: Iterable[tuple[str, Document]], tokenizer: Bytes | SentencePiece
) -> Iterator[TokenDocument]:
    """Encodes some megabytes at a time, which lets SentencePiece use its threads."""

    def flush() -> Iterator[TokenDocument]:
        tokens = tokenizer.encode_documents([document.text for _, document in waiting])
        for (split, document), ids in zip(waiting, tokens, strict=True):
            yield TokenDocument(split, ids, len(document.text), document.source_bytes)

    waiting: list[tuple[str, Document]] = []
    size = 0
    for split, document in documents:
        waiting.append((split, document))
        size += len(document.text)
        if size >= _ENCODE_BYTES:
            yield from flush()
            waiting, size = [], 0
    yield from flush()


def build(folder: Path, encoded: Encoded, identity: Identity, config: DataConfig) -> Manifest:
    """Writes records, vocabulary and, last, the manifest into an empty folder.

    Raises:
      UserError: the disk is full, the folder cannot be written, or the corpus
        is not usable; what was written is then the caller's to delete.
    """
    writers = {
        name: _SplitWriter(folder, name, config.sequence_length, encoded.vocabulary)
        for name in SPLITS
    }
    description = f"caching {encoded.task}"
    consumed = 0
    try:
        if encoded.model is not None:
            (folder / VOCABULARY_FILE).write_bytes(encoded.model)
        total = None if encoded.total_bytes is None else encoded.total_bytes // 1000
        with console.progress(description, total, "kB") as advance:
            for document in encoded.documents:
                writers[document.split].add(document)
                before, consumed = consumed, consumed + document.source_bytes
                if consumed // 1000 > before // 1000:
                    advance(consumed // 1000 - before // 1000)
            splits = {name: writer.finish() for name, writer in writers.items()}
        splits = {name: info for name, info in splits.items() if info.records}
        if TRAIN not in splits:
            raise UserError(f"{encoded.source}: no document with any token was found.")
        manifest = Manifest(
            task=encoded.task,
            source=encoded.source,
            identity=identity,
            vocabulary=encoded.vocabulary,
            sequence_length=config.sequence_length,
            held_out=config.held_out,
            split_method=encoded.split_method,
            splits=splits,
            notes=dict(sorted(encoded.notes.counts.items())),
        )
        manifest.save(folder)
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        stored = sum(writer.stored_bytes for writer in writers.values())
        part = consumed / encoded.total_bytes if encoded.total_bytes else 1
        needed = int(stored / max(part, 0.01))
        raise disk_full(folder.parent, encoded.task, error, needed) from error
    for line in encoded.notes.lines():
        console.warn(f"{encoded.task}: {line}")
    return manifest


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no more room (or quota, or file size).

    ArrayRecord reports it as a RuntimeError with the system's words.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(os.strerror(code) in str(error) for code in codes)


def disk_full(folder: Path, task: str, error: BaseException, needed: int | None) -> UserError:
    """The message for a full disk; `needed` bytes is the most that the cache may take."""
    room = "" if needed is None else f"it may take up to {needed / 1e6:,.1f} MB and "
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        free = "the disk is full"
    return UserError(
        f"no space left to cache {task} in {folder} ({' '.join(str(error).split())}): "
        f"{room}{free}: make room there, or name another place with cache_dir or "
        "STACKING_JAX_CACHE."
    )


class _SplitWriter:
    """Packs the documents of one split and writes their records in shards."""

    def __init__(self, folder: Path, name: str, length: int, vocabulary: VocabularyInfo):
        self._folder, self._name, self._length = folder, name, length
        self._dtype = token_dtype(vocabulary.vocab_size)
        self._window: list[np.ndarray] = []
        self._window_tokens = 0
        self._digest = hashlib.sha256()
        self._documents = self._records = self._tokens = self._text_bytes = 0
        self._shards: list[Shard] = []
        self._writer = None
        self._shard_records = self._shard_bytes = 0

    @property
    def stored_bytes(self) -> int:
        """What the records take before compression."""
        return self._tokens * self._dtype.itemsize + 8 * (self._tokens // self._length)

    def add(self, document: TokenDocument) -> None:
        self._window.append(document.tokens.astype(self._dtype, copy=False))
        self._documents += 1
        self._tokens += len(document.tokens)
        self._text_bytes += document.text_bytes
        self._window_tokens += len(document.tokens)
        if self._window_tokens >= WINDOW_TOKENS:
            self._flush()

    def finish(self) -> SplitInfo:
        self._flush()
        self._close_shard()
        return SplitInfo(
            documents=self._documents,
            records=self._records,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            digest=self._digest.hexdigest(),
            shards=tuple(self._shards),
        )

    def _flush(self) -> None:
        window, self._window, self._window_tokens = self._window, [], 0
        records = [
            encode_record([window[p.document][p.start : p.stop] for p in pieces], self._dtype)
            for pieces in pack([len(tokens) for tokens in window], self._length)
        ]
        # In the order of a hash, not of the files: the first batches of a
        # split are then a fair sample of it, read in order or in part.
        records.sort(key=lambda record: hashlib.blake2b(record, digest_size=8).digest())
        for record in records:
            self._digest.update(record)
            self._write(record)

    def _write(self, record: bytes) -> None:
        if self._writer is None:
            self._open_shard()
        self._writer.write(record)
        self._records += 1
        self._shard_records += 1
        self._shard_bytes += len(record)
        if self._shard_bytes >= SHARD_BYTES:
            self._close_shard()

    def _open_shard(self) -> None:
        from array_record.python import array_record_module

        self._path = self._folder / f"{self._name}-{len(self._shards):05d}.array_record"
        # One record to a chunk: any record is read without its neighbours.
        self._writer = array_record_module.ArrayRecordWriter(str(self._path), "group_size:1")
        self._shard_records = self._shard_bytes = 0

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with open(self._path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._path.stat().st_size
        self._shards.append(Shard(self._path.name, self._shard_records, size, sha256))
