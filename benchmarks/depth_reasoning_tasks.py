"""The texts of the depth reasoning study as seqio tasks: prompts carry no loss.

Importing this registers `depth_reasoning_copying`, `_repeated` and `_asked_0` to `_asked_3`,
which read what `python -m benchmarks.depth_reasoning` wrote below the working directory.
"""

from __future__ import annotations

import functools
import json

import seqio
import tensorflow as tf

from benchmarks.depth_reasoning import FOLDER, KINDS


def _rows(split: str, shuffle_files: bool, seed=None, *, kind: str) -> tf.data.Dataset:
    del shuffle_files, seed
    path = FOLDER / "texts" / split / f"{kind}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tf.data.Dataset.from_tensor_slices(
        {name: [row[name] for row in rows] for name in ("inputs", "targets")}
    )


def _register(kind: str) -> None:
    words = seqio.SentencePieceVocabulary(str(FOLDER / "vocab.model"))
    seqio.TaskRegistry.add(
        f"depth_reasoning_{kind}",
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
