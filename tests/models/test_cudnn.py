"""What cuDNN is told of documents: checked against the mask, by JAX's own reading of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.models import cudnn
from stacking_jax.models.attention import attend, document_mask
from stacking_jax.models.kernels import _documents_in_runs

# Three documents and padding, one document, padding alone, as many as fit.
SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 3, 3, 3, 3, 3, 0, 0, 0],
        [1] * 12,
        [0] * 12,
        [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4],
    ],
    np.int32,
)


def test_runs_by_definition():
    offsets, lengths = cudnn.runs_of(jnp.asarray(SEGMENTS), 4)
    assert offsets.tolist() == [
        [0, 3, 4, 9, -1], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1], [0, 2, 7, 11, -1]
    ]
    assert lengths.tolist() == [[3, 1, 5, 3], [12, -1, -1, -1], [12, -1, -1, -1], [2, 5, 4, 1]]
    # More runs than asked for: the first of them.
    offsets, lengths = cudnn.runs_of(jnp.asarray(SEGMENTS), 2)
    assert offsets.tolist()[3] == [0, 2, -1] and lengths.tolist()[3] == [2, 5]
    # More room than tokens.
    offsets, lengths = cudnn.runs_of(jnp.asarray(SEGMENTS), 20)
    assert offsets.shape == (4, 21) and lengths.shape == (4, 20)
    assert np.sum(np.maximum(lengths, 0), axis=1).tolist() == [12] * 4


@pytest.mark.parametrize("causal", [True, False])
def test_runs_are_the_mask(causal):
    """JAX turns runs into elements of memory; attention over those elements is the mask's."""
    from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets

    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (*SEGMENTS.shape, 2, 4)) for k in keys)
    offsets, lengths = cudnn.runs_of(jnp.asarray(SEGMENTS), 5)
    lengths, _, offsets, _ = _fix_seqlen_offsets(
        lengths, lengths, offsets, offsets, query, key
    )
    got = np.full((SEGMENTS.size, 2, 4), np.nan, np.float32)
    flat = [np.asarray(x).reshape(-1, 2, 4) for x in (query, key, value)]
    for begin, length in zip(np.ravel(offsets), np.ravel(lengths), strict=False):
        run = slice(begin // 8, begin // 8 + length)
        scores = np.einsum("qhw,khw->hqk", flat[0][run], flat[1][run]) / 2
        seen = np.tri(length) if causal else np.ones((length, length))
        weights = np.exp(scores) * seen
        weights /= weights.sum(-1, keepdims=True)
        got[run] = np.einsum("hqk,khw->qhw", weights, flat[2][run])
    mask = document_mask(jnp.asarray(SEGMENTS))
    if not causal:
        mask = mask | mask.transpose(0, 1, 3, 2)
    want = attend(query, key, value, mask)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)


def test_rows_that_runs_cannot_say():
    rows = np.array(
        [
            [1, 1, 2, 2, 0, 0],
            [1, 2, 3, 0, 0, 0],  # three documents
            [1, 1, 2, 2, 1, 1],  # a document that goes on
            [1, 1, 0, 0, 2, 2],  # padding in the middle
            [0, 0, 0, 0, 0, 0],
            [5, 5, 7, 7, 7, 7],
        ]
    )
    sound = _documents_in_runs(jnp.asarray(rows, jnp.int32), 2)
    assert sound.tolist() == [True, False, False, False, True, True]
