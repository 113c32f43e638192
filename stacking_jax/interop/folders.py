"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from stacking_jax.console import progress
from stacking_jax.errors import UserError
from stacking_jax.paths import local_path


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path`, which takes that name at the end.

    If anything fails, it is removed and `path` does not appear.

    Raises:
      UserError: if something is at `path` already, or the disk refuses.
    """
    path = Path(os.path.abspath(local_path(path)))
    refuse_existing(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        refuse_existing(path)
        os.rename(temporary, path)
        temporary = None
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{path} was not made: {where}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: str | Path) -> None:
    """Raises UserError if anything is at `path`: nothing is written over."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is not written over; name another folder")


@contextlib.contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in megabytes; yields a function that takes how many bytes were done."""
    done = shown = 0
    with progress(description, max(total // 10**6, 1), "MB") as advance:

        def count(nbytes: int) -> None:
            nonlocal done, shown
            done += nbytes
            if done // 10**6 > shown:
                advance(done // 10**6 - shown)
                shown = done // 10**6

        yield count


def _umask() -> int:
    # There is no way to read it but to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
