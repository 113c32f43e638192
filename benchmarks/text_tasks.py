"""Texts of prompts and answers as seqio tasks: prompts carry no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import seqio
import tensorflow as tf


def register(
    name: str, vocabulary: Path, rows: Callable[[str], Sequence[dict[str, str]]]
) -> None:
    """Registers a task.

    Args:
      name: of the task.
      vocabulary: a SentencePiece model.
      rows: of a split, `train` or `validation`: dicts of `inputs` and `targets`.
    """
    words = seqio.SentencePieceVocabulary(str(vocabulary))

    def dataset(split: str, shuffle_files: bool, seed=None) -> tf.data.Dataset:
        del shuffle_files, seed
        found = rows(split)
        return tf.data.Dataset.from_tensor_slices(
            {part: [row[part] for row in found] for part in ("inputs", "targets")}
        )

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            "inputs": seqio.Feature(words, add_eos=False),
            "targets": seqio.Feature(words, add_eos=True),
        },
    )
