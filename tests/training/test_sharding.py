"""The mesh, the table of axis names, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stacking_jax.errors import UserError
from stacking_jax.models import DecoderConfig
from stacking_jax.training import MeshConfig, sharding
from stacking_jax.training.state import abstract_params


def mesh(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1)),
        ({"tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1)),
    ],
)
def test_the_rest_of_the_devices_goes_where_the_minus_one_stands(sizes, shape):
    made = mesh(**sizes)
    assert made.axis_names == ("data", "fsdp", "tensor")
    assert tuple(made.shape.values()) == shape


def test_a_mesh_may_take_some_devices_only():
    made = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:2])
    assert made.size == 2


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"fsdp": 3}, "needs 3 devices, but 8 are at hand"),
        ({"tensor": 3}, "3 does not divide the 8 devices"),
        ({"fsdp": 16}, "needs 16 devices"),
        ({"data": 5, "fsdp": -1}, "5 does not divide"),
    ],
)
def test_a_mesh_that_does_not_fit_the_machine(sizes, part):
    with pytest.raises(UserError, match=part):
        mesh(**sizes)


def test_specs_come_from_the_one_table():
    assert sharding.spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)


def test_every_parameter_is_split_over_the_whole_mesh():
    """All matrices of the decoder take part in fsdp and in tensor."""
    config = DecoderConfig(
        vocab_size=320, num_layers=2, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2,
        tied_embeddings=False,
    )
    params = abstract_params(config, 2, mesh(fsdp=4, tensor=2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_vector = "scale" in jax.tree_util.keystr(path)
        pieces = 1 if is_vector else 8
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == np.prod(leaf.shape) / pieces, path


def test_an_axis_that_the_mesh_cannot_divide_is_named():
    with pytest.raises(UserError) as caught:
        sharding.named_sharding(mesh(tensor=2), ("embed", "heads"), (30, 4), "query")
    assert "query (30, 4): axis 0 (embed, 30) cannot be divided over 4" in str(caught.value)


@pytest.mark.parametrize("batch_size", [8, 16, 24])
def test_batches_that_divide(batch_size):
    sharding.check_batch(mesh(), batch_size)
    sharding.check_batch(mesh(data=2, fsdp=2, tensor=2), batch_size, microbatches=2)


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "near"), [(4, 1, 8), (12, 1, 16), (8, 2, 16), (24, 2, 32)]
)
def test_a_batch_that_the_mesh_cannot_divide(batch_size, microbatches, near):
    with pytest.raises(UserError) as caught:
        sharding.check_batch(mesh(), batch_size, microbatches)
    assert str(caught.value).endswith(f"such as {near}")
    sharding.check_batch(mesh(), near, microbatches)


def test_rows_are_placed_in_their_order():
    rows = np.arange(16 * 4, dtype=np.int32).reshape(16, 4)
    placed = sharding.place_batch({"tokens": rows}, mesh(data=2, fsdp=4))["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


def test_one_host_reads_all_rows():
    assert sharding.local_rows(24) == slice(0, 24)


def test_activations_are_placed_by_name():
    constrain = sharding.constrainer(mesh(data=2, fsdp=2, tensor=2))
    placed = jax.jit(lambda x: constrain(x, ("batch", "length", "mlp")))(jnp.zeros((8, 4, 6)))
    assert placed.sharding.shard_shape(placed.shape) == (2, 4, 3)


def test_one_device_needs_no_constraints():
    constrain = sharding.constrainer(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    x = jnp.zeros((3,))
    assert constrain(x, ("batch",)) is x
