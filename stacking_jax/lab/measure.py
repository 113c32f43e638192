"""The measurements: each a function of the settings that gives plain lists, for JSON."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stacking_jax.lab import fitting, population
from stacking_jax.lab.prompts import Covariances, Prompts, orthonormal
from stacking_jax.lab.settings import IclSettings
from stacking_jax.lab.stacks import Stack

# `larger` and `wider` change what is tested, not what is trained.
SHIFTS = ("wider", "larger")
_BASIS_KEY = 4  # Of the one covariance of the preconditioner's tasks, whatever the seeds.


def arms(settings: IclSettings) -> list[Stack]:
    """Every architecture at every depth, in the order in which they are measured."""
    found = []
    for restricted in (True, False):
        for tied in (False, True):
            found += [Stack("linear", tied, restricted, depth) for depth in settings.depths]
    # Restricted stacks are the same with injection and without.
    found += [
        Stack("linear", True, False, depth, injection=True) for depth in settings.softmax_depths
    ]
    for restricted in (True, False):
        for tied in (False, True):
            found += [
                Stack("softmax", tied, restricted, depth) for depth in settings.softmax_depths
            ]
    return found


def measure_stack(
    stack: Stack, settings: IclSettings, advance: Callable[..., None]
) -> dict[str, Any]:
    """Trains a stack on every kappa with every seed, and tests it.

    Returns:
      `by_position` `[kappas][seeds][positions]`: relative loss read after every position, for
      tied stacks up to `extra_loops` times the depth; and `wider`, `larger` `[kappas][seeds]`:
      relative loss under shift, at the stack's own depth.
    """
    draw = fitting.diverse(settings)
    kappas, seeds = fitting.grid(settings, settings.kappas)
    layers, trained, _ = fitting.fit(
        stack, draw, settings, kappas, seeds, settings.steps, advance
    )
    shape = (len(settings.kappas), settings.seeds)
    positions = stack.depth * (settings.extra_loops if stack.tied else 1)
    found = {"train": _lists(trained[-max(1, len(trained) // 10) :].mean(0).reshape(shape))}
    for name, prompts in _tests(settings).items():
        loss = fitting.losses_by_position(stack, layers, prompts, positions, settings.cap)
        loss = np.asarray(loss).reshape(*shape, positions)
        shifted = name in SHIFTS
        found[name] = _lists(loss[:, :, stack.depth - 1] if shifted else loss)
    return found


@functools.lru_cache(maxsize=1)
def _tests(settings: IclSettings) -> dict[str, Prompts]:
    """Held-out prompts of every kappa and seed, the same for all arms."""
    kappas, seeds = fitting.grid(settings, settings.kappas)
    draw = fitting.diverse(settings)
    laws = {
        "by_position": (draw, kappas),
        "wider": (draw, kappas * settings.wider),
        "larger": (fitting.diverse(settings, settings.larger), kappas),
    }
    return {
        name: fitting.held_out(law, of, seeds, settings.test_prompts)
        for name, (law, of) in laws.items()
    }


def measure_preconditioner(
    pairs: int, settings: IclSettings, advance: Callable[..., None]
) -> dict[str, Any]:
    """Follows A and u of the tied restricted linear stack on tasks of one covariance.

    Returns:
      `steps`, and per seed `distance` (see `population.distance`), `u` (its norm in white
      coordinates) and `loss`, each `[seeds][recorded]`.
    """
    d, steps = settings.dimension, settings.preconditioner_steps
    stack = Stack("linear", True, True, settings.preconditioner_loops)
    values = settings.preconditioner_kappa ** -jnp.linspace(0, 1, d)
    basis = orthonormal(jax.random.normal(jax.random.key(_BASIS_KEY), (d, d)))
    root = (basis * jnp.sqrt(values)[None]) @ basis.T
    draw = fitting.alike(Covariances(basis, values), pairs)
    kappas, seeds = fitting.grid(settings, [1.0])
    test = fitting.held_out(draw, kappas, seeds, settings.test_prompts)

    def look(layers):
        loss = fitting.losses_by_position(stack, layers, test, stack.depth, settings.cap)
        loss = np.asarray(loss)[:, -1]
        far = population.distance(layers["a"][:, 0], root)
        u = jnp.linalg.norm(layers["u"][:, 0] @ root, axis=-1)
        return [np.asarray(far), np.asarray(u), loss]

    at_its_rate = dataclasses.replace(settings, learning_rate=settings.preconditioner_rate)
    _, _, seen = fitting.fit(stack, draw, at_its_rate, kappas, seeds, steps, advance, look)
    every = -(-steps // 20)
    table = np.asarray(seen)  # [recorded, what, seeds]
    return {
        "steps": [min(i * every, steps) for i in range(len(seen))],
        **{name: _lists(table[:, i].T) for i, name in enumerate(("distance", "u", "loss"))},
    }


def measure_dominance(
    loops: int, pairs: int, settings: IclSettings, advance: Callable[..., None]
) -> dict[str, Any]:
    """Follows ‖∇L‖² / L^((2ℓ−1)/ℓ) along gradient descent on the population loss.

    The covariance is the identity, where the theorem speaks of the gradient flow. With pairs 0 the
    loss is exact; else it is a mean over `dominance_contexts` contexts, of which value and
    gradient are exact.

    Returns:
      `steps`, and `loss`, `ratio` `[seeds][recorded]`.
    """
    steps = settings.dominance_steps
    optimizer = optax.sgd(settings.dominance_rate)

    def begin(seed):
        of_start, of_contexts = jax.random.split(jax.random.key(seed))
        shape = (settings.dimension, settings.dimension)
        start = settings.init_scale * jax.random.normal(of_start, shape)
        contexts = population.draw_contexts(
            of_contexts, settings.dominance_contexts, pairs, settings.dimension
        )
        return start, contexts

    def update(b, contexts):
        loss, gradient = jax.value_and_grad(population.population_loss)(b, contexts, loops)
        change, _ = optimizer.update(gradient, optimizer.init(b))
        ratio = population.dominance_ratio(loss, gradient, loops)
        return optax.apply_updates(b, change), (loss, ratio)

    @jax.jit
    def descend(b, contexts):
        return jax.lax.scan(lambda b, _: update(b, contexts), b, None, length=steps)[1]

    start, contexts = jax.vmap(begin)(jnp.arange(settings.seeds))
    loss, ratio = jax.vmap(descend)(start, contexts)
    advance(steps)
    kept = np.unique(np.geomspace(1, steps, 60).astype(int)) - 1
    return {
        "steps": kept.tolist(),
        "loss": _lists(np.asarray(loss)[:, kept]),
        "ratio": _lists(np.asarray(ratio)[:, kept]),
    }


def _lists(values: np.ndarray) -> list:
    """Nested lists in which what is not finite is None: JSON has no infinity."""
    if values.ndim == 0:
        return float(f"{float(values):.6g}") if np.isfinite(values) else None
    return [_lists(part) for part in values]
