"""Opening the packed copy of a corpus, making it on first use.

A cache is a folder: ArrayRecord shards, manifest.json and, for a SentencePiece
vocabulary, the model. It is built in a hidden folder beside its place and
renamed when complete, so that a cache is either whole or not there. Its name
holds a digest of all that decides its content: changed text, vocabulary or
record length lead to another cache, never to a stale one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stacking_jax import console
from stacking_jax.data import building
from stacking_jax.data.config import DataConfig, cache_root
from stacking_jax.data.documents import Corpus, open_corpus
from stacking_jax.data.manifest import FILE, Identity, Manifest
from stacking_jax.data.records import RecordReader
from stacking_jax.data.vocabularies import BYTES, Bytes, SentencePiece, load_tokenizer
from stacking_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """A complete cache on disk.

    Attributes:
      folder: where it lies.
      manifest: what it holds.
      config: what it was asked for with; None if opened by its folder alone.
    """

    folder: Path
    manifest: Manifest
    config: DataConfig | None = None

    def tokenizer(self) -> Bytes | SentencePiece:
        """The tokenizer of the cache's own vocabulary, from the cache alone.

        Raises:
          UserError: a seqio task brought a vocabulary of a kind of its own.
        """
        vocabulary = self.manifest.vocabulary
        if vocabulary.name == BYTES:
            return Bytes(vocabulary.extra_ids)
        model = self.folder / building.VOCABULARY_FILE
        if not model.exists():
            raise UserError(
                f"the vocabulary {vocabulary.name} of the cache {self.folder} is neither bytes nor "
                "SentencePiece: text cannot be encoded or decoded with it here."
            )
        return SentencePiece(model.read_bytes(), vocabulary.extra_ids, vocabulary.name)

    def num_records(self, split: str) -> int:
        """Records of a split, 0 if the cache has no such split."""
        info = self.manifest.splits.get(split)
        return info.records if info else 0

    def reader(self, split: str) -> RecordReader:
        """Random access to the records of a split.

        Raises:
          UserError: the cache has no record of this split.
        """
        if not self.num_records(split):
            has = ", ".join(sorted(self.manifest.splits))
            raise UserError(
                f"the cache {self.folder} has no {split!r} records (it has: {has}): choose one of "
                "these, or set held_out above 0 to have a validation split."
            )
        shards = self.manifest.splits[split].shards
        return RecordReader(
            [self.folder / shard.file for shard in shards], [shard.records for shard in shards]
        )

    def verify(self) -> None:
        """Compares every byte of the shards with the manifest (opening compares sizes).

        Raises:
          UserError: naming the first damaged shard.
        """
        for split in self.manifest.splits.values():
            for shard in split.shards:
                with open(self.folder / shard.file, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        raise UserError(
                            f"the cache shard {self.folder / shard.file} is damaged: delete the "
                            "folder, it will be made again."
                        )


def load_cache(folder: str | os.PathLike) -> PackedCache:
    """Opens a cache by its folder, whatever it was made from.

    Raises:
      UserError: there is no cache, or it is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / FILE).exists():
        raise UserError(f"{folder} holds no cache (no {FILE}).")
    return PackedCache(folder, Manifest.load(folder))


def tokenizer(config: DataConfig) -> Bytes | SentencePiece:
    """The tokenizer of a configuration.

    For the texts read here no cache is needed; a task registered elsewhere
    brings its vocabulary, which lies in its cache.

    Raises:
      UserError: the vocabulary is missing, or of a kind of its own.
    """
    if config.is_builtin:
        return load_tokenizer(config.vocabulary, config.extra_ids)
    return open_cache(config).tokenizer()


def open_cache(config: DataConfig) -> PackedCache:
    """Opens the cache of a configuration, building it on first use.

    Building shows a progress bar. Another process that wants the same cache
    meanwhile waits for it.

    Raises:
      UserError: the corpus is missing, empty or too small; the vocabulary is
        missing; the disk is full; `cache_dir` holds something else; or the
        cache is damaged.
    """
    request = _Request.of(config)
    folder = request.folder
    if (folder / FILE).exists():
        return request.check(folder)
    if folder.is_dir() and any(folder.iterdir()) or folder.is_file():
        raise UserError(
            f"cache_dir {folder} exists but holds no cache: name an empty or a new folder."
        )
    if request.missing is not None:
        raise request.missing
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as locked:
            if (folder / FILE).exists():
                return request.check(folder)
            if locked:
                unfinished = f".{glob.escape(folder.name)}.building-*"
                for leftover in folder.parent.glob(unfinished):
                    shutil.rmtree(leftover, ignore_errors=True)
            _build(folder, request)
    except OSError as error:
        if building.is_disk_full(error):
            name = config.text_dir or config.task
            raise building.disk_full(folder.parent, name, error, None) from error
        raise UserError(
            f"the cache {folder} cannot be written ({error.strerror or error}): name another place "
            "with cache_dir or STACKING_JAX_CACHE."
        ) from error
    return request.check(folder)


