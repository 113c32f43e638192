"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stacking_jax.models.decoder import Constrain, unconstrained
from stacking_jax.models.head_loss import SoftTargets, chunk_of, head_loss
from stacking_jax.models.layer_stack import LAYOUT, cast_matrices
from stacking_jax.models.losses import carries_loss
from stacking_jax.training.paths import keep_undrawn
from stacking_jax.training.spike_config import SpikeConfig
from stacking_jax.training.spikes import judge
from stacking_jax.training.stack_runs import StackOf, hidden_of_batch, plain_stack
from stacking_jax.training.state import TrainState
from stacking_jax.training.teaching import Teaching

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    clip_norm: float | None = None,
    z_loss: float = 0.0,
    microbatches: int = 1,
    skip_nonfinite: bool = False,
    spikes: SpikeConfig = SpikeConfig(),
    stack: StackOf = plain_stack,
    similarity: Callable[[Any], tuple[jax.Array, jax.Array]] | None = None,
    skip_undrawn: bool = False,
    teaching: Teaching | None = None,
    constrain: Constrain = unconstrained,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch, teacher=None) -> (state, metrics)`.

    Args:
      graph: the decoder's graph definition, from `state.model_graph`.
      optimizer: gives directions; the learning rate is applied here.
      learning_rate: from the number of the update, counted from 1, to its rate.
      clip_norm: the largest global norm of a gradient.
      z_loss: weight of log²(Z).
      microbatches: parts of a batch that are computed one after the other.
      skip_nonfinite: leave the state as it is when loss or gradient is not finite.
      spikes: the policy for gradients that are far too large; with one, a state has a
        window, see `spikes.with_window`.
      stack: from the number of updates done to how the stack runs, see `stack_runs`.
      similarity: the regulariser, see `similarity.similarity_term`.
      skip_undrawn: leave layers that are not in the step's path as they are, their moments too;
        else they get the update of a gradient of zero. `stack` must give a path.
      teaching: how soft labels are learnt from, if they are; `teacher` are then the parameters
        that it needs, which the step reads and does not give back.
      constrain: places activations on the mesh.

    The batch holds `tokens`, `segment_ids` and `positions`, int32 `[B, L]`, and
    `prefix` where the data have prompts, which carry no loss. The metrics are
    scalars: `loss` (cross-entropy alone, nats per token), `grad_norm` (before
    clipping), `learning_rate`, `tokens` (that carried loss), `skipped`; with a policy
    `spike` and `median_grad_norm`; with a regulariser `similarity`; and with a teacher
    `soft_loss`, the cross-entropy towards it.
    """

    def train_step(
        state: TrainState, batch: Batch, teacher: Any = None
    ) -> tuple[TrainState, Metrics]:
        tokens = jnp.sum(carries_loss(batch))
        runs = stack(state.step)
        weight = 0.0 if teaching is None else teaching.weight(state.step)

        def loss_of(params, part):
            labels = None
            if teaching is not None:
                labels = Labels(teaching.soft_targets(teacher, part, constrain), weight)
            objective, *read = _sums(graph, params, part, runs, z_loss, constrain, labels)
            # Divided by the whole batch's tokens, so that parts add up to the whole.
            return objective / jnp.maximum(tokens, 1), tuple(read)

        dtype = nnx.merge(graph, state.params).config.dtype
        gradients, (cross, *soft) = _accumulate(
            loss_of, state.params, batch, microbatches, dtype, 1 if teaching is None else 2
        )
        if similarity is not None:
            # Of the parameters alone: once a step, whatever its microbatches.
            pull, similar = jax.grad(similarity, has_aux=True)(state.params)
            gradients = jax.tree.map(jnp.add, gradients, pull)
        grad_norm = optax.tree.norm(gradients)
        if clip_norm is not None:
            shrink = jnp.minimum(1.0, clip_norm / (grad_norm + 1e-9))
            gradients = jax.tree.map(lambda leaf: leaf * shrink, gradients)

        rate = learning_rate(state.step + 1)
        directions, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda leaf, step: leaf - rate * step, state.params, directions)
        if skip_undrawn:
            params, opt_state = keep_undrawn(
                (params, opt_state), (state.params, state.opt_state), runs["depth_map"], LAYOUT
            )

        loss = cross / jnp.maximum(tokens, 1)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        good, window = finite if skip_nonfinite else None, state.spikes
        if spikes.action is not None:
            spike, median, window = judge(spikes, window, grad_norm)
            good = ~spike if good is None else good & ~spike
        if good is not None:
            # A select and not a `cond`: a `cond` would copy the whole state.
            keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
            params = jax.tree.map(keep, params, state.params)
            opt_state = jax.tree.map(keep, opt_state, state.opt_state)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "tokens": tokens,
            "skipped": jnp.where(finite, 0, 1),
        }
        if spikes.action is not None:
            metrics |= {"spike": spike, "median_grad_norm": median}
        if similarity is not None:
            metrics["similarity"] = similar
        if soft:
            metrics["soft_loss"] = soft[0] / jnp.maximum(tokens, 1)
        return TrainState(state.step + 1, params, opt_state, window), metrics

    return train_step


class Labels(NamedTuple):
    """A teacher's soft targets and their share of the objective."""

    soft: SoftTargets
    weight: float | jax.Array


def make_eval_step(
    graph: Any, stack: StackOf = plain_stack, constrain: Constrain = unconstrained
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds `eval_step(params, batch, step=0) -> (summed cross-entropy in nats, tokens)`.

    Args:
      graph: the decoder's graph definition.
      stack: from the number of updates done to how the stack runs at evaluation.
      constrain: places activations on the mesh.
    """

    def eval_step(params, batch, step=0):
        _, cross = _sums(graph, params, batch, stack(step), 0.0, constrain)
        return cross, jnp.sum(carries_loss(batch))

    return eval_step


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite, as a bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _sums(graph, params, batch, runs, z_loss, constrain, labels=None):
    """What `head_loss` gives for a batch, with the stack run as `runs` says."""
    model = nnx.merge(graph, params)
    config = model.config
    hidden = hidden_of_batch(model, batch, runs, constrain)
    kernel, vocab_axis = model.head_matrix()
    soft, weight = (None, 0.0) if labels is None else labels

    def sums(hidden, targets, weights):
        chunk = chunk_of(
            config.loss, config.loss_chunk, targets.shape, config.vocab_size, constrain
        )
        return head_loss(
            hidden, kernel, targets, weights, vocab_axis=vocab_axis, z_loss=z_loss, soft=soft,
            soft_weight=weight, chunk=chunk, constrain=constrain,
        )

    targets, weights = batch["tokens"], carries_loss(batch).astype(jnp.float32)
    exits = 1 if (loop := runs.get("loop")) is None else loop.exits
    if exits == 1:
        return sums(hidden, targets, weights)
    # The last exit is the network; the others are more rows of every device's own. None of them
    # is taught: `TrainConfig` sees to that.
    objective, cross = sums(hidden[-1], targets, weights)
    more = jnp.moveaxis(hidden[:-1], 0, 1)
    others, _ = sums(
        more.reshape(-1, *more.shape[2:]),
        *(jnp.repeat(leaf, exits - 1, axis=0) for leaf in (targets, weights)),
    )
    return (objective + others) / exits, cross


def _accumulate(loss_of, params, batch, microbatches, dtype, read=1):
    """Gradient over the microbatches, and the `read` sums beside it."""
    gradient_of = jax.grad(loss_of, has_aux=True)
    # Cast once, for all microbatches and layers; what comes back is added up in float32.
    low = cast_matrices(params, dtype)

    def wide(gradients):
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), gradients, params)

    if microbatches == 1:
        gradients, sums = gradient_of(low, batch)
        return wide(gradients), sums

    # Rows are dealt out in turn: every device keeps its share of each microbatch.
    parts = jax.tree.map(
        lambda leaf: leaf.reshape(-1, microbatches, *leaf.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total, part):
        gradients, sums = gradient_of(low, part)
        return jax.tree.map(jnp.add, total, (wide(gradients), sums)), None

    zeros = jax.tree.map(jnp.zeros_like, params), (jnp.zeros((), jnp.float32),) * read
    return jax.lax.scan(add, zeros, parts)[0]
