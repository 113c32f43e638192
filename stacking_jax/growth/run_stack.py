"""`run_stack` runs a depth map over stacked layers, in any codebase.

A pure function over stacked parameters: usable from NNX, Linen or nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap, Segment, as_depth_map, contiguous_runs
from stacking_jax.growth.loops import Loop
from stacking_jax.growth.read_layer import keep_all_but_layers, read_layer
from stacking_jax.growth.run_loop import map_of_loop, run_loop


def run_stack(
    body: Callable[..., Any],
    layers: Any,
    x: Any,
    depth_map: DepthMap | Sequence[int] | jax.Array | None = None,
    gates: jax.Array | None = None,
    *,
    loop: Loop | None = None,
    per_position: Any = None,
    mode: Literal["scan", "unroll"] = "scan",
    unroll: int = 1,
    remat: Callable[..., Any] | None = None,
) -> Any:
    """Runs `body` once per position of the depth map, nearest the input first.

    A static map with repeats runs as nested scans: the weights of a loop are
    held once, however often it repeats. A traced map (an integer array of static
    length, drawn anew each step, say) costs as many layers as it is long; each
    layer is read where it is stored, and read again in the backward pass. A stack
    that stores no layers gives its carry back.

    Args:
      body: `body(layer, x) -> x` for one layer; `layer` is `layers` without its
        leading axis. With `per_position`: `body(layer, x, item) -> (x, output)`.
      layers: a pytree of arrays `[stored, ...]`.
      x: the carry, any pytree; shapes and dtypes must not change.
      depth_map: a `DepthMap`, a sequence of stored layers, a traced integer
        array `[positions]`, or None for every layer once. Entries of a traced
        map are not checked: JAX clips them into range. `NEW` layers cannot run.
      gates: `[positions]`; position i computes x + gates[i] · (body(layer, x) − x),
        so 1 is the layer itself and 0 skips it, both exactly, and 1/p rescales a
        dropped one. Mixed in float32 at least; integers in the carry are not gated.
      loop: the layers that repeat, with what happens between their turns: injection, truncated
        back-propagation, several exits. The map is then the loop's own, and may be left out.
      per_position: a pytree of arrays `[positions, ...]` that goes by position
        and not by stored layer, such as a KV cache.
      mode: 'scan' compiles in flat time with depth; 'unroll' runs faster on CPU.
      unroll: with 'scan', how many positions one turn of the loop runs: something in
        between. Of nested scans it is the inner one that has it.
      remat: a `jax.checkpoint` policy, what a position keeps for its backward
        pass; None keeps everything. Give it here rather than wrap `body`: a traced
        map has a checkpoint of its own, and the outer of two policies wins.

    Returns:
      The carry, or `(carry, outputs)` with outputs stacked `[positions, ...]`
      where `per_position` is given. Of a loop with several exits the carry of each,
      `[exits, ...]`, the one after all turns last.

    Raises:
      UserError: if leaves disagree on the number of layers, the map names a
        layer that is not there or is `NEW`, gates and map differ in length, map and loop
        do not agree, or `body` returns a carry of another structure, shape or dtype.
    """
    stored = _stored(layers)
    if loop is not None:
        depth_map = map_of_loop(loop, stored, depth_map, per_position)
    traced = isinstance(depth_map, jax.Array)
    if depth_map is None:
        depth_map = DepthMap.identity(stored)
    elif traced:
        _check_traced(depth_map)
    else:
        depth_map = as_depth_map(depth_map, stored)
        if any(depth_map.fresh):
            raise UserError(
                f"run_stack cannot run the map {depth_map}: its layers marked + are NEW and have "
                "no stored layer; grow the stack by the map first, then run all of its layers"
            )
    positions = depth_map.shape[0] if traced else len(depth_map)
    if gates is not None:
        gates = jnp.asarray(gates)
        if gates.shape != (positions,):
            raise UserError(
                f"gates has shape {gates.shape}, but the depth map runs {positions} positions"
            )
    _check_positions(per_position, positions)
    if mode not in ("scan", "unroll"):
        raise UserError(f"mode is 'scan' or 'unroll'; got {mode!r}")
    if isinstance(unroll, bool) or not isinstance(unroll, int) or unroll < 1:
        raise UserError(f"unroll is a positive whole number; got {unroll!r}")

    step = _step(body, with_items=per_position is not None)
    items = (gates, per_position)
    if not positions:
        return x if per_position is None else (x, _no_outputs(step, layers, x, items))
    if traced:
        x, outputs = _run_traced(step, layers, x, depth_map, items, mode, unroll, remat)
        return x if per_position is None else (x, outputs)
    if remat is not None:
        shortest = min(len(segment.layers) for segment in depth_map.segments)
        step = _checkpoint(step, remat, looped=mode == "scan" and unroll < shortest)
    if loop is not None:
        parts = _Parts(step, layers, stored, mode, unroll)
        x, outputs = run_loop(parts, loop, stored, x, items)
    elif mode == "unroll":
        x, outputs = _run_unrolled(step, _unstack(layers, stored), x, depth_map.sources, items)
    else:
        x, outputs = _run_scanned(step, layers, x, depth_map, items, unroll)
    return x if per_position is None else (x, outputs)


def _step(body: Callable, with_items: bool) -> Callable:
    """`step(x, (layer, (gate, item))) -> (x, output)` around the user's body."""

    def step(x, inputs):
        layer, (gate, item) = inputs
        new_x, output = body(layer, x, item) if with_items else (body(layer, x), None)
        _check_carry(x, new_x)
        if gate is not None:
            new_x = jax.tree.map(lambda old, new: _mix(old, new, gate), x, new_x)
        return new_x, output

    return step


