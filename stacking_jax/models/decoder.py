"""The decoder: RMSNorm, rotary attention, gated MLP, stacked layers.

Shapes: B batch, L length, D width, H query heads, K key heads, W head width,
F inner width, V vocabulary. Every parameter carries the names of its axes
(`axes`), which the training code's one table maps onto the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop
from stacking_jax.models.attention import (
    attend_behind,
    document_mask,
    rotary_angles,
    rotate,
)
from stacking_jax.models.config import DecoderConfig
from stacking_jax.models.kernels import attention_mask, self_attention
from stacking_jax.models.layer_stack import LayerStack, positions_of
from stacking_jax.models.losses import head_logits
from stacking_jax.models.placement import unconstrained
from stacking_jax.models.products import dense, gated

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
STREAM = ("batch", "length", "stream")
QUERIES = ("batch", "length", "heads", None)
PARTS_OF_KEYS = ("batch", "length", "kv_heads", None)
KEYS = ("batch", "keys", "kv_heads", None)


def _matrix(rngs: nnx.Rngs, shape: tuple[int, int], axes: tuple[str, str], scale: float = 1.0):
    """A kernel [in, out] with standard deviation scale / √in."""
    std = scale * shape[0] ** -0.5
    values = std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(values, axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return (normed * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped keys."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        queries = config.num_heads * config.head_width
        keys = config.kv_heads * config.head_width
        self.query = _matrix(rngs, (config.d_model, queries), ("embed", "heads"))
        self.key = _matrix(rngs, (config.d_model, keys), ("embed", "kv_heads"))
        self.value = _matrix(rngs, (config.d_model, keys), ("embed", "kv_heads"))
        # Branches add up over the whole depth, so they start smaller by its root:
        # by the *final* depth, or a stage's fresh layers would differ from another's.
        depth_scale = (2 * config.num_layers) ** -0.5
        self.out = _matrix(rngs, (queries, config.d_model), ("heads", "embed"), depth_scale)
        self.width = config.head_width

    def __call__(self, x, mask, angles, constrain, cache=None, start=None):
        query = constrain(rotate(self._heads(x, self.query, constrain), *angles), QUERIES)
        query = checkpoint_name(query, "query")
        # Each device makes the keys and values of its part of the length, and then has all.
        key, value = (
            constrain(constrain(part, PARTS_OF_KEYS), KEYS)
            for part in (
                rotate(self._heads(x, self.key, constrain), *angles),
                self._heads(x, self.value, constrain),
            )
        )
        key, value = checkpoint_name(key, "key"), checkpoint_name(value, "value")
        if cache is None:
            mixed, new = self_attention(query, key, value, mask, constrain), None
        else:
            mixed = attend_behind(query, key, value, mask, cache, start)
            new = {"key": key.transpose(0, 2, 1, 3), "value": value.transpose(0, 2, 1, 3)}
        return dense(mixed.reshape(*x.shape[:2], -1), self.out[...], constrain), new

    def _heads(self, x, kernel, constrain):
        return dense(x, kernel[...], constrain).reshape(*x.shape[:2], -1, self.width)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) · up(x)): SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        wide, narrow = (config.d_model, config.d_ff), (config.d_ff, config.d_model)
        self.gate = _matrix(rngs, wide, ("embed", "mlp"))
        self.up = _matrix(rngs, wide, ("embed", "mlp"))
        self.down = _matrix(rngs, narrow, ("mlp", "embed"), (2 * config.num_layers) ** -0.5)

    def __call__(self, x, constrain):
        return dense(self.neurons(x, constrain), self.down[...], constrain)

    def neurons(self, x, constrain):
        """The inner activations `[B, L, F]`."""
        gate, up = (dense(x, kernel[...], constrain) for kernel in (self.gate, self.up))
        return gated(gate, up)


class DecoderLayer(nnx.Module):
    """One pre-norm layer: attention and MLP, each added to the stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x, mask, angles, constrain, start=None, cache=None):
        x = checkpoint_name(x, "stream")
        mixed, new = self.attention(self.attention_norm(x), mask, angles, constrain, cache, start)
        x = checkpoint_name(constrain(x + mixed, STREAM), "middle")
        x = constrain(x + self.mlp(self.mlp_norm(x), constrain), STREAM)
        return x if cache is None else (x, new)


