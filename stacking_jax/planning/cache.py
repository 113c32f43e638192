"""Results of compilations, kept by content in a private folder.

Two keys lead to a result. The program's own (its text, the topology, the compiler) decides
what is compiled: a change of comments compiles nothing, and plans that share depths share
results. The question's (the configuration, our source, the versions) finds a result without
tracing anything.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stacking_jax.data.config import cache_root
from stacking_jax.training.config import TrainConfig

_FORMAT = 2
_ROOMS = ("growth", "models", "training", "planning", "data/records.py")
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
# What changes no program: names, paths, and what is due when.
_NOT_COMPILED = (
    "name", "seed", "log_every", "eval_every", "eval_batches", "evaluate_tasks", "evaluate_every",
    "evaluation", "checkpoint_every", "keep_checkpoints", "compilation_cache",
)
_COMPILED_OF_DATA = ("sequence_length", "objective")
# What leads from stage to stage, and is in no stage's step: plans with the same depths share.
_BETWEEN_STAGES = (
    "operator", "num_stages", "schedule", "alpha", "options", "keep_first", "keep_last",
    "stage_depths", "stage_fractions", "stages", "init", "init_options", "moments",
)


class ResultCache:
    """A folder of results: `questions/` lead to `programs/`."""

    def __init__(self, directory: str | Path | None = None):
        root = Path(directory) if directory is not None else cache_root() / "planned"
        self.directory = root
        for folder in (root, root / "questions", root / "programs"):
            # Private, like the compiled programs of training.
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def find(self, question: str) -> dict | None:
        """The result of a question that was asked before."""
        asked = self._read("questions", question)
        return None if asked is None else self.program(str(asked.get("program")))

    def program(self, digest: str) -> dict | None:
        """The result of a program that was compiled before."""
        return self._read("programs", digest)

    def keep(
        self, question: str, digest: str, result: dict | None = None, text: str | None = None
    ) -> None:
        """Keeps a result, the optimised program beside it, and which question led there."""
        if text is not None:
            self._write(f"programs/{digest}.hlo.gz", gzip.compress(text.encode(), 6))
        if result is not None:
            self._write(f"programs/{digest}.json", json.dumps(result, indent=1).encode())
        self._write(f"questions/{question}.json", json.dumps({"program": digest}).encode())

    def text(self, digest: str) -> str | None:
        """The optimised program that a result was read from."""
        path = self.directory / "programs" / f"{digest}.hlo.gz"
        return gzip.decompress(path.read_bytes()).decode() if path.exists() else None

    def _read(self, folder: str, name: str) -> dict | None:
        try:
            found = json.loads((self.directory / folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self, name: str, content: bytes) -> None:
        # Whole or not at all: two plans may be at it at once.
        path = self.directory / name
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)


def question(
    config: TrainConfig, stage: int, topology: str, modules: Sequence[str] = ()
) -> str:
    """The digest of all that decides what a stage compiles to.

    Args:
      config: of the run.
      stage: its number, from 0.
      topology: its name.
      modules: the user's own that were imported: their files count as source.
    """
    return _digest(
        {
            "format": _FORMAT, "config": compiled_settings(config, stage),
            "topology": topology, "source": source_digest(tuple(modules)),
            "versions": versions(), "flags": flags(),
        }
    )


def program_digest(text: str, topology: str) -> str:
    """The digest of a lowered program, for one topology and compiler."""
    return _digest(
        {
            "format": _FORMAT, "text": hashlib.sha256(text.encode()).hexdigest(),
            "topology": topology, "flags": flags(),
            "compiler": {name: versions()[name] for name in ("jaxlib", "libtpu")},
        }
    )


def compiled_settings(config: TrainConfig, stage: int) -> dict[str, Any]:
    """The part of a configuration that the compiled step of a stage can depend on."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_COMPILED}
    settings["data"] = {k: settings["data"][k] for k in _COMPILED_OF_DATA}
    planned = config.plan().stages[stage]
    if planned.taught:
        settings["distill"]["teacher"] = _teacher(config)
    else:
        del settings["distill"]
    growth = config.growth
    if growth.ramp_steps or growth.rewarm_steps:
        # Gates and the climbing rate know where the growths are.
        return settings | {"stage": stage}
    settings["growth"] = {
        k: v for k, v in settings["growth"].items() if k not in _BETWEEN_STAGES
    }
    described = planned.to_dict()
    names = ("depth", "run_map", "path", "loop", "taught")
    return settings | {name: described[name] for name in names}


def _teacher(config: TrainConfig) -> dict[str, Any]:
    """What a compiled step depends on of its teacher; at the same path there may be another."""
    from stacking_jax.training import teacher

    labels = teacher.labels_of(config)
    if labels is not None:
        return {"cached": labels.manifest.top_k}
    found = teacher.find(config)
    return {"model": dataclasses.asdict(found.model), "stage": found.stage.to_dict()}


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of what compiles and traces; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def flags() -> dict[str, str]:
    """Settings of the compiler from the environment."""
    return {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}


@functools.cache
def source_digest(modules: tuple[str, ...] = ()) -> str:
    """Of the files of this package that make or read a program, and of the user's modules."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for room in _ROOMS:
        place = package / room
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(package).as_posix().encode() + b"\0")
            digest.update(file.read_bytes() + b"\0")
    for name in modules:
        file = getattr(importlib.import_module(name), "__file__", None)
        digest.update(name.encode() + b"\0" + (Path(file).read_bytes() if file else b""))
    return digest.hexdigest()


@functools.cache
def reader_digest() -> str:
    """Of the files that read an optimised program: results read by others are read again."""
    here = Path(__file__).resolve().parent
    names = ("hlo", "collectives", "traffic", "topology", "chips")
    return hashlib.sha256(b"".join((here / f"{n}.py").read_bytes() for n in names)).hexdigest()


def _digest(content: Any) -> str:
    def plain(value):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return str(value)

    text = json.dumps(content, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()
