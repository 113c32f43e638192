"""Names of topologies, their chips and their links."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.planning.chips import CHIPS, chip_of_kind
from stacking_jax.planning.topology import parse


@pytest.mark.parametrize(
    ("text", "shape", "slices", "chips"),
    [
        ("v5p:4x4x8", (4, 4, 8), 1, 128), ("v5e:16x16*2", (16, 16), 2, 512),
        ("V4:2x2x1", (2, 2, 1), 1, 4), ("h100:8x4", (8, 4), 1, 32), ("h200:8", (8, 1), 1, 8),
    ],
)
def test_names(text, shape, slices, chips):
    topology = parse(text)
    assert (topology.shape, topology.slices, topology.num_chips) == (shape, slices, chips)
    assert parse(topology.name) == topology


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("v5p", "write CHIP:AxBxC"), ("v9:2x2", "no chip 'v9'; there are v4, v5e"),
        ("v5p:4x4", "a shape of v5p is AxBxC"), ("v5e:4x4x4", "a shape of v5e is AxB"),
        ("v5e:0x4", "at least 1"), ("h100:8x4*2", "nodes, not slices"), ("v5e:4x4*0", "at least 1"),
    ],
)
def test_names_that_are_none(text, part):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "coords", "links"),
    [
        # All of v5p:4x4x8: three axes, each a ring.
        ("v5p:4x4x8", [(x, y, z) for x in range(4) for y in range(4) for z in range(8)], 6),
        # Half of a ring is a line.
        ("v5p:4x4x8", [(0, 0, z) for z in range(4)], 1),
        ("v5p:4x4x8", [(0, 0, z) for z in range(8)], 2),
        # v5e closes its rings at 16 only.
        ("v5e:8x16", [(x, y) for x in range(8) for y in range(16)], 3),
        ("v5e:2x2", [(0, 0), (0, 1), (1, 0), (1, 1)], 2),
    ],
)
def test_links_at_work(name, coords, links):
    topology = parse(name)
    assert topology.rate_of(coords) == links * topology.chip.link_bandwidth


def test_between_slices_goes_over_the_network():
    topology = parse("v5e:16x16*2")
    assert topology.rate_of([(0, 0), (0, 0)], slices=2) == topology.chip.network_bandwidth
    assert topology.chip.network_bandwidth < topology.chip.link_bandwidth


def test_the_chips_are_told_apart_by_what_jax_calls_them():
    kinds = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40",
    }
    assert {kind: chip_of_kind(kind).name for kind in kinds} == kinds
    assert chip_of_kind("cpu") is None


def test_published_rates_are_of_the_right_order():
    for chip in CHIPS.values():
        assert 1e14 < chip.peak_flops < 1e16
        # All of them: some hundred FLOPs for each byte of main memory.
        assert 100 < chip.peak_flops / chip.hbm_bandwidth < 700
        assert chip.network_bandwidth < chip.link_bandwidth < chip.hbm_bandwidth


def test_the_compiler_describes_one_device_per_chip(libtpu, run_apart):
    """For a v4 only as 'megacore'. In a process of its own, as libtpu wants it."""
    names = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v5e:2x2*2"]
    said = run_apart(f"""
        from stacking_jax.errors import UserError
        from stacking_jax.planning.chips import chip_of_kind
        from stacking_jax.planning.topology import parse
        for topology in map(parse, {names!r}):
            devices = topology.devices()
            print(len(devices), chip_of_kind(devices[0].device_kind).name,
                  topology.link_rate(devices) / topology.chip.link_bandwidth)
        try:
            parse("v5e:3x3").devices()
        except UserError as error:
            print(error)
    """).splitlines()
    for name, line in zip(names, said, strict=False):
        count, chip, links = line.split()
        topology = parse(name)
        assert (int(count), chip) == (topology.num_chips, topology.chip.name)
        assert float(links) == 2 if topology.slices == 1 else float(links) < 1
    assert len(said) == len(names) + 1 and "knows no topology v5e:3x3" in said[-1]