class Decoder(nnx.Module):
    """Token embedding, a stack of layers, a final norm and a head.

    Attributes:
      embedding: float32 `[V, D]`.
      stack: the layers; see `LayerStack`.
      norm: the final RMSNorm.
      head: float32 `[D, V]`, absent where embeddings are tied.
    """

    def __init__(self, config: DecoderConfig, *, depth: int | None = None, key: jax.Array):
        """Builds and initialises a decoder.

        Args:
          config: its shape; `config.num_layers` is the final depth.
          depth: stored layers now; None for the final depth.
          key: a random key. Initial values do not depend on `depth`.
        """
        embed_key, stack_key, head_key = jax.random.split(key, 3)
        std = config.d_model**-0.5
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(
            std * jax.random.normal(embed_key, shape, jnp.float32), axes=("vocab", "embed")
        )
        self.stack = LayerStack(
            lambda rngs: DecoderLayer(config, rngs),
            config.num_layers if depth is None else depth,
            key=stack_key,
            dtype=config.dtype,
            mode=config.stack,
            scan_unroll=config.scan_unroll,
            remat=config.remat,
        )
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        if not config.tied_embeddings:
            self.head = _matrix(nnx.Rngs(head_key), shape[::-1], ("embed", "vocab"))
        self.config = config

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        bidirectional: jax.Array | None = None,
        depth_map: DepthMap | jax.Array | None = None,
        gates: jax.Array | None = None,
        loop: Loop | None = None,
        constrain: Constrain = unconstrained,
    ) -> jax.Array:
        """Logits of the next token.

        Args:
          tokens: int `[B, L]`.
          segment_ids: int `[B, L]`, documents of a packed record; None for one
            document per row.
          positions: int `[B, L]`, restarting in each document; None for 0..L-1.
          bidirectional: bool `[B, L]`, inputs of a prompt, which see each other
            within their document (`losses.prompt_inputs`); None for causal.
          depth_map, gates, loop: see `LayerStack`.
          constrain: places an activation on the mesh by the names of its axes.

        Returns:
          float32 `[B, L, V]`.

        Raises:
          UserError: for a loop with several exits; `hidden_states` gives them all.
        """
        if loop is not None and loop.exits > 1:
            raise UserError(f"the logits of {loop.exits} exits are not one: ask hidden_states")
        hidden = self.hidden_states(
            tokens, segment_ids=segment_ids, positions=positions, bidirectional=bidirectional,
            depth_map=depth_map, gates=gates, loop=loop, constrain=constrain,
        )
        return self._logits(hidden, constrain)

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        bidirectional: jax.Array | None = None,
        depth_map: DepthMap | jax.Array | None = None,
        gates: jax.Array | None = None,
        loop: Loop | None = None,
        constrain: Constrain = unconstrained,
    ) -> jax.Array:
        """What `__call__` makes logits of: `[B, L, D]`, normed, in the dtype of computation.

        With `head_matrix` it is what `head_loss` takes. Arguments as in `__call__`; a loop with
        several exits gives `[exits, B, L, D]`, the whole network last.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        mask = attention_mask(self.config, tokens.shape, segment_ids, bidirectional, constrain)
        x = self.stack(
            mask.guard(self._embed(tokens, constrain)),
            mask,
            self._angles(positions),
            constrain,
            depth_map=depth_map,
            gates=gates,
            loop=loop,
        )
        return self.norm(x)

    def head_matrix(self) -> tuple[jax.Array, int]:
        """The head's matrix in the dtype of the computation, and its axis of the vocabulary."""
        if self.config.tied_embeddings:
            return self.embedding[...].astype(self.config.dtype), 0
        return self.head[...].astype(self.config.dtype), 1

    def prefill(
        self,
        tokens: jax.Array,
        capacity: int,
        *,
        bidirectional: jax.Array | None = None,
        depth_map: DepthMap | None = None,
        loop: Loop | None = None,
        constrain: Constrain = unconstrained,
    ) -> Any:
        """The cache of prompts, which stand at its beginning.

        Args:
          tokens: int `[B, Q]`. Rows may be padded on the right: what padding leaves in the
            cache is overwritten by the row's own tokens before any of them sees it.
          capacity: slots of the cache, at least Q.
          bidirectional: bool `[B, Q]`, tokens of a prompt that see each other.
          depth_map, loop: run another map than every layer once.
          constrain: as in `__call__`.

        Raises:
          UserError: if the prompts do not fit.
        """
        batch, length = tokens.shape
        if length > capacity:
            raise UserError(f"prompts of {length} tokens do not fit into {capacity} cached slots")
        stored = jax.tree.leaves(nnx.state(self.stack))[0].shape[0]
        nothing = self.init_cache(batch, 0, positions_of(stored, depth_map, loop))
        positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        _, new = self._extend(tokens, positions, nothing, bidirectional, depth_map, loop, constrain)
        room = [(0, 0)] * 3 + [(0, capacity - length), (0, 0)]
        return jax.tree.map(lambda leaf: jnp.pad(leaf, room), new)

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any,
        *,
        bidirectional: jax.Array | None = None,
        depth_map: DepthMap | None = None,
        loop: Loop | None = None,
        constrain: Constrain = unconstrained,
    ) -> tuple[jax.Array, Any]:
        """Logits of the tokens that follow a cached prefix, and the cache with them.

        Args:
          tokens: int `[B, Q]`, Q consecutive tokens of each row.
          positions: int `[B, Q]`, their positions in the cache. Slots from the first of
            them on are not seen, whatever they hold.
          cache: from `init_cache` or `prefill`.
          bidirectional: bool `[B, Q]`, tokens of a prompt that see each other, as
            in `__call__`; a prompt must then be given in one piece. None for causal.
          depth_map, loop: the map with which the cache was made.
          constrain: as in `__call__`.

        Returns:
          float32 `[B, Q, V]` and the cache. Positions behind its end are an error: where
          they are known only when the program runs, the logits of that row are NaN.

        Raises:
          UserError: if tokens lie behind the end of the cache.
        """
        slots = jax.tree.leaves(cache)[0].shape[3]
        known = not isinstance(positions, jax.core.Tracer)
        top = int(positions.max()) + 1 if known else tokens.shape[1]
        if top > slots:
            raise UserError(f"decoding to position {top} needs more than the {slots} cached slots")
        x, new = self._extend(tokens, positions, cache, bidirectional, depth_map, loop, constrain)
        rows = jnp.arange(tokens.shape[0])[:, None]

        def write(kept, leaf):
            # A scatter by row and slot is done in place within a loop.
            return kept.at[:, rows, :, positions].set(
                leaf.transpose(1, 3, 0, 2, 4), mode="drop", unique_indices=True
            )

        within = jnp.all(positions < slots, axis=1)[:, None, None]
        logits = jnp.where(within, self._logits(self.norm(x), constrain), jnp.nan)
        return logits, jax.tree.map(write, cache, new)

    def _extend(self, tokens, positions, cache, bidirectional, depth_map, loop, constrain):
        """The residual stream of more tokens, and their keys and values alone."""
        return self.stack(
            self._embed(tokens, constrain),
            document_mask(jnp.ones_like(tokens), bidirectional),
            self._angles(positions),
            constrain,
            positions[:, 0],
            depth_map=depth_map,
            loop=loop,
            cache=cache,
        )

    def init_cache(self, batch_size: int, length: int, positions: int) -> Any:
        """An empty KV cache: keys and values `[positions, B, K, length, W]`.

        `positions` is the length of the depth map that will run, since a looped
        layer sees another input in every loop.
        """
        shape = (positions, batch_size, self.config.kv_heads, length, self.config.head_width)
        return {name: jnp.zeros(shape, self.config.dtype) for name in ("key", "value")}

    def _embed(self, tokens, constrain):
        # Gathered over D as every other weight is; else the rows that were found would have
        # to change places between all devices of the batch.
        table = constrain(self.embedding[...].astype(self.config.dtype), ("vocab", "stream"))
        return constrain(jnp.take(table, tokens, axis=0, mode="clip"), STREAM)

    def _angles(self, positions):
        return rotary_angles(positions, self.config.head_width, self.config.rope_theta)

    def _logits(self, hidden, constrain):
        return constrain(head_logits(hidden, *self.head_matrix()), ("batch", "length", "vocab"))
