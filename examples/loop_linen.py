"""Runs a Linen block in a loop with `run_stack`, and unties the loop with `grow`.

    python examples/loop_linen.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from stacking_jax.growth import Scanned, grow, loop, run_stack

WIDTH, STORED = 32, 2


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.SelfAttention(num_heads=4)(nn.LayerNorm()(x))
        x = x + y
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


def body(layer, x):
    """One layer: `layer` holds the parameters of one block."""
    return Block().apply({"params": layer}, x)


def main():
    x = jax.random.normal(jax.random.key(1), (8, 16, WIDTH))
    # One block initialised for every stored layer, its parameters stacked on axis 0.
    keys = jax.random.split(jax.random.key(0), STORED)
    layers = jax.vmap(lambda key: Block().init(key, x)["params"])(keys)

    looped = loop(STORED, times=3)
    y = jax.jit(lambda layers, x: run_stack(body, layers, x, looped))(layers, x)
    count = sum(leaf.size for leaf in jax.tree.leaves(layers))
    print(f"looped:  {len(looped)} layers run, {count} parameters, map {looped}")

    untied = grow({"layers": layers}, looped, Scanned("layers"))["layers"]
    count = sum(leaf.size for leaf in jax.tree.leaves(untied))
    z = jax.jit(lambda layers, x: run_stack(body, layers, x))(untied, x)
    print(f"untied:  {len(looped)} layers run, {count} parameters")
    print(f"largest difference between the two: {jnp.abs(y - z).max():.1e}")
    assert jnp.allclose(y, z, atol=1e-5)

    # The gradient of a loop is the sum over its runs.
    grads = jax.grad(lambda layers: run_stack(body, layers, x, looped).sum())(layers)
    assert jax.tree.structure(grads) == jax.tree.structure(layers)


if __name__ == "__main__":
    main()
