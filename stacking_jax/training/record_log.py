"""Which records each step was given, so that it can be counted that none was lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.training import distributed
from stacking_jax.training.telemetry import one_line_disk_errors


class RecordLog:
    """records-P.jsonl: for each step the rows that process P put on its devices.

    A line holds the step (counted from 1, as in metrics.jsonl), the first of the
    process's rows in the global batch, and for each row the digest of its tokens and
    documents as they were handed over. A run that goes on from a step first drops what
    was written after it, whichever process wrote it.
    """

    def __init__(self, run_dir: Path, first_step: int):
        self._path = run_dir / f"records-{jax.process_index()}.jsonl"
        with distributed.main_process_first("records"), one_line_disk_errors(self._path):
            if jax.process_index() == 0:
                for path in run_dir.glob("records-*.jsonl"):
                    _drop_after(path, first_step)
            self._file = open(self._path, "a", encoding="utf-8")

    def write(self, step: int, first_row: int, batch: Mapping[str, np.ndarray]) -> None:
        """Notes the rows `[rows, length]` of a step."""
        ids = [
            hashlib.blake2b(tokens.tobytes() + segments.tobytes(), digest_size=8).hexdigest()
            for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
        ]
        with one_line_disk_errors(self._path):
            line = {"step": step, "first_row": first_row, "ids": ids}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        with one_line_disk_errors(self._path):
            self._file.close()


def read_records(run_dir: Path) -> dict[int, list[str]]:
    """Step -> the digests of its whole batch, the rows of all processes put together.

    Raises:
      ValueError: rows of a step are missing or were read twice.
    """
    parts: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(run_dir.glob("records-*.jsonl")):
        for line in _lines(path):
            parts.setdefault(line["step"], []).append(line)
    records = {}
    for step, lines in sorted(parts.items()):
        ids: list[str] = []
        for line in sorted(lines, key=lambda line: line["first_row"]):
            if line["first_row"] != len(ids):
                raise ValueError(f"step {step}: rows from {len(ids)} on are missing or read twice")
            ids += line["ids"]
        records[step] = ids
    return records


def _drop_after(path: Path, step: int) -> None:
    kept = [line for line in _lines(path) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # The line that was being written when the process was killed.
    return lines
