"""Grows a whole train state, Adam's moments included, in the middle of a training.

    python examples/adam_train_state.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from stacking_jax.growth import Unrolled, gradstack, grow


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Model(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 32)(tokens)
        for i in range(self.depth):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(50)(x)


TOKENS = jax.random.randint(jax.random.key(1), (64,), 0, 50)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def create(depth):
    params = Model(depth).init(jax.random.key(0), TOKENS)["params"]
    return TrainState.create(apply_fn=Model(depth).apply, params=params, tx=OPTIMIZER)


@jax.jit
def step(state):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, 2 * TOKENS % 50).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def main():
    state = create(depth=4)
    for _ in range(30):
        state, loss = step(state)
    print(f"4 layers: loss {loss:.3f} after {state.step} steps")

    # Parameters and moments grow by the same path; the step goes on. What the
    # state says about its own model is not ours to change: the new `apply_fn` is.
    state = state.replace(apply_fn=Model(6).apply)
    target = jax.eval_shape(lambda: create(depth=6)).replace(apply_fn=state.apply_fn)
    state = grow(state, gradstack(4, block=2), Unrolled("block_{}"), target=target)
    moments = state.opt_state[1][0].mu
    copy, source = (moments[block]["Dense_0"]["bias"] for block in ("block_5", "block_3"))
    assert jnp.array_equal(copy, source)

    for _ in range(30):
        state, loss = step(state)
    print(f"6 layers: loss {loss:.3f} after {state.step} steps")


if __name__ == "__main__":
    main()
