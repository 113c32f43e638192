"""The folder in which compiled programs are kept from run to run."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from stacking_jax.console import warn
from stacking_jax.errors import UserError

_ELSEWHERE = (
    "name a folder of your own with TrainConfig.compilation_cache or STACKING_JAX_CACHE, or '' "
    "for none"
)


def use_compilation_cache(directory: str | None) -> None:
    """Turns on JAX's persistent compilation cache.

    The folder is private to the user, since what lies in it is run as code. Of one behind a
    URL, who may write there is the business of its bucket.

    Args:
      directory: of the cache; None for the user's cache folder; '' for none.

    Raises:
      UserError: see `private_folder`.
    """
    if directory is None:
        root = os.environ.get("STACKING_JAX_CACHE") or Path.home() / ".cache" / "stacking_jax"
        directory = str(Path(root).expanduser() / "compiled")
    if directory and "://" not in directory:
        private_folder(Path(directory))
    if jax.config.jax_compilation_cache_dir != (directory or None):
        jax.config.update("jax_compilation_cache_dir", directory or None)
        # JAX settles on a folder, or on none, with the first program of the process.
        compilation_cache.reset_cache()
    # A smaller value is the user's own.
    least = min(0.5, jax.config.jax_persistent_cache_min_compile_time_secs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def private_folder(folder: Path) -> None:
    """Makes a folder with mode 0700 for what is run as code, or sees to it that it is one.

    A folder that others could read or write is closed to them, with a word.

    Raises:
      UserError: it cannot be made or closed; it belongs to another user; or others could
        write there and have.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not hasattr(os, "geteuid"):  # not a POSIX system
            return
        found, me = folder.stat(), os.geteuid()
        if found.st_uid != me:
            raise UserError(
                f"compiled programs in {folder} would be run as code, and it belongs to user "
                f"{found.st_uid}, not to you ({me}); {_ELSEWHERE}"
            )
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o022:
            theirs = [entry for entry in folder.iterdir() if entry.lstat().st_uid != me]
            if theirs:
                raise UserError(
                    f"compiled programs in {folder} would be run as code, and others could write "
                    f"there and have ({theirs[0].name}); delete it, or {_ELSEWHERE}"
                )
        if mode & 0o077:
            folder.chmod(0o700)
            warn(
                f"{folder} was open to other users (mode {mode:04o}) and holds what is run as "
                "code; it is yours alone now (0700)"
            )
            if stat.S_IMODE(folder.stat().st_mode) & 0o077:
                raise UserError(
                    f"{folder} stays open to other users, on a file system without such rights; "
                    f"{_ELSEWHERE}"
                )
    except OSError as error:
        raise UserError(
            f"the folder of compiled programs {folder} cannot be used: "
            f"{error.strerror or error}; {_ELSEWHERE}"
        ) from error
