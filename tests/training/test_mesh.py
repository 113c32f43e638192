"""How the devices are laid out."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stacking_jax.errors import UserError
from stacking_jax.training import MeshConfig
from stacking_jax.training.mesh import make_decoding_mesh, make_mesh
from stacking_jax.training.rules import AXES


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as its place in a mesh depends on."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "none"


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 1, 8, 1, 1)),
        ({"tensor": 2}, (1, 1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (1, 2, 2, 1, 2)),
        ({"data": -1, "fsdp": 1}, (1, 8, 1, 1, 1)),
        ({"slice": 2, "sequence": 4, "fsdp": 1}, (2, 1, 1, 4, 1)),
        ({"slice": 2, "sequence": -1, "fsdp": 2}, (2, 1, 2, 2, 1)),
    ],
)
def test_the_rest_of_the_devices_goes_where_the_minus_one_stands(sizes, shape):
    made = make_mesh(MeshConfig(**sizes))
    assert made.axis_names == AXES == ("slice", "data", "fsdp", "sequence", "tensor")
    assert tuple(made.shape.values()) == shape and made.size == made.devices.size == 8
    assert [device.id for device in made.devices.flat] == list(range(8))


def test_a_mesh_may_take_some_devices_only():
    assert make_mesh(MeshConfig(), devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"fsdp": 3}, "mesh fsdp=3 needs 3 devices, but 8 are at hand"),
        ({"tensor": 3}, "mesh fsdp=-1 × tensor=3: 3 does not divide the 8 devices"),
        ({"fsdp": 16}, "needs 16 devices"),
        ({"data": 5, "fsdp": -1}, "5 does not divide"),
        ({"fsdp": 1}, "needs 1 devices, but 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_machine(sizes, part):
    with pytest.raises(UserError, match=part):
        make_mesh(MeshConfig(**sizes))


def test_devices_of_slices_are_sorted_by_them():
    """Whatever the order in which they come: only the axis `slice` goes between slices."""
    chips = [Chip(number, slice_index=number // 2 % 2) for number in range(8)]
    made = make_mesh(MeshConfig(slice=2, fsdp=-1, tensor=2), chips)
    assert tuple(made.shape.values()) == (2, 1, 2, 1, 2)
    for number in range(2):
        assert {chip.slice_index for chip in made.devices[number].flat} == {number}


def test_tpu_slices_have_to_be_an_axis_and_hosts_with_gpus_need_not():
    chips = [Chip(number, slice_index=number // 4) for number in range(8)]
    made = make_mesh(MeshConfig(tensor=2), chips)
    assert [chip.id for chip in made.devices.flat] == list(range(8))
    tpus = [dataclasses.replace(chip, platform="tpu") for chip in chips]
    with pytest.raises(UserError, match="lie in 2 slices.* bind MeshConfig.slice = 2"):
        make_mesh(MeshConfig(), tpus)


def test_specs_come_from_the_table_and_its_overrides():
    made = make_mesh(MeshConfig())
    assert made.spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert made.spec(("batch", None)) == PartitionSpec(("slice", "data", "fsdp"), None)
    ruled = make_mesh(MeshConfig(rules={"embed": ("fsdp", "sequence"), "heads": None}))
    assert ruled.spec(("embed", "heads")) == PartitionSpec(("fsdp", "sequence"), None)
    assert ruled != made and hash(made) == hash(make_mesh(MeshConfig()))


def test_parts_are_counted_over_all_axes_of_a_rule():
    made = make_mesh(MeshConfig(slice=2, data=2, fsdp=1, sequence=2))
    assert [made.parts(name) for name in ("batch", "length", "embed", None)] == [4, 2, 1, 1]
    decoding = made.for_decoding()
    assert decoding.parts("batch") == 8 and decoding.parts("length") == 1
    assert decoding.physical is made.physical


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 4), (6, 6)], ids=["it fits", "it does not"])
def test_a_run_is_decoded_on_its_own_mesh_or_on_what_is_there(devices, fsdp):
    config = MeshConfig(fsdp=4, tensor=2, rules={"vocab": None})
    made = make_decoding_mesh(config, jax.devices()[:devices])
    assert made.shape["fsdp"] == fsdp and made.size == devices
    assert made.rules.axes("vocab") == () and np.prod(list(made.shape.values())) == devices
