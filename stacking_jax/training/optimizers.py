"""The optimisers of training, each per layer: see `growth.layerwise`.

What looks at the whole gradient (the global clip) or at the global step (the
schedule) stays outside and happens once; see `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from stacking_jax.growth import Scanned
from stacking_jax.growth.layerwise import layerwise
from stacking_jax.growth.layouts import path_keys
from stacking_jax.training.config import OptimizerConfig


def optimizer(config: OptimizerConfig, layout: Scanned) -> optax.GradientTransformation:
    """The update direction before it is multiplied by −learning rate.

    AdamW is Loshchilov & Hutter 2019. Adafactor is Shazeer & Stern 2018 with
    factored second moments, clipping by RMS 1 and steps relative to the
    parameter's own RMS, as learning rates near 0.01 presume; no momentum. Muon
    (Jordan et al. 2024) orthogonalises the matrices of the layers, scaled to the RMS of
    an Adam update (Liu et al. 2025), and leaves embedding, head and norms to AdamW.

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
    elif config.name == "muon":
        direction = optax.contrib.muon(
            -1.0,  # the direction itself: optax multiplies by −rate
            beta=config.muon_beta, consistent_rms=0.2, adam_b1=config.beta1,
            adam_b2=config.beta2, eps=config.epsilon,
            muon_weight_dimension_numbers=_matrices_of_layers,
        )
    else:
        direction = optax.chain(
            optax.scale_by_factored_rms(decay_rate=config.factored_decay),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    if config.weight_decay:
        direction = optax.chain(direction, decay)
    return _by_depth(layerwise(direction, layout), config.depth_rates, layout)


def _by_depth(
    transform: optax.GradientTransformation, points: Sequence[float] | None, layout: Scanned
) -> optax.GradientTransformation:
    """Directions of the layers times their factors of the learning rate; the state is the same."""
    if points is None:
        return transform

    def update(updates, state, params=None, **extra):
        directions, state = transform.update(updates, state, params, **extra)

        def scale(path, leaf):
            if not layout.matches(path_keys(path)):
                return leaf
            depth = leaf.shape[0]
            at = np.linspace(0, len(points) - 1, depth)
            factors = np.interp(at, np.arange(len(points)), points).astype(leaf.dtype)
            return leaf * factors.reshape(-1, *[1] * (leaf.ndim - 1))

        return jax.tree_util.tree_map_with_path(scale, directions), state

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _matrices_of_layers(params: Any) -> Any:
    """Which leaves Muon orthogonalises: no embedding and no head, whose rows are tokens."""

    def mark(path, leaf):
        token_table = {"embedding", "head"} & set(path_keys(path))
        return MuonDimensionNumbers() if leaf.ndim == 2 and not token_table else None

    return jax.tree_util.tree_map_with_path(mark, params)
