"""Comparing a grown tree with what it must look like."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import path_keys


def check_target(tree: Any, target: Any) -> None:
    """Compares paths, shapes and dtypes of two trees, abstract or not.

    Raises:
      UserError: naming the first leaves that are missing, surplus or of another kind.
    """
    have, want = _described(tree), _described(target)
    surplus = [path for path in have if path not in want]
    missing = [path for path in want if path not in have]
    if surplus or missing:
        parts = []
        if missing:
            parts.append(f"the target also has {_listed(missing)}")
        if surplus:
            parts.append(f"the target has no {_listed(surplus)}")
        raise UserError(f"the grown tree is not the target: {'; '.join(parts)}")
    for path, kind in have.items():
        if kind != want[path]:
            raise UserError(f"{path} grew to {kind}, but the target has {want[path]}")


def _described(tree: Any) -> dict[str, str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(path_keys(path)): f"{_dtype(leaf)}{list(np.shape(leaf))}" for path, leaf in flat
    }


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f", ... ({len(paths)} leaves)" if len(paths) > 3 else "")
