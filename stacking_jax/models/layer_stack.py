"""A stack of layers whose parameters lie on axis 0, run by a depth map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop, Scanned, run_stack
from stacking_jax.growth.layouts import path_keys

LAYOUT = Scanned("stack/layers")
"""Where the decoder's layers live, in parameters and optimiser state alike."""

KEPT_NAMES = ("query", "key", "value", "context", "middle")
"""What 'minimal' keeps of a layer, by `checkpoint_name`: what attention reads and gives, and the
residual stream behind it. 'offload' takes the same, and the layer's input, to the host."""

OFFLOADED_NAMES = ("stream", *KEPT_NAMES)
_HOST = "pinned_host"

CHECKPOINT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "minimal": jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(OFFLOADED_NAMES),
        offload_src="device", offload_dst=_HOST,
    ),
}
"""What a layer keeps for its backward pass, by name; see `DecoderConfig.remat`."""

_UNROLL_UP_TO = 24


def cast_matrices(params: Any, dtype: str) -> Any:
    """A decoder's parameters with every matrix in the dtype of the computation.

    To be done once per step, outside of loops over layers or microbatches. Vectors (norm
    scales) stay as they are.

    Args:
      params: nested dicts, with layers stacked as `LAYOUT` says.
      dtype: of the computation.
    """

    def cast(path, leaf):
        axes = leaf.ndim - LAYOUT.matches(path_keys(path))
        return leaf.astype(dtype) if axes > 1 else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


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
        scan_unroll: int = 1,
        remat: str = "none",
    ):
        """Builds the stack.

        Args:
          make_layer: builds one layer from its random streams.
          num_layers: the stored depth.
          key: a random key.
          dtype: of the computation.
          mode: 'scan', 'unroll' or 'auto'; see `DecoderConfig.stack`.
          scan_unroll: layers per turn of a scan.
          remat: name of a policy; see `DecoderConfig.remat`.
        """
        graph = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))

        def parameters(layer_key):
            return nnx.state(make_layer(nnx.Rngs(layer_key)), nnx.Param)

        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_layers))
        self.layers = nnx.merge(graph, jax.vmap(parameters)(keys))
        self.dtype = dtype
        self.mode = mode
        self.scan_unroll = scan_unroll
        self.remat = remat

    def __call__(
        self,
        x: jax.Array,
        *inputs: Any,
        depth_map: DepthMap | jax.Array | None = None,
        gates: jax.Array | None = None,
        loop: Loop | None = None,
        cache: Any = None,
    ) -> Any:
        """Runs the stack.

        Args:
          x: the residual stream `[B, L, D]`.
          *inputs: passed to every layer after `x` (mask, angles, ...).
          depth_map: which stored layer runs at each position: a static map, a
            traced integer array of static length, or None for all in order.
          gates: `[positions]`, see `growth.run_stack`.
          loop: the layers that repeat, see there; it runs a map of its own.
          cache: a pytree `[positions, ...]`, by position and not by layer.

        Returns:
          The residual stream, or `(stream, new cache)` where a cache is given. Of a loop with
          several exits the stream at each, `[exits, B, L, D]`.

        Raises:
          UserError: for remat = 'offload' where the devices cannot reach the host's memory.
        """
        if self.remat == "offload":
            check_offload(jax.devices()[0])
        graph, state = nnx.split(self.layers)
        stored = nnx.to_pure_dict(state)
        # Cast before the scan: inside it, every loop would keep its own cast copy
        # for the backward pass. Vectors (norm scales) stay in float32.
        stored = jax.tree.map(
            lambda leaf: leaf.astype(self.dtype) if leaf.ndim > 2 else leaf, stored
        )

        def body(layer, x, *item):
            return nnx.merge(graph, layer)(x, *inputs, *item)

        positions = positions_of(jax.tree.leaves(stored)[0].shape[0], depth_map, loop)
        mode = resolve_mode(self.mode, positions)
        return run_stack(
            body,
            stored,
            x,
            depth_map,
            gates,
            loop=loop,
            per_position=cache,
            mode=mode,
            unroll=self.scan_unroll,
            remat=CHECKPOINT_POLICIES[self.remat],
        )


def positions_of(
    stored: int, depth_map: DepthMap | jax.Array | None, loop: Loop | None = None
) -> int:
    """How many positions run of so many stored layers."""
    if loop is not None:
        return len(loop.depth_map(stored))
    return stored if depth_map is None else len(depth_map)


def resolve_mode(mode: str, positions: int) -> str:
    """'scan' or 'unroll' for a stack of that many positions on the default backend."""
    if mode != "auto":
        return mode
    unroll = jax.default_backend() == "cpu" and positions <= _UNROLL_UP_TO
    return "unroll" if unroll else "scan"


def check_offload(device: jax.Device) -> None:
    """Raises UserError unless programs of this device can keep arrays in the host's memory."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if _HOST not in kinds:
        raise UserError(
            f"DecoderConfig.remat = 'offload' needs devices with the memory {_HOST!r}; "
            f"{device.device_kind} has {', '.join(kinds)}; use 'full' or 'minimal'"
        )
