"""What is measured is kept: a JSON file per cell, so that a session goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("stack", "preconditioner", "dominance")
# Of what is computed: to be raised when a change of the code gives a cell another meaning or other
# numbers, for a digest knows settings and packages but no code.
COMPUTATION = 1
# What judges and is not measured: cells stay when it changes. Digests were first made with some of
# it, and go on holding those values.
_JUDGING = ("target_losses", "tolerance", "floor")
_AS_FIRST = {"target_loss": 0.1, "tolerance": 0.01, "floor": 2.0}


class Kept:
    """Cells of one session of measurements in `folder/cells`.

    A cell is named by what it measures and by a digest of the settings that it depends on, of the
    packages' versions and of `COMPUTATION`: others measure anew and leave what is there alone. A
    name begins with the cell's kind ('preconditioner/40'), and settings that begin with another
    kind ('dominance_rate') are not its.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], versions: dict):
        self.folder = Path(folder) / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._settings, self._versions = settings, versions

    def path(self, name: str) -> Path:
        kind = name.partition("/")[0]
        others = tuple(f"{other}_" for other in KINDS if other != kind)
        mine = {
            key: value for key, value in self._settings.items()
            if not key.startswith(others) and key not in _JUDGING
        }  # fmt: skip
        told = [mine | _AS_FIRST, self._versions]
        # The first computation was not named.
        text = json.dumps(told + [COMPUTATION] * (COMPUTATION > 1), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return self.folder / f"{name.replace('/', '-').replace(' ', '_')}-{digest}.json"

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of that name, measured now if it is not there; with its `seconds`."""
        path = self.path(name)
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        begun = time.monotonic()
        found = compute()
        found["seconds"] = round(time.monotonic() - begun, 2)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
        part.replace(path)  # A cell is there whole or not at all.
        return found

    def has(self, name: str) -> bool:
        return self.path(name).exists()
