"""Letting some layers of an optimiser state start afresh, with their counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import path_keys
from stacking_jax.growth.stacks import Leaf, Positions
from stacking_jax.growth.state_leaves import StateLeaf, read_state

Policy = Literal["copy", "zero", "copy_first", "reset_copies", "reset_all"]

POLICIES: tuple[Policy, ...] = get_args(Policy)

FIRST_MOMENTS = frozenset({"mu", "m", "m1", "trace", "exp_avg"})
SECOND_MOMENTS = frozenset({"nu", "nu_max", "n", "v", "v_row", "v_col", "exp_avg_sq"})
"""Fields of optax's states that hold first and second moments."""

_OTHER_MOMENTS = frozenset(
    {"m2", "ema", "e_g", "e_x", "g", "s", "grad_sum_sq", "previous_gradient"}
)
_ADAM_LIKE = {
    frozenset(fields.split())
    for fields in ("mu nu", "mu nu nu_max", "mu", "trace", "m1 m2 nu", "m n")
}
# Gradients under accumulation are no history: the copies share them like the parameters.
_GRADIENTS = frozenset({"acc_grads", "grad_acc"})
PARAMETERS = frozenset({"z", "x0", "init_params", "params0", "init_particles", "cache"})
"""Fields of optax's states that hold parameters and not moments."""


