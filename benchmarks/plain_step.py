"""The opponent: a train step of the decoder's mathematics, written by hand in plain JAX.

No module library, no layer-wise optimiser, nothing of ours: what a person would
write in an afternoon for exactly this shape. `layers` is either one tree of stacked
arrays, indexed layer by layer, or a Python list of trees.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale[None, None]


def rotate(x, cosines, sines):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )


def layer(p, x, mask, cosines, sines, heads):
    batch, length, width = x.shape
    split = lambda y: y.reshape(batch, length, heads, width // heads)  # noqa: E731
    y = rms_norm(x, p["attention_norm"]["scale"])
    query = rotate(split(y @ p["attention"]["query"]), cosines, sines)
    key = rotate(split(y @ p["attention"]["key"]), cosines, sines)
    value = split(y @ p["attention"]["value"])
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, key) * (width // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhqk,bkhw->bqhw", weights, value).reshape(x.shape)
    x = x + mixed @ p["attention"]["out"]
    y = rms_norm(x, p["mlp_norm"]["scale"])
    return x + (jax.nn.silu(y @ p["mlp"]["gate"]) * (y @ p["mlp"]["up"])) @ p["mlp"]["down"]


def loss(params, layers, batch, heads):
    tokens, segments, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    length = tokens.shape[1]
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    inputs = jnp.where(before == segments, inputs, 0)
    x = params["embedding"][inputs]
    half = x.shape[-1] // heads // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[:, :, None, None] * frequencies[None, None, None]
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    mask = (mask & (segments[:, :, None] == segments[:, None, :]))[:, None]
    for p in layers:
        x = layer(p, x, mask, jnp.cos(angles), jnp.sin(angles), heads)
    logits = rms_norm(x, params["norm"]["scale"]) @ params["embedding"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    weights = (segments > 0).astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def make_step(optimizer: optax.GradientTransformation, heads: int, depth: int):
    """`step((params, opt_state), batch) -> ((params, opt_state), loss)`, to be jitted."""

    def loss_of(params, batch):
        layers = params["stack"]["layers"]
        if not isinstance(layers, list):
            layers = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(depth)]
        return loss(params, layers, batch, heads)

    def step(state, batch):
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step