@dataclasses.dataclass(frozen=True)
class _Request:
    """A configuration, resolved: what the cache is called and made from.

    `missing` is the complaint about a corpus that is not on this machine;
    a cache in an explicit folder can be used without it.
    """

    config: DataConfig
    identity: Identity
    folder: Path
    corpus: Corpus | None = None
    tokenizer: Bytes | SentencePiece | None = None
    missing: UserError | None = None

    @classmethod
    def of(cls, config: DataConfig) -> _Request:
        corpus = vocabulary = missing = None
        if config.is_builtin or config.vocabulary != BYTES:
            vocabulary = load_tokenizer(config.vocabulary, config.extra_ids)
        if config.is_builtin:
            try:
                corpus = open_corpus(config)
            except UserError as error:
                if config.cache_dir is None:
                    raise
                missing = error
        identity = Identity(
            task="text" if config.text_dir is not None else config.task,
            fingerprint=corpus.fingerprint() if corpus else "",
            vocabulary=vocabulary.info.digest if vocabulary else "",
            sequence_length=config.sequence_length,
            held_out=config.held_out,
        )
        if config.cache_dir is not None:
            folder = Path(config.cache_dir).expanduser()
        else:
            name = re.sub(r"[^\w.-]+", "_", corpus.name if corpus else config.task).lstrip(".")
            folder = cache_root() / "data" / f"{name or 'text'}-{identity.key[:16]}"
        if corpus is not None and _is_read_with(folder.resolve(), corpus.root.resolve()):
            raise UserError(
                f"the cache {folder} would lie inside the text it is made from, {corpus.root}: "
                "name another place with cache_dir or STACKING_JAX_CACHE."
            )
        return cls(config, identity, folder, corpus, vocabulary, missing)

    def encode(self) -> building.Encoded:
        if self.corpus is not None:
            return building.encode_corpus(self.corpus, self.tokenizer, self.config)
        from stacking_jax.data import tasks

        encoded = tasks.encode_task(self.config)
        if self.tokenizer and self.tokenizer.info.digest != encoded.vocabulary.digest:
            raise UserError(
                f"the task {self.config.task} brings the vocabulary {encoded.vocabulary.name}, "
                f"which is not {self.config.vocabulary}: leave `vocabulary` at its default."
            )
        return encoded

    def check(self, folder: Path) -> PackedCache:
        """Opens the cache there if it is the one asked for."""
        manifest = Manifest.load(folder)
        there, asked = manifest.identity, self.identity
        if self.missing is not None and there.task == asked.task:
            console.say(f"{self.missing} Going on with the cache {folder} alone.")
            asked = dataclasses.replace(asked, fingerprint=there.fingerprint)
        if there != asked:
            raise UserError(
                f"the cache {folder} was made differently: {self._differences(manifest, asked)}: "
                "name another cache_dir, leave it out, or delete the folder."
            )
        return PackedCache(folder, manifest, self.config)

    def _differences(self, manifest: Manifest, asked: Identity) -> str:
        there, config = manifest.identity, self.config
        wanted = f"{config.vocabulary} with {config.extra_ids} extra ids"
        has = f"{manifest.vocabulary.name} with {manifest.vocabulary.extra_ids} extra ids"
        text = f"made from {manifest.source}, asked for {config.text_dir or config.task}"
        lines = {
            "task": text,
            "fingerprint": f"the text has changed since or is another ({text})",
            "vocabulary": f"vocabulary {has} there, {wanted} asked for",
        }
        return "; ".join(
            lines.get(field.name)
            or f"{field.name} {getattr(there, field.name)} there, "
            f"{getattr(asked, field.name)} asked for"
            for field in dataclasses.fields(Identity)
            if getattr(there, field.name) != getattr(asked, field.name)
            and not (field.name == "fingerprint" and there.task != asked.task)
        )


def _is_read_with(folder: Path, root: Path) -> bool:
    """Whether a folder would be read as part of the text at `root`; hidden ones are not."""
    if not folder.is_relative_to(root):
        return False
    return not any(part.startswith(".") for part in folder.relative_to(root).parts)


def _build(folder: Path, request: _Request) -> None:
    """Builds beside `folder` and moves it there in one step."""
    encoded = request.encode()
    name = f".{folder.name}.building-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = folder.parent / name
    unfinished.mkdir()
    try:
        manifest = building.build(unfinished, encoded, request.identity, request.config)
        try:
            os.rename(unfinished, folder)
        except OSError:
            # Only where locks do not work: another process was faster. Its cache is as good.
            if not (folder / FILE).exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    parts = [
        f"{split.documents:,} documents and {split.tokens:,} tokens to {name}"
        for name, split in manifest.splits.items()
    ]
    room = sum(split.records for split in manifest.splits.values()) * manifest.sequence_length
    filled = sum(split.tokens for split in manifest.splits.values()) / room
    console.say(f"cached {manifest.task}: {', '.join(parts)}; records {filled:.1%} full; {folder}")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Holds the right to build `folder`; yields False where the system has no locks.

    The system lets go of the lock when its holder ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield False
        return
    with open(folder.parent / f".{folder.name}.lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"waiting for another process that makes the cache {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True
