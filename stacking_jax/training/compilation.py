"""The folder in which compiled programs are kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_compilation_cache(directory: str | None) -> None:
    """Turns on JAX's persistent compilation cache.

    The folder is private to the user, since what lies in it is run as code.

    Args:
      directory: of the cache; None for the user's cache folder; '' for none.
    """
    if directory is None:
        root = os.environ.get("STACKING_JAX_CACHE") or Path.home() / ".cache" / "stacking_jax"
        directory = str(Path(root).expanduser() / "compiled")
    if directory and "://" not in directory:
        Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    if jax.config.jax_compilation_cache_dir != (directory or None):
        jax.config.update("jax_compilation_cache_dir", directory or None)
        # JAX settles on a folder, or on none, with the first program of the process.
        compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
