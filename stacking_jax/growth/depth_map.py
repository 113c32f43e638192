"""The depth map: which stored layer runs at each position of the stack.

One idea carries plain models, growth by stacking, looped models and random
sub-paths (see docs/architecture.md). A map is *materialised* once by
`growth.grow` (the copies become layers of their own) or *run* on every forward
pass by `growth.run_stack` (the copies stay tied). Layers that come from nowhere
are `NEW`: such a map can be materialised, not run.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence

from stacking_jax.errors import UserError

# The entry of a map for a layer that no stored layer is the source of: `grow` takes
# it from the freshly initialised tree that it is given.
NEW = -1


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of stored layers that is repeated as a whole.

    Attributes:
      layers: stored layer indices, or `NEW`, in the order in which they run.
      repeats: how often the run happens, at least 1.

    Raises:
      UserError: if `layers` or `repeats` are not whole numbers, or repeats < 1.
    """

    layers: tuple[int, ...]
    repeats: int = 1

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(_as_index(layer) for layer in self.layers))
        object.__setattr__(self, "repeats", _as_index(self.repeats))
        if self.repeats < 1:
            raise UserError("a segment of a depth map must be repeated at least once")

    @property
    def sources(self) -> tuple[int, ...]:
        return self.layers * self.repeats


class DepthMap:
    """Maps each position of a stack to the stored layer that runs there.

    A map is immutable, hashable (so it can be a static argument of `jax.jit`)
    and compares by what it does: two maps are equal when they read from the
    same number of stored layers and have the same `sources`.

    Attributes:
      segments: the map as segments × repeats. Loops keep their structure, which
        `run_stack` turns into nested scans.
      stored: the number of stored layers that the map reads from; 0 where every
        layer is `NEW`.

    Raises:
      UserError: if the map is empty, but for the one of a stack that stores no layer
        (`stored` = 0), or names a layer that is not stored.
    """

    __slots__ = ("segments", "stored")

    segments: tuple[Segment, ...]
    stored: int

    def __init__(
        self, sources: Iterable[int] | Sequence[Segment], stored: int | None = None
    ):
        """Builds a map from a flat list of layers or from segments.

        Args:
          sources: stored layer of each position (or `NEW`), nearest the input
            first; or `Segment`s. Flat lists are folded into segments where they
            repeat.
          stored: the number of stored layers; by default the largest index + 1.
        """
        entries = tuple(sources)
        if entries and all(isinstance(entry, Segment) for entry in entries):
            segments = tuple(entry for entry in entries if entry.layers)
        else:
            segments = _fold(tuple(_as_index(entry) for entry in entries))
        flat = [layer for segment in segments for layer in segment.layers]
        if not flat and stored != 0:
            raise UserError("a depth map needs at least one layer; got none")
        stored = max(flat) + 1 if stored is None else _as_index(stored)
        if stored < 0:
            raise UserError(f"a depth map reads from 0 or more stored layers; got {stored}")
        for layer in flat:
            if layer != NEW and not 0 <= layer < stored:
                stores = f"stores layers 0 to {stored - 1}" if stored else "stores none"
                raise UserError(
                    f"the depth map names layer {layer}, but the stack {stores}; "
                    f"NEW ({NEW}) is the one entry without a source"
                )
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "stored", stored)

    def __setattr__(self, name, value):
        raise AttributeError("a DepthMap cannot be changed; build a new one")

    def __reduce__(self):
        return DepthMap, (self.segments, self.stored)

    @classmethod
    def identity(cls, depth: int) -> DepthMap:
        """The map of a plain model: every stored layer once, in order."""
        return cls(range(depth), stored=depth)

    @property
    def sources(self) -> tuple[int, ...]:
        """The stored layer (or `NEW`) of each position, nearest the input first."""
        return sum((segment.sources for segment in self.segments), ())

    def __len__(self) -> int:
        """The number of positions: the depth that runs."""
        return sum(len(segment.layers) * segment.repeats for segment in self.segments)

    @property
    def is_identity(self) -> bool:
        return self.sources == tuple(range(self.stored))

    @property
    def copies(self) -> tuple[bool, ...]:
        """For each position, whether an earlier position has the same source.

        A `NEW` layer is nobody's copy.
        """
        seen: set[int] = set()
        flags = []
        for source in self.sources:
            flags.append(source in seen)
            if source != NEW:
                seen.add(source)
        return tuple(flags)

    @property
    def fresh(self) -> tuple[bool, ...]:
        """For each position, whether it is `NEW`."""
        return tuple(source == NEW for source in self.sources)

    def then(self, later: DepthMap) -> DepthMap:
        """The single map that equals growing by `self` and then by `later`.

        What is `NEW` in either is new in the result. (A copy that `later` makes of a
        new layer is new as well: one map cannot say that two new layers are equal.)

        Raises:
          UserError: if `later` does not read from as many layers as `self` makes.
        """
        if later.stored != len(self):
            raise UserError(
                f"cannot compose: the first map makes {len(self)} layers, "
                f"the second reads from {later.stored}"
            )
        sources = self.sources
        composed = (NEW if layer == NEW else sources[layer] for layer in later.sources)
        return DepthMap(composed, stored=self.stored)

    def __eq__(self, other) -> bool:
        if not isinstance(other, DepthMap):
            return NotImplemented
        return self.stored == other.stored and self.sources == other.sources

    def __hash__(self) -> int:
        return hash((self.stored, self.sources))

    def __str__(self) -> str:
        """A small picture: runs of layers, loops in parentheses, new layers as +."""
        pictures: list[str] = []
        for alike in _each_alone(self.segments):
            first, last = _picture(alike[0]), _picture(alike[-1])
            pictures += [f"{first}..{last}"] if len(alike) > 2 else map(_picture, alike)
        return " ".join(pictures) or "none"

    def __repr__(self) -> str:
        return f"DepthMap({list(self.sources)}, stored={self.stored})"


