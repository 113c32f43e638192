"""Stacks of attention do what gradient descent does, tied or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.growth import grow, loop
from stacking_jax.growth.layouts import Scanned
from stacking_jax.lab.prompts import draw_covariances, draw_prompts
from stacking_jax.lab.stacks import Stack, init, predict, predict_each, relative_loss

D, N, BATCH = 3, 7, 5


def some_prompts(kappa=8.0, context="gaussian"):
    covariances = draw_covariances(jax.random.key(1), BATCH, D, kappa, "log_uniform")
    return covariances, draw_prompts(jax.random.key(2), covariances, N, context)


def hand_made(a, loops=1):
    return {"a": jnp.stack([jnp.asarray(a, jnp.float32)] * loops), "u": jnp.zeros((loops, D))}


def gradient_descent(tokens, a, steps):
    """Predictions after each step of preconditioned descent on ½ mean (w·x − y)², in NumPy."""
    tokens = np.asarray(tokens, np.float64)
    found = []
    for prompt in tokens:
        x, y, query = prompt[:-1, :-1], prompt[:-1, -1], prompt[-1, :-1]
        w, of_prompt = np.zeros(D), []
        for _ in range(steps):
            w = w - np.asarray(a, np.float64).T @ (x.T @ (x @ w - y)) / len(x)
            of_prompt.append(w @ query)
        found.append(of_prompt)
    return np.array(found).T


@pytest.mark.parametrize("injection", [False, True])
def test_hand_made_layers_are_steps_of_preconditioned_gradient_descent(injection):
    _, prompts = some_prompts()
    a = 0.4 * np.eye(D) + 0.1 * np.random.default_rng(0).normal(size=(D, D))
    stack = Stack("linear", True, True, 4, injection)
    # Three times as many loops as the stack was made for: they go on descending.
    mine = predict_each(stack, hand_made(a), prompts.tokens, depth=12)
    np.testing.assert_allclose(mine, gradient_descent(prompts.tokens, a, 12), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("restricted", [True, False])
def test_tied_is_untied_with_equal_weights_in_value_and_gradient(attention, restricted):
    _, prompts = some_prompts()
    tied = Stack(attention, True, restricted, 3)
    untied = Stack(attention, False, restricted, 3)
    layers = init(tied, jax.random.key(0), D, 0.2)
    copies = grow({"s": layers}, loop(1, 3), Scanned("s"))["s"]

    def loss(layers, stack):
        return relative_loss(predict(stack, layers, prompts.tokens), prompts)

    value, gradient = jax.value_and_grad(loss)(layers, tied)
    other, parts = jax.value_and_grad(loss)(copies, untied)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for name in layers:  # A shared weight's gradient is the sum over its places.
        np.testing.assert_allclose(gradient[name][0], parts[name].sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_the_gradient_is_that_of_differences(attention):
    _, prompts = some_prompts()
    stack = Stack(attention, True, False, 2, injection=True)
    layers = init(stack, jax.random.key(3), D, 0.3)

    def loss(p):
        read = predict(stack, {**layers, "p": p}, prompts.tokens)
        return relative_loss(read, prompts)

    way = jax.random.normal(jax.random.key(4), layers["p"].shape)
    by_rule = jnp.sum(jax.grad(loss)(layers["p"]) * way)
    step = 1e-2
    by_hand = (loss(layers["p"] + step * way) - loss(layers["p"] - step * way)) / (2 * step)
    np.testing.assert_allclose(by_rule, by_hand, rtol=2e-2, atol=1e-3)


def test_reading_each_position_ends_with_the_prediction_and_shorter_runs_are_prefixes():
    _, prompts = some_prompts()
    stack = Stack("linear", False, False, 3)
    layers = init(stack, jax.random.key(0), D, 0.3)
    each = predict_each(stack, layers, prompts.tokens)
    np.testing.assert_allclose(each[-1], predict(stack, layers, prompts.tokens), rtol=1e-5)
    np.testing.assert_allclose(each[1], predict(stack, layers, prompts.tokens, 2), rtol=1e-5)


def test_the_query_is_not_seen_by_the_pairs():
    _, prompts = some_prompts()
    stack = Stack("linear", True, False, 2)
    layers = init(stack, jax.random.key(0), D, 0.3)
    other = prompts.tokens.at[:, -1, :-1].multiply(2.0)
    # A linear stack's answer is linear in the query when no pair has read it.
    np.testing.assert_allclose(
        predict(stack, layers, other), 2 * predict(stack, layers, prompts.tokens), rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip


def test_whitened_prompts_have_the_covariance_that_was_drawn():
    covariances, prompts = some_prompts(32.0, "whitened")
    x = prompts.tokens[:, :-1, :-1]
    moment = jnp.einsum("bni,bnj->bij", x, x) / N
    basis, values = covariances
    wanted = jnp.einsum("bij,bj,bkj->bik", basis, values, basis)
    np.testing.assert_allclose(moment, wanted, atol=1e-5)


@pytest.mark.parametrize("condition", ["log_uniform", "uniform", "fixed"])
def test_condition_numbers_lie_between_one_and_kappa(condition):
    values = draw_covariances(jax.random.key(0), 200, D, 16.0, condition).eigenvalues
    numbers = values.max(axis=1) / values.min(axis=1)
    np.testing.assert_allclose(values.max(axis=1), 1.0, rtol=1e-6)
    assert numbers.min() >= 1 and numbers.max() <= 16 * (1 + 1e-5)
    if condition == "fixed":
        np.testing.assert_allclose(numbers, 16.0, rtol=1e-5)
    else:
        assert numbers.max() > 2 * numbers.min()


def test_answers_have_variance_d_whatever_the_covariance():
    covariances = draw_covariances(jax.random.key(0), 20_000, D, 64.0, "log_uniform")
    answers = draw_prompts(jax.random.key(1), covariances, N, "gaussian").answers
    assert abs(float(jnp.mean(answers**2)) / D - 1) < 0.1


def test_prompts_are_functions_of_the_key():
    one, two = some_prompts()[1], some_prompts()[1]
    assert (one.tokens == two.tokens).all() and (one.answers == two.answers).all()
    assert (one.tokens[:, -1, -1] == 0).all()
