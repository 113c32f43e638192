"""The optimiser state of a grown stack: what becomes of the copies' moments.

Which leaf belongs to which layer follows from its path, never from its size; see
`state_leaves`. Whatever falls into no single layer is refused.

A moment that starts afresh needs its own bias correction. Adam divides by √v; under a
step count that all layers share and that stands at t ≫ 1, v = 0 is not recognised as
young: the first update of a zeroed layer is (1 − β₁)/√(1 − β₂) ≈ 3.2 times the learning
rate, and 1/√(1 − β₂) ≈ 32 times where the first moment was copied. So a moment may only
start afresh where its layer counts its own steps, which is what `layerwise` gives.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap
from stacking_jax.growth.grow import grow
from stacking_jax.growth.layerwise import LayerwiseState
from stacking_jax.growth.layouts import Layout, Scanned, path_keys
from stacking_jax.growth.restart import POLICIES, Policy, Restart
from stacking_jax.growth.stacks import (
    Held,
    in_stack,
    layer_axis,
    period_of,
    place_of,
    positions_of,
    stacks_of,
)
from stacking_jax.growth.state_leaves import StateLeaf, check_shapes, read_state


def grow_opt_state(
    opt_state: Any,
    depth_map: DepthMap | Sequence[int] | Mapping[str, Any],
    layout: Layout | Mapping[str, Layout],
    policy: Policy = "copy",
    *,
    params: Any = None,
    optimizer: Any = None,
    grown_params: Any = None,
    counts: Literal["keep", "reset"] = "keep",
) -> Any:
    """Grows an optimiser state by a depth map. Pure, so it runs under `jax.jit`.

    What the policies do (copies are `DepthMap.copies`; layers without a source always
    start afresh):

    - 'copy': a copy has the moments and the step count of its source. Growing then
      commutes with the update, for every optimiser that treats layers independently.
    - 'zero': the copies' moments are zero.
    - 'reset_copies': the copies' state is the one that `optimizer.init` gives, which
      differs from zero for Adagrad, Rprop and others. Originals keep theirs.
    - 'reset_all': every moment of every parameter is as `optimizer.init` gives it.
    - 'copy_first': the copies keep the direction of their source but not the size of
      its gradients: their state is that after one step of a fresh optimiser along the
      source's first moment. Plainly copying the first moment and zeroing the second
      makes the first update some 30 times too long, or unbounded where the gradient
      is near zero; as it is here, none exceeds a fresh Adam's (for β₁ ≥ 1/2). It warns
      all the same, since the moments are no longer averages over one history.

    A moment takes its step count, and with it its bias correction, along: both are
    copied or both restart. Where all layers share one count, a policy that restarts
    some of them is refused; wrap the optimiser in `layerwise`, and turn a state that
    you have by `to_layerwise`.

    Args:
      opt_state: the state of any optax chain, concrete, traced or abstract.
      depth_map: the map; by stack where there are several.
      layout: where the parameters' layers live; by stack where there are several.
      policy: what becomes of the copies' moments.
      params: the parameters *before* the growth; their shapes suffice, unless the
        optimiser keeps parameters in its state. Needed by everything but 'copy', and
        for Adafactor outside of `layerwise`.
      optimizer: the optimiser whose state it is. Given, the result is checked against
        what it would make for the grown parameters. Needed by 'copy_first', and where
        a state does not begin at zero.
      grown_params: the grown parameters if they differ from `grow(params)`.
      counts: 'reset' also restarts what schedules count, so that the learning rate's
        schedule begins anew.

    Raises:
      UserError: naming the leaf, if it falls into no layers, if it cannot be told how
        it starts, or if a policy would make a first update too long.
    """
    if policy not in POLICIES:
        raise UserError(
            f"there is no policy {policy!r} for moments; choose from {', '.join(POLICIES)}"
        )
    if counts not in ("keep", "reset"):
        raise UserError(f"counts is 'keep' or 'reset'; got {counts!r}")
    if policy != "copy" and params is None:
        raise UserError(f"the policy {policy!r} needs params=..., the parameters before the growth")
    if policy == "copy_first":
        if optimizer is None:
            raise UserError("the policy 'copy_first' needs optimizer=..., to take one step with it")
        warnings.warn(
            "copy_first: the copies keep their source's first moment and forget the second; "
            "'copy' or 'reset_copies' is the safer choice", stacklevel=2,
        )
    stacks = stacks_of(depth_map, layout)
    layouts = [one_layout for _, one_layout in stacks]
    positions = [positions_of(one).per_layer(period_of(it)) for one, it in stacks]

    state = opt_state
    for index, (one_map, _) in enumerate(stacks):
        state = _grow_by_path(state, one_map, layouts, index, params)
    anew = policy != "copy" or counts == "reset" or any(any(one.new) for one in positions)
    if not anew and optimizer is None:
        return state

    if grown_params is None and params is not None:
        grown_params = _grow_params(params, stacks)
    if optimizer is not None and grown_params is not None:
        check_shapes(state, optimizer, grown_params)
    if not anew:
        return state
    return Restart(state, layouts, positions, policy, optimizer, grown_params).run(counts)


def _grow_params(params: Any, stacks: list) -> Any:
    for one_map, one_layout in stacks:
        params = grow_sources(params, one_map, one_layout)
    return params


def _grow_by_path(state, depth_map, layouts: list[Layout], index: int, params) -> Any:
    """The state with one stack grown, every leaf along the axis that its path tells."""
    layout = layouts[index]
    read = read_state(state, layouts, params)
    mine = [at for at, leaf in enumerate(read) if leaf.stack == index and leaf.per_layer]
    if not mine:  # plain SGD keeps nothing
        return state
    if not isinstance(layout, Scanned):
        return _grow_unrolled(state, depth_map, layout)
    leaves, treedef = jax.tree.flatten(state)
    for at in mine:
        # `grow` knows a leaf by the layout's path, and names it in its errors.
        along = dataclasses.replace(layout, axis=read[at].axis)
        whole = _whole_layers(leaves[at], depth_map)
        piece = grow_sources(_nested(read[at], along, leaves[at]), whole, along)
        leaves[at] = jax.tree.leaves(piece)[0]
    return jax.tree.unflatten(treedef, leaves)


def _grow_unrolled(state: Any, depth_map: Any, layout: Layout) -> Any:
    """Each layer's own state under a wrapper, and what else has a subtree per layer."""
    is_wrapper = lambda node: isinstance(node, LayerwiseState)  # noqa: E731
    nodes, treedef = jax.tree.flatten(state, is_leaf=is_wrapper)
    wrappers = {at: node for at, node in enumerate(nodes) if is_wrapper(node)}
    outer = jax.tree.unflatten(
        treedef, [Held(at) if at in wrappers else node for at, node in enumerate(nodes)]
    )
    if in_stack(outer, layout):
        outer = grow_sources(outer, depth_map, layout)
    grown = {
        at: node._replace(stacked=grow_sources(node.stacked, depth_map, layout))
        if in_stack(node.stacked, layout) else node
        for at, node in wrappers.items()
    }
    return jax.tree.map(lambda leaf: grown[leaf.at] if isinstance(leaf, Held) else leaf, outer)


