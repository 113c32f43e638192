"""The folder in which compiled programs are kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_compilation_cache(directory: str | None) -> None:
    """Turns on JAX's persistent compilation cache.

    The folder is private to the user, since what lies in it is run as code.

    Args:
      directory: of the cache; None for the user's cache folder; '' for none.
    """
    if directory == "":
        return
    if directory is None:
        root = os.environ.get("STACKING_JAX_CACHE") or Path.home() / ".cache" / "stacking_jax"
        directory = str(Path(root) / "compiled")
    if "://" not in directory:
        Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
