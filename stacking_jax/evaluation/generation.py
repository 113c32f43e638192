"""Continues many prompts: sorted by length, batched, cut where the task says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stacking_jax.evaluation.batching import batches_by_length, default_tokens_per_batch
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.evaluation.tokens import (
    Split,
    continuation_text,
    cut_at_stop,
    holds_stop,
    stopping_ids,
)
from stacking_jax.models.decoding import generate


def generate_texts(
    model: LanguageModel,
    prompts: Sequence[Split],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    settings: EvaluationConfig = EvaluationConfig(),
    advance: Callable[[int], None] = lambda amount: None,
) -> list[str]:
    """The continuation of each prompt, as text before the first stop text or EOS.

    A stop text is looked for in the text and not among the tokens, so that it may
    begin in one token and end in another. What a prompt gets does not depend on the
    other prompts: each draws with a seed of its own.

    Args:
      model: what continues.
      prompts: from `tokens.split`; each must leave room for `max_new_tokens`.
      max_new_tokens: the most tokens that are added.
      stop: texts before which a continuation ends.
      settings: of the sampling and of the batches.
      advance: is told of prompts that are done.

    Raises:
      UserError: for a prompt that does not fit into the context.
    """
    texts = [""] * len(prompts)
    ends = stopping_ids(model.tokenizer, stop)
    # Where every stop text is one character, some token that ends it has it whole.
    straddling = any(len(mark) > 1 for mark in stop)
    budget = settings.tokens_per_batch or default_tokens_per_batch()
    lengths = [len(parts.prompt_ids) + 1 for parts in prompts]
    for batch in batches_by_length(lengths, budget, model.parts):
        chosen = [prompts[i] for i in batch.members]
        filling = batch.rows - len(chosen)

        def stopped(row: int, ids: list[int], chosen=chosen) -> bool:
            if row >= len(chosen):
                return True
            return straddling and holds_stop(
                continuation_text(model.tokenizer, chosen[row], ids), stop
            )

        new = generate(
            model.graph,
            model.params,
            # A row of filling repeats a prompt, and so ends when that one ends.
            [parts.prompt_ids for parts in chosen] + [chosen[0].prompt_ids] * filling,
            max_new_tokens=max_new_tokens,
            eos_id=model.tokenizer.eos_id,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            stop_ids=ends,
            stopped=stopped,
            row_seeds=[*batch.members, *[batch.members[0]] * filling],
            width=batch.width,
            max_length=model.context,
            place=model.place,
            constrain=model.constrain,
            **model.runs,
        )
        for place, parts, ids in zip(batch.members, chosen, new, strict=False):
            texts[place] = cut_at_stop(continuation_text(model.tokenizer, parts, ids), stop)
        advance(len(chosen))
    return texts