def as_depth_map(depth_map: DepthMap | Iterable[int], stored: int | None = None) -> DepthMap:
    """Accepts a `DepthMap` or a plain sequence of layers.

    Args:
      depth_map: a map, or the stored layer (or `NEW`) of each position.
      stored: the number of layers that the tree really stores; checked.

    Raises:
      UserError: if the map reads from another number of layers than `stored`.
    """
    if not isinstance(depth_map, DepthMap):
        return DepthMap(depth_map, stored=stored)
    if stored is not None and depth_map.stored != stored:
        raise UserError(
            f"the depth map reads from {depth_map.stored} stored layers, "
            f"but the stack holds {stored}"
        )
    return depth_map


def _as_index(entry) -> int:
    # A list of True and False is a mask of layers taken for a list of layers.
    if not isinstance(entry, bool):
        try:
            return operator.index(entry)
        except TypeError:
            pass
    raise UserError(
        f"a depth map holds whole layer numbers; got {entry!r} of type {type(entry).__name__}"
    )


def _fold(sources: tuple[int, ...]) -> tuple[Segment, ...]:
    """Finds repeats, longest coverage first from the left: 0 1 0 1 2 -> (0 1)×2, 2."""
    segments: list[Segment] = []
    plain: list[int] = []
    at = 0
    while at < len(sources):
        best = Segment(sources[at : at + 1])
        for period in range(1, (len(sources) - at) // 2 + 1):
            unit = sources[at : at + period]
            repeats = 1
            while sources[at + repeats * period : at + (repeats + 1) * period] == unit:
                repeats += 1
            if repeats > 1 and repeats * period > len(best.layers) * best.repeats:
                best = Segment(unit, repeats)
        if best.repeats == 1:
            plain.extend(best.layers)
        else:
            if plain:
                segments.append(Segment(tuple(plain)))
                plain = []
            segments.append(best)
        at += len(best.layers) * best.repeats
    if plain:
        segments.append(Segment(tuple(plain)))
    return tuple(segments)


def _each_alone(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments, those together that repeat one layer each, one after the other: (0)×2 (1)×2."""
    groups: list[list[Segment]] = []
    for segment in segments:
        before = groups[-1][-1] if groups else None
        if before is not None and before.repeats == segment.repeats > 1 and (
            len(before.layers) == 1 and segment.layers == (before.layers[0] + 1,)
            and before.layers != (NEW,)
        ):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _picture(segment: Segment) -> str:
    runs: list[str] = []
    for first, last in contiguous_runs(segment.layers):
        if last - first >= 2:
            runs.append(f"{first}..{last}")
        else:
            runs.extend("+" if layer == NEW else str(layer) for layer in range(first, last + 1))
    text = " ".join(runs)
    return text if segment.repeats == 1 else f"({text})×{segment.repeats}"


def contiguous_runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Splits layers into ascending runs; each is (first, last), both included.

    A `NEW` layer is a run of its own, (NEW, NEW): it is no neighbour of layer 0.
    """
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] != NEW and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs
