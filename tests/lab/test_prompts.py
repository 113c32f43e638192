"""The bases and contexts of the prompts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.lab import fitting
from stacking_jax.lab.prompts import orthonormal
from stacking_jax.lab.settings import IclSettings


@pytest.mark.parametrize("rows, columns", [(5, 5), (10, 5), (3, 1)])
def test_columns_become_orthonormal_and_span_the_same(rows, columns):
    x = jax.random.normal(jax.random.key(rows), (64, rows, columns))
    found = orthonormal(x)
    gram = jnp.einsum("brc,brd->bcd", found, found)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(columns), gram.shape), atol=2e-6)
    again = jnp.einsum("brc,bsc,bsd->brd", found, found, x)
    np.testing.assert_allclose(again, x, atol=1e-5)


def test_bases_favour_no_direction():
    basis = orthonormal(jax.random.normal(jax.random.key(0), (4096, 3, 3)))
    # Of Haar's measure: entries have mean 0 and mean square 1/3, the first column too.
    np.testing.assert_allclose(basis.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(jnp.square(basis).mean(0), 1 / 3, atol=0.02)


def test_drawing_calls_no_library_that_could_wait_for_its_own_threads():
    draw = fitting.diverse(IclSettings())
    program = jax.jit(draw, static_argnums=2).lower(jax.random.key(0), 4.0, 8).compile()
    assert "custom-call" not in program.as_text()