def _nested(leaf: StateLeaf, layout: Scanned, value: Any) -> Any:
    for key in reversed((*layout.keys, leaf.path)):
        value = {key: value}
    return value


def _whole_layers(leaf: Any, depth_map: Any) -> Any:
    """For counts, the layers that weigh most in a matrix: there is no half a step."""
    if getattr(depth_map, "ndim", 0) != 2 or jnp.issubdtype(leaf.dtype, jnp.inexact):
        return depth_map
    return DepthMap(positions_of(depth_map).sources, stored=depth_map.shape[1])


def grow_sources(tree: Any, depth_map: Any, layout: Layout) -> Any:
    """`grow`, with some layer or zeros where the map names none: to be filled afterwards."""
    if getattr(depth_map, "ndim", 0) == 2:
        return grow(tree, depth_map, layout)
    read = positions_of(depth_map)
    if not any(read.new):
        return grow(tree, depth_map, layout)
    if read.stored:
        sources = [max(source, 0) for source in read.sources]
        return grow(tree, DepthMap(sources, stored=read.stored), layout)
    return _from_nothing(tree, len(read.sources) * period_of(layout), layout)


def _from_nothing(tree: Any, layers: int, layout: Layout) -> Any:
    if not isinstance(layout, Scanned):
        raise UserError(
            f"there are no layers {layout.pattern!r} whose names and shapes could be taken over; "
            "begin with the newly initialised tree"
        )

    def empty(path, leaf):
        if place_of(path_keys(path), layout) is None:
            return leaf
        axis = layer_axis(np.shape(leaf), layout, "/".join(path_keys(path)))
        shape = (*leaf.shape[:axis], layers, *leaf.shape[axis + 1 :])
        return leaf.update(shape=shape) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.zeros(
            shape, leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(empty, tree)
