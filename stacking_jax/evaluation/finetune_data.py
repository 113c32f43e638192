"""Training examples of tasks as rows of tokens: loss on the answers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.evaluation.batching import bucket
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.evaluation.task import TRAIN, EvalTask


@dataclasses.dataclass(frozen=True)
class Examples:
    """One example per row: prompt, answer, EOS, and padding.

    Attributes:
      tokens, segment_ids, positions, prefix: int32 `[examples, length]`, as training reads
        them; `prefix` is 1 on the prompt, which carries no loss.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    prefix: np.ndarray

    @property
    def count(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: np.ndarray, rows: int, local: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows of a batch, filled up with rows of padding; those of this host."""
        filling = ((0, rows - len(chosen)), (0, 0))
        return {
            name: np.pad(getattr(self, name)[chosen], filling)[np.asarray(local)]
            for name in ("tokens", "segment_ids", "positions", "prefix")
        }


def encode_examples(
    model: LanguageModel, tasks: Sequence[EvalTask], count: int | None, seed: int
) -> Examples:
    """`count` training examples of each task, task after task.

    Raises:
      UserError: a task has too few examples, or one does not fit into the context.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for task in tasks:
        found = list(task.source(TRAIN, count, seed))
        if not found or (count is not None and len(found) < count):
            raise UserError(
                f"the task {task.name} has {len(found)} training examples, not {count or 'any'}"
            )
        for example in found:
            parts = model.split(example.prompt, example.target)
            answer = [*parts.target_ids, model.tokenizer.eos_id]
            if len(parts.prompt_ids) + len(answer) > model.context:
                raise UserError(
                    f"a training example of {task.name} has {len(parts.prompt_ids) + len(answer)} "
                    f"tokens, the context {model.context}; it is not cut: choose a task that fits"
                )
            rows.append((parts.prompt_ids, answer))
    # A few widths for all datasets, so that they share a compiled program.
    width = bucket(max(len(prompt) + len(answer) for prompt, answer in rows))
    shape = (len(rows), width)
    tokens, prefix = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        tokens[i, :length] = [*prompt, *answer]
        prefix[i, : len(prompt)] = 1
        segment_ids[i, :length] = 1
        positions[i, :length] = np.arange(length)
    return Examples(tokens, segment_ids, positions, prefix)
