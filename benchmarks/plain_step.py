"""The opponent: a train step of the decoder's mathematics, written by hand in plain JAX.

No module library, no layer-wise optimiser, nothing of ours: what a person would
write in an afternoon for exactly this shape. `layers` is either one tree of stacked
arrays, indexed layer by layer, or a Python list of trees. In bfloat16 the matrices are cast
once per step; norms, rotations, softmax and loss are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def rms_norm(x, scale):
    wide = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * size * scale[None, None]).astype(x.dtype)


def rotate(x, cosines, sines):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    ).astype(x.dtype)


def masked_attention(query, key, value, mask):
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhw->bqhw", weights, value)


def layer(p, x, attend, cosines, sines, heads):
    batch, length, width = x.shape
    split = lambda y: y.reshape(batch, length, heads, width // heads)  # noqa: E731
    y = rms_norm(x, p["attention_norm"]["scale"])
    query = rotate(split(y @ p["attention"]["query"]), cosines, sines)
    key = rotate(split(y @ p["attention"]["key"]), cosines, sines)
    value = split(y @ p["attention"]["value"])
    x = x + attend(query, key, value).reshape(x.shape) @ p["attention"]["out"]
    y = rms_norm(x, p["mlp_norm"]["scale"])
    return x + (jax.nn.silu(y @ p["mlp"]["gate"]) * (y @ p["mlp"]["up"])) @ p["mlp"]["down"]


def loss(params, layers, batch, heads, dtype, kernel):
    tokens, segments, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    length = tokens.shape[1]
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    inputs = jnp.where(before == segments, inputs, 0)
    table = params["embedding"].astype(dtype)
    x = table[inputs]
    half = x.shape[-1] // heads // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[:, :, None, None] * frequencies[None, None, None]
    if kernel is None:
        mask = jnp.tril(jnp.ones((length, length), bool))[None]
        mask = (mask & (segments[:, :, None] == segments[:, None, :]))[:, None]
        attend = lambda *qkv: masked_attention(*qkv, mask)  # noqa: E731
    else:
        attend = lambda *qkv: jax.nn.dot_product_attention(  # noqa: E731
            *qkv, is_causal=True, implementation=kernel
        )
    for p in layers:
        p = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, p)
        x = layer(p, x, attend, jnp.cos(angles), jnp.sin(angles), heads)
    logits = jnp.einsum(
        "bld,vd->blv", rms_norm(x, params["norm"]["scale"]), table,
        preferred_element_type=jnp.float32,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    weights = (segments > 0).astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def make_step(
    optimizer: optax.GradientTransformation, heads: int, depth: int, *, dtype: str = "float32",
    kernel: str | None = None,
):
    """`step((params, opt_state), batch) -> ((params, opt_state), metrics)`, to be jitted.

    Args:
      optimizer: gives whole updates, its clip included.
      heads, depth: of the decoder.
      dtype: of the computation.
      kernel: None masks packed documents; else rows are one document each, and this is the
        implementation of `jax.nn.dot_product_attention`, 'cudnn' or 'xla'.
    """

    def loss_of(params, batch):
        layers = params["stack"]["layers"]
        if not isinstance(layers, list):
            layers = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(depth)]
        return loss(params, layers, batch, heads, dtype, kernel)

    def step(state, batch):
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
        return (optax.apply_updates(params, updates), opt_state), metrics

    return step
