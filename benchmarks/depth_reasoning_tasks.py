"""The texts of the depth reasoning study as seqio tasks: prompts carry no loss.

Importing this registers `depth_reasoning_copying`, `_repeated` and `_asked_0` to `_asked_3`,
which read what `python -m benchmarks.depth_reasoning` wrote below the working directory.
"""

from __future__ import annotations

import functools
import json

from benchmarks.depth_reasoning import FOLDER, KINDS
from benchmarks.text_tasks import register


def _rows(split: str, *, kind: str) -> list[dict[str, str]]:
    path = FOLDER / "texts" / split / f"{kind}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


for _kind in KINDS:
    register(
        f"depth_reasoning_{_kind}", FOLDER / "vocab.model", functools.partial(_rows, kind=_kind)
    )
