"""Growth operators against the list copies that define them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.errors import UserError
from stacking_jax.growth import (
    NEW,
    OPERATORS,
    DepthMap,
    Segment,
    custom,
    drop_last,
    every_nth,
    first_block,
    g_stack,
    gradstack,
    inherit_first,
    interleave,
    lidas,
    loop,
    midas,
    operator,
    progressive,
    random_block,
    repeat_block,
    single_layer,
    solar,
)

# ---- the definitions, on lists of layers ------------------------------------------------------
# Layers are letters here, and blocks lists of them: nothing counts indices.


def cut(layers: list, block: int) -> list[list]:
    return [layers[at : at + block] for at in range(0, len(layers), block)]


def joined(blocks: list[list]) -> list:
    return [layer for block in blocks for layer in block]


def midas_on_lists(layers: list, block: int) -> list:
    """Eq. 1: block ⌈n/2⌉ (from the input, from 1) stands twice."""
    blocks = cut(layers, block)
    middle = math.ceil(len(blocks) / 2)
    return joined(blocks[:middle] + [blocks[middle - 1]] + blocks[middle:])


def gradstack_on_lists(layers: list, block: int) -> list:
    """Reddi et al.: the last layers are copied on top."""
    return layers + layers[-block:]


def lidas_in_place_on_lists(layers: list, block: int) -> list:
    """Layers go off both ends in turn, the upper first, until `block` are left; those twice."""
    head, centre, tail = [], list(layers), []
    while len(centre) > block:
        if len(tail) <= len(head):
            tail.insert(0, centre.pop())
        else:
            head.append(centre.pop(0))
    return head + centre + centre + tail


def lidas_literal_on_lists(layers: list, block: int) -> list:
    """Between B' and B'' comes the last half of B' and the first half of B''."""
    blocks = cut(layers, block)
    if len(blocks) % 2:
        return midas_on_lists(layers, block)
    under, above = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
    new = under[-1][block // 2 :] + above[0][: block // 2]
    return joined(under) + new + joined(above)


def first_block_on_lists(layers: list, block: int) -> list:
    return layers[:block] + layers


def interleave_on_lists(layers: list, times: int) -> list:
    return joined([[layer] * times for layer in layers])


def solar_on_lists(layers: list, drop: int) -> list:
    lower, upper = list(layers), list(layers)
    for _ in range(drop):
        lower.pop()
        upper.pop(0)
    return lower + upper


def letters(count: int) -> list[str]:
    return [chr(ord("a") + i) for i in range(count)]


def applied(depth_map: DepthMap, layers: list) -> list:
    assert depth_map.stored == len(layers)
    return [layers[source] for source in depth_map.sources]


# ---- operators of whole blocks and of layers --------------------------------------------------

WHOLE_BLOCKS = {
    "midas": (midas, midas_on_lists),
    "lidas literal": (
        lambda depth, block, **guards: lidas(depth, block, reading="literal", **guards),
        lidas_literal_on_lists,
    ),
    "repeat_block, last": (
        lambda depth, block, **guards: repeat_block(depth, block, -1, **guards),
        gradstack_on_lists,
    ),
    "repeat_block, first": (
        lambda depth, block, **guards: repeat_block(depth, block, 0, **guards),
        first_block_on_lists,
    ),
}
LAYERS = {
    "gradstack": (gradstack, gradstack_on_lists),
    "lidas": (lidas, lidas_in_place_on_lists),
    "first_block": (first_block, first_block_on_lists),
}


@pytest.mark.parametrize("name", sorted(WHOLE_BLOCKS | LAYERS))
@pytest.mark.parametrize("block", [1, 2, 4, 6])
def test_every_boundary_equals_copies_of_lists(name, block):
    function, on_lists = (WHOLE_BLOCKS | LAYERS)[name]
    for blocks in range(1, 9):
        layers = letters(blocks * block)
        assert applied(function(len(layers), block), layers) == on_lists(layers, block)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_operators_of_layers_take_any_block_of_any_depth(name):
    function, on_lists = LAYERS[name]
    for depth in range(1, 14):
        for block in range(1, depth + 1):
            layers = letters(depth)
            assert applied(function(depth, block), layers) == on_lists(layers, block)
        with pytest.raises(UserError, match=f"a block of {depth + 1} layers, but .* only {depth}"):
            function(depth, depth + 1)


@pytest.mark.parametrize("name", sorted(WHOLE_BLOCKS))
def test_operators_of_blocks_refuse_a_depth_between(name):
    function, _ = WHOLE_BLOCKS[name]
    with pytest.raises(
        UserError, match="depth 10 is not a multiple of block 4; blocks that fit: 1, 2, 5, 10"
    ):
        function(10, 4)
    with pytest.raises(UserError, match="between, 8 layers, is not a multiple of block 3"):
        function(11, 3, keep_first=2, keep_last=1)


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(WHOLE_BLOCKS | LAYERS)),
    block=st.integers(1, 4), blocks=st.integers(1, 5), first=st.integers(0, 3),
    last=st.integers(0, 3),
)
def test_guards_leave_the_ends_alone(name, block, blocks, first, last):
    function, on_lists = (WHOLE_BLOCKS | LAYERS)[name]
    if name == "lidas literal":
        block *= 2
    layers = [f"layer {i}" for i in range(first + block * blocks + last)]
    head, middle, tail = (
        layers[:first], layers[first : len(layers) - last], layers[len(layers) - last :]
    )
    grown = applied(function(len(layers), block, keep_first=first, keep_last=last), layers)
    assert grown == head + on_lists(middle, block) + tail


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
    for grown in (midas, gradstack, first_block):
        whole = DepthMap.identity(4)
        for depth in (4, 8, 12, 16, 20):
            whole = whole.then(grown(depth, 4))
        assert whole == DepthMap([*range(4)] * 6)


def test_the_example_of_the_design():
    assert midas(8, 4).sources == (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7)
    assert gradstack(8, 4).sources == (0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7)


# ---- lidas ------------------------------------------------------------------------------------


def test_the_two_readings_of_lidas():
    counted_from_one = {
        "in_place": (1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8),
        "literal": (1, 2, 3, 4, 3, 4, 5, 6, 5, 6, 7, 8),
    }
    for reading, expected in counted_from_one.items():
        assert tuple(i + 1 for i in lidas(8, 4, reading=reading).sources) == expected
    assert lidas(8, 4) == lidas(8, 4, reading="in_place")
    with pytest.raises(UserError, match="'in_place' or 'literal'; got 'centre'"):
        lidas(8, 4, reading="centre")


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("reading", ["in_place", "literal"])
def test_lidas_is_midas_for_an_odd_number_of_blocks(block, reading):
    for blocks in range(1, 9):
        same = lidas(blocks * block, block, reading=reading) == midas(blocks * block, block)
        # With blocks of one layer the two middles round alike.
        assert same == (blocks % 2 == 1 or block == 1)


@pytest.mark.parametrize("reading", ["in_place", "literal"])
def test_lidas_keeps_the_stack_symmetric_where_there_is_a_centre(reading):
    for block, blocks in [(2, 2), (2, 5), (4, 4), (4, 6), (3, 3)]:
        depth = block * blocks
        sources = lidas(depth, block, reading=reading).sources
        assert sources == tuple(depth - 1 - source for source in reversed(sources))


# ---- chosen blocks ----------------------------------------------------------------------------


def test_repeat_block_by_number():
    for blocks in range(1, 8):
        for index in range(blocks):
            layers = letters(blocks * 2)
            own = cut(layers, 2)
            expected = joined(own[: index + 1] + [own[index]] + own[index + 1 :])
            assert applied(repeat_block(blocks * 2, 2, index), layers) == expected
            assert repeat_block(blocks * 2, 2, index - blocks) == repeat_block(blocks * 2, 2, index)
        assert repeat_block(blocks * 2, 2, math.ceil(blocks / 2) - 1) == midas(blocks * 2, 2)
    for index in (2, -3):
        with pytest.raises(UserError, match=f"numbered 0 to 1 .* there is no block {index}"):
            repeat_block(4, 2, index)


def test_a_random_block_is_a_block_and_is_the_same_everywhere():
    drawn = {}
    for seed in range(40):
        grown = random_block(24, 4, seed)
        assert grown == random_block(24, 4, seed)
        drawn[seed] = next(i for i in range(6) if grown == repeat_block(24, 4, i))
    assert set(drawn.values()) == set(range(6)), "every block has its turn"
    assert [drawn[seed] for seed in range(12)] == [
        0, 1, 2, 4, 4, 0, 2, 1, 5, 4, 0, 0
    ], "for ever, on every host"
    # Growths that follow each other do not all draw the same number.
    assert len({random_block(depth, 4, 0).sources[:8] for depth in range(24, 64, 4)}) > 1
    for seed in (-1, 0.5, None):
        with pytest.raises(UserError, match="the seed must be"):
            random_block(24, 4, seed)


# ---- the whole stack --------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    depth=st.integers(1, 8), times=st.integers(2, 4), first=st.integers(0, 2),
    last=st.integers(0, 2),
)
def test_copies_of_the_whole_stack(depth, times, first, last):
    layers = [f"layer {i}" for i in range(first + depth + last)]
    head, middle, tail = (
        layers[:first], layers[first : first + depth], layers[first + depth :]
    )
    guards = {"keep_first": first, "keep_last": last}
    total = len(layers)
    assert applied(g_stack(total, times, **guards), layers) == head + middle * times + tail
    assert applied(progressive(total, **guards), layers) == head + middle + middle + tail
    assert applied(interleave(total, times, **guards), layers) == (
        head + interleave_on_lists(middle, times) + tail
    )
    for drop in range((depth + 1) // 2):
        grown = solar(total, drop, **guards)
        assert applied(grown, layers) == head + solar_on_lists(middle, drop) + tail
        assert len(grown) == first + 2 * depth - 2 * drop + last
    assert loop(depth, times, prefix=first, suffix=last) == g_stack(total, times, **guards)


def test_what_equals_what():
    assert progressive(6) == g_stack(6, 2) == solar(6, 0) == loop(6, 2)
    assert g_stack(1, 5) == interleave(1, 5) == single_layer(5)
    assert midas(6, 6) == progressive(6)
    assert interleave(3).sources == (0, 0, 1, 1, 2, 2)


def test_solar_10_7b():
    """32 layers without 8 at the seam of each copy make 48."""
    grown = solar(32, 8)
    assert len(grown) == 48
    assert grown.sources == (*range(24), *range(8, 32))
    assert [i for i, is_copy in enumerate(grown.copies) if is_copy] == list(range(24, 40))
    with pytest.raises(UserError, match="drop at most 15"):
        solar(32, 16)


def test_a_loop_keeps_its_segments():
    middle = loop(4, 4, prefix=4, suffix=4)
    assert middle.segments == (
        Segment((0, 1, 2, 3)), Segment((4, 5, 6, 7), 4), Segment((8, 9, 10, 11))
    )
    assert (middle.stored, len(middle)) == (12, 24)
    assert str(middle) == "0..3 (4..7)×4 8..11"
    assert loop(3, 1).is_identity


# ---- chosen layers ----------------------------------------------------------------------------


def test_inheriting_the_first_layers():
    assert inherit_first(8, 3).sources == (0, 1, 2)
    grown = inherit_first(4, 3, 6)
    assert grown.sources == (0, 1, 2, NEW, NEW, NEW)
    assert grown.stored == 4 and grown.fresh == (False,) * 3 + (True,) * 3
    assert inherit_first(0, 0, 3) == DepthMap([NEW] * 3, stored=0)
    for arguments in [(4, 5), (4, 3, 2), (4, 0)]:
        with pytest.raises(UserError):
            inherit_first(*arguments)


def test_maps_by_hand():
    assert custom([2, 0, NEW], 4) == DepthMap([2, 0, NEW], stored=4)
    assert custom([Segment((0, 1), 2)]) == DepthMap([0, 1, 0, 1])
    assert custom(midas(8, 4)) == midas(8, 4)
    for nothing in ("midas", 4, None):
        with pytest.raises(UserError, match="custom needs a list of layers"):
            custom(nothing)


def test_shrinking():
    layers = letters(9)
    for n in range(1, 10):
        for first in range(3):
            assert applied(every_nth(9, n, first=first), layers) == layers[first::n]
        kept = every_nth(9, n, keep_first=1, keep_last=2)
        assert applied(kept, layers) == layers[:1] + layers[1:7:n] + layers[7:]
    assert applied(drop_last(9, 4), layers) == layers[:5]
    with pytest.raises(UserError, match="no layer 9"):
        every_nth(9, 2, first=9)
    with pytest.raises(UserError, match="at least one must stay"):
        drop_last(9, 9)


# ---- by name, and bad input -------------------------------------------------------------------


def test_operators_by_name():
    assert operator("midas") is midas
    for name, function in OPERATORS.items():
        assert operator(name) is function and function.__name__ == name
    with pytest.raises(UserError, match="did you mean midas"):
        operator("midsa")
    with pytest.raises(UserError, match="custom, drop_last, every_nth"):
        operator("zzz")
    with pytest.raises(UserError, match="no growth operator None"):
        operator(None)


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: midas(bad, 4), lambda bad: midas(8, bad), lambda bad: gradstack(8, bad),
        lambda bad: lidas(bad, 4), lambda bad: repeat_block(8, bad, 0),
        lambda bad: first_block(8, bad), lambda bad: random_block(bad, 4, 0),
        lambda bad: g_stack(8, bad), lambda bad: progressive(bad), lambda bad: interleave(8, bad),
        lambda bad: solar(bad, 0), lambda bad: single_layer(bad), lambda bad: loop(bad, 2),
        lambda bad: loop(2, bad), lambda bad: every_nth(8, bad), lambda bad: drop_last(bad, 1),
    ],
)
def test_numbers_that_are_none(call):
    for bad in (0, -4):
        with pytest.raises(UserError, match="must be at least [12]"):
            call(bad)
    for bad in (2.0, "4", None, True):
        with pytest.raises(UserError, match="must be a whole number"):
            call(bad)


GUARDED = {
    "midas": (4,), "gradstack": (4,), "lidas": (4,), "repeat_block": (4, 0), "first_block": (4,),
    "random_block": (4, 0), "g_stack": (2,), "progressive": (), "interleave": (2,), "solar": (1,),
    "every_nth": (2,),
}


@pytest.mark.parametrize("name", sorted(GUARDED))
def test_guards_that_cannot_be(name):
    arguments = GUARDED[name]
    with pytest.raises(UserError, match="first 5 and the last 3 of 8 layers, and none lies"):
        operator(name)(8, *arguments, keep_first=5, keep_last=3)
    with pytest.raises(UserError, match="keep_first must be at least 0"):
        operator(name)(8, *arguments, keep_first=-1)
    with pytest.raises(UserError, match="keep_last must be a whole number"):
        operator(name)(8, *arguments, keep_last=1.0)
