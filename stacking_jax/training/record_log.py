"""Which records each step was given, so that it can be counted that none was lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.training import distributed
from stacking_jax.training.telemetry import one_line_disk_errors


class RecordLog:
    """records-P.jsonl: for each step the rows that process P put on its devices.

    A line holds the step (counted from 1, as in metrics.jsonl), the numbers of the
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

    def write(self, step: int, rows: Sequence[int], batch: Mapping[str, np.ndarray]) -> None:
        """Notes the rows `[rows, length]` of a step, and which of the batch they are."""
        ids = [
            hashlib.blake2b(tokens.tobytes() + segments.tobytes(), digest_size=8).hexdigest()
            for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
        ]
        with one_line_disk_errors(self._path):
            line = {"step": step, "rows": list(rows), "ids": ids}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        with one_line_disk_errors(self._path):
            self._file.close()


def read_records(run_dir: Path) -> dict[int, list[str]]:
    """Step -> the digests of its whole batch, the rows of all processes put together.

    Raises:
      ValueError: rows of a step are missing, or processes that share a row (where `tensor`
        or `sequence` goes from one to another) were not given the same.
    """
    parts: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(run_dir.glob("records-*.jsonl")):
        for line in _lines(path):
            parts.setdefault(line["step"], []).append(line)
    records = {}
    for step, lines in sorted(parts.items()):
        ids: dict[int, str] = {}
        for line in lines:
            for row, found in zip(line["rows"], line["ids"], strict=True):
                if ids.setdefault(row, found) != found:
                    raise ValueError(f"step {step}: processes were given different rows {row}")
        missing = set(range(max(ids) + 1)) - set(ids)
        if missing:
            raise ValueError(f"step {step}: the rows {sorted(missing)} are missing")
        records[step] = [ids[row] for row in sorted(ids)]
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
