"""What a whole checkpoint consists of: its files, their sizes and SHA-256 digests.

Written into the checkpoint's own folder once Orbax has committed it, so that it goes
wherever the folder is copied. Every process describes the files that it wrote, so that no
host reads what another one has just written, in a file of its own:
`digests.process_K.json`. A manifest is complete when all of them are there.

Not listed are Orbax's marks of a commit, which some tools do not copy: a complete manifest
that agrees says more than they do.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

COMMIT_MARK = "commit_success.txt"
STEP_METADATA = "_CHECKPOINT_METADATA"

_NAME = re.compile(r"digests\.process_(\d+)\.json")
_FORMAT = 1
_PIECE = 8 << 20
_THREADS = 4
_NICENESS = 19


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a manifest says of a checkpoint.

    Attributes:
      problem: the first file that is not as it was written and how it differs, or None.
      complete: whether every file is accounted for.
    """

    problem: str | None
    complete: bool


def write(
    folder: epath.PathLike, process: int = 0, processes: int = 1, *, digests: bool = True
) -> None:
    """Describes the files of a committed checkpoint that belong to one process.

    The threads that read them back, mostly from the page cache, give way to all others.

    Args:
      folder: of the checkpoint.
      process, processes: whose files, of how many processes.
      digests: without them, sizes alone.

    Raises:
      OSError: if something cannot be read or written.
    """
    folder = epath.Path(folder)
    mine = [name for name in _files(folder) if _owner(name, processes) == process]
    files = _described(folder, mine, digests, nice=True)
    text = json.dumps(
        {"format": _FORMAT, "process": process, "processes": processes, "files": files}, indent=1
    )
    target = folder / f"digests.process_{process}.json"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text + "\n")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check(
    folder: epath.PathLike, process: int = 0, processes: int = 1, *, digests: bool = True
) -> Verdict:
    """Whether the files of a checkpoint are those that its manifest describes.

    Args:
      folder: of the checkpoint.
      process, processes: which part of the files to look at, so that hosts share the
        work, however many had written them.
      digests: whether to read files at all, or to look at their sizes alone.
    """
    folder = epath.Path(folder)
    try:
        described, complete = _read(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Verdict(f"{error.__class__.__name__} in its manifest: {error}", False)
    mine = {
        name: described[name] for name in sorted(described)[process::processes]
    }
    for name, about in mine.items():
        try:
            size = (folder / name).stat().length
        except OSError:
            return Verdict(f"{name} is missing", complete)
        if size != about["bytes"]:
            return Verdict(f"{name} has {size:,} bytes instead of {about['bytes']:,}", complete)
    hashed = [name for name, about in mine.items() if digests and "sha256" in about]
    try:
        found = _described(folder, hashed, digests=True, nice=False)
    except OSError as error:
        return Verdict(f"{error.filename} cannot be read: {error.strerror or error}", complete)
    for name, about in found.items():
        if about["sha256"] != described[name]["sha256"]:
            return Verdict(f"the content of {name} has changed: its digest differs", complete)
    return Verdict(None, complete)


def digest(folder: epath.PathLike) -> str:
    """SHA-256 of what the manifest says: equal for copies of one checkpoint.

    Raises:
      OSError, ValueError: if it cannot be read, or there is none.
    """
    described, _ = _read(epath.Path(folder))
    if not described:
        raise ValueError("it has no manifest")
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def committed(folder: epath.PathLike) -> bool:
    """Whether Orbax itself says that it finished this checkpoint.

    Its step metadata hold a time of commit from just before the folder gets its name, or,
    on a store without renaming, its mark.
    """
    folder = epath.Path(folder)
    if (folder / COMMIT_MARK).exists():
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        metadata = json.loads((folder / STEP_METADATA).read_text())
        return metadata.get("commit_timestamp_nsecs") is not None
    return False


def put_back_mark(folder: epath.PathLike) -> None:
    """Writes Orbax's mark of a commit where a copy has lost it.

    On `gs://` Orbax reads nothing without it.
    """
    mark = epath.Path(folder) / COMMIT_MARK
    if not mark.exists():
        mark.write_text("Put back: every file agrees with the manifest.")


def _read(folder: epath.Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """All that the parts of a manifest describe, and whether no part is missing."""
    described: dict[str, dict[str, Any]] = {}
    present, wanted = set(), None
    for entry in sorted(folder.iterdir()):
        if _NAME.fullmatch(entry.name):
            part = json.loads(entry.read_text())
            present.add(int(part["process"]))
            wanted = int(part["processes"])
            for name, about in part["files"].items():
                described[name] = {**about, "bytes": int(about["bytes"])}
    return described, wanted is not None and present >= set(range(wanted))


def _files(folder: epath.Path) -> Iterator[str]:
    """The files of a checkpoint, by their paths within it."""
    for parent, _, names in folder.walk():
        for name in names:
            path = (parent / name).relative_to(folder)
            mark = name == COMMIT_MARK or str(path) == STEP_METADATA
            if not (mark or _NAME.fullmatch(name) or name.endswith(".tmp")):
                yield path.as_posix()


def _owner(name: str, processes: int) -> int:
    """The process that wrote a file: Orbax names its folders, the rest is the first's."""
    found = re.search(r"process_(\d+)(?:/|$)", name)
    return int(found[1]) % processes if found else 0


def _described(
    folder: epath.Path, names: Iterable[str], digests: bool, nice: bool
) -> dict[str, dict[str, Any]]:
    def describe(name: str) -> dict[str, Any]:
        path = folder / name
        about: dict[str, Any] = {"bytes": path.stat().length}
        if digests:
            about["sha256"] = _sha256(path)
        return about

    names = sorted(names)
    with concurrent.futures.ThreadPoolExecutor(
        _THREADS, "digests", initializer=_give_way if nice else None
    ) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _give_way() -> None:
    """Lowers the priority of this thread alone, where the system knows how."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
