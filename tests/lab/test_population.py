"""The population loss is the loss, and the ratio is the known one where it is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.lab import population
from stacking_jax.lab.prompts import Covariances, draw_prompts
from stacking_jax.lab.stacks import Stack, predict, relative_loss


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_closed_form_equals_the_model_on_sampled_prompts(loops):
    d, n, batch = 3, 12, 40_000
    values = jnp.array([1.0, 0.5, 0.25])
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (d, d)))[0]
    root = (basis * jnp.sqrt(values)[None]) @ basis.T
    shared = Covariances(
        jnp.broadcast_to(basis, (batch, d, d)), jnp.broadcast_to(values, (batch, d))
    )
    prompts = draw_prompts(jax.random.key(1), shared, n, "gaussian")
    a = 0.5 * jnp.eye(d) + 0.1 * jax.random.normal(jax.random.key(2), (d, d))
    layers = {"a": a[None], "u": jnp.zeros((1, d))}
    sampled = d * relative_loss(predict(Stack("linear", True, True, loops), layers,
                                        prompts.tokens), prompts)  # fmt: skip
    contexts = population.draw_contexts(jax.random.key(3), 20_000, n, d)
    # The model's step is x_jᵀ A x_i, so A acts on weights as its transpose.
    exact = population.population_loss(root @ a.T @ root, contexts, loops)
    np.testing.assert_allclose(sampled, exact, rtol=0.05)


def test_the_estimate_is_the_chi_square_polynomial_in_one_dimension():
    n, a = 10, 0.7
    contexts = population.draw_contexts(jax.random.key(0), 200_000, n, 1)
    mine = population.population_loss(jnp.array([[a]]), contexts, 2)
    moments = [1.0]  # E[(chi²_n / n)^k]
    for k in range(4):
        moments.append(moments[-1] * (n + 2 * k) / n)
    signs = [1, -4 * a, 6 * a**2, -4 * a**3, a**4]
    np.testing.assert_allclose(mine, np.dot(signs, moments), rtol=0.03)


@pytest.mark.parametrize("dimension, loops", [(1, 1), (1, 3), (5, 1), (5, 2), (4, 4)])
def test_the_ratio_of_an_isotropic_preconditioner_is_known(dimension, loops):
    contexts = population.draw_contexts(jax.random.key(0), 1, 0, dimension)
    for a in (0.1, 0.6):
        loss, gradient = jax.value_and_grad(population.population_loss)(
            a * jnp.eye(dimension), contexts, loops
        )
        np.testing.assert_allclose(
            population.dominance_ratio(loss, gradient, loops),
            population.isotropic_ratio(dimension, loops), rtol=1e-4,
        )  # fmt: skip


def test_no_symmetric_preconditioner_has_a_smaller_ratio_than_the_isotropic_one():
    contexts = population.draw_contexts(jax.random.key(0), 1, 0, 4)
    draw = 0.4 * jax.random.normal(jax.random.key(1), (200, 4, 4))

    def ratio(b):
        b = (b + b.T) / 2
        loss, gradient = jax.value_and_grad(population.population_loss)(b, contexts, 3)
        return population.dominance_ratio(loss, gradient, 3)

    assert jax.vmap(ratio)(draw).min() >= population.isotropic_ratio(4, 3) * (1 - 1e-4)


def test_distance_is_zero_at_the_inverse_and_one_at_nothing():
    root = jnp.diag(jnp.array([1.0, 0.5, 0.1]))
    inverse = jnp.linalg.inv(root @ root)
    np.testing.assert_allclose(population.distance(inverse, root), 0.0, atol=1e-5)
    np.testing.assert_allclose(population.distance(0 * inverse, root), 1.0, rtol=1e-6)
