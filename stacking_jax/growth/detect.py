"""`detect_layout` finds the stacks in a tree, says how it knew, and refuses to guess.

Evidence, in this order. *Numbered* subtrees of the same keys and shapes (`layers_0`,
`layers_1`, ...) are an unrolled stack. A subtree of which every array has an axis of the
same size in the same place is a stack along that axis; more so under a name that stacks
bear ('layers', 'encoderblock', T5X's 'decoder/decoder'). A size alone proves little: a
model whose width equals its depth looks stacked along either axis. Where two readings
remain, the caller has to say which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import Layout, Scanned, path_keys
from stacking_jax.growth.readings import (
    AROUND,
    Candidate,
    Hints,
    Keys,
    numbered_but_unlike,
    numbered_stacks,
    parameters_root,
    scanned_stacks,
    within,
)
from stacking_jax.growth.stacks import place_of


@dataclasses.dataclass(frozen=True)
class Detected:
    """The stacks of a tree.

    Attributes:
      layouts: the layouts by name, as `grow` takes them for several stacks.
      depths: how many layers each holds.
      reason: how that was known, in a sentence per stack.
    """

    layouts: dict[str, Layout]
    depths: dict[str, int]
    reason: str

    @property
    def layout(self) -> Layout:
        """The one layout.

        Raises:
          UserError: if there are several stacks.
        """
        if len(self.layouts) > 1:
            raise UserError(
                f"the tree holds several stacks, {', '.join(self.layouts)}; use .layouts and a "
                "depth map for each"
            )
        return next(iter(self.layouts.values()))

    @property
    def depth(self) -> int:
        """How many layers the stacks hold.

        Raises:
          UserError: if they hold different numbers.
        """
        if len(set(self.depths.values())) > 1:
            shown = ", ".join(f"{name} {depth}" for name, depth in self.depths.items())
            raise UserError(f"the stacks have different depths: {shown}; use .depths")
        return next(iter(self.depths.values()))


def detect_layout(
    tree: Any, *, axis: int | None = None, depth: int | None = None, period: int | None = None
) -> Detected:
    """Finds where the layers of a tree are.

    Args:
      tree: parameters or a whole train state, abstract or not. Of a state, the
        parameters decide; moments and averages follow by the same path.
      axis: the axis of stacked layers, where it is known.
      depth: the number of layers, where it is known.
      period: layers per unit, where unlike layers follow one another; by default found
        from their keys and shapes, and for Gemma 2 and 3 from their names.

    Raises:
      UserError: if there is no stack, or more than one reading of one.
    """
    # Counts and random keys are shaped by their use, and prove nothing.
    leaves = {
        path_keys(_unboxed(path)): tuple(np.shape(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), np.inexact)
    }
    root = parameters_root(leaves)
    inside = {keys: shape for keys, shape in leaves.items() if keys[: len(root)] == root}
    hints = Hints(axis, depth, period)
    found = numbered_stacks(inside, hints) if axis is None else []
    outside = {k: s for k, s in inside.items() if not any(within(k, one) for one in found)}
    found += scanned_stacks(outside, hints, several=bool(found))
    if not found:
        unlike = numbered_but_unlike(inside)
        if unlike is not None:
            raise UserError(f"no stack of layers found: {unlike}; name the layout yourself")
        # A single number is weak evidence: a block that is stacked may hold a 'layers_0'.
        found = numbered_stacks(inside, hints, single=True) if axis is None else []
    if not found:
        raise _none(leaves, hints)
    return _named(found, inside)


def _none(leaves: dict[Keys, tuple], hints: Hints) -> UserError:
    shown = ", ".join("/".join(keys) for keys in list(leaves)[:3]) or "no leaves"
    wanted = "" if hints.depth is None else f" of depth {hints.depth}"
    return UserError(
        f"no stack of layers found{wanted}: neither numbered subtrees of the same keys and shapes, "
        f"nor arrays that share an axis; the tree holds {shown}, ... ({len(leaves)} leaves)"
    )


def _named(found: list[Candidate], leaves: dict[Keys, tuple]) -> Detected:
    groups: dict[Keys, list[Candidate]] = {}
    for candidate in found:
        groups.setdefault(_own_keys(candidate.keys), []).append(candidate)
    layouts: dict[str, Layout] = {}
    depths, reasons = {}, []
    for keys, members in groups.items():
        forms = {(it.depth, it.layout.period, getattr(it.layout, "axis", None)) for it in members}
        if len(forms) > 1:
            shown = ", ".join(f"{'/'.join(one.keys)} {one.depth}" for one in members)
            raise UserError(f"stacks of one name differ in depth or axis: {shown}")
        path, first = "/".join(keys), members[0]
        if isinstance(first.layout, Scanned):
            layouts[path] = dataclasses.replace(first.layout, path=path)
        else:
            layouts[path] = dataclasses.replace(first.layout, pattern=path)
        depths[path] = first.depth
        reasons.append(first.reason)
    _check_claims(layouts, groups.values(), leaves)
    short = _short_names(list(layouts))
    return Detected(
        {short[path]: layout for path, layout in layouts.items()},
        {short[path]: depth for path, depth in depths.items()},
        "; ".join(reasons),
    )


def _own_keys(keys: Keys) -> Keys:
    """Without what stands around the parameters."""
    strong = [at for at, key in enumerate(keys[:-1]) if key in AROUND]
    start = strong[-1] + 1 if strong else 0
    # '{}' alone is no pattern that could be told from any other list.
    while start and keys[start:] == ("{}",):
        start -= 1
    return keys[start:]


def _check_claims(layouts: dict[str, Layout], groups, leaves: dict[Keys, tuple]) -> None:
    """A layout matches anywhere in a path; here it must match its own stack alone."""
    for (name, layout), members in zip(layouts.items(), groups, strict=True):
        for keys in leaves:
            own = any(within(keys, one) for one in members)
            if not own and place_of(keys, layout) is not None:
                raise UserError(
                    f"{layout} would also claim {'/'.join(keys)}, which is not of that stack; put "
                    "the tree under a key of its own, or name the layouts yourself"
                )


def _short_names(paths: list[str]) -> dict[str, str]:
    """'decoder/layers' -> 'decoder', as long as that tells the stacks apart."""
    heads = {path: path.split("/")[0].replace("{}", "").strip("_.") or path for path in paths}
    return heads if len(set(heads.values())) == len(paths) else {path: path for path in paths}


def _unboxed(path: Sequence) -> Sequence:
    """Without the last step into a box such as Flax's `Partitioned` or a `Variable`."""
    boxed = len(path) > 1 and getattr(path[-1], "name", None) == "value"
    return path[:-1] if boxed else path
