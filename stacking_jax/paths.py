"""Where people keep things: local folders, and object stores by URL, through etils.epath.

A local path stays a `pathlib.Path`. A store has no folders to make, cannot append and does not
rename; but an object that is written appears whole or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from stacking_jax.errors import UserError

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/runs."""
    return "://" in os.fspath(path)


def open_path(name: str | os.PathLike) -> Path:
    """The path of this name: an absolute local one, or one of etils.epath for a URL.

    Raises:
      UserError: the URL is of an unknown kind, needs packages that are not installed, or
        cannot be reached.
    """
    name = os.fspath(name)
    if not is_remote(name):
        if re.match(r"(gs|s3|az):/", name):
            raise UserError(f"{name} has lost a slash, as in a pathlib.Path; give it as text")
        return Path(name).expanduser().absolute()
    scheme = name.partition("://")[0]
    if scheme not in _PACKAGES:
        known = ", ".join(f"{known}://" for known in _PACKAGES)
        raise UserError(f"{name}: {scheme}:// is not known here; a local path, {known} are")
    _check_installed(name, scheme)
    from etils import epath

    path = epath.Path(name)
    try:
        path.exists()
    except Exception as error:  # each store has its own kinds
        raise UserError(f"{name} cannot be reached: {' '.join(str(error).split())}") from error
    return path


def local_path(name: str | os.PathLike) -> Path:
    """The same for what is done on local folders alone.

    Raises:
      UserError: it is a URL.
    """
    if is_remote(name):
        raise UserError(f"{name}: this works on local folders alone; copy it to one first")
    return Path(name).absolute()


def identity(path: Path) -> Path:
    """Equal for equal places: without links on the way, where there can be some."""
    return path if is_remote(path) else path.resolve()


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where there are folders."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def _check_installed(name: str, scheme: str) -> None:
    # As epath chooses: TensorFlow's file systems where it is installed, else fsspec's.
    with_tensorflow = os.environ.get("EPATH_USE_TF", "").lower() not in ("false", "no", "f", "0")
    if with_tensorflow and importlib.util.find_spec("tensorflow") is not None:
        return
    try:
        import fsspec

        fsspec.get_filesystem_class("gcs" if scheme == "gs" else scheme)
    except (ImportError, ValueError):
        listed = " --no-deps -r requirements/gcs.txt" if scheme == "gs" else f" {_PACKAGES[scheme]}"
        raise UserError(
            f"{name} needs packages that are not installed: python -m pip install{listed}"
        ) from None