def _no_outputs(step, layers, x, items):
    """The outputs `[0, ...]` of no positions."""

    def one(leaf):
        return jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf))

    _, output = jax.eval_shape(step, x, jax.tree.map(one, (layers, items)))
    return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), output)


def _mix(old, new, gate):
    """(1 − gate) · old + gate · new, which is exact where the gate is 0 or 1."""
    dtype = jnp.result_type(old)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return new
    wide = jnp.promote_types(dtype, jnp.float32)
    gate = gate.astype(wide)
    return (jnp.asarray(old, wide) * (1 - gate) + jnp.asarray(new, wide) * gate).astype(dtype)


def _checkpoint(step: Callable, policy: Callable, looped: bool) -> Callable:
    # Inside a loop the recomputation cannot be merged with the first one, so the
    # barrier that would prevent it only costs. A scan of a single turn is no loop.
    return jax.checkpoint(step, policy=policy, prevent_cse=not looped)


def _run_scanned(step, layers, x, depth_map: DepthMap, items, unroll):
    outputs = []
    start = 0
    for segment in depth_map.segments:
        stop = start + len(segment.layers) * segment.repeats
        here = _slice(items, start, stop)
        chosen = _select(layers, segment, depth_map.stored)
        x, output = _scan_segment(step, chosen, x, segment, here, unroll)
        outputs.append(output)
        start = stop
    return x, _concatenate(outputs)


def _scan_segment(step, layers, x, segment: Segment, items, unroll):
    if segment.repeats == 1:
        return jax.lax.scan(step, x, (layers, items), unroll=unroll)
    loops = (segment.repeats, len(segment.layers))
    items = jax.tree.map(lambda leaf: leaf.reshape(*loops, *leaf.shape[1:]), items)

    def one_loop(x, items_of_loop):
        # `layers` is closed over, so every loop reads the same buffer and the
        # gradient of the loops is summed as it comes.
        return jax.lax.scan(step, x, (layers, items_of_loop), unroll=unroll)

    x, output = jax.lax.scan(one_loop, x, items, length=segment.repeats)
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), output)


def _select(layers, segment: Segment, stored: int):
    """The stacked parameters of one segment: in place, a slice, or slices put together."""
    runs = contiguous_runs(segment.layers)
    if runs == [(0, stored - 1)]:
        return layers
    pieces = [
        jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, first, last + 1), layers)
        for first, last in runs
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)


