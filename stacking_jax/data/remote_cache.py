"""A cache behind a URL: made and read on the local disk, kept in an object store.

ArrayRecord files are read at random, which neither the library nor a store offers over a
network. So the files of a finished cache are copied to this machine once, and those of a
new one to the store; the manifest goes last both ways, so that either place holds a whole
cache or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from stacking_jax.console import progress, say
from stacking_jax.data import making
from stacking_jax.data.building import VOCABULARY_FILE
from stacking_jax.data.config import cache_root
from stacking_jax.data.manifest import FILE, Manifest
from stacking_jax.errors import UserError
from stacking_jax.paths import open_path

_PART = 16 << 20


def local_folder(url: str) -> Path:
    """Where the copy of a cache at `url` lies on this machine."""
    name = re.sub(r"[^\w.-]+", "_", url.partition("://")[2]).strip("_.")
    return cache_root() / "remote" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def fetch(url: str, folder: Path) -> None:
    """Copies the cache at `url` to `folder`, if there is one and it is not there yet.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    remote = open_path(url)
    with _one_line_errors(f"the cache {url} cannot be read"):
        if not (remote / FILE).exists():
            return
        text = (remote / FILE).read_bytes()
    if (folder / FILE).exists() and (folder / FILE).read_bytes() == text:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with making.lock(folder):
        if (folder / FILE).exists():
            if (folder / FILE).read_bytes() == text:
                return
            shutil.rmtree(folder)
        unfinished = folder.with_name(f".{folder.name}.copying")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        (unfinished / FILE).write_bytes(text)
        with _one_line_errors(f"the cache {url} cannot be copied to {folder}"):
            _copy(remote, unfinished, _names(text, remote), f"copying {url}")
        Manifest.load(unfinished)
        os.rename(unfinished, folder)
    say(f"copied the cache {url} to {folder}")


def store(folder: Path, url: str) -> None:
    """Copies the cache in `folder` to `url`, unless there is one.

    Raises:
      UserError: it cannot be written.
    """
    remote = open_path(url)
    with _one_line_errors(f"the cache {url} cannot be written"):
        if (remote / FILE).exists():
            return
        text = (folder / FILE).read_bytes()
        _copy(folder, remote, _names(text, folder), f"storing {url}")
        (remote / FILE).write_bytes(text)
    say(f"stored the cache in {url}")


def _names(manifest: bytes, folder: Path) -> list[str]:
    """The files of a cache but its manifest."""
    splits = json.loads(manifest)["splits"].values()
    names = [shard["file"] for split in splits for shard in split["shards"]]
    return names + [VOCABULARY_FILE] * (folder / VOCABULARY_FILE).exists()


def _copy(source: Path, target: Path, names: Iterable[str], title: str) -> None:
    names = list(names)
    with progress(title, len(names), "files") as advance:
        for name in names:
            with (source / name).open("rb") as read, (target / name).open("wb") as write:
                while part := read.read(_PART):
                    write.write(part)
            advance(1, name)


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turns what a store raises, which is of its own kinds, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
