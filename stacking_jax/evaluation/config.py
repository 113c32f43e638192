"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
import os

from stacking_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How tasks are evaluated, by the command and during training alike.

    Attributes:
      data_dir: the folder of published evaluation files.
      bad_rows: 'refuse' or 'skip' (and count) rows of those files that cannot be read.
      allow_lossy: evaluate reasoning primitives that the vocabulary does not give back as
        they were, with a warning; they are refused otherwise.
      shots: of a group or a beginning of names, only the tasks of so many demonstrations.
      limit: examples per task, the first ones; None for as many as a task has (of a
        generated task, as many as it says by itself).
      seed: of generated examples, demonstrations and sampling.
      temperature: 0 takes the likeliest token.
      top_k, top_p: narrow what is sampled; see `models.decoding.generate`.
      mode: under UL2, whose mode token begins each prompt: 'causal' ([NLG]), 'prefix' ([S2S]),
        'span' ([NLU]), or None for no token. Models without mode tokens get none.
      bidirectional_prompts: whether the tokens of a prompt see one another; None for what the
        model was trained with, `DecoderConfig.bidirectional_prompts`.
      tokens_per_batch: rows × columns of a batch; None for what suits the device.
      loops: how often the block of a looped model runs; None for as in training.

    Raises:
      UserError: a value is outside its range.
    """

    data_dir: str | None = None
    bad_rows: str = "refuse"
    allow_lossy: bool = False
    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    mode: str | None = "prefix"
    bidirectional_prompts: bool | None = None
    tokens_per_batch: int | None = None
    loops: int | None = None

    def __post_init__(self):
        if isinstance(self.data_dir, os.PathLike):
            object.__setattr__(self, "data_dir", os.fspath(self.data_dir))
        for name, least in (
            ("shots", 0), ("limit", 1), ("top_k", 1), ("tokens_per_batch", 1), ("loops", 1)
        ):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < least
            ):
                raise UserError(
                    f"EvaluationConfig.{name} is None or a whole number of at least {least}; got "
                    f"{value!r}"
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"EvaluationConfig.seed is a whole number from 0; got {self.seed!r}")
        if self.bad_rows not in ("refuse", "skip"):
            raise UserError(
                f"EvaluationConfig.bad_rows is 'refuse' or 'skip'; got {self.bad_rows!r}"
            )
        if self.mode not in (None, "causal", "prefix", "span"):
            raise UserError(
                f"EvaluationConfig.mode is None, causal, prefix or span; got {self.mode!r}"
            )
        if self.bidirectional_prompts not in (None, True, False):
            raise UserError(
                "EvaluationConfig.bidirectional_prompts is None, True or False; got "
                f"{self.bidirectional_prompts!r}"
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "EvaluationConfig needs temperature >= 0 and 0 < top_p <= 1; got "
                f"{self.temperature!r} and {self.top_p!r}"
            )
