"""Growth operators against the list copies that define them."""

from __future__ import annotations

import math

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import OPERATORS, DepthMap, gradstack, midas, operator


def midas_on_lists(layers: list, block: int) -> list:
    """MIDAS, Eq. 1: block ⌈n/2⌉ (from the input, from 1) is copied in place."""
    n = len(layers) // block
    m = math.ceil(n / 2)
    return layers[: m * block] + layers[(m - 1) * block : m * block] + layers[m * block :]


def gradstack_on_lists(layers: list, block: int) -> list:
    """Reddi et al.: the last block is copied on top."""
    return layers + layers[-block:]


REFERENCES = {"midas": midas_on_lists, "gradstack": gradstack_on_lists}
SHAPES = [(24, 8), (24, 6), (24, 4), (24, 3), (12, 6), (8, 4), (48, 6), (72, 6), (5, 5), (7, 1)]


@pytest.mark.parametrize("name", sorted(REFERENCES))
@pytest.mark.parametrize(("depth", "stages"), SHAPES)
def test_every_boundary_equals_copies_of_lists(name, depth, stages):
    block = depth // stages
    for stage in range(1, stages):
        before = stage * block
        grown = operator(name)(before, block)
        assert grown.stored == before
        assert list(grown.sources) == REFERENCES[name](list(range(before)), block)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_midas_duplicates_the_middle_block(block):
    for blocks, duplicated in zip([1, 2, 3, 4, 5], [1, 1, 2, 2, 3]):
        grown = midas(blocks * block, block)
        copies = [layer for layer, is_copy in zip(grown.sources, grown.copies) if is_copy]
        assert copies == list(range((duplicated - 1) * block, duplicated * block))


@pytest.mark.parametrize("block", [1, 4])
def test_midas_differs_from_gradstack_from_the_second_growth_on(block):
    assert midas(block, block) == gradstack(block, block)
    for blocks in range(2, 8):
        assert midas(blocks * block, block) != gradstack(blocks * block, block)


def test_composed_from_the_first_stage_they_are_the_same_map():
    # Every block descends from the first, so only single boundaries can tell them apart.
    composed = {}
    for name, grown in OPERATORS.items():
        whole = DepthMap.identity(4)
        for depth in (4, 8, 12, 16, 20):
            whole = whole.then(grown(depth, 4))
        composed[name] = whole
    assert composed["midas"] == composed["gradstack"] == DepthMap([*range(4)] * 6)


def test_the_example_of_the_design():
    assert midas(8, 4).sources == (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7)
    assert gradstack(8, 4).sources == (0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_bad_depths(name):
    with pytest.raises(UserError, match="depth 10 is not a multiple of block 4"):
        operator(name)(10, 4)
    for depth, block in [(0, 4), (8, 0), (-4, 4), (4, -4)]:
        with pytest.raises(UserError, match="at least 1"):
            operator(name)(depth, block)


def test_operators_by_name():
    assert operator("midas") is midas
    with pytest.raises(UserError, match="did you mean midas"):
        operator("midsa")
    with pytest.raises(UserError, match="gradstack, midas"):
        operator("zzz")
