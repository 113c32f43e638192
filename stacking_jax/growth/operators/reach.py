"""From one depth to another by the name of an operator, applied as often as needed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap
from stacking_jax.growth.operators.guards import between, guarded, whole
from stacking_jax.growth.operators.registry import operator


def growth_map(
    name: str,
    depth: int,
    to: int,
    *,
    block: int | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    **options: Any,
) -> DepthMap:
    """The one map that leads from `depth` to `to` layers by the operator `name`.

    The operator is applied as often as needed and its maps are composed. Which depths
    it reaches follows from its definition:

    * `midas`, `repeat_block`, `random_block`, `lidas` in its literal reading: by whole
      blocks. `block` is by default the largest that leads there.
    * `gradstack`, `first_block`, `lidas`: any depth. `block` is by default what is
      missing, at most what is there; where it does not divide what is missing, the
      last growth copies fewer layers.
    * `g_stack`, `interleave`: any depth, in one growth: position i of D copies layer
      i mod d, or ⌊i · d / D⌋ (stacking and interpolation as LiGO, Wang et al. 2023,
      writes them). With `times`: depth · times^j only. `progressive`: depth · 2^j.
    * `solar`: even depths up to 2 · depth, in one growth. `loop`: what whole loops
      reach. `single_layer`: any, from one layer. `inherit_first`: any (what is deeper
      than `k`, by default all that is there, is `NEW`). `custom`: what its list says.
    * `every_nth`, `drop_last`: less than depth.

    Args:
      name: of the operator.
      depth: the present number of layers; 0 for `inherit_first` and `custom`.
      to: the number of layers to reach.
      block: layers per block, for operators that have blocks.
      keep_first, keep_last: layers at the ends that are never repeated, for operators
        that repeat. (For a loop, its `prefix` and `suffix`.)
      **options: the operator's other arguments.

    Returns:
      A map of length `to` over `depth` stored layers; the identity if they are equal.

    Raises:
      UserError: if there is no such operator, it takes no such option, or it does not
        lead there; the message names the depths that it leads to.
    """
    function = operator(name)
    depth = whole("growth_map: the depth", depth, least=0)
    if not depth and name not in _FROM_NOTHING:
        raise UserError(
            f"{name} copies layers, and there are none yet: from a depth of 0 leads "
            "inherit_first, which makes new ones"
        )
    to = whole("growth_map: the depth to reach", to, least=1)
    guards = {"keep_first": keep_first, "keep_last": keep_last}
    given = dict(options)
    given |= {key: value for key, value in guards.items() if value != 0}
    if block is not None:
        given["block"] = block
    _check_options(name, function, given)
    return _WAYS.get(name, _by_blocks)(name, depth, to, given)


def stage_depths(
    name: str,
    depth: int,
    num_stages: int,
    *,
    keep_first: int = 0,
    keep_last: int = 0,
    **options: Any,
) -> list[int]:
    """The depths of `num_stages` stages that end at `depth`, as the method spaces them.

    Operators that copy blocks grow by equal steps: stage i of k has i/k of the final
    depth (MIDAS, §2). Operators that copy the whole stack multiply it: `progressive`
    by 2, `g_stack` and `interleave` by their `times`. Layers that are kept stand in
    every stage and do not count.

    Args:
      name: of the operator.
      depth: the final depth.
      num_stages: k.
      keep_first, keep_last, **options: as in `growth_map`, `block` among them.

    Raises:
      UserError: if the stages do not divide the depth, or the method spaces no stages.
    """
    function = operator(name)
    depth = whole("depth", depth, least=1)
    num_stages = whole("num_stages", num_stages, least=1)
    guards = {"keep_first": keep_first, "keep_last": keep_last}
    _check_options(name, function, {**options, **guards})
    if num_stages == 1:
        return [depth]
    if name not in _FACTORS and name in _WAYS:
        raise UserError(
            f"{name} has no stages of its own; list the depths of the stages, ending at {depth}"
        )
    inner = between(name, depth, keep_first, keep_last)
    kept = depth - inner
    what = f"a depth of {depth}" + (f" with {kept} layers kept" if kept else "")
    if name not in _FACTORS:
        if inner % num_stages:
            fits = [k for k in range(1, inner + 1) if inner % k == 0]
            raise UserError(
                f"{what} cannot be reached in {num_stages} equal stages; "
                f"numbers of stages that divide it: {', '.join(map(str, fits))}"
            )
        return [kept + inner * i // num_stages for i in range(1, num_stages + 1)]
    times = options.get("times", _FACTORS[name])
    if times is None:
        raise UserError(f"{name} needs the option times: by how much each growth multiplies")
    times = whole(f"{name}: times", times, least=2)
    first, rest = divmod(inner, times ** (num_stages - 1))
    if rest:
        most = max(k for k in range(1, num_stages) if inner % times ** (k - 1) == 0)
        raise UserError(
            f"{what} cannot be reached by {name} in {num_stages} stages, each {times} times as "
            f"deep as the one before: {times ** (num_stages - 1)} does not divide {inner}; "
            f"at most {most} stages do"
        )
    return [kept + first * times**i for i in range(num_stages)]


# ---- the ways there --------------------------------------------------------------------


def _by_blocks(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    rest = {key: value for key, value in given.items() if key != "block"}
    inner, missing = _inner(name, depth, given), to - depth
    _only_deepens(name, depth, to)
    by_layers = name in ("gradstack", "first_block") or (
        name == "lidas" and given.get("reading", "in_place") == "in_place"
    )
    block = given.get("block")
    if block is not None:
        block = whole(f"{name}: the block", block, least=1)
    elif by_layers:
        block = min(inner, missing)
    else:
        block = math.gcd(inner, missing)
    function = operator(name)
    if missing:
        function(depth, block, **rest)  # What is wrong with the block is wrong at once.
    if not by_layers and missing % block:
        reached = [depth + block * i for i in range(1, missing // block + 3)]
        raise _unreachable(name, depth, to, reached, f" with block {block}")
    grown = DepthMap.identity(depth)
    while len(grown) < to:
        grown = grown.then(function(len(grown), min(block, to - len(grown)), **rest))
    return grown


def _by_factor(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    inner = _inner(name, depth, given)
    kept, goal = depth - inner, to - (depth - inner)
    _only_deepens(name, depth, to)
    times = 2 if name == "progressive" else given.get("times")
    if times is None:
        if name == "g_stack":
            middle = [position % inner for position in range(goal)]
        else:
            middle = [position * inner // goal for position in range(goal)]
        return guarded(middle, depth, given.get("keep_first", 0), given.get("keep_last", 0))
    times = whole(f"{name}: times", times, least=2)
    reached = [inner]
    while reached[-1] < goal:
        reached.append(reached[-1] * times)
    if reached[-1] != goal:
        raise _unreachable(
            name, depth, to, [kept + middle for middle in reached[1:]],
            "" if name == "progressive" else f" with times {times}",
        )
    grown = DepthMap.identity(depth)
    for middle in reached[:-1]:
        grown = grown.then(operator(name)(kept + middle, **given))
    return grown


def _solar(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    inner = _inner(name, depth, given)
    kept, goal = depth - inner, to - (depth - inner)
    _only_deepens(name, depth, to)
    if to == depth:
        return DepthMap.identity(depth)
    if goal % 2 or goal > 2 * inner:
        reached = [kept + middle for middle in range(inner + 1, 2 * inner + 1) if middle % 2 == 0]
        raise _unreachable(name, depth, to, reached)
    drop = given.get("drop", inner - goal // 2)
    return _checked(name, operator(name)(depth, **given | {"drop": drop}), depth, to)


def _single_layer(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    if depth != 1:
        raise UserError(f"single_layer grows a stack of one layer; this one has {depth}")
    return operator(name)(to)


def _loop(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    prefix = whole("loop: prefix", given.get("prefix", 0), least=0)
    suffix = whole("loop: suffix", given.get("suffix", 0), least=0)
    _only_deepens(name, depth, to)
    k = depth - prefix - suffix
    if k < 1 or given.get("k", k) != k:
        raise UserError(
            f"loop: {depth} layers without a prefix of {prefix} and a suffix of {suffix} leave "
            f"{k} to loop" + (f", not k = {given['k']}" if "k" in given else "")
        )
    if (to - depth) % k:
        reached = [depth + k * i for i in range(1, (to - depth) // k + 3)]
        raise _unreachable(name, depth, to, reached)
    times = given.get("times", 1 + (to - depth) // k)
    return _checked(name, operator(name)(k, times, prefix, suffix), depth, to)


def _inherit_first(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    return operator(name)(depth, given.get("k", min(depth, to)), to)


def _custom(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    if "sources" not in given:
        raise UserError("custom needs the option sources: the stored layer of each position")
    return _checked(name, operator(name)(given["sources"], depth), depth, to)


def _every_nth(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    _only_shrinks(name, depth, to)
    inner = _inner(name, depth, given)
    if "n" in given:
        return _checked(name, operator(name)(depth, **given), depth, to)
    reached = {len(operator(name)(depth, n, **given)): n for n in range(inner, 0, -1)}
    if to not in reached:
        raise _unreachable(name, depth, to, reached)
    return operator(name)(depth, reached[to], **given)


def _drop_last(name: str, depth: int, to: int, given: dict[str, Any]) -> DepthMap:
    _only_shrinks(name, depth, to)
    return _checked(name, operator(name)(depth, given.get("count", depth - to)), depth, to)


# Operators that multiply the depth, and by how much unless `times` says so.
_FACTORS: dict[str, int | None] = {"progressive": 2, "g_stack": None, "interleave": 2}

# Every other operator copies blocks.
_WAYS: dict[str, Callable[[str, int, int, dict[str, Any]], DepthMap]] = {
    **dict.fromkeys(_FACTORS, _by_factor),
    "solar": _solar,
    "single_layer": _single_layer,
    "loop": _loop,
    "inherit_first": _inherit_first,
    "custom": _custom,
    "every_nth": _every_nth,
    "drop_last": _drop_last,
}

# Operators that make layers without a source.
_FROM_NOTHING = ("inherit_first", "custom")

# What growth_map itself finds out, so that it is no option.
_FOUND = {
    "single_layer": ("to",),
    "inherit_first": ("depth", "to"),
    "custom": ("stored",),
}
_NEEDED = {"repeat_block": ("index",), "random_block": ("seed",)}


def _check_options(name: str, function: Callable, given: dict[str, Any]) -> None:
    found = _FOUND.get(name, ("depth",))
    known = [key for key in inspect.signature(function).parameters if key not in found]
    for key, value in given.items():
        guard = key in ("keep_first", "keep_last")
        if key not in known and not (guard and value == 0):
            raise UserError(
                f"{name} takes no option {key!r}; it takes {', '.join(known) or 'none'}"
            )
    for key in _NEEDED.get(name, ()):
        if key not in given:
            raise UserError(f"{name} needs the option {key}")


def _inner(name: str, depth: int, given: dict[str, Any]) -> int:
    return between(name, depth, given.get("keep_first", 0), given.get("keep_last", 0))


def _checked(name: str, grown: DepthMap, depth: int, to: int) -> DepthMap:
    if grown.stored != depth or len(grown) != to:
        raise UserError(
            f"{name} with these options leads from {grown.stored} layers to {len(grown)}, "
            f"not from {depth} to {to}"
        )
    return grown


def _only_deepens(name: str, depth: int, to: int) -> None:
    if to < depth:
        raise UserError(
            f"{name} only deepens a stack; from {depth} layers to {to} lead drop_last, "
            "every_nth, inherit_first and custom"
        )


def _only_shrinks(name: str, depth: int, to: int) -> None:
    if to > depth:
        raise UserError(
            f"{name} only shrinks a stack; it does not lead from {depth} layers to {to}"
        )


def _unreachable(
    name: str, depth: int, to: int, reached: Iterable[int], how: str = ""
) -> UserError:
    # Those around the depth that was asked for are what helps.
    near = sorted(sorted(reached, key=lambda other: abs(other - to))[:6])
    return UserError(
        f"{name}{how} does not lead from {depth} layers to {to}; it leads to "
        f"{', '.join(map(str, near))}"
    )
