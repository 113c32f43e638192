"""Several sources at fixed rates, each with a cache of its own.

Mixed when they are read: rates are shares of packed records, and so of tokens.
Changing a rate makes no cache anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from stacking_jax.data.cache import PackedCache, open_cache
from stacking_jax.data.config import DEFAULT_TASK, TFDS_PREFIX, DataConfig
from stacking_jax.data.manifest import SplitInfo
from stacking_jax.data.vocabularies import Bytes, SentencePiece, VocabularyInfo
from stacking_jax.errors import UserError

ENDINGS = ("", ".jsonl.gz", ".jsonl", ".txt")


@dataclasses.dataclass(frozen=True)
class MixtureManifest:
    """What a mixture holds, in the words of a cache's manifest.

    Attributes:
      task: the sources and their rates, for people.
      vocabulary, sequence_length, prompts: as in `Manifest`; the same for all sources.
      splits: "source/split" -> what it holds.
      digest: of the sources' digests, their names and their rates: equal digests
        are equal data in an equal order.
    """

    task: str
    vocabulary: VocabularyInfo
    sequence_length: int
    prompts: bool
    splits: dict[str, SplitInfo]
    digest: str

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.vocab_size


@dataclasses.dataclass(frozen=True)
class MixedCache:
    """The caches of a mixture.

    Attributes:
      sources: name -> cache, in the order of the configuration.
      rates: name -> share of the records; they add up to 1.
      config: what it was asked for with.
    """

    sources: dict[str, PackedCache]
    rates: dict[str, float]
    config: DataConfig
    manifest: MixtureManifest

    def tokenizer(self) -> Bytes | SentencePiece:
        return next(iter(self.sources.values())).tokenizer()

    def num_records(self, split: str) -> int:
        return sum(cache.num_records(split) for cache in self.sources.values())

    def verify(self) -> None:
        """Compares every byte with the manifests; see `PackedCache.verify`."""
        for cache in self.sources.values():
            cache.verify()


def open_mixture(config: DataConfig, beam: Sequence[str] | None = None) -> MixedCache:
    """Opens the cache of every source, building what is not there yet.

    Raises:
      UserError: as `open_cache`; or the sources do not share a vocabulary.
    """
    sources = {name: open_cache(one, beam) for name, one in source_configs(config).items()}
    first = next(iter(sources.values()))
    for name, cache in sources.items():
        if cache.manifest.vocabulary.digest != first.manifest.vocabulary.digest:
            raise UserError(
                f"the source {name} has the vocabulary {cache.manifest.vocabulary.name}, and "
                f"{next(iter(sources))} has {first.manifest.vocabulary.name}: the sources of a "
                "mixture share one."
            )
    total = math.fsum(config.mixture.values())
    rates = {name: rate / total for name, rate in config.mixture.items()}
    text = json.dumps(
        ([] if not config.stages else [[share, dict(later)] for share, later in config.stages])
        + [
            [name, cache.manifest.digest, weight]
            for (name, cache), weight in zip(
                sources.items(), whole_rates(list(config.mixture.values())), strict=True
            )
        ]
    )
    manifest = MixtureManifest(
        task=", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()),
        vocabulary=first.manifest.vocabulary,
        sequence_length=config.sequence_length,
        prompts=any(cache.manifest.prompts for cache in sources.values()),
        splits={
            f"{name}/{split}": info
            for name, cache in sources.items()
            for split, info in cache.manifest.splits.items()
        },
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )
    return MixedCache(sources, rates, config, manifest)


def source_configs(config: DataConfig) -> dict[str, DataConfig]:
    """The configuration of each source of `config.mixture`.

    Raises:
      UserError: a source is neither below `text_dir` nor the name of a task.
    """
    folder = None if config.text_dir is None else Path(config.text_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"{config.text_dir} is not a folder: a mixture looks for its sources "
            f"({', '.join(config.mixture)}) in one; bind DATA_DIR or DataConfig.text_dir."
        )
    made = {}
    for name in config.mixture:
        place = None if folder is None else _find(folder, name)
        if place is None:
            _check_task(name, folder)
        cache_dir = config.cache_dir and os.path.join(config.cache_dir, _as_folder(name))
        made[name] = dataclasses.replace(
            config,
            mixture=None,
            stages=None,
            text_dir=None if place is None else str(place),
            task=name if place is None else DEFAULT_TASK,
            cache_dir=cache_dir,
        )
    return made


def _find(folder: Path, name: str) -> Path | None:
    for ending in ENDINGS:
        if (folder / f"{name}{ending}").exists():
            return folder / f"{name}{ending}"
    return None


def _check_task(name: str, folder: Path | None) -> None:
    """Raises UserError, which lists the files, unless `name` is that of a task."""
    from stacking_jax.data.tasks import is_task

    if name == DEFAULT_TASK or name.startswith(TFDS_PREFIX) or is_task(name):
        return
    if folder is None:
        raise UserError(
            f"the mixture names the source {name!r}, which is no registered task: import the "
            "module that registers it (--gin_import), or set DataConfig.text_dir to the folder "
            "that holds its text."
        )
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    raise UserError(
        f"{folder} holds no {name}.jsonl.gz, {name}.jsonl, {name}.txt or folder {name}, and no "
        f"task has that name; there are {', '.join(there[:8]) or 'no files'}: name the sources "
        "with DataConfig.mixture."
    )


def _as_folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or "source"


def whole_rates(rates: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in exactly these proportions, as small as can be (0.57 is 57/100)."""
    fractions = [Fraction(str(rate)) for rate in rates]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    return tuple(number // math.gcd(*whole) for number in whole)


def interleave(position: int, rates: Sequence[int]) -> tuple[int, int]:
    """(source, position within that source) of a position in a mixture.

    Sources take turns as evenly as their rates allow: over any n records in a row a
    source has its share of n, give or take the number of sources, where random draws
    would stray by √n. This is the rule of `grain.MapDataset.mix`, with exact rates:
    Grain rounds them so that the smallest is 100, which at 57 : 17 : 17 : 9 shifts
    the largest by 0.08 points.

    Args:
      position: counts from 0.
      rates: from `whole_rates`.
    """
    remaining = sum(rates)
    begin, end = position, position + 1
    for source, rate in enumerate(rates):
        # What is left for the sources after this one, before and after this record.
        rest_begin = begin * (remaining - rate) // remaining
        rest_end = end * (remaining - rate) // remaining
        if begin - rest_begin != end - rest_end:
            return source, begin - rest_begin
        remaining -= rate
        begin, end = rest_begin, rest_end
    raise ValueError(f"no source for position {position} at rates {tuple(rates)}")
