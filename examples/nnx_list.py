"""Grows a Flax NNX model that keeps its blocks in a list, in place, from 3 blocks to 6.

    python examples/nnx_list.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stacking_jax.growth import Unrolled, grow_module, interleave


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, depth, width, rngs):
        self.embed = nnx.Embed(50, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 50, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(model, steps):
    """A few steps on one batch: each token predicts its double, modulo 50."""
    tokens = jax.random.randint(jax.random.key(1), (64,), 0, 50)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            labels = 2 * tokens % 50
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(steps):
        loss = step(model, optimizer)
    return float(loss)


def main():
    model = Model(depth=3, width=32, rngs=nnx.Rngs(0))
    print(f"3 blocks: loss {train(model, steps=30):.3f}")

    depth_map = interleave(3)
    print("the map:", depth_map)
    first = model.blocks[0]
    grow_module(model, depth_map, Unrolled("blocks/{}"))
    assert len(model.blocks) == 6 and model.blocks[0] is first
    assert jnp.array_equal(model.blocks[5].up.kernel[...], model.blocks[4].up.kernel[...])
    print(f"6 blocks: loss {train(model, steps=30):.3f}")


if __name__ == "__main__":
    main()
