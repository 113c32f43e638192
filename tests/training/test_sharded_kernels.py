"""Kernels on a mesh compute what XLA's attention computes on one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.models.kernels import interpreted
from stacking_jax.training import MeshConfig, sharding

LENGTH = 256
MODEL = DecoderConfig(
    vocab_size=16, num_layers=2, d_model=32, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=16,
    stack="scan", remat="dots",
)
SEGMENTS = np.repeat([[1, 2, 3, 0]], 4, 0).repeat([100, 60, 80, 16], axis=1).astype(np.int32)
PROMPTS = np.zeros((4, LENGTH), bool)
PROMPTS[::2, 100:140] = PROMPTS[1, :30] = True


def loss_and_gradients(kernel, placement=None, prompts=False):
    """Mean squared logit of real tokens, and its gradients, by a fresh program."""
    model = Decoder(dataclasses.replace(MODEL, attention=kernel), key=jax.random.key(0))
    graph, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(1), (4, LENGTH), 0, 16)
    options = {} if placement is None else {"constrain": placement}
    rows = jnp.asarray(SEGMENTS), jnp.asarray(PROMPTS) if prompts else None
    if placement is not None:
        where = placement.sharding(("batch", "length"))
        tokens, *rows = jax.tree.map(lambda x: jax.device_put(x, where), (tokens, *rows))

    @jax.jit
    def run(params, tokens, segments, bidirectional):
        def loss(params):
            logits = nnx.merge(graph, params)(
                tokens, segment_ids=segments, bidirectional=bidirectional, **options
            )
            return jnp.mean(jnp.square(logits) * (segments > 0)[..., None])

        return jax.value_and_grad(loss)(params)

    return run(params, tokens, *rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "axes", "prompts"),
    [
        ("splash", {"data": 2, "fsdp": 2, "tensor": 2}, False),
        # Two key heads over four devices; a row over two, whose second part begins at 128.
        ("splash", {"sequence": 2, "tensor": 4}, True),
        ("triton", {"fsdp": 2, "tensor": 4}, False),
    ],
    ids=["splash", "splash-length", "triton"],
)
def test_on_a_mesh_as_on_one_device(kernel, axes, prompts):
    mesh = sharding.make_mesh(MeshConfig(**axes))
    want = loss_and_gradients("xla", prompts=prompts)
    with interpreted():
        got = loss_and_gradients(kernel, sharding.constrainer(mesh), prompts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, want)


def test_a_mesh_says_for_which_devices_it_is():
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    placement = sharding.constrainer(mesh)
    assert placement is sharding.constrainer(mesh)
    assert placement.device.platform == "cpu"
    assert [placement.parts(name) for name in ("batch", "heads", "keys")] == [4, 2, 1]

    def part(x):
        assert x.shape == (2, 3)  # Of eight rows, and three columns that nothing divides.
        return x + 1

    spec = placement.spec(("batch", "stream"))
    out = jax.jit(placement.on_each_device(part, (spec,), spec))(jnp.zeros((8, 3)))
    assert np.array_equal(out, np.ones((8, 3)))
    alone = sharding.constrainer(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert alone.on_each_device(part, (spec,), spec) is part
    assert alone(out, ("batch", "stream")) is out
