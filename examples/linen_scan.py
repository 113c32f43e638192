"""Grows a Flax Linen model whose layers are stacked by `nn.scan`, from 4 layers to 12.

    python examples/linen_scan.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from stacking_jax.growth import detect_layout, grow, growth_map


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(y)), None


class Model(nn.Module):
    depth: int
    width: int = 32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, self.width)(tokens)
        stack = nn.scan(
            Block, length=self.depth, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        x, _ = stack(self.width, name="layers")(x, None)
        return nn.Dense(50)(nn.LayerNorm()(x))


def train(depth, params, steps):
    """A few steps on one batch: each token predicts its double, modulo 50."""
    tokens = jax.random.randint(jax.random.key(1), (64,), 0, 50)
    optimizer = optax.adam(1e-3)

    def loss_of(params):
        logits = Model(depth).apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, 2 * tokens % 50).mean()

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(steps):
        params, state, loss = step(params, state)
    return params, float(loss)


def main():
    def init(depth):
        return Model(depth).init(jax.random.key(0), jnp.zeros(1, int))["params"]

    params = init(4)
    found = detect_layout(params)
    print(found.reason)

    params, loss = train(4, params, steps=30)
    print(f" 4 layers: loss {loss:.3f}")
    # MIDAS adds a block of 2 at a time; this is four of its growths composed.
    depth_map = growth_map("midas", found.depth, 12, block=2)
    print("the map:", depth_map)
    params = grow(params, depth_map, found.layout, target=jax.eval_shape(lambda: init(12)))
    params, loss = train(12, params, steps=30)
    print(f"12 layers: loss {loss:.3f}")


if __name__ == "__main__":
    main()
