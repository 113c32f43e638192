"""A layer that is read again instead of being kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.growth.read_layer import keep_all_but_layers, read_layer


def honest(stack, index):
    return jnp.sum(jnp.sin(stack[index]) ** 2)


def by_reading(stack, index):
    return jnp.sum(jnp.sin(read_layer(stack, index, jnp.take(stack, index, axis=0))) ** 2)


STACK = jax.random.normal(jax.random.key(0), (3, 4))
TRANSFORMS = {
    "value": lambda f: f,
    "grad": jax.grad,
    "jit grad": lambda f: jax.jit(jax.grad(f)),
    "hessian, forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "hessian, reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "third derivative": lambda f: jax.jacfwd(jax.jacfwd(jax.grad(f))),
    "remat": lambda f: jax.grad(jax.checkpoint(f)),
}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_every_derivative_is_that_of_plain_indexing(name):
    transform = TRANSFORMS[name]
    index = jnp.asarray(1)
    np.testing.assert_allclose(
        transform(by_reading)(STACK, index), transform(honest)(STACK, index), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 0)])
def test_batched(axes):
    stack = jnp.stack([STACK, 2 * STACK], axis=axes[0] if axes[0] is not None else 0)
    stack = stack if axes[0] is not None else STACK
    index = jnp.array([0, 2]) if axes[1] is not None else jnp.asarray(1)
    for transform in (lambda f: f, jax.grad):
        np.testing.assert_allclose(
            jax.vmap(transform(by_reading), axes)(stack, index),
            jax.vmap(transform(honest), axes)(stack, index),
            rtol=1e-6,
        )
    both = jax.vmap(jax.vmap(jax.grad(by_reading), (None, 0)), (0, None))
    np.testing.assert_allclose(
        both(jnp.stack([STACK, 3 * STACK]), jnp.array([0, 2])),
        jax.vmap(jax.vmap(jax.grad(honest), (None, 0)), (0, None))(
            jnp.stack([STACK, 3 * STACK]), jnp.array([0, 2])
        ),
        rtol=1e-6,
    )


def test_the_value_comes_from_the_stack_and_the_gradient_goes_to_the_gathered():
    gathered = jnp.full((4,), 100.0)
    value = read_layer(STACK, jnp.asarray(2), gathered)
    np.testing.assert_array_equal(value, STACK[2])
    of_stack, of_gathered = jax.grad(
        lambda stack, gathered: jnp.sum(read_layer(stack, 2, gathered)), (0, 1)
    )(STACK, gathered)
    assert not of_stack.any() and (of_gathered == 1).all()


def test_the_policy_keeps_all_but_layers():
    jaxpr = jax.make_jaxpr(by_reading)(STACK, 1)
    verdicts = {eqn.primitive.name: keep_all_but_layers(None, eqn.primitive) for eqn in jaxpr.eqns}
    assert verdicts.pop("read_layer") is False
    assert verdicts and all(verdicts.values())
    sin = next(eqn.primitive for eqn in jaxpr.eqns if eqn.primitive.name == "sin")
    assert not keep_all_but_layers(jax.checkpoint_policies.nothing_saveable, sin)
