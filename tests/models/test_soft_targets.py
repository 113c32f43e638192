"""A teacher's most probable tokens against the whole distribution, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.models.head_loss import head_loss
from stacking_jax.models.soft_targets import top_log_probs, top_targets
from stacking_jax.training import MeshConfig, sharding

VOCAB = 24


def teacher(seed=0, rows=4, columns=6, width=8):
    dice = np.random.default_rng(seed)
    hidden = jnp.asarray(dice.normal(size=(rows, columns, width)), jnp.float32)
    return hidden, jnp.asarray(dice.normal(size=(VOCAB, width)), jnp.float32)


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_most_probable_tokens_are_found(chunk):
    hidden, kernel = teacher()
    want = np.asarray(jax.nn.log_softmax(hidden @ kernel.T))
    ids, log_probs = top_log_probs(hidden, kernel, vocab_axis=0, k=3, chunk=chunk)
    np.testing.assert_array_equal(ids, np.argsort(-want, axis=-1)[..., :3])
    np.testing.assert_allclose(
        log_probs[..., :3], np.take_along_axis(want, np.asarray(ids), -1), rtol=1e-5
    )
    np.testing.assert_allclose(
        jnp.exp(log_probs[..., 3]), 1 - np.exp(np.sort(want)[..., -3:]).sum(-1), rtol=1e-4
    )
    other = top_log_probs(hidden, kernel.T, vocab_axis=1, k=3, chunk=chunk)
    np.testing.assert_array_equal(other[0], ids)


def test_eight_devices_find_what_one_finds():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    hidden, kernel = teacher()
    want = top_log_probs(hidden, kernel, vocab_axis=0, k=3)
    for chunk in (None, 3):
        found = jax.jit(
            lambda *arrays, chunk=chunk: top_log_probs(
                *arrays, vocab_axis=0, k=3, chunk=chunk, constrain=sharding.constrainer(mesh)
            )
        )(hidden, kernel)
        np.testing.assert_array_equal(found[0], want[0])
        np.testing.assert_allclose(found[1], want[1], rtol=1e-5, atol=1e-6)


def spread(targets):
    """The whole distribution that soft targets stand for."""
    whole = np.zeros((*targets.ids.shape[:2], VOCAB))
    if targets.elsewhere is not None:
        whole += np.asarray(targets.elsewhere)[..., None]
    np.put_along_axis(whole, np.asarray(targets.ids), np.asarray(targets.probabilities), -1)
    return whole


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail", ["drop", "renormalise", "uniform"])
def test_the_tail_and_the_temperature(tail, temperature):
    hidden, kernel = teacher()
    ids, log_probs = top_log_probs(hidden, kernel, vocab_axis=0, k=3)
    mass = np.exp(np.asarray(log_probs, np.float64))
    flat = np.repeat(mass[..., 3:] / (VOCAB - 3), VOCAB, axis=-1)
    np.put_along_axis(flat, np.asarray(ids), mass[..., :3], -1)
    want = flat ** (1 / temperature)
    want /= want.sum(-1, keepdims=True)
    of_top = np.zeros(want.shape, bool)
    np.put_along_axis(of_top, np.asarray(ids), True, -1)
    if tail != "uniform":
        want = np.where(of_top, want, 0.0)
    if tail == "renormalise":
        want /= want.sum(-1, keepdims=True)
    targets = top_targets(ids, log_probs, vocab=VOCAB, temperature=temperature, tail=tail)
    np.testing.assert_allclose(spread(targets), want, atol=1e-6)


@pytest.mark.parametrize("tail", ["drop", "renormalise", "uniform"])
def test_all_tokens_are_the_whole_distribution(tail):
    hidden, kernel = teacher()
    ids, log_probs = top_log_probs(hidden, kernel, vocab_axis=0, k=VOCAB)
    targets = top_targets(ids, log_probs, vocab=VOCAB, temperature=2.0, tail=tail)
    np.testing.assert_allclose(
        spread(targets), jax.nn.softmax(hidden @ kernel.T / 2.0), atol=1e-6
    )


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_loss_knows_the_tail_and_tells_the_soft_part(chunk):
    hidden, kernel = teacher()
    student, head = teacher(1)
    words = jnp.zeros(hidden.shape[:2], jnp.int32)
    weights = jnp.asarray(np.random.default_rng(0).random(words.shape) > 0.3, jnp.float32)
    targets = top_targets(
        *top_log_probs(hidden, kernel, vocab_axis=0, k=3), vocab=VOCAB, temperature=1.0,
        tail="uniform",
    )

    def loss(student, soft_weight):
        return head_loss(
            student, head, words, weights, vocab_axis=0, z_loss=1e-2, soft=targets,
            soft_weight=soft_weight, chunk=chunk,
        )

    log_probs = jax.nn.log_softmax(student @ head.T)
    towards = -(spread(targets) * log_probs).sum(-1)
    objective, cross, soft = loss(student, 0.3)
    np.testing.assert_allclose(soft, (towards * weights).sum(), rtol=1e-5)
    z = 1e-2 * jnp.square(jax.nn.logsumexp(student @ head.T, axis=-1))
    np.testing.assert_allclose(
        objective, 0.7 * cross + 0.3 * soft + (z * weights).sum(), rtol=1e-5
    )
    assert not jax.grad(lambda student: loss(student, 0.3)[2])(student).any()