class Restart:
    """A grown state of which some layers start afresh."""

    def __init__(self, state, layouts, positions: list[Positions], policy, optimizer, params):
        self.leaves, self.treedef = jax.tree.flatten(state)
        self.read = read_state(state, layouts, params)
        self.abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in self.leaves)
        self.positions, self.policy = positions, policy
        self.optimizer, self.params = optimizer, params
        self.owners = {leaf.owner for leaf in self.read if _is_moment(leaf)}
        # States of which a moment restarts: their counts restart with it.
        self.restarting = {
            leaf.owner for leaf in self.read if _is_moment(leaf) and self.chosen(leaf).any()
        }
        self.fresh = None if optimizer is None or self.abstract else self._initial()

    def run(self, counts: str) -> Any:
        for value, leaf in zip(self.leaves, self.read, strict=True):
            self._refuse_shared_count(leaf, value)
        after_step = self._after_one_step() if self.policy == "copy_first" else {}
        leaves = []
        for at, (value, leaf) in enumerate(zip(self.leaves, self.read, strict=True)):
            follows = _is_moment(leaf) or (not leaf.of_parameter and leaf.owner in self.restarting)
            if not self.abstract and counts == "reset" and self._is_schedule(leaf, value):
                value = _choose(leaf, value, np.array([True]), self._start_of(at))
            elif not self.abstract and follows:
                value = self._restarted(at, leaf, value, after_step)
            leaves.append(value)
        return jax.tree.unflatten(self.treedef, leaves)

    def chosen(self, leaf: StateLeaf) -> np.ndarray:
        """Which layers of a leaf start afresh; a single flag where it is not stacked."""
        if self.policy == "reset_all":
            return np.array([True])
        if not leaf.per_layer:
            return np.array([False])
        at = self.positions[leaf.stack]
        return _flags(leaf, at.new if self.policy == "copy" else at.started)

    def _restarted(self, at: int, leaf: StateLeaf, value: Any, after_step: dict) -> Any:
        chosen = self.chosen(leaf)
        if not chosen.any():
            return value
        if at in after_step:
            copies = _flags(leaf, self.positions[leaf.stack].copies)
            value = _choose(leaf, value, copies, after_step[at])
            chosen = chosen & ~copies
        return _choose(leaf, value, chosen, self._start_of(at)) if chosen.any() else value

    def _start_of(self, at: int) -> Any:
        """What the optimiser's own initialisation puts here: an array or 0."""
        leaf, value = self.read[at], self.leaves[at]
        known = leaf.field in FIRST_MOMENTS | SECOND_MOMENTS | _OTHER_MOMENTS
        if self.policy == "zero" and leaf.of_parameter:
            if not known:
                raise UserError(
                    f"{leaf.path}: {leaf.field!r} is not known to be a moment, so it cannot be "
                    "zeroed; use 'reset_copies' with optimizer=..."
                )
            return 0
        if self.fresh is not None:
            return self.fresh[at]
        if known or (not leaf.of_parameter and jnp.issubdtype(value.dtype, jnp.integer)):
            return 0
        raise UserError(
            f"{leaf.path}: it cannot be told how {leaf.field!r} starts; give optimizer=..., whose "
            "init knows"
        )

    def _is_schedule(self, leaf: StateLeaf, value: Any) -> bool:
        own_count = not leaf.of_parameter and jnp.issubdtype(value.dtype, jnp.integer)
        return own_count and leaf.owner not in self.owners

    def _refuse_shared_count(self, leaf: StateLeaf, value: Any) -> None:
        if leaf.of_parameter or leaf.per_layer or self.policy == "reset_all":
            return
        if leaf.owner in self.restarting and not jnp.issubdtype(value.dtype, jnp.inexact):
            raise UserError(
                f"{leaf.path} is one for all layers, so the bias of moments that restart would not "
                "be corrected, and the first update be about 3 times too long (30 with the first "
                "moment kept); wrap the optimiser in layerwise(optimizer, layout), where layers "
                "count for themselves, and turn this state by to_layerwise"
            )

    def _initial(self) -> list[Any]:
        return self._in_order(self.optimizer.init(self.params))

    def _in_order(self, tree: Any) -> list[Any]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        by_path = {path_keys(path): leaf for path, leaf in flat}
        return [by_path[leaf.keys] for leaf in self.read]

    def _after_one_step(self) -> dict[int, Any]:
        """Of each leaf in question: its value after one step along the first moment."""
        first = self._first_moments()
        if self.abstract:
            return {}
        # One step of a fresh optimiser along a small constant gradient shows how it takes
        # a gradient in: linearly into every moment, squared into the second. Small, lest a
        # clip by the global norm touch it.
        small = 1e-6
        gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, small), self.params)
        _, state = self.optimizer.update(gradient, self.optimizer.init(self.params), self.params)
        probe, after = self._in_order(state), {}
        for at, leaf in enumerate(self.read):
            if not leaf.per_layer:
                continue
            if not leaf.of_parameter and leaf.owner in {self.read[i].owner for i in first.values()}:
                after[at] = probe[at]
            elif at in first:
                along = jnp.asarray(self.leaves[first[at]])
                taken = jnp.asarray(probe[at], jnp.float32) / small * along
                if leaf.field in SECOND_MOMENTS:
                    # Twice the square: with once, a gradient across the first moment would
                    # give an update 0.13 % longer than a fresh Adam's.
                    taken = 2 * taken / small * along
                after[at] = taken
        return after

    def _first_moments(self) -> dict[int, int]:
        """Moment -> the first moment of the same parameter in the same state.

        Raises:
          UserError: if some state keeps moments in a way that is not Adam's.
        """
        moments: dict[tuple, dict[str, int]] = {}
        for at, leaf in enumerate(self.read):
            if _is_moment(leaf) and leaf.per_layer:
                parameter = leaf.keys[len(leaf.owner) + 1 :]
                moments.setdefault((leaf.owner, parameter), {})[leaf.field] = at
        first = {}
        for (owner, parameter), fields in moments.items():
            if frozenset(fields) not in _ADAM_LIKE:
                raise UserError(
                    f"copy_first knows Adam's moments, but {'/'.join((*owner, *parameter))} has "
                    f"{', '.join(map(str, fields))}; use 'copy' or 'reset_copies'"
                )
            source = next(fields[name] for name in ("mu", "m", "m1", "trace") if name in fields)
            for at in fields.values():
                if np.shape(self.leaves[at]) != np.shape(self.leaves[source]):
                    raise UserError(
                        f"copy_first: {self.read[at].path} has another shape than the first moment"
                    )
                first[at] = source
        if not first:
            raise UserError("copy_first: this optimiser keeps no first moment of the stack")
        return first


def _is_moment(leaf: StateLeaf) -> bool:
    return leaf.of_parameter and leaf.field not in _GRADIENTS


def _flags(leaf: StateLeaf, flags: Sequence[bool]) -> np.ndarray:
    flags = np.array(flags, bool)
    return flags if leaf.number is None else flags[leaf.number : leaf.number + 1]


def _choose(leaf: StateLeaf, value: Any, chosen: np.ndarray, new: Any) -> Any:
    """`value` with the chosen layers from `new`, which is like it, or a number."""
    if not chosen.any():
        return value
    if chosen.all():
        whole = jnp.broadcast_to(jnp.asarray(new), value.shape).astype(value.dtype)
        return np.asarray(whole) if isinstance(value, np.ndarray) else whole
    new = jnp.moveaxis(jnp.asarray(new), leaf.axis, 0) if np.ndim(new) else new
    return Leaf(leaf.keys, [value], leaf.axis).where(chosen, new)[0]
