"""The path of a step: which positions of the stack it runs, drawn from the seed and the step.

The draw is a part of the step's program and depends on nothing else, so it is the same on every
host and device, for all microbatches, and after a restart. Its length is static: no step of a
stage compiles anything, and what is not drawn is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.growth import Scanned, Stage
from stacking_jax.growth.layouts import path_keys
from stacking_jax.training.path_config import PathConfig

_STREAM = 0x52615054  # Sets these draws apart from all others that begin with the run's seed.
_UNIT = 1 << 20


def draw_path(key: jax.Array, probabilities: Sequence[float], length: int) -> jax.Array:
    """Positions of one path, int32 `[length]`, from the input to the output.

    Systematic sampling in random order (Hartley & Rao 1962): the probabilities are laid end to
    end in a random order, and each of the points u, u + 1, u + 2, ... draws the position on
    which it falls. So no position is drawn twice, and each with its own probability, which
    successive weighted draws (Gumbel top-k) do not give. In whole numbers, so that no rounding
    can lose a position.

    Args:
      key: a random key.
      probabilities: of the positions, from 0 to 1; they sum to `length`.
      length: of the path.
    """
    count = len(probabilities)
    one, two = jax.random.split(key)
    order = jax.random.permutation(one, count)
    ends = jnp.cumsum(jnp.asarray(_in_units(probabilities, length), jnp.int32)[order])
    points = (ends + jax.random.randint(two, (), 0, _UNIT)) // _UNIT
    drawn = jnp.diff(points, prepend=0) > 0
    return jnp.sort(jnp.where(drawn, order, count))[:length].astype(jnp.int32)


def _in_units(probabilities: Sequence[float], length: int) -> list[int]:
    """Probabilities as whole multiples of 1 / _UNIT that sum to `length` exactly."""
    units = [min(int(chance * _UNIT), _UNIT) for chance in probabilities]
    open_ones = [i for i, chance in enumerate(probabilities) if 0 < chance < 1]
    for n in range(length * _UNIT - sum(units)):
        units[open_ones[n % len(open_ones)]] += 1
    return units


def path_stack(
    config: PathConfig, seed: int, stage: Stage
) -> Callable[[jax.Array], dict[str, Any]]:
    """How a training step of a stage with a path runs the stack; see `stack_runs`.

    Args:
      config: of the paths.
      seed: of the run.
      stage: with `path`, a length below its depth.
    """
    chances = config.probabilities(stage.depth, stage.path)
    power = {"none": 0.0, "root": -0.5, "inverse": -1.0}[config.scaling]
    factors = [chance**power if chance else 0.0 for chance in chances]

    def stack(step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)
        path = draw_path(key, chances, stage.path)
        if not power:
            return {"depth_map": path}
        return {"depth_map": path, "gates": jnp.asarray(factors, jnp.float32)[path]}

    return stack


def keep_undrawn(new: Any, old: Any, path: jax.Array, layout: Scanned) -> Any:
    """`new`, with the layers that are not in `path` as they are in `old`.

    Args:
      new, old: trees of one structure, parameters or `layerwise` optimiser state.
      path: stored layers that ran, integers `[positions]`.
      layout: where the stack lives; its leaves have the layers on axis 0.
    """

    def choose(keys, after, before):
        if not layout.matches(path_keys(keys)):
            return after
        drawn = jnp.zeros(after.shape[0], bool).at[path].set(True)
        return jnp.where(drawn.reshape(-1, *[1] * (after.ndim - 1)), after, before)

    return jax.tree_util.tree_map_with_path(choose, new, old)
