"""Before the first step the processes of a run compare what they are about to run."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import platform
import socket
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import stacking_jax
from stacking_jax.errors import UserError
from stacking_jax.training import consensus
from stacking_jax.training.config import TrainConfig

_PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "grain")
# Folders of each machine's own, which decide no number.
_OF_ITS_OWN = (("compilation_cache",), ("data", "cache_dir"))


def check_agreement(
    config: TrainConfig, data_digest: str, run_dir: Path, stop_at: int | None = None
) -> None:
    """Waits for all processes and compares code, versions, configuration, data and place.

    Args:
      config: what this process is to run.
      data_digest: of its cache's manifest.
      run_dir: where it looks for checkpoints, which must be the same folder for all.
      stop_at: where it is to leave off.

    Raises:
      UserError: in every process alike, with the process, its host and what differs.
    """
    facts = {"host": socket.gethostname(), **facts_of(config, data_digest)}
    facts["checkpoints in the run directory"] = _checkpoints(run_dir)
    facts["--stop_at"] = str(stop_at)
    compare(consensus.every(facts))


def facts_of(config: TrainConfig, data_digest: str) -> dict[str, Any]:
    """What must be the same everywhere, by name."""
    return {
        "code": source_digest(),
        "versions": versions(),
        "configuration": _settings(config.to_dict()),
        "data": data_digest,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "backend": jax.default_backend(),
    }


def compare(facts: Sequence[dict[str, Any]]) -> None:
    """Compares what the processes said of themselves, in their order.

    The majority is taken to be right, and process 0 where there is none.

    Raises:
      UserError: for the first process that differs; others are counted.
    """
    wrong: dict[int, list[str]] = {}
    for name in facts[0]:
        if name == "host":
            continue
        said = [json.dumps(each.get(name), sort_keys=True) for each in facts]
        usual, count = collections.Counter(said).most_common(1)[0]
        if 2 * count <= len(said):
            usual = said[0]
        for process, text in enumerate(said):
            if text != usual:
                difference = _difference(name, json.loads(text), json.loads(usual))
                wrong.setdefault(process, []).append(difference)
    if not wrong:
        return
    process = min(wrong)
    more = f" ({len(wrong) - 1} more process(es) differ too)" if len(wrong) > 1 else ""
    raise UserError(
        f"process {process} on {facts[process]['host']} differs from the others: "
        f"{'; '.join(wrong[process])}{more}; make the hosts alike and start again"
    )


def source_digest() -> str:
    """SHA-256 over the package's Python files: names and bytes."""
    folder = Path(stacking_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}:{len(content)};".encode() + content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that compute, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as one flat object, without each machine's own folders."""
    flat: dict[str, Any] = {}

    def walk(value, path):
        if path in _OF_ITS_OWN:
            return
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, (*path, str(name)))
        else:
            flat[".".join(path)] = value

    walk(json.loads(json.dumps(config)), ())
    return flat


def _checkpoints(run_dir: Path) -> str:
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return ", ".join(sorted((name for name in names if name.isdecimal()), key=int)) or "none"


def _difference(name: str, said: Any, usual: Any) -> str:
    if isinstance(said, dict) and isinstance(usual, dict):
        keys = [key for key in sorted({*said, *usual}) if said.get(key) != usual.get(key)]
        return f"{name}: " + ", ".join(
            f"{key} is {said.get(key)!r}, not {usual.get(key)!r}" for key in keys
        )
    if name in ("code", "data"):
        return f"{name} (digest {str(said)[:12]}, not {str(usual)[:12]})"
    return f"{name}: {said!r}, not {usual!r}"
