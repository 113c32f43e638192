"""The texts of `learned_primitive` as seqio tasks: prompts carry no loss.

Importing this registers `learned_copying`, `learned_repeated` and `learned_asked`. The folder
of the texts and of the vocabulary is the environment variable LEARNED_PRIMITIVE.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from benchmarks.text_tasks import register

KINDS = ("copying", "repeated", "asked")
_FOLDER = Path(os.environ["LEARNED_PRIMITIVE"])
_HELD_OUT = 100


def _rows(split: str, *, kind: str) -> list[dict[str, str]]:
    lines = (_FOLDER / "texts" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    lines = lines[_HELD_OUT:] if split == "train" else lines[:_HELD_OUT]
    return [json.loads(line) for line in lines]


for _kind in KINDS:
    register(f"learned_{_kind}", _FOLDER / "vocab.model", functools.partial(_rows, kind=_kind))
