"""Masks, attention and rotary positions against plain NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.models.attention import (
    attend,
    attend_behind,
    blocks_of,
    document_mask,
    rotary_angles,
    rotate,
)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_document_mask_by_definition():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    mask = np.asarray(document_mask(jnp.asarray(segments)))
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for query in range(6):
            for key in range(6):
                sees = key <= query and segments[b, key] == segments[b, query]
                assert mask[b, 0, query, key] == sees
    # Nobody is without a key: a softmax over nothing would be NaN.
    assert mask.any(axis=-1).all()


def test_inputs_of_a_prompt_see_each_other_by_definition():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
    prompt = np.array([[1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]], bool)
    mask = np.asarray(document_mask(jnp.asarray(segments), jnp.asarray(prompt)))
    for b in range(2):
        for query in range(6):
            for key in range(6):
                seen = key <= query or (prompt[b, query] and prompt[b, key])
                assert mask[b, 0, query, key] == (seen and segments[b, key] == segments[b, query])
    none = document_mask(jnp.asarray(segments), jnp.zeros((2, 6), bool))
    assert np.array_equal(none, document_mask(jnp.asarray(segments)))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, [[1, 1, 0], [1, 1, 1]]], ids=["causal", "prompt"])
def test_attention_behind_a_cache_is_attention_over_all(prompt):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 8, 4, 6))
    key, value = (jax.random.normal(k, (2, 8, 2, 6)) for k in keys[1:])
    bidirectional = jnp.zeros((2, 8), bool)
    if prompt is not None:
        bidirectional = bidirectional.at[:, 5:].set(jnp.array(prompt, bool))
    whole = attend(query, key, value, document_mask(jnp.ones((2, 8), int), bidirectional))
    # Slots that are not filled yet hold anything.
    cache = {
        name: jnp.pad(x[:, :5], ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=9.0)
        for name, x in (("key", key), ("value", value))
    }
    cache = jax.tree.map(lambda leaf: leaf.transpose(0, 2, 1, 3), cache)
    mask = document_mask(jnp.ones((2, 3), int), bidirectional[:, 5:])
    got = attend_behind(
        query[:, 5:], key[:, 5:], value[:, 5:], mask, cache, jnp.array([5, 5])
    )
    np.testing.assert_allclose(got, whole[:, 5:], atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_against_numpy(kv_heads):
    batch, length, heads, width = 2, 5, 4, 6
    query, key, value = (
        random(0, batch, length, heads, width),
        random(1, batch, length, kv_heads, width),
        random(2, batch, length, kv_heads, width),
    )
    mask = document_mask(jnp.array([[1, 1, 1, 2, 2], [1, 2, 2, 2, 0]]))
    got = attend(query, key, value, mask)
    group = heads // kv_heads
    for b in range(batch):
        for h in range(heads):
            scores = np.asarray(query[b, :, h] @ key[b, :, h // group].T) / np.sqrt(width)
            scores = np.where(np.asarray(mask[b, 0]), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            want = weights @ np.asarray(value[b, :, h // group])
            np.testing.assert_allclose(got[b, :, h], want, rtol=1e-5, atol=1e-5)


def plain_attention(query, key, value, mask):
    """By JAX's own rules for gradients, in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhw,bshw->bhqs", query, key) * query.shape[3] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqs,bshw->bqhw", weights, value)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_queries_change_neither_values_nor_gradients(blocks, dtype):
    """Packed rows: a block's last key may be in another document than its first query."""
    batch, length, heads, kv_heads, width = 2, 16, 4, 2, 8
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    *parts, pull = (random(i, *shape).astype(dtype) for i, shape in enumerate(shapes))
    documents = jnp.array([[1] * 5 + [2] * 9 + [0] * 2, [1] * 16])
    mask = document_mask(documents)
    got, back = jax.vjp(lambda *parts: attend(*parts, mask, blocks), *parts)
    want, plain_back = jax.vjp(lambda *parts: plain_attention(*parts, mask), *parts)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    assert got.dtype == dtype
    for one, other in zip(
        (got, *back(pull)), (want, *plain_back(pull.astype(jnp.float32))), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32),
            rtol=tolerance, atol=tolerance,
        )


def test_products_of_both_passes_take_factors_in_the_dtype_of_the_computation():
    parts = [random(i, 1, 8, 2, 4).astype(jnp.bfloat16) for i in range(3)]
    mask = document_mask(jnp.ones((1, 8), int))
    traced = jax.make_jaxpr(
        lambda *parts: jax.vjp(lambda *parts: attend(*parts, mask, 2), *parts)[1](parts[0])
    )(*parts)
    dtypes = [str(factor) for pair in factors_of_products(traced.jaxpr) for factor in pair]
    assert dtypes == ["bfloat16"] * 2 * 12, "two blocks: two products forward, four backward"


def factors_of_products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(factor.aval.dtype for factor in equation.invars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from factors_of_products(getattr(inner, "jaxpr", inner))


def test_a_row_is_cut_into_a_few_large_blocks():
    assert [blocks_of(length) for length in (64, 255, 256, 510, 512, 1280, 1281)] == [
        1, 1, 2, 2, 4, 4, 1,
    ]


def test_the_softmax_is_wider_than_bfloat16():
    # 256 equal keys: in bf16 sums of 1/256 would be exact, so weigh one of them more.
    length = 300
    query = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    key = jnp.zeros((1, length, 1, 2), jnp.bfloat16)
    value = jnp.ones((1, length, 1, 2), jnp.bfloat16)
    out = attend(query, key, value, jnp.ones((1, 1, 1, length), bool))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=2**-7)


def test_rotation_against_complex_numbers():
    positions, width, theta = jnp.array([[0, 1, 7], [3, 0, 100]]), 8, 10_000.0
    x = random(3, 2, 3, 2, width)
    got = rotate(x, *rotary_angles(positions, width, theta))
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    frequencies = theta ** (-np.arange(4) * 2 / width)
    turned = pairs * np.exp(1j * np.asarray(positions)[:, :, None, None] * frequencies)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-4)


def test_rotation_keeps_lengths_and_sees_only_distances():
    query, key = random(4, 1, 1, 1, 8), random(5, 1, 1, 1, 8)

    def score(q, k):
        at = [rotary_angles(jnp.array([[position]]), 8, 10_000.0) for position in (q, k)]
        return float(jnp.sum(rotate(query, *at[0]) * rotate(key, *at[1])))

    assert score(0, 0) == pytest.approx(float(jnp.sum(query * key)), rel=1e-5)
    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-3, abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)
    far = rotary_angles(jnp.array([[4000]]), 8, 10_000.0)
    assert jnp.linalg.norm(rotate(query, *far)) == pytest.approx(
        float(jnp.linalg.norm(query)), rel=1e-5
    )


def test_rotation_keeps_the_dtype():
    x = random(6, 1, 2, 1, 4).astype(jnp.bfloat16)
    assert rotate(x, *rotary_angles(jnp.array([[0, 1]]), 4, 1e4)).dtype == jnp.bfloat16
