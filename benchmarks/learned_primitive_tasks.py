"""The texts of `learned_primitive` as seqio tasks: prompts carry no loss.

Importing this registers `learned_copying`, `learned_repeated` and `learned_asked`. The folder
of the texts and of the vocabulary is the environment variable LEARNED_PRIMITIVE.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import seqio
import tensorflow as tf

KINDS = ("copying", "repeated", "asked")
_FOLDER = Path(os.environ["LEARNED_PRIMITIVE"])
_HELD_OUT = 100


def _rows(split: str, shuffle_files: bool, seed=None, *, kind: str) -> tf.data.Dataset:
    del shuffle_files, seed
    lines = (_FOLDER / "texts" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    lines = lines[_HELD_OUT:] if split == "train" else lines[:_HELD_OUT]
    rows = [json.loads(line) for line in lines]
    return tf.data.Dataset.from_tensor_slices(
        {name: [row[name] for row in rows] for name in ("inputs", "targets")}
    )


def _register(kind: str) -> None:
    words = seqio.SentencePieceVocabulary(str(_FOLDER / "vocab.model"))
    seqio.TaskRegistry.add(
        f"learned_{kind}",
        source=seqio.FunctionDataSource(
            functools.partial(_rows, kind=kind), splits=("train", "validation")
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            "inputs": seqio.Feature(words, add_eos=False),
            "targets": seqio.Feature(words, add_eos=True),
        },
    )


for _kind in KINDS:
    _register(_kind)
