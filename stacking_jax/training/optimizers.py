"""Optimisers that see layers, not the stacked array.

Adafactor's factored moments, its clipping by a block's RMS and its parameter
scale belong to one matrix of one layer. On a stacked leaf [layers, in, out] they
would mix layers, training scanned and unrolled would differ, and growing would
not commute with the update. So everything that looks at a leaf as a whole runs
under `vmap` over the layers. What looks at the whole gradient (the global clip)
or at the global step (the schedule) stays outside and happens once; see `step`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from stacking_jax.growth import Scanned
from stacking_jax.growth.layouts import path_keys
from stacking_jax.training.config import OptimizerConfig


class LayerwiseState(NamedTuple):
    """State of a transform that runs once per layer and once for the rest.

    Attributes:
      stacked: the state for the layers, every leaf with a leading axis of layers,
        nested under the layout's own keys so that `grow` finds all of it by path,
        counts included.
      rest: the state for everything else.
    """

    stacked: Any
    rest: Any


def layerwise(
    transform: optax.GradientTransformation, layout: Scanned
) -> optax.GradientTransformation:
    """Runs `transform` per layer on the leaves of a scanned stack.

    Args:
      transform: any transform that treats leaves, or whole layers, independently.
      layout: where the stack lives; its axis must be 0.
    """

    def split(tree):
        def pick(wanted):
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf if layout.matches(path_keys(path)) is wanted else None, tree
            )

        return pick(True), pick(False)

    def nest(state):
        for key in reversed(layout.keys):
            state = {key: state}
        return state

    def unnest(state):
        for key in layout.keys:
            state = state[key]
        return state

    def init(params):
        stacked, rest = split(params)
        return LayerwiseState(nest(jax.vmap(transform.init)(stacked)), transform.init(rest))

    def update(updates, state, params=None):
        stacked, rest = split(updates)
        stacked_params, rest_params = split(params) if params is not None else (None, None)
        stacked, stacked_state = jax.vmap(transform.update)(
            stacked, unnest(state.stacked), stacked_params
        )
        rest, rest_state = transform.update(rest, state.rest, rest_params)
        merged = jax.tree.map(
            lambda a, b: b if a is None else a, stacked, rest, is_leaf=lambda leaf: leaf is None
        )
        return merged, LayerwiseState(nest(stacked_state), rest_state)

    return optax.GradientTransformation(init, update)


def optimizer(config: OptimizerConfig, layout: Scanned) -> optax.GradientTransformation:
    """The update direction before it is multiplied by −learning rate.

    AdamW is Loshchilov & Hutter 2019. Adafactor is Shazeer & Stern 2018 with
    factored second moments, clipping by RMS 1 and steps relative to the
    parameter's own RMS, as learning rates near 0.01 presume; no momentum.

    Args:
      config: which one, and its constants.
      layout: where the stack lives.
    """
    # `ndim` is the layer's own, since this runs per layer: a stacked norm scale
    # [layers, D] is a vector here and is not decayed.
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    )
    if config.name == "adamw":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    else:
        direction = optax.chain(
            optax.scale_by_factored_rms(decay_rate=config.factored_decay),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    if config.weight_decay:
        direction = optax.chain(direction, decay)
    return layerwise(direction, layout)
