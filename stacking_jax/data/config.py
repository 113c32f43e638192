"""What to read, in which tokens, and where the packed copy is kept."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from pathlib import Path

from stacking_jax.errors import UserError

DEFAULT_TASK = "python_stdlib"
CACHE_VARIABLE = "STACKING_JAX_CACHE"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus, one vocabulary, one record length: what a cache is made from.

    Everything but `cache_dir` and `shuffle_seed` decides the content of the
    cache, so a change of it leads to another cache.

    Attributes:
      task: name of a registered seqio Task or Mixture; not used when
        `text_dir` is set. "python_stdlib" is the source of the running
        interpreter's standard library and needs neither network nor
        TensorFlow. A task registered elsewhere brings its own vocabulary and
        is known by its name alone: one that changes needs a new name.
      text_dir: a folder (read recursively) or one file of text; `*.jsonl` and
        `*.jsonl.gz` hold one document per line in the field `text`.
      vocabulary: "bytes", or the path or URL of a SentencePiece `.model`.
      extra_ids: sentinel ids appended to the vocabulary, as seqio does it.
      sequence_length: tokens per packed record.
      held_out: share of the documents kept apart for validation, chosen by a
        hash of their content; 0 keeps none.
      cache_dir: the folder of this one cache. None makes a folder of its own,
        named by content, below $STACKING_JAX_CACHE (or ~/.cache/stacking_jax).
      shuffle_seed: order of the training records where the reader of the
        cache names no seed of its own.

    Raises:
      UserError: a value is outside its range or of the wrong type.
    """

    task: str = DEFAULT_TASK
    text_dir: str | None = None
    vocabulary: str = "bytes"
    extra_ids: int = 0
    sequence_length: int = 512
    held_out: float = 0.02
    cache_dir: str | None = None
    shuffle_seed: int = 0

    def __post_init__(self):
        for name, optional in (
            ("task", False), ("text_dir", True), ("vocabulary", False), ("cache_dir", True)
        ):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, value := os.fspath(value))
            if not (optional and value is None) and not (isinstance(value, str) and value):
                raise UserError(
                    f"{name} is {value!r}: it must be a string that is not empty"
                    + (" or None." if optional else ".")
                )
        for name, least in (("extra_ids", 0), ("sequence_length", 2), ("shuffle_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise UserError(f"{name} is {value!r}: it must be a whole number.")
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")
            object.__setattr__(self, name, int(value))
        share = self.held_out
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or math.isnan(share):
            raise UserError(f"held_out is {share!r}: it must be a number, a share of documents.")
        if not 0 <= share < 1:
            raise UserError(
                f"held_out is {share}: it is a share of the documents, at least 0 and below 1 "
                "(0.02 keeps one document in fifty apart)."
            )
        object.__setattr__(self, "held_out", float(share))

    @property
    def is_builtin(self) -> bool:
        """Whether the documents are read here, without seqio and TensorFlow."""
        return self.text_dir is not None or self.task == DEFAULT_TASK


def cache_root() -> Path:
    """The folder below which everything downloaded or cached is kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/stacking_jax").expanduser()
