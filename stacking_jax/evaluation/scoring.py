"""The likelihood of given continuations; a prompt is computed once for all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.evaluation.batching import batches_by_length, bucket, default_tokens_per_batch
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.evaluation.tokens import stopping_ids
from stacking_jax.models.decoding import pad_prompts, prefill, to_host

NORMALISATIONS = ("sum", "token", "byte")
_LEAST_CHOICE = 4


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
      log_probability: of all its tokens, and of its end where that is asked for, in nats.
      tokens: how many they are.
      bytes: of its text in UTF-8.
    """

    log_probability: float
    tokens: int
    bytes: int

    def by(self, normalisation: str) -> float:
        """The log-probability, as it is or per token or byte.

        Raises:
          UserError: for a normalisation that is not known.
        """
        if normalisation not in NORMALISATIONS:
            raise UserError(
                f"likelihoods are ranked by {', '.join(NORMALISATIONS)}; got {normalisation!r}"
            )
        parts = {"sum": 1, "token": self.tokens, "byte": self.bytes}[normalisation]
        return self.log_probability / max(parts, 1)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One prompt in tokens and those choices that follow just these tokens."""

    prompt_ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return max(len(choice) for choice in self.choices)


def tokens_needed(model: LanguageModel, prompt: str, choices: Sequence[str]) -> int:
    """Tokens of a prompt with the longest of its choices and its end."""
    parts = (model.split(prompt, choice) for choice in choices)
    return max(len(part.prompt_ids) + len(part.target_ids) for part in parts) + 1


def likelihoods(
    model: LanguageModel,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    stop: Sequence[str] = (),
    tokens_per_batch: int | None = None,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[list[Likelihood]]:
    """How likely each choice is after its prompt.

    A prompt runs once, and its choices one after the other against its keys and
    values. A choice that merges with the end of the prompt into other tokens (see
    `tokens.split`) gets a run of its own.

    With `stop`, the likelihood is that of the choice and nothing more: the probability
    that a stop text or EOS comes next is multiplied in. Without it, "1" would always be at
    least as likely as "17".

    Args:
      model: what is asked.
      prompts: texts.
      choices: per prompt, the continuations as text.
      stop: texts that end an answer; those that no single token holds do not count.
      tokens_per_batch: rows × columns of a batch; None for what suits the device.
      advance: is told of prompts that are done.

    Returns:
      Per prompt, one result per choice.

    Raises:
      UserError: for a choice that has no token, or does not fit into the context.
    """
    rows = [row for i, prompt in enumerate(prompts) for row in _rows(model, i, prompt, choices[i])]
    results = [[Likelihood(0.0, 0, 0)] * len(options) for options in choices]
    budget = tokens_per_batch or default_tokens_per_batch()
    marks = stopping_ids(model.tokenizer, stop) if stop else ()
    ends = (*marks, model.tokenizer.eos_id) if marks else ()
    # Rows of as many choices of like lengths share a program.
    groups: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        shape = (len(row.choices), bucket(row.longest + bool(ends), _LEAST_CHOICE))
        groups.setdefault(shape, []).append(row)
    for (count, columns), members in sorted(groups.items()):
        lengths = [len(row.prompt_ids) + 1 for row in members]
        for batch in batches_by_length(lengths, budget, model.parts):
            chosen = [members[i] for i in batch.members]
            padded = chosen + [chosen[0]] * (batch.rows - len(chosen))
            sums = _run(model, padded, ends, count, columns, batch.width)
            for column, row in enumerate(chosen):
                for number, (prompt, choice) in enumerate(row.places):
                    results[prompt][choice] = Likelihood(
                        float(sums[number, column]),
                        len(row.choices[number]),
                        len(choices[prompt][choice].encode("utf-8", errors="replace")),
                    )
                if row.places[0][1] == 0:  # the row of a prompt's first choice
                    advance(1)
    return results


def _rows(model: LanguageModel, prompt_number: int, prompt: str, choices: Sequence[str]):
    by_prompt: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, choice in enumerate(choices):
        parts = model.split(prompt, choice)
        if not parts.target_ids:
            raise UserError(
                f"the choice {choice!r} has no token in the vocabulary "
                f"{model.tokenizer.info.name}: it cannot be ranked"
            )
        needed = len(parts.prompt_ids) + len(parts.target_ids) + 1
        if needed > model.context:
            raise UserError(
                f"a prompt with its choice and an end has {needed} tokens, which do not fit into a "
                f"context of {model.context}; leave it out or shorten it"
            )
        by_prompt.setdefault(tuple(parts.prompt_ids), []).append(
            (number, tuple(parts.target_ids))
        )
    for prompt_ids, members in by_prompt.items():
        yield _Row(
            prompt_ids,
            tuple(ids for _, ids in members),
            tuple((prompt_number, number) for number, _ in members),
        )


def _run(
    model: LanguageModel, rows: Sequence[_Row], ends: Sequence[int], count: int, columns: int,
    width: int,
) -> np.ndarray:
    """Summed log-probabilities `[choices, rows]`."""
    inputs, lengths = pad_prompts([row.prompt_ids for row in rows], width)
    tokens = np.zeros((count, len(rows), columns + 1), np.int32)
    weights = np.zeros((count, len(rows), columns), np.float32)
    at_end = np.zeros((count, len(rows), columns), np.float32)
    for place, row in enumerate(rows):
        for number, ids in enumerate(row.choices):
            # The last token of the prompt is fed again: it predicts the first of the choice.
            tokens[number, place, 0] = inputs[place, lengths[place] - 1]
            tokens[number, place, 1 : len(ids) + 1] = ids
            weights[number, place, : len(ids)] = 1.0
            if ends:
                at_end[number, place, len(ids)] = 1.0
    ending = np.zeros(model.params["embedding"].shape[0], bool)
    ending[list(ends)] = True
    lengths = model.place(lengths)
    cache = prefill(
        model.graph, model.params, model.place(inputs), lengths,
        capacity=width + columns, constrain=model.constrain, **model.runs,
    )
    sums = _score(
        model.graph, model.params, cache, lengths, model.place_axis(tokens, 1),
        model.place_axis(weights, 1), model.place_axis(at_end, 1), jnp.asarray(ending),
        constrain=model.constrain, **model.runs,
    )
    sums = to_host(sums)
    if not np.isfinite(sums).all():
        raise UserError("the model's likelihoods are not numbers: its parameters are not finite")
    return sums


@functools.partial(jax.jit, static_argnames=("graph", "depth_map", "loop", "constrain"))
def _score(
    graph, params, cache, lengths, tokens, weights, at_end, ending, *, depth_map, loop, constrain
):
    model = nnx.merge(graph, params)
    positions = (lengths - 1)[:, None] + jnp.arange(tokens.shape[2] - 1)[None]

    def of_choice(item):
        ids, weight, end_weight = item
        # What this writes behind the prompt is dropped: every choice sees the prompt alone.
        logits, _ = model.decode(
            ids[:, :-1], positions, cache, depth_map=depth_map, loop=loop, constrain=constrain
        )
        log_z = jax.nn.logsumexp(logits, axis=-1)
        of_target = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1, mode="clip")[..., 0]
        of_end = jax.nn.logsumexp(jnp.where(ending[None, None], logits, -1e30), axis=-1)
        each = (of_target - log_z) * weight + (of_end - log_z) * end_weight
        return jnp.sum(each, axis=-1)

    return jax.lax.map(of_choice, (tokens, weights, at_end))
