"""Where parameters, activations and batches lie, and what a mesh refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.models import DecoderConfig
from stacking_jax.training import MeshConfig, sharding
from stacking_jax.training.state import abstract_params


def mesh(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes))


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


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        (
            {"tensor": 2}, (30, 4),
            "query (30, 4): axis 0 (embed, 30) cannot be divided over 4 devices (fsdp); use 28 or "
            "32, or a mesh with fsdp = 1 or 2",
        ),
        (
            {"fsdp": 1, "tensor": 8}, (32, 4),
            "query (32, 4): axis 1 (heads, 4) cannot be divided over 8 devices (tensor); use 8, "
            "or a mesh with tensor = 1 or 2 or 4",
        ),
        (
            {"fsdp": 4, "sequence": 2, "rules": {"embed": ("fsdp", "sequence")}}, (12, 4),
            "query (12, 4): axis 0 (embed, 12) cannot be divided over 8 devices (fsdp × sequence); "
            "use 8 or 16, or a mesh with fsdp × sequence = 1 or 2 or 4",
        ),
    ],
)
def test_an_axis_that_the_mesh_cannot_divide_is_named_with_what_would_work(sizes, shape, message):
    with pytest.raises(UserError) as caught:
        sharding.named_sharding(mesh(**sizes), ("embed", "heads"), shape, "query")
    assert str(caught.value) == message


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


def test_a_length_that_the_mesh_cannot_divide():
    sharding.check_batch(mesh(fsdp=2, sequence=4), 8, length=64)
    with pytest.raises(UserError) as caught:
        sharding.check_batch(mesh(fsdp=2, sequence=4), 8, length=62)
    assert str(caught.value) == (
        "a sequence_length of 62 cannot be divided over 4 devices (sequence); use 60 or 64, or a "
        "mesh with sequence = 1 or 2"
    )


@pytest.mark.parametrize(
    ("sizes", "piece"),
    [
        ({"data": 2, "fsdp": 4}, (2, 4)),
        ({"fsdp": 2, "sequence": 4}, (8, 1)),
        ({"slice": 2, "fsdp": 1, "sequence": 2, "tensor": 2}, (8, 2)),
    ],
)
def test_rows_are_placed_in_their_order(sizes, piece):
    rows = np.arange(16 * 4, dtype=np.int32).reshape(16, 4)
    placed = sharding.place_batch({"tokens": rows}, mesh(**sizes))["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {piece}


def test_rows_that_are_no_batch_are_refused():
    with pytest.raises(UserError, match="12 rows on this host cannot be divided over the 8 of 8"):
        sharding.place_batch({"tokens": np.zeros((12, 4), np.int32)}, mesh())


def test_one_host_reads_all_rows():
    assert sharding.local_rows(24, mesh(fsdp=4, tensor=2)) == tuple(range(24))


@pytest.mark.parametrize(
    ("sizes", "hosts", "rows"),
    [
        # Four hosts of two devices, next to one another on the last axes.
        ({"fsdp": 8}, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ({"fsdp": 4, "tensor": 2}, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        # `tensor` and `sequence` go from host to host: some read the same rows.
        ({"fsdp": 2, "tensor": 4}, 4, [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2),
        ({"fsdp": 1, "sequence": 8}, 4, [tuple(range(8))] * 4),
        ({"slice": 2, "fsdp": 1, "sequence": 4}, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
)
def test_a_host_reads_the_rows_of_its_devices(sizes, hosts, rows):
    made = mesh(**sizes)
    share = 8 // hosts
    devices = list(made.devices.flat)
    found = [
        sharding.rows_of(devices[i * share : (i + 1) * share], made, 8) for i in range(hosts)
    ]
    assert found == rows


def test_rows_of_a_host_need_not_stand_together():
    """Torus links decide which devices are neighbours in a mesh, and hosts have others."""
    made = mesh(data=2, fsdp=4)
    devices = list(made.devices.flat)
    hosts = [sharding.rows_of(devices[i::4], made, 16) for i in range(4)]
    assert hosts[1] == (2, 3, 10, 11)
    assert sorted(row for rows in hosts for row in rows) == list(range(16))


def test_an_array_that_every_host_has_is_placed_by_name():
    values = np.arange(3 * 8 * 2).reshape(3, 8, 2)
    placed = sharding.place(values, mesh(fsdp=4, tensor=2), (None, "batch", "heads"))
    np.testing.assert_array_equal(placed, values)
    assert placed.sharding.shard_shape(placed.shape) == (3, 2, 1)


def test_activations_are_placed_by_name():
    constrain = sharding.constrainer(mesh(data=2, fsdp=2, tensor=2))
    placed = jax.jit(lambda x: constrain(x, ("batch", "length", "mlp")))(jnp.zeros((8, 4, 6)))
    assert placed.sharding.shard_shape(placed.shape) == (2, 4, 3)


def test_an_activation_that_cannot_be_divided_is_left_to_the_compiler():
    constrain = sharding.constrainer(mesh(fsdp=2, tensor=4))
    placed = jax.jit(lambda x: constrain(x * 2, ("batch", None, "kv_heads")))(jnp.ones((8, 4, 2)))
    assert placed.sharding.shard_shape(placed.shape)[0] == 4
    np.testing.assert_array_equal(placed, np.full((8, 4, 2), 2.0))


def test_the_same_mesh_gets_the_same_constraints():
    """They are a static argument of compiled programs."""
    assert sharding.constrainer(mesh(tensor=2)) is sharding.constrainer(mesh(tensor=2))
    assert sharding.constrainer(mesh(tensor=2)) is not sharding.constrainer(mesh(tensor=4))


def test_one_device_needs_no_constraints():
    constrain = sharding.constrainer(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    x = jnp.zeros((3,))
    assert constrain(x, ("batch",)) is x
