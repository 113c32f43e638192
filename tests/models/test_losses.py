"""Cross-entropy and the inputs that go with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stacking_jax.models.losses import cross_entropy, inputs_from_targets

LOGITS = 3 * jax.random.normal(jax.random.key(0), (4, 6, 11))
TARGETS = jax.random.randint(jax.random.key(1), (4, 6), 0, 11)
WEIGHTS = (jax.random.uniform(jax.random.key(2), (4, 6)) > 0.3).astype(jnp.float32)


def test_cross_entropy_equals_optax():
    loss, z = cross_entropy(LOGITS, TARGETS, WEIGHTS)
    want = optax.softmax_cross_entropy_with_integer_labels(LOGITS, TARGETS)
    np.testing.assert_allclose(loss, jnp.sum(want * WEIGHTS), rtol=1e-6)
    assert z == 0


def test_its_gradient_is_probability_minus_one_hot():
    got = jax.grad(lambda logits: cross_entropy(logits, TARGETS, WEIGHTS)[0])(LOGITS)
    want = (jax.nn.softmax(LOGITS) - jax.nn.one_hot(TARGETS, 11)) * WEIGHTS[..., None]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_z_loss_is_the_squared_log_normaliser():
    loss, z = cross_entropy(LOGITS, TARGETS, WEIGHTS, z_loss=1e-2)
    log_z = jax.nn.logsumexp(LOGITS, axis=-1)
    np.testing.assert_allclose(z, 1e-2 * jnp.sum(log_z**2 * WEIGHTS), rtol=1e-6)
    np.testing.assert_allclose(loss, cross_entropy(LOGITS, TARGETS, WEIGHTS)[0])


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_add_up_to_the_whole(parts):
    whole = cross_entropy(LOGITS, TARGETS, WEIGHTS, 1e-3)
    split = [jnp.split(array, parts) for array in (LOGITS, TARGETS, WEIGHTS)]
    sums = [cross_entropy(*part, 1e-3) for part in zip(*split, strict=True)]
    for i in range(2):
        np.testing.assert_allclose(sum(part[i] for part in sums), whole[i], rtol=1e-5)


def test_tokens_without_weight_do_not_count():
    weights = WEIGHTS.at[:, 3:].set(0)
    noise = LOGITS.at[:, 3:].set(77.0)
    for got, want in zip(
        cross_entropy(noise, TARGETS, weights, 1e-3), cross_entropy(LOGITS, TARGETS, weights, 1e-3)
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    gradient = jax.grad(lambda logits: sum(cross_entropy(logits, TARGETS, weights, 1e-3)))(LOGITS)
    assert not gradient[:, 3:].any() and gradient[:, :3].any()


def test_low_precision_logits_are_summed_in_float32():
    loss, z = cross_entropy(LOGITS.astype(jnp.bfloat16), TARGETS, WEIGHTS, 1e-3)
    assert loss.dtype == z.dtype == jnp.float32
    np.testing.assert_allclose(loss, cross_entropy(LOGITS, TARGETS, WEIGHTS)[0], rtol=1e-2)


def test_huge_logits_stay_finite():
    loss, _ = cross_entropy(LOGITS * 1e4, TARGETS, WEIGHTS)
    assert np.isfinite(loss)


def test_inputs_are_the_document_shifted_by_one():
    tokens = jnp.array([[5, 6, 1, 7, 1, 8, 0, 0], [9, 8, 7, 6, 5, 4, 3, 1]])
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    assert inputs_from_targets(tokens, segments).tolist() == [
        [0, 5, 6, 0, 7, 0, 0, 0],
        [0, 9, 8, 7, 6, 5, 4, 3],
    ]


def test_no_input_shows_its_own_target_or_another_document():
    rng = np.random.default_rng(0)
    lengths = [3, 1, 4, 2]
    segments = np.repeat(np.arange(1, 5), lengths)[None]
    tokens = rng.permutation(np.arange(2, 12))[None]
    inputs = np.asarray(inputs_from_targets(jnp.asarray(tokens), jnp.asarray(segments)))
    start = 0
    for length in lengths:
        document = tokens[0, start : start + length]
        assert inputs[0, start : start + length].tolist() == [0, *document[:-1]]
        start += length
