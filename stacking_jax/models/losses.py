"""Cross-entropy over the tokens that carry loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def head_logits(hidden: jax.Array, kernel: jax.Array, vocab_axis: int) -> jax.Array:
    """hidden · kernel in float32, whose gradient goes on in the dtype of the factors.

    By JAX's own rule both products of the backward pass would take the float32 gradient of
    the logits as it is, and so run in float32 where the model computes in bfloat16.

    Args:
      hidden: `[..., D]`.
      kernel: `[V, D]` or `[D, V]`, in the same dtype.
      vocab_axis: of the kernel, 0 or 1.

    Returns:
      float32 `[..., V]`.
    """
    if hidden.dtype == jnp.float32:
        return _product(hidden, kernel, vocab_axis)
    return _low_product(hidden, kernel, vocab_axis)


def _product(hidden, kernel, vocab_axis):
    return jax.lax.dot_general(
        hidden, kernel, (((hidden.ndim - 1,), (1 - vocab_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


_low_product = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _low_product_forward(hidden, kernel, vocab_axis):
    return _product(hidden, kernel, vocab_axis), (hidden, kernel)


def _low_product_backward(vocab_axis, factors, gradient):
    hidden, kernel = factors
    gradient = gradient.astype(hidden.dtype)
    of_hidden = jnp.tensordot(gradient, kernel, axes=(-1, vocab_axis))
    tokens = tuple(range(hidden.ndim - 1))
    pair = (gradient, hidden) if vocab_axis == 0 else (hidden, gradient)
    return of_hidden, jnp.tensordot(*pair, axes=(tokens, tokens))


_low_product.defvjp(_low_product_forward, _low_product_backward)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy and summed z-loss, in nats.

    Sums, not means, so that parts of a batch (microbatches, hosts) add up to the
    whole whatever their share of padding.

    Args:
      logits: float `[B, L, V]`.
      targets: int `[B, L]`.
      weights: float `[B, L]`, 1 where a token counts.
      z_loss: weight of log²(Z), which keeps the normaliser near 1 (PaLM, §5).

    Returns:
      (Σ cross-entropy, Σ z-loss), float32 scalars.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    loss = jnp.sum((log_z - of_target) * weights)
    return loss, z_loss * jnp.sum(jnp.square(log_z) * weights)


def inputs_from_targets(tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The model's inputs: each document shifted right by one, starting with 0.

    Padding's id 0 doubles as the begin-of-document token, as in T5X and seqio.

    Args:
      tokens: int `[B, L]`, the tokens to predict.
      segment_ids: int `[B, L]`, documents of a packed record.

    Returns:
      int `[B, L]`.
    """
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    previous_segment = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(previous_segment == segment_ids, previous, 0)


def carries_loss(batch: dict[str, jax.Array]) -> jax.Array:
    """Bool `[B, L]`: which targets carry loss; padding and prompts do not."""
    counted = batch["segment_ids"] > 0
    if "prefix" in batch:
        counted = counted & (batch["prefix"] == 0)
    return counted


def prompt_inputs(prefix: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The *inputs* that belong to a prompt, from the *targets* that do.

    Inputs are targets shifted right, so the input that holds the prompt's last
    token stands one place after it; it belongs to the prompt too, as in T5X's
    decoder-only prefix LM. It predicts the first token that carries loss and sees
    nothing that it must not: the tokens that carry loss come after it.

    Args:
      prefix: int `[B, L]`, 1 where the target belongs to a prompt.
      segment_ids: int `[B, L]`.

    Returns:
      bool `[B, L]`.
    """
    of_prompt = prefix > 0
    before = jnp.pad(of_prompt[:, :-1], ((0, 0), (1, 0)))
    previous_segment = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return of_prompt | (before & (previous_segment == segment_ids))
