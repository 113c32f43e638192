"""Files of gin/methods laid over one another: none of them is dropped in silence.

A method's file binds all that it stands on, `GrowthConfig.operator = None` for one at full depth,
so that it fits over any experiment. Over another method's file that would take the other one back
and say nothing. So two of them may not bind a parameter to different values, whichever comes
first. What is not a method's file may bind anything, and decides where it comes last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError

FOLDER = ("gin", "methods")
# The one whose purpose is to take back what came before it.
TAKES_BACK = "baseline"
# A method at full depth -> what of it goes with growth, bound by itself.
BESIDE_GROWTH = {"loop_regularised": ("SimilarityConfig.weight", "SimilarityConfig.block")}


@dataclass(frozen=True, eq=False)
class MethodFile:
    """One reading of a method's file; what it includes belongs to it."""

    stem: str

    def __str__(self) -> str:
        return f"{'/'.join(FOLDER)}/{self.stem}.gin"


def method_file(path: Path, root: Path) -> MethodFile | None:
    """The method whose file this is; None for any other file.

    Args:
      path: of the file, resolved.
      root: `gin_root()`. A checkout's own `gin/methods` counts too where the package is installed
        elsewhere, for the names that are there.
    """
    folder = root.resolve().joinpath(*FOLDER[1:])
    named = path.parent == folder or path.parts[-3:-1] == FOLDER
    return MethodFile(path.stem) if named and (folder / path.name).is_file() else None


def check_layers(history: Iterable[Any]) -> None:
    """Refuses methods that would replace one another's settings.

    Args:
      history: all bindings in order, each with `key`, `name`, `value` and the `method` that it
        belongs to, None for what a user's own file or the command line binds.

    Raises:
      UserError: the first two files that bind a parameter differently, where nothing else does
        so after them.
    """
    owners: dict[Any, Any] = {}
    replaced: dict[Any, tuple[Any, Any]] = {}
    bound: dict[str, dict[str, Any]] = {}
    for method, read in itertools.groupby(history, key=lambda binding: binding.method):
        last = {binding.key: binding for binding in read}
        if method is None:
            for key in last:
                owners.pop(key, None)
                replaced.pop(key, None)
        elif method.stem == TAKES_BACK:
            owners.clear()
            replaced.clear()
        else:
            bound[method.stem] = {binding.name: binding.value for binding in last.values()}
            for key, binding in last.items():
                before = owners.get(key, binding)
                if before.method.stem != method.stem and before.value != binding.value:
                    replaced.setdefault(key, (before, binding))
                owners[key] = binding
    for first, second in replaced.values():
        raise UserError(
            f"{first.method} binds {first.name} = {first.value!r} and {second.method} after it "
            f"{second.value!r}, so that a part of one method would be lost: name one of the two"
            + _instead(first.method.stem, second.method.stem, bound)
        )


def _instead(one: str, other: str, bound: dict[str, dict[str, Any]]) -> str:
    """What goes with growth in place of the whole file, where one of the two grows the stack."""
    for stem, grower in ((one, other), (other, one)):
        if stem in BESIDE_GROWTH and bound[grower].get("GrowthConfig.operator") is not None:
            flags = " ".join(
                f"--gin.{name}={bound[stem][name]!r}" for name in BESIDE_GROWTH[stem]
            )
            return f", or in place of {MethodFile(stem)} bind {flags}"
    return ""