class _Parts:
    """How `run_loop` runs some of the layers in a row."""

    def __init__(self, step, layers, stored: int, mode: str, unroll: int):
        self.scans = mode == "scan"
        self._step, self._stored, self._unroll = step, stored, unroll
        self._layers = layers if self.scans else _unstack(layers, stored)

    def select(self, first: int, last: int) -> Any:
        """The layers from `first` to before `last`, to be read by `run`."""
        if not self.scans:
            return self._layers[first:last]
        return _select(self._layers, Segment(tuple(range(first, last))), self._stored)

    def run(self, layers: Any, x, items) -> tuple[Any, Any]:
        if not self.scans:
            return _run_unrolled(self._step, layers, x, range(len(layers)), items)
        return jax.lax.scan(self._step, x, (layers, items), unroll=self._unroll)


def _run_unrolled(step, layer_list, x, sources, items):
    outputs = []
    for position, source in enumerate(sources):
        item = jax.tree.map(lambda leaf: leaf[position], items)
        x, output = step(x, (layer_list[source], item))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _run_traced(step, layers, x, indices, items, mode, unroll, remat):
    indices = jnp.clip(indices, 0, _stored(layers) - 1)
    gathered = jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, mode="clip"), layers)

    def read_and_step(x, inputs):
        (index, slot), item = inputs
        layer = jax.tree.map(lambda leaf, mine: read_layer(leaf, index, mine), layers, slot)
        return step(x, (layer, item))

    policy = functools.partial(keep_all_but_layers, remat)
    count = indices.shape[0]
    looped = mode == "scan" and unroll < count
    read_and_step = _checkpoint(read_and_step, policy, looped)
    if mode == "scan":
        return jax.lax.scan(read_and_step, x, ((indices, gathered), items), unroll=unroll)
    slots = list(zip(_unstack(indices, count), _unstack(gathered, count), strict=True))
    return _run_unrolled(read_and_step, slots, x, range(count), items)


def _unstack(layers, stored: int) -> list:
    """A list of layers. `split` transposes to one concatenate, where indexing would
    transpose to as many full-size additions as there are layers."""

    def pieces(leaf):
        return [piece[0] for piece in jax.lax.split(leaf, [1] * stored, axis=0)]

    leaves, treedef = jax.tree.flatten(layers)
    split = [pieces(leaf) for leaf in leaves]
    return [treedef.unflatten([column[i] for column in split]) for i in range(stored)]


def _slice(tree, start: int, stop: int):
    return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, start, stop), tree)


def _concatenate(trees: list):
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *trees)


def _stored(layers) -> int:
    leaves = jax.tree_util.tree_flatten_with_path(layers)[0]
    if not leaves:
        raise UserError("run_stack got no layers: the tree of stacked parameters is empty")
    sizes = {}
    for path, leaf in leaves:
        if not jnp.shape(leaf):
            raise UserError(
                f"run_stack: {jax.tree_util.keystr(path)} is a scalar; every leaf needs a "
                "leading axis of layers"
            )
        sizes.setdefault(jnp.shape(leaf)[0], jax.tree_util.keystr(path))
    if len(sizes) > 1:
        shown = ", ".join(f"{name} has {size}" for size, name in sizes.items())
        raise UserError(f"run_stack: the leaves disagree on the number of layers: {shown}")
    return next(iter(sizes))


def _check_traced(indices: jax.Array) -> None:
    if indices.ndim != 1 or not indices.size or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise UserError(
            "a traced depth map is an integer array [positions] of at least one position; "
            f"got {indices.dtype}{list(indices.shape)}"
        )


def _check_positions(tree, positions: int) -> None:
    for leaf in jax.tree.leaves(tree):
        if not jnp.shape(leaf) or jnp.shape(leaf)[0] != positions:
            raise UserError(
                f"per_position has a leaf of shape {jnp.shape(leaf)}, but the depth map runs "
                f"{positions} positions"
            )


def _check_carry(old, new) -> None:
    """A scan would refuse a changed carry at length; an unrolled stack would let it pass."""

    def describe(tree):
        leaves, treedef = jax.tree.flatten(tree)
        return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    if describe(old) != describe(new):
        was, now = (jax.tree.map(jax.typeof, tree) for tree in (old, new))
        raise UserError(f"run_stack: body takes a carry {was} and returns {now}; they must agree")
