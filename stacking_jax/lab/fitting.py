"""Training: all condition numbers and seeds of one architecture at once, by `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stacking_jax.lab import stacks
from stacking_jax.lab.prompts import Covariances, Prompts, draw_covariances, draw_prompts
from stacking_jax.lab.settings import IclSettings

_HELD_OUT = 2**31 - 1  # No step of training has this number.

# (key, kappa, batch) -> prompts
Draw = Callable[[jax.Array, Any, int], Prompts]


@functools.lru_cache(maxsize=4)
def diverse(settings: IclSettings, larger: float = 1.0) -> Draw:
    """Tasks with a covariance each, all of them times `larger`."""

    def draw(key, kappa, batch):
        first, second = jax.random.split(key)
        covariances = draw_covariances(
            first, batch, settings.dimension, kappa, settings.condition
        )
        covariances = covariances._replace(eigenvalues=larger * covariances.eigenvalues)
        return draw_prompts(second, covariances, settings.pairs, settings.context)

    return draw


def alike(covariance: Covariances, pairs: int) -> Draw:
    """Gaussian prompts that share one covariance, given without its batch axis."""

    def draw(key, kappa, batch):
        del kappa
        shared = Covariances(
            *(jnp.broadcast_to(part, (batch, *part.shape)) for part in covariance)
        )
        return draw_prompts(key, shared, pairs, "gaussian")

    return draw


def grid(settings: IclSettings, kappas) -> tuple[jax.Array, jax.Array]:
    """Every kappa with every seed: `[models]` each, the seed running fastest."""
    seeds = jnp.arange(settings.seeds)
    kappas = jnp.asarray(kappas, jnp.float32)
    return jnp.repeat(kappas, len(seeds)), jnp.tile(seeds, len(kappas))


def fit(
    stack: stacks.Stack, draw: Draw, settings: IclSettings, kappas: jax.Array, seeds: jax.Array,
    steps: int, advance: Callable[..., None], record: Callable[[Any], Any] | None = None,
) -> tuple[Any, np.ndarray, list]:
    """Trains one model per entry of `kappas` and `seeds`.

    A model's prompts of a step depend on its seed and the step alone: arms and depths meet the
    same tasks, and kappas differ in nothing but the spread of their eigenvalues.

    Args:
      advance: `advance(steps)`, a progress bar's.
      record: of the parameters, called before the first step and about twenty times after.

    Returns:
      (parameters `[models, stored, ...]`, training losses `[steps, models]`, what was recorded).
    """
    optimizer = make_optimizer(settings, steps)
    roots = jax.vmap(jax.random.key)(seeds)

    def begin(root):
        key = jax.random.fold_in(root, 0)
        return stacks.init(stack, key, settings.dimension, settings.init_scale)

    def loss(layers, prompts):
        read = stacks.predict(stack, layers, prompts.tokens)
        return stacks.relative_loss(read, prompts, settings.cap)

    def update(layers, state, prompts):
        value, gradient = jax.value_and_grad(loss)(layers, prompts)
        change, state = optimizer.update(gradient, state, layers)
        return optax.apply_updates(layers, change), state, value

    @functools.partial(jax.jit, donate_argnums=0)
    def some_steps(carry, prompts):
        def one(carry, prompts):
            layers, state, value = jax.vmap(update)(*carry, prompts)
            return (layers, state), value

        return jax.lax.scan(one, carry, prompts)

    layers = jax.jit(jax.vmap(begin))(roots)
    carry = (layers, jax.vmap(optimizer.init)(layers))
    recorded = [] if record is None else [record(layers)]
    losses, done = [], 0
    while done < steps:
        count = min(-(-steps // 20), steps - done)
        prompts = _train_prompts(draw, kappas, seeds, done + jnp.arange(count), settings.batch)
        carry, values = some_steps(carry, prompts)
        losses.append(np.asarray(values))
        done += count
        advance(count)
        if record is not None:
            recorded.append(record(carry[0]))
    return carry[0], np.concatenate(losses), recorded


@functools.partial(jax.jit, static_argnums=(0, 4))
def _train_prompts(draw: Draw, kappas, seeds, steps, batch: int) -> Prompts:
    """`[steps, models, batch, ...]`. Apart from the training, so that it compiles once for all."""

    def one(step, kappa, seed):
        key = jax.random.fold_in(jax.random.key(seed), step + 1)  # 0 is the initial values'.
        return draw(key, kappa, batch)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))(
        steps, kappas, seeds
    )


def make_optimizer(settings: IclSettings, steps: int) -> optax.GradientTransformation:
    """Adam or SGD behind a clip of one model's global norm, warm-up and cosine to zero.

    A gradient that is not finite counts as zero: of a prompt whose prediction overflows.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, steps // 10), max(2, steps)
    )
    rule = {"adam": optax.adam, "sgd": optax.sgd}[settings.optimizer](schedule)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm), optax.zero_nans(), rule
    )


def held_out(draw: Draw, kappas: jax.Array, seeds: jax.Array, count: int) -> Prompts:
    """Test prompts `[models, count, ...]`: the same for every arm and depth."""

    def one(kappa, seed):
        return draw(jax.random.fold_in(jax.random.key(seed), _HELD_OUT), kappa, count)

    return jax.jit(jax.vmap(one))(kappas, seeds)


@functools.partial(jax.jit, static_argnums=(0, 3))
def losses_by_position(
    stack: stacks.Stack, layers: Any, prompts: Prompts, depth: int, cap: float
) -> jax.Array:
    """Relative losses read after 1 .. depth positions: `[models, depth]`."""

    def one(layers, prompts):
        read = stacks.predict_each(stack, layers, prompts.tokens, depth)
        return stacks.relative_loss(read, prompts, cap)

    return jax.vmap(one)(layers, prompts)
