"""A stack of layers whose parameters lie on axis 0, run by a depth map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stacking_jax.growth import DepthMap, Scanned, run_stack

LAYOUT = Scanned("stack/layers")
"""Where the decoder's layers live, in parameters and optimiser state alike."""

CHECKPOINT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps for its backward pass, by name; see `DecoderConfig.remat`."""

_UNROLL_UP_TO = 24


class LayerStack(nnx.Module):
    """`num_layers` layers of one kind, stacked on axis 0.

    Layer i is initialised from `fold_in(key, i)`, so stacks of different depths
    that share a key share their first layers.

    Attributes:
      layers: one layer module whose parameters have a leading axis of layers.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        key: jax.Array,
        dtype: str = "float32",
        mode: str = "auto",
        remat: str = "none",
    ):
        """Builds the stack.

        Args:
          make_layer: builds one layer from its random streams.
          num_layers: the stored depth.
          key: a random key.
          dtype: of the computation.
          mode: 'scan', 'unroll' or 'auto'; see `DecoderConfig.stack`.
          remat: name of a policy; see `DecoderConfig.remat`.
        """
        graph = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))

        def parameters(layer_key):
            return nnx.state(make_layer(nnx.Rngs(layer_key)), nnx.Param)

        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_layers))
        self.layers = nnx.merge(graph, jax.vmap(parameters)(keys))
        self.dtype = dtype
        self.mode = mode
        self.remat = remat

    def __call__(
        self,
        x: jax.Array,
        *inputs: Any,
        depth_map: DepthMap | jax.Array | None = None,
        gates: jax.Array | None = None,
        cache: Any = None,
    ) -> Any:
        """Runs the stack.

        Args:
          x: the residual stream `[B, L, D]`.
          *inputs: passed to every layer after `x` (mask, angles, ...).
          depth_map: which stored layer runs at each position: a static map, a
            traced integer array of static length, or None for all in order.
          gates: `[positions]`, see `growth.run_stack`.
          cache: a pytree `[positions, ...]`, by position and not by layer.

        Returns:
          The residual stream, or `(stream, new cache)` where a cache is given.
        """
        graph, state = nnx.split(self.layers)
        stored = nnx.to_pure_dict(state)
        # Cast before the scan: inside it, every loop would keep its own cast copy
        # for the backward pass. Vectors (norm scales) stay in float32.
        stored = jax.tree.map(
            lambda leaf: leaf.astype(self.dtype) if leaf.ndim > 2 else leaf, stored
        )

        def body(layer, x, *item):
            return nnx.merge(graph, layer)(x, *inputs, *item)

        positions = jax.tree.leaves(stored)[0].shape[0] if depth_map is None else len(depth_map)
        mode = resolve_mode(self.mode, positions)
        return run_stack(
            body,
            stored,
            x,
            depth_map,
            gates,
            per_position=cache,
            mode=mode,
            remat=CHECKPOINT_POLICIES[self.remat],
        )


def resolve_mode(mode: str, positions: int) -> str:
    """'scan' or 'unroll' for a stack of that many positions on the default backend."""
    if mode != "auto":
        return mode
    unroll = jax.default_backend() == "cpu" and positions <= _UNROLL_UP_TO
    return "unroll" if unroll else "scan"
