"""What to read, in which tokens, and where the packed copy is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from stacking_jax.data.ul2_config import UL2Config
from stacking_jax.errors import UserError

DEFAULT_TASK = "python_stdlib"
TFDS_PREFIX = "tfds:"
OBJECTIVE_CHOICES = ("causal", "ul2")
BAD_ROWS = ("refuse", "skip")
CACHE_VARIABLE = "STACKING_JAX_CACHE"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Texts, one vocabulary, one record length, one objective: what caches are made from.

    Everything but `cache_dir`, `shuffle_seed` and the rates of `mixture` decides the
    content of a cache, so a change of it leads to another cache.

    Attributes:
      task: name of a registered seqio Task or Mixture; not used when
        `text_dir` is set. "python_stdlib" is the source of the running
        interpreter's standard library and needs neither network nor
        TensorFlow. "tfds:NAME:VERSION" is the text of a TensorFlow dataset, such
        as "tfds:c4/en:3.1.0". A task registered elsewhere brings its own vocabulary and
        is known by its name alone: one that changes needs a new name.
      text_dir: a folder (read recursively) or one file of text; `*.jsonl` and
        `*.jsonl.gz` hold one document per line in the field `text`.
      mixture: source -> rate, in place of one task or text. A source is a file or
        folder below `text_dir` (the ending .jsonl.gz, .jsonl or .txt may be left
        out), else a task by name. Each source has a cache of its own; rates are
        shares of the packed records, in any unit, and change no cache.
      stages: later rates of the mixture: (share of the run's steps, {source: rate}) of each,
        from there on; a source that is not named there rests. Of a mixture with stages a
        rate may be 0: a source for later, such as mathematics for a cool-down. Held-out loss
        stays that of `mixture`.
      vocabulary: "bytes", or the path or URL of a SentencePiece `.model`.
      extra_ids: sentinel ids appended to the vocabulary, as seqio does it.
      sequence_length: tokens per packed record.
      held_out: share of the documents kept apart for validation, chosen by a
        hash of their content; 0 keeps none.
      cache_dir: the folder of this one cache. None makes a folder of its own,
        named by content, below $STACKING_JAX_CACHE (or ~/.cache/stacking_jax).
      objective: "causal" trains on every token; "ul2" cuts documents into chunks for
        causal LM, prefix LM and span corruption, and needs a vocabulary with
        sentinels. Validation is causal in any case.
      ul2: the shares of the objectives and the noise.
      mode_tokens: whether under UL2 each chunk, and at evaluation each prompt, begins
        with the token of its objective ([NLG], [S2S], [NLU]).
      bad_rows: a row of a JSONL file that is not JSON with a text is refused, with
        file and line ("refuse"), or counted, named and left out ("skip").
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
    mixture: Mapping[str, float] | None = None
    objective: str = "causal"
    ul2: UL2Config = UL2Config()
    mode_tokens: bool = True
    bad_rows: str = "refuse"
    stages: Sequence[tuple[float, Mapping[str, float]]] | None = None

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
        for name, known in (("objective", OBJECTIVE_CHOICES), ("bad_rows", BAD_ROWS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}: it is one of {', '.join(known)}."
                )
        if not isinstance(self.mode_tokens, bool):
            raise UserError(f"mode_tokens is {self.mode_tokens!r}: it must be True or False.")
        if isinstance(self.ul2, Mapping):  # as a run's config.json has it
            object.__setattr__(self, "ul2", UL2Config(**self.ul2))
        if not isinstance(self.ul2, UL2Config):
            raise UserError(f"ul2 is {self.ul2!r}: it must be a UL2Config.")
        if self.mixture is not None:
            later = bool(self.stages)
            object.__setattr__(self, "mixture", _rates(self.mixture, zero=later))
        if self.stages is not None:
            object.__setattr__(self, "stages", _stages(self.stages, self.mixture))

    @property
    def is_builtin(self) -> bool:
        """Whether the documents are read here, without seqio and TensorFlow."""
        return self.text_dir is not None or self.task == DEFAULT_TASK

    @property
    def has_own_vocabulary(self) -> bool:
        """Whether `vocabulary` decides the tokens; a task registered elsewhere brings its own."""
        return self.is_builtin or self.task.startswith(TFDS_PREFIX)

    @property
    def is_ul2(self) -> bool:
        return self.objective == "ul2"

    @property
    def has_mode_tokens(self) -> bool:
        """Whether a token that says which objective is on begins every chunk."""
        return self.is_ul2 and self.mode_tokens

    def stages_of(self, total_steps: int) -> list[tuple[int, Mapping[str, float]]]:
        """(updates done when it begins, rates) of each data stage after the first.

        Raises:
          UserError: two begin at one step, or one at the run's beginning or end.
        """
        found = [(round(share * total_steps), rates) for share, rates in self.stages or ()]
        steps = [0, *(step for step, _ in found), total_steps]
        if steps != sorted(set(steps)):
            raise UserError(
                f"the data stages of {total_steps} steps begin at {steps[1:-1]}: each needs a step "
                "of its own, after 0 and before the end; change DataConfig.stages or the steps."
            )
        return found

    def objective_text(self) -> str:
        """All that the objective adds to a cache's identity; "" for plain causal text."""
        if not self.is_ul2:
            return ""
        settings = {**dataclasses.asdict(self.ul2), "mode_tokens": self.mode_tokens}
        return "ul2 " + json.dumps(settings, sort_keys=True)


def _stages(stages, mixture) -> list[list]:
    """The data stages, checked."""
    form = "a list of (share of the steps, {source: rate}), such as [(0.8, {'math': 1.0})]"
    if not isinstance(stages, list | tuple) or not stages or mixture is None:
        raise UserError(f"stages is {stages!r}: it must be {form}, of a mixture.")
    found = []
    for entry in stages:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise UserError(f"stages has the entry {entry!r}: it must be {form}.")
        share, rates = entry
        real = isinstance(share, numbers.Real) and not isinstance(share, bool)
        if not (real and 0 < share < 1) or (found and share <= found[-1][0]):
            raise UserError(
                f"stages begins one at {share!r}: shares of the steps rise between 0 and 1."
            )
        rates = _rates(rates)
        unknown = sorted(set(rates) - set(mixture))
        if unknown:
            raise UserError(
                f"stages names the source {unknown[0]!r}, which is not in the mixture; give it "
                "there too, with rate 0 if it is for later alone."
            )
        found.append([float(share), rates])
    return found


def _rates(mixture: Mapping[str, float], zero: bool = False) -> dict[str, float]:
    """The rates of a mixture, checked; their order is that of the sources."""
    if not isinstance(mixture, Mapping) or not mixture:
        raise UserError(
            f"mixture is {mixture!r}: it must be a dict of sources and rates, such as "
            "{'web': 57, 'github': 17}."
        )
    for name, rate in mixture.items():
        real = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
        fits = real and math.isfinite(rate) and (rate > 0 or (zero and rate == 0))
        if not (isinstance(name, str) and name and fits):
            raise UserError(
                f"mixture has the source {name!r} at rate {rate!r}: sources are names and rates "
                "numbers above 0 (leave a source out instead of giving it 0)."
            )
    if not any(mixture.values()):
        raise UserError(f"mixture is {mixture!r}: some source needs a rate above 0.")
    return {name: float(rate) for name, rate in mixture.items()}


def cache_root() -> Path:
    """The folder below which everything downloaded or cached is kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/stacking_jax").expanduser()
