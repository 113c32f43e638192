"""Opening the packed copy of a corpus, making it on first use.

A cache is a folder: ArrayRecord shards, manifest.json and, for a SentencePiece
vocabulary, the model. It is built in a hidden folder beside its place and
renamed when complete, so that a cache is either whole or not there. Its name
holds a digest of all that decides its content: changed text, vocabulary or
record length lead to another cache, never to a stale one.

Under UL2 every reading of a source is corrupted anew, so each has records of its
own: the first lies in the cache itself, the others in `pass-001`, `pass-002`, ..
inside it, each a cache too, made when it is first asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stacking_jax import console
from stacking_jax.data import building, making, remote_cache
from stacking_jax.data.config import DataConfig, cache_root
from stacking_jax.data.documents import Corpus, open_corpus
from stacking_jax.data.manifest import FILE, Identity, Manifest
from stacking_jax.data.records import RecordReader
from stacking_jax.data.split_writer import file_sha256
from stacking_jax.data.ul2 import mode_ids
from stacking_jax.data.ul2_config import EXAMPLES
from stacking_jax.data.vocabularies import BYTES, Bytes, SentencePiece, load_tokenizer
from stacking_jax.errors import UserError
from stacking_jax.paths import is_remote

if TYPE_CHECKING:
    from stacking_jax.data.mixture import MixedCache


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """A complete cache on disk.

    Attributes:
      folder: where it lies.
      manifest: what it holds.
      config: what it was asked for with; None if opened by its folder alone.
      beam: see `open_cache`; passes that are missing are made in the same way.
      name, sources, rates: as a mixture has them, of which this is the only source.
    """

    folder: Path
    manifest: Manifest
    config: DataConfig | None = None
    beam: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return self.manifest.task

    @property
    def sources(self) -> dict[str, PackedCache]:
        """Itself; a mixture has several."""
        return {self.name: self}

    @property
    def rates(self) -> dict[str, float]:
        return {self.name: 1.0}

    @property
    def varies(self) -> bool:
        """Whether each pass over the training text has records of its own."""
        objectives = self.manifest.splits["train"].objectives
        return bool(self.manifest.identity.objective) and set(objectives) != {EXAMPLES}

    def train_pass(self, number: int) -> PackedCache:
        """The cache that holds a pass over the training text, made if it is not there.

        Its records depend on the pass alone, not on when it is made.

        Raises:
          UserError: as `open_cache`; or the pass is not there, and this cache was
            opened by its folder, without the text.
        """
        if number == 0 or not self.varies:
            return self
        folder = self.folder / f"pass-{number:03d}"
        identity = dataclasses.replace(self.manifest.identity, pass_number=number)
        if self.config is not None:
            request = _Request.of(self.config, self.beam)
            if request.missing is None and request.identity != self.manifest.identity:
                raise UserError(
                    f"the text of the cache {self.folder} has changed since it was made: its pass "
                    f"{number} would not fit to the others; start a new run."
                )
            url = request.url and f"{request.url}/{folder.name}"
            return _open(dataclasses.replace(request, identity=identity, folder=folder, url=url))
        if not (folder / FILE).exists():
            raise UserError(
                f"the cache {self.folder} holds no pass {number}: make it with `stacking-jax "
                "cache` and the configuration of the run."
            )
        return PackedCache(folder, Manifest.load(folder))

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
                if file_sha256(self.folder / shard.file) != shard.sha256:
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
    if config.mixture is not None:
        from stacking_jax.data.mixture import source_configs

        config = next(iter(source_configs(config).values()))
    if config.has_own_vocabulary:
        return load_tokenizer(config.vocabulary, config.extra_ids)
    return open_cache(config).tokenizer()


def open_cache(
    config: DataConfig, beam: Sequence[str] | None = None
) -> PackedCache | MixedCache:
    """Opens the cache of a configuration, or of each source of its mixture.

    What is not there yet is built, with a progress bar. Another process that wants
    the same cache meanwhile waits for it.

    Args:
      config: what to read.
      beam: options of an Apache Beam pipeline, such as ("--runner=DirectRunner",
        "--direct_num_workers=4"), which then makes what is not there; None does it in
        this process. The bytes are the same.

    Raises:
      UserError: the corpus is missing, empty or too small; the vocabulary is
        missing; the disk is full; `cache_dir` holds something else; or the
        cache is damaged.
    """
    if config.mixture is not None:
        from stacking_jax.data.mixture import open_mixture

        return open_mixture(config, beam)
    return _open(_Request.of(config, beam))


def _open(request: _Request) -> PackedCache:
    folder = request.folder
    if request.url is None:
        return _open_local(request, folder)
    remote_cache.fetch(request.url, folder)
    cache = _open_local(request, folder)
    remote_cache.store(folder, request.url)
    return cache


def _open_local(request: _Request, folder: Path) -> PackedCache:
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
        with making.lock(folder) as locked:
            if not (folder / FILE).exists():
                making.make(
                    folder, request.encode, request.identity, request.config, locked,
                    request.builder(),
                )
    except OSError as error:
        if building.is_disk_full(error):
            name = request.config.text_dir or request.config.task
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
    a cache in an explicit folder can be used without it. `url` is where the cache is kept
    whose copy on this machine is `folder`, if it is kept elsewhere.
    """

    config: DataConfig
    identity: Identity
    folder: Path
    corpus: Corpus | None = None
    tokenizer: Bytes | SentencePiece | None = None
    missing: UserError | None = None
    beam: tuple[str, ...] | None = None
    url: str | None = None

    @classmethod
    def of(cls, config: DataConfig, beam: Sequence[str] | None = None) -> _Request:
        corpus = vocabulary = missing = None
        if config.has_own_vocabulary or config.vocabulary != BYTES:
            vocabulary = load_tokenizer(config.vocabulary, config.extra_ids)
            if config.is_ul2:
                mode_ids(vocabulary.info)  # it has sentinels, or says so before any work
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
            objective=config.objective_text(),
            bad_rows="skip" if config.bad_rows == "skip" else "",
        )
        url = None
        if config.cache_dir is not None and is_remote(config.cache_dir):
            url = config.cache_dir.rstrip("/")
            folder = remote_cache.local_folder(url)
        elif config.cache_dir is not None:
            folder = Path(config.cache_dir).expanduser()
        else:
            name = re.sub(r"[^\w.-]+", "_", corpus.name if corpus else config.task).lstrip(".")
            folder = cache_root() / "data" / f"{name or 'text'}-{identity.key[:16]}"
        if corpus is not None and _is_read_with(folder.resolve(), corpus.root.resolve()):
            raise UserError(
                f"the cache {folder} would lie inside the text it is made from, {corpus.root}: "
                "name another place with cache_dir or STACKING_JAX_CACHE."
            )
        options = None if beam is None else tuple(beam)
        return cls(config, identity, folder, corpus, vocabulary, missing, options, url)

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

    def builder(self) -> Callable[..., Manifest]:
        """What makes the cache of what `encode` returns."""
        if self.beam is None:
            return building.build
        from stacking_jax.data import beam_pipeline

        beam_pipeline.import_beam()
        return functools.partial(beam_pipeline.build, options=self.beam)

    def check(self, folder: Path) -> PackedCache:
        """Opens the cache there if it is the one asked for."""
        manifest = Manifest.load(folder)
        there, asked = manifest.identity, self.identity
        if self.missing is not None and there.task == asked.task:
            if not asked.pass_number:
                console.say(f"{self.missing} Going on with the cache {folder} alone.")
            asked = dataclasses.replace(asked, fingerprint=there.fingerprint)
        if there != asked:
            raise UserError(
                f"the cache {folder} was made differently: {self._differences(manifest, asked)}: "
                "name another cache_dir, leave it out, or delete the folder."
            )
        return PackedCache(folder, manifest, self.config, self.beam)

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
