"""How alike layers are that lie one block apart: the looping-inspired regulariser.

Saunshi et al. 2025, arXiv 2502.17416, Eq. 3: over the blocks i and the layers j of a block of k,

    R_G(k) = 1 / (L − k) · Σ_i Σ_j cos(θ_G^(ik + j), θ_G^((i+1)k + j)),

which is the mean over the L − k pairs of layers (l, l + k); and R is the mean over the groups G.
Each matrix of a layer is a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.growth import Stage
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.similarity_config import GROUPS

Term = Callable[[Any], tuple[jax.Array, jax.Array]]
"""From parameters to λ · (1 − R) and R."""


def similarity(
    layers: Mapping[str, Any], block: int, groups: Sequence[str] | None = None
) -> jax.Array:
    """R, a float32 scalar from −1 to 1.

    The cosine with a matrix of zeros (the output of a copy that starts as the identity) counts
    as 0, and has no gradient.

    Args:
      layers: the decoder's stacked layers: nested dicts of arrays `[layers, in, out]`.
      block: k; the layers must be at least k + 1.
      groups: names of `GROUPS`; None: all.
    """
    means = []
    for name in GROUPS if groups is None else groups:
        room, matrix = GROUPS[name]
        means.append(jnp.mean(_cosines(layers[room][matrix], block)))
    return jnp.mean(jnp.stack(means))


def similarity_term(config: TrainConfig, stage: Stage) -> Term | None:
    """The regulariser of a stage, or None where it has none."""
    settings = config.similarity
    block = settings.period(config.model.num_layers)
    if not settings.weight or stage.depth < 2 * block:
        return None

    def term(params):
        found = similarity(params["stack"]["layers"], block, settings.groups)
        return settings.weight * (1.0 - found), found

    return term


def _cosines(stacked: jax.Array, block: int) -> jax.Array:
    """`[layers − block]`, of each layer and the one a block behind it."""
    wide = stacked.astype(jnp.float32)
    inner = tuple(range(1, wide.ndim))
    squares = jnp.sum(jnp.square(wide), axis=inner)
    some = squares > 0
    scales = jnp.where(some, jax.lax.rsqrt(jnp.where(some, squares, 1.0)), 0.0)
    products = jnp.sum(wide[:-block] * wide[block:], axis=inner)
    return products * scales[:-block] * scales[block:]
