"""Runs a `Loop`: the turns of a block, with what happens between them."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap, as_depth_map
from stacking_jax.growth.loops import Loop


class Parts(Protocol):
    """How some layers run in a row: `scans` says whether loops are to be scans as well."""

    scans: bool

    def select(self, first: int, last: int) -> Any: ...

    def run(self, layers: Any, x: Any, items: Any) -> tuple[Any, Any]: ...


def map_of_loop(loop: Loop, stored: int, depth_map: Any, per_position: Any) -> DepthMap:
    """The map that a loop runs, held against one that is given.

    Raises:
      UserError: if they differ, or outputs by position are asked for at several exits.
    """
    own = loop.depth_map(stored)
    if isinstance(depth_map, jax.Array):
        raise UserError("a loop runs its own depth map, not one that is drawn at every step")
    if depth_map is not None and as_depth_map(depth_map, stored) != own:
        raise UserError(
            f"the loop runs the map {own}, but the depth map given is "
            f"{as_depth_map(depth_map, stored)}"
        )
    if per_position is not None and loop.exits > 1:
        raise UserError(
            f"a loop with {loop.exits} exits has no outputs by position; give it one exit"
        )
    return own


def run_loop(parts: Parts, loop: Loop, stored: int, x: Any, items: Any) -> tuple[Any, Any]:
    """(carry, outputs by position) of a whole stack with a loop in it; see `run_stack`."""
    outputs = []
    given = x
    ends = loop.start + loop.turns * loop.block

    def straight(x, first, last, position):
        return parts.run(parts.select(first, last), x, _slice(items, position, last - first))

    if loop.start:
        x, output = straight(x, 0, loop.start, 0)
        outputs.append(output)
    injected = {"input": given, "stream": x, None: None}[loop.inject]
    block = parts.select(loop.start, loop.stop)
    states = None
    for first, end in loop.spans():
        here = _slice(items, loop.start + first * loop.block, (end - first) * loop.block)
        frozen = loop.backprop is not None and end <= loop.turns - loop.backprop
        keep = loop.exits > 1 and first >= loop.turns - loop.exits
        run = (x, block, injected, here)
        # Stopped before the turns and not only behind them, so that no rule of
        # differentiation ever runs over what has no gradient.
        run = jax.lax.stop_gradient(run) if frozen else run
        x, output, kept = _turns(parts, loop, *run, first, end, keep)
        states = kept if states is None else _joined(states, kept)
        outputs.append(output)
    tail = stored - loop.stop
    if loop.exits > 1:
        exits = _exits(parts, states, straight, loop, stored, ends) if tail else states
        return exits, None
    if tail:
        x, output = straight(x, loop.stop, stored, ends)
        outputs.append(output)
    return x, _concatenated(outputs)


def _turns(parts: Parts, loop: Loop, x, block, injected, items, first, end, keep):
    """Turns `first` to before `end`: carry, outputs by position, and the carry after each."""
    count = end - first
    items = jax.tree.map(lambda leaf: leaf.reshape(count, loop.block, *leaf.shape[1:]), items)

    def turn(x, inputs):
        number, item = inputs
        if injected is not None:
            # The first turn begins with what the others have added. A select, and not a turn
            # apart: the program would hold the block twice.
            added = jax.tree.map(_added, x, injected)
            begins = number > 0
            x = jax.tree.map(lambda new, old: jnp.where(begins, new, old), added, x)
        x, output = parts.run(block, x, item)
        return x, (output, x if keep else None)

    if parts.scans:
        x, (outputs, states) = jax.lax.scan(turn, x, (jnp.arange(first, end), items))
    else:
        each = []
        for place in range(count):
            item = jax.tree.map(lambda leaf, place=place: leaf[place], items)
            x, made = turn(x, (first + place, item))
            each.append(made)
        outputs, states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    return x, flat, states


def _exits(parts: Parts, states, straight, loop: Loop, stored: int, position: int):
    """The layers after the loop, on the carry of each exit."""
    leave = lambda x: straight(x, loop.stop, stored, position)[0]  # noqa: E731
    if parts.scans:
        return jax.lax.map(leave, states)
    each = [leave(jax.tree.map(lambda leaf, n=n: leaf[n], states)) for n in range(loop.exits)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _added(x, injected):
    """Whole numbers of the carry (counts, ids) are no part of the stream."""
    return x + injected if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def _slice(tree, start: int, count: int):
    return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, start, start + count), tree)


def _joined(before, after):
    if before is None or after is None:
        return before if after is None else after
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), before, after)


def _concatenated(trees: list):
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *trees)
