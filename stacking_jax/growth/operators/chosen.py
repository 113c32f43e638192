"""Operators that say which layers stay: inheriting, shrinking, and maps by hand.

A map that is shorter than what it reads from shrinks the stack; `grow` takes it like
any other.
"""

from __future__ import annotations

from collections.abc import Iterable

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import NEW, DepthMap, Segment, as_depth_map
from stacking_jax.growth.operators.guards import between, guarded, whole


def inherit_first(depth: int, k: int, to: int | None = None) -> DepthMap:
    """Keeps the first `k` layers; what is deeper is `NEW`.

    With `to` = k it is the first step of Inheritune (Sanyal et al. 2024, arXiv
    2404.08634), which cuts a small model out of the early layers of a large one.
    With a larger `to`, layers without a source follow on top: give `grow` a freshly
    initialised tree for them. `inherit_first(0, 0, to)` is growth from zero layers
    (Bu 2025, arXiv 2511.04981).

    Args:
      depth: the present number of layers, 0 allowed.
      k: how many of them are kept.
      to: the depth to grow to, at least k; k by default.

    Returns:
      A map of length `to` over `depth` stored layers.

    Raises:
      UserError: if there are not `k` layers, or `to` has no room for them.
    """
    depth = whole("inherit_first: the depth", depth, least=0)
    k = whole("inherit_first: k", k, least=0)
    to = k if to is None else whole("inherit_first: to", to, least=0)
    if k > depth or k > to:
        raise UserError(
            f"inherit_first: the first {k} layers do not fit: there are {depth}, "
            f"and {to} are to stand"
        )
    return DepthMap([*range(k), *[NEW] * (to - k)], stored=depth)


def custom(
    sources: DepthMap | Iterable[int | Segment], stored: int | None = None
) -> DepthMap:
    """A map by hand: the stored layer of each position, nearest the input first.

    Args:
      sources: stored layers, `NEW` among them where a layer has no source; or
        `Segment`s; or a map.
      stored: how many layers are stored; by default the largest one named + 1.

    Raises:
      UserError: if the map is empty or names a layer that is not stored.
    """
    if isinstance(sources, str) or not isinstance(sources, DepthMap | Iterable):
        raise UserError(f"custom needs a list of layers; got {sources!r}")
    return as_depth_map(sources, stored)


def every_nth(
    depth: int, n: int, *, first: int = 0, keep_first: int = 0, keep_last: int = 0
) -> DepthMap:
    """Shrinks the stack to every n-th layer: 0 2 4 6.

    As DistilBERT takes one layer out of two of its teacher (Sanh et al. 2019, arXiv
    1910.01108).

    Args:
      depth: the present number of layers.
      n: the distance of the layers that stay.
      first: the first one that stays.
      keep_first, keep_last: layers at the ends that stay in any case.

    Returns:
      A map of length ⌈(depth − first) / n⌉ (of what is not kept) over `depth` layers.

    Raises:
      UserError: if there is no layer `first`.
    """
    inner = between("every_nth", depth, keep_first, keep_last)
    n = whole("every_nth: n", n, least=1)
    first = whole("every_nth: first", first, least=0)
    if first >= inner:
        raise UserError(f"every_nth: there are {inner} layers to take from, and no layer {first}")
    return guarded(range(first, inner, n), depth, keep_first, keep_last)


def drop_last(depth: int, count: int) -> DepthMap:
    """Shrinks the stack by its last `count` layers: an early exit, made permanent.

    Args:
      depth: the present number of layers.
      count: how many go; at least one layer must stay.

    Returns:
      A map of length depth − count over `depth` stored layers.

    Raises:
      UserError: if no layer would stay.
    """
    depth = whole("drop_last: the depth", depth, least=1)
    count = whole("drop_last: count", count, least=0)
    if count >= depth:
        raise UserError(f"drop_last: {count} of {depth} layers are to go; at least one must stay")
    return DepthMap(range(depth - count), stored=depth)
