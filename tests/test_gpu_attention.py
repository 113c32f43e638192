"""The script that judges kernels on a GPU: it must find what it is there to find."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.gpu_attention import SHAPES, SMALL, check, prompts_of, segments_of
from stacking_jax.models import kernels
from stacking_jax.models.kernels import check_documents, interpreted

SHAPE = dataclasses.replace(SMALL["small"], length=64, documents=2)


@pytest.mark.parametrize("shape", [*SHAPES.values(), *SMALL.values()])
def test_the_documents_are_as_many_as_it_says(shape):
    segments = segments_of(shape)
    assert segments.shape == (shape.rows, shape.length)
    assert np.all(segments.max(axis=1) == shape.documents) and np.all(segments[:, -1] == 0)
    check_documents(segments, shape.documents, "the script")
    prompts = prompts_of(segments)
    assert prompts.any() and not prompts[segments == 0].any()


@pytest.mark.slow
def test_it_finds_a_kernel_that_is_right_and_one_that_leaks(monkeypatch):
    with interpreted():
        found = check("triton", SHAPE, False)
        assert found["right"] and found["leak"] == found["leak_of_gradients"] == 0
        assert max(found["error"].values()) > 0
        # A kernel that is told of no documents, as the public call of cuDNN is.
        real = kernels.triton.attend
        monkeypatch.setattr(
            kernels.triton, "attend", lambda q, k, v, ids, **rest: real(q, k, v, 0 * ids, **rest)
        )
        found = check("triton", SHAPE, False)
    assert not found["right"] and found["leak"] > 0 and found["leak_of_gradients"] > 0
