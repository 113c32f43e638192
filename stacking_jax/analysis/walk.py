"""A decoder run one position at a time, so that one may look at its stream on the way.

Shapes: B batch, L length, D width, F inner width. Programs take the whole parameters and the
stored layer's number, which is traced: one compiled program serves all positions, and two
streams lie on the devices at a time, however deep the network is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from stacking_jax.models.decoder import Decoder
from stacking_jax.models.head_loss import LOGIT_BYTES
from stacking_jax.models.kernels import attention_mask
from stacking_jax.models.losses import (
    carries_loss,
    head_logits,
    inputs_from_targets,
    prompt_inputs,
)
from stacking_jax.models.products import dense
from stacking_jax.training import sharding
from stacking_jax.training.mesh import LogicalMesh

STREAM = ("batch", "length", "stream")
_TINY = 1e-12


class Seen(NamedTuple):
    """What one layer did with one batch, summed over the tokens that carry loss, float32.

    Attributes:
      attention, mlp: ‖branch‖ / ‖stream that the branch is added to‖.
      attention_cosine, mlp_cosine: cosine of branch and stream.
      neurons: `[F]`, |inner activation| of the MLP.
    """

    attention: jax.Array
    mlp: jax.Array
    attention_cosine: jax.Array
    mlp_cosine: jax.Array
    neurons: jax.Array


class Walk:
    """The programs of one model.

    Args:
      graph: of the decoder, from `state.model_graph`.
      mesh: the devices, one that divides no rows over its axis of the length.
      top: tokens of a prediction that `read` compares.
    """

    def __init__(self, graph: Any, mesh: LogicalMesh, top: int = 5):
        self._graph, self.top = graph, top
        self._constrain = sharding.constrainer(mesh)
        whole = mesh.sharding(())
        stream = mesh.sharding(STREAM)

        def program(function: Callable, gives: Any) -> Callable:
            return jax.jit(function, out_shardings=gives)

        self.embed = program(self._embed, stream)
        self.step = program(self._step, stream)
        self.look = program(self._look, (stream, stream, whole))
        self.pair = program(self._pair, (stream, stream, whole))
        self.best = program(self._best, mesh.sharding(("batch", "length", None)))
        self.read = program(self._read, whole)
        self.apart = program(self._apart, whole)
        self.add = program(jnp.add, stream)
        self.tokens = program(lambda batch: jnp.sum(carries_loss(batch)), whole)

    # ---- one position ----------------------------------------------------------------

    def _embed(self, params, batch):
        """The stream `[B, L, D]` before the first layer."""
        model = self._model(params)
        tokens = inputs_from_targets(batch["tokens"], batch["segment_ids"])
        mask = self._mask(model, batch)
        return mask.guard(model._embed(tokens, self._constrain))

    def _step(self, params, batch, source, x):
        """The stream behind the stored layer `source`."""
        x, branches, _ = self._run(params, batch, source, x)
        return x + branches[1]

    def _look(self, params, batch, source, x):
        """(stream behind the layer, what it added `[B, L, D]`, `Seen`)."""
        weights = carries_loss(batch)
        middle, (mixed, thought), neurons = self._run(params, batch, source, x)
        after = middle + thought
        seen = Seen(
            total(_length(mixed) / norm(x), weights),
            total(_length(thought) / norm(middle), weights),
            total(cosine(mixed, x), weights),
            total(cosine(thought, middle), weights),
            jnp.sum(jnp.where(weights[..., None], jnp.abs(neurons), 0), axis=(0, 1)),
        )
        return after, mixed + thought, seen

    def _pair(self, params, batch, source, x, y):
        """Two streams behind the layer, and Σ ‖its update of y − that of x‖ / ‖that of x‖."""
        ends, updates = [], []
        for stream in (x, y):
            middle, (mixed, thought), _ = self._run(params, batch, source, stream)
            ends.append(middle + thought)
            updates.append(mixed.astype(jnp.float32) + thought.astype(jnp.float32))
        moved = _length(updates[1] - updates[0]) / norm(updates[0])
        return *ends, total(moved, carries_loss(batch))

    def _run(self, params, batch, source, x):
        """(stream behind attention, both branches, inner activations of the MLP).

        As `DecoderLayer.__call__`, which gives none of it away.
        """
        model, constrain = self._model(params), self._constrain
        graph, state = nnx.split(model.stack.layers)

        def pick(leaf):
            leaf = leaf.astype(model.config.dtype) if leaf.ndim > 2 else leaf
            return jax.lax.dynamic_index_in_dim(leaf, source, keepdims=False)

        layer = nnx.merge(graph, jax.tree.map(pick, nnx.to_pure_dict(state)))
        angles = model._angles(batch["positions"])
        mask = self._mask(model, batch)
        mixed, _ = layer.attention(layer.attention_norm(x), mask, angles, constrain)
        middle = constrain(x + mixed, STREAM)
        neurons = layer.mlp.neurons(layer.mlp_norm(middle), constrain)
        thought = constrain(dense(neurons, layer.mlp.down[...], constrain), STREAM)
        return middle, (mixed, thought), neurons

    # ---- reading the stream through the head ---------------------------------------------

    def _best(self, params, x):
        """The `top` most likely next tokens when the stream is read here, int `[B, L, top]`."""
        model = self._model(params)

        def best(hidden):
            return jax.lax.top_k(self._logits(model, hidden), self.top)[1]

        return self._by_columns(model, best, x)

    def _read(self, params, batch, x, best):
        """Sums over tokens of the stream read here, as the logit lens does (nostalgebraist 2020).

        Returns:
          `loss`: cross-entropy in nats; `overlap`: share of the `top` tokens that `best` holds as
          well; `agreement`: 1 where the most likely token is that of `best`.
        """
        model = self._model(params)

        def read(hidden, targets, weights, best):
            logits = self._logits(model, hidden)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            here = jax.lax.top_k(logits, self.top)[1]
            shared = jnp.any(here[..., None] == best[..., None, :], axis=-1)
            return {
                "loss": total(jax.nn.logsumexp(logits, axis=-1) - chosen, weights),
                "overlap": total(jnp.mean(shared, axis=-1, dtype=jnp.float32), weights),
                "agreement": total((here[..., 0] == best[..., 0]).astype(jnp.float32), weights),
            }

        inputs = (x, batch["tokens"], carries_loss(batch), best)
        return jax.tree.map(jnp.sum, self._by_columns(model, read, *inputs, joined=False))

    def _apart(self, params, batch, x, y):
        """Σ ‖softmax(logits of y) − softmax(logits of x)‖."""
        model = self._model(params)

        def apart(x, y, weights):
            p, q = (jax.nn.softmax(self._logits(model, hidden)) for hidden in (x, y))
            return total(jnp.linalg.norm(q - p, axis=-1), weights)

        inputs = (x, y, carries_loss(batch))
        return jnp.sum(self._by_columns(model, apart, *inputs, joined=False))

    def _logits(self, model: Decoder, hidden):
        logits = head_logits(model.norm(hidden), *model.head_matrix())
        return self._constrain(logits, ("batch", "length", "vocab"))

    def _by_columns(self, model: Decoder, function, *arrays, joined: bool = True):
        """`function` of a few columns `[B, l, ...]` at a time, so that all logits never lie there.

        Columns and not rows: rows are what the devices share out.
        """
        rows, columns = arrays[0].shape[:2]
        each = 4 * model.config.vocab_size * rows // self._constrain.parts("batch")
        most = max(1, LOGIT_BYTES // each)
        width = max(n for n in range(1, columns + 1) if columns % n == 0 and n <= most)

        def cut(array):
            array = array.reshape(rows, columns // width, width, *array.shape[2:])
            return jnp.moveaxis(array, 1, 0)

        found = jax.lax.map(lambda parts: function(*parts), tuple(cut(a) for a in arrays))
        if not joined:
            return found
        return jnp.moveaxis(found, 0, 1).reshape(rows, columns, *found.shape[3:])

    # ---- what all of them need ---------------------------------------------------------------

    def _model(self, params) -> Decoder:
        return nnx.merge(self._graph, params)

    def _mask(self, model: Decoder, batch):
        segment_ids, bidirectional = batch["segment_ids"], None
        if "prefix" in batch and model.config.bidirectional_prompts:
            bidirectional = prompt_inputs(batch["prefix"], segment_ids)
        return attention_mask(
            model.config, segment_ids.shape, segment_ids, bidirectional, self._constrain
        )


def norm(x: jax.Array) -> jax.Array:
    """Of the last axis, in float32 and never 0."""
    return jnp.maximum(_length(x), _TINY)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of the last axis, in float32."""
    product = jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    return product / (norm(x) * norm(y))


def total(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ values where weights are true."""
    # A select, not a product: padding may hold what is not a number.
    return jnp.sum(jnp.where(weights, values, 0.0))


def _length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
