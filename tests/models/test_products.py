"""Products of a layer: how they are computed is no matter of what they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.models.placement import unconstrained
from stacking_jax.models.products import dense, gated


def random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(got, want, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32),
            rtol=tolerance, atol=tolerance,
        )


def test_rows_and_columns_as_one_axis_or_two():
    x, kernel, pull = random(0, 2, 5, 8), random(1, 8, 6), random(2, 2, 5, 6)

    def run(constrain):
        value, back = jax.vjp(lambda *both: dense(*both, constrain), x, kernel)
        return value, back(pull)

    close(run(unconstrained), run(lambda x, names: x))
    close(run(unconstrained), (x @ kernel, (pull @ kernel.T, jnp.einsum("bli,blo->io", x, pull))))


def test_on_a_cpu_the_kernels_gradient_sums_over_one_axis():
    x, kernel = random(0, 2, 5, 8), random(1, 8, 6)
    traced = str(jax.make_jaxpr(jax.grad(
        lambda kernel: jnp.sum(dense(x, kernel, unconstrained) ** 2)
    ))(kernel))
    assert "([0], [0])" in traced and "([0, 1], [0, 1])" not in traced


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_gate_is_silu_times_up(dtype, tolerance):
    gate, up, pull = (3 * random(i, 2, 5, 8).astype(dtype) for i in range(3))
    value, back = jax.vjp(gated, gate, up)
    wide = (gate.astype(jnp.float32), up.astype(jnp.float32))
    want, plain_back = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *wide)
    assert value.dtype == dtype
    close((value, back(pull)), (want, plain_back(pull.astype(jnp.float32))), tolerance)


def test_the_gate_keeps_its_arguments_alone():
    gate, up = random(0, 2, 5, 8), random(1, 2, 5, 8)
    kept = jax.tree.leaves(jax.eval_shape(lambda *both: jax.vjp(gated, *both)[1], gate, up))
    assert [leaf.shape for leaf in kept] == [gate.shape] * 2
