"""The optimisers of training, each per layer: see `growth.layerwise`.

What looks at the whole gradient (the global clip) or at the global step (the
schedule) stays outside and happens once; see `step`.
"""

from __future__ import annotations

import jax
import optax

from stacking_jax.growth import Scanned
from stacking_jax.growth.layerwise import layerwise
from stacking_jax.training.config import OptimizerConfig


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
