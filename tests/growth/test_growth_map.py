"""From any depth to any other by name: what is reached, and what is refused."""

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
    every_nth,
    growth_map,
    loop,
    operator,
    random_block,
    single_layer,
    solar,
    stage_depths,
)

BY_BLOCKS = {
    "midas": {}, "repeat_block": {"index": 0}, "random_block": {"seed": 7},
    "lidas": {"reading": "literal"},
}
BY_LAYERS = {"gradstack": {}, "first_block": {}, "lidas": {}}
ANYWHERE = {**BY_BLOCKS, **BY_LAYERS, "g_stack": {}, "interleave": {}}


def stepwise(name: str, depth: int, to: int, block: int, **options) -> list[int]:
    """Growing a list again and again, one boundary at a time."""
    layers = list(range(depth))
    while len(layers) < to:
        step = operator(name)(len(layers), min(block, to - len(layers)), **options)
        layers = [layers[source] for source in step.sources]
    return layers


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(BY_BLOCKS)), block=st.integers(1, 4), blocks=st.integers(1, 4),
    more=st.integers(0, 5), first=st.integers(0, 2), last=st.integers(0, 2),
)
def test_whole_blocks_are_repeated_single_boundaries(name, block, blocks, more, first, last):
    depth = first + block * blocks + last
    guards = {"keep_first": first, "keep_last": last}
    options = BY_BLOCKS[name] | guards
    to = depth + more * block
    grown = growth_map(name, depth, to, block=block, **options)
    assert (grown.stored, len(grown)) == (depth, to)
    assert list(grown.sources) == stepwise(name, depth, to, block, **options)
    # Without a block: the largest that leads there.
    largest = math.gcd(block * blocks, to - depth)
    assert growth_map(name, depth, to, **options) == growth_map(
        name, depth, to, block=largest, **options
    )


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(BY_LAYERS)), depth=st.integers(1, 9), more=st.integers(0, 14),
    data=st.data(),
)
def test_layers_reach_every_depth(name, depth, more, data):
    block = data.draw(st.integers(1, depth))
    grown = growth_map(name, depth, depth + more, block=block)
    assert (grown.stored, len(grown)) == (depth, depth + more)
    assert list(grown.sources) == stepwise(name, depth, depth + more, block)
    assert growth_map(name, depth, depth + more) == growth_map(
        name, depth, depth + more, block=min(depth, more) or 1
    )


@settings(deadline=None, max_examples=200)
@given(
    name=st.sampled_from(sorted(ANYWHERE)), depth=st.integers(3, 8), more=st.integers(0, 14),
    first=st.integers(0, 1), last=st.integers(0, 1),
)
def test_what_reaches_every_depth_does(name, depth, more, first, last):
    options = ANYWHERE[name] | {"keep_first": first, "keep_last": last}
    grown = growth_map(name, depth, depth + more, **options)
    assert (grown.stored, len(grown)) == (depth, depth + more)
    assert set(grown.sources) == set(range(depth)), "no layer is lost"
    for end, sources in ((first, grown.sources), (last, grown.sources[::-1])):
        assert all(grown.sources.count(kept) == 1 for kept in sources[:end])
    assert grown.sources[: first + 1] == tuple(range(first + 1))
    assert grown.sources[-1] == depth - 1 or name == "g_stack"
    assert growth_map(name, depth, depth, **options).is_identity


@pytest.mark.parametrize("name", ["midas", "lidas", "gradstack"])
def test_growing_goes_on_where_it_stopped(name):
    """One map from 4 to 24 layers is the same in one call and in several."""
    for between in (8, 12, 20):
        parts = growth_map(name, 4, between, block=4).then(growth_map(name, between, 24, block=4))
        assert parts == growth_map(name, 4, 24, block=4)


def test_random_blocks_differ_from_growth_to_growth():
    grown = growth_map("random_block", 4, 12, block=4, seed=3)
    assert grown == random_block(4, 4, 3).then(random_block(8, 4, 3))
    maps = {growth_map("random_block", 8, 24, block=2, seed=seed) for seed in range(8)}
    assert len(maps) == 8


# ---- the whole stack --------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, 3, 4])
def test_multiples_are_the_operator_itself(times):
    for name in ("g_stack", "interleave"):
        assert growth_map(name, 5, 5 * times) == operator(name)(5, times)
        guarded = growth_map(name, 8, 3 + 5 * times, keep_first=1, keep_last=2)
        assert guarded == operator(name)(8, times, keep_first=1, keep_last=2)
        twice = operator(name)(5, times).then(operator(name)(5 * times, times))
        assert growth_map(name, 5, 5 * times**2, times=times) == twice
        assert growth_map(name, 5, 5 * times**2) == twice


def test_depths_between_of_stacking_and_of_interpolation():
    assert growth_map("g_stack", 4, 6).sources == (0, 1, 2, 3, 0, 1)
    assert growth_map("interleave", 4, 6).sources == (0, 0, 1, 2, 2, 3)
    assert growth_map("interleave", 3, 7).sources == (0, 0, 0, 1, 1, 2, 2)


def test_progressive_doubles():
    assert growth_map("progressive", 3, 12) == DepthMap([0, 1, 2] * 4)
    assert growth_map("progressive", 3, 12) == growth_map("g_stack", 3, 12)
    for to in (4, 9, 23):
        with pytest.raises(
            UserError, match=f"progressive does not lead from 3 layers to {to}; it leads to 6"
        ):
            growth_map("progressive", 3, to)
    with pytest.raises(UserError, match="times 3 does not lead from 4 layers to 24; .* 12, 36"):
        growth_map("g_stack", 4, 24, times=3)


def test_solar_finds_what_to_drop():
    assert growth_map("solar", 32, 48) == solar(32, 8) == growth_map("solar", 32, 48, drop=8)
    assert growth_map("solar", 34, 50, keep_last=2) == solar(34, 8, keep_last=2)
    with pytest.raises(UserError, match="from 32 layers to 47; it leads to 42, 44, 46, 48, 50, 52"):
        growth_map("solar", 32, 47)
    with pytest.raises(UserError, match="to 66; it leads to 54, 56, 58, 60, 62, 64"):
        growth_map("solar", 32, 66)
    with pytest.raises(UserError, match="leads from 32 layers to 46, not from 32 to 48"):
        growth_map("solar", 32, 48, drop=9)


def test_loops():
    assert growth_map("loop", 12, 24, prefix=4, suffix=4) == loop(4, 4, 4, 4)
    assert growth_map("loop", 4, 12, k=4, times=3) == loop(4, 3)
    assert growth_map("loop", 4, 12).segments == loop(4, 3).segments
    with pytest.raises(UserError, match="from 4 layers to 10; it leads to 8, 12, 16"):
        growth_map("loop", 4, 10)
    with pytest.raises(UserError, match="leave 4 to loop, not k = 3"):
        growth_map("loop", 4, 8, k=3)
    with pytest.raises(UserError, match="leave 0 to loop"):
        growth_map("loop", 4, 8, prefix=2, suffix=2)
    with pytest.raises(UserError, match="leads from 4 layers to 8, not from 4 to 12"):
        growth_map("loop", 4, 12, times=2)


# ---- chosen layers ----------------------------------------------------------------------------


def test_from_one_layer_and_from_none():
    assert growth_map("single_layer", 1, 6) == single_layer(6)
    nothing = DepthMap([NEW] * 6, stored=0)
    assert growth_map("inherit_first", 0, 6) == nothing
    assert growth_map("custom", 0, 6, sources=[NEW] * 6) == nothing
    for name in ("midas", "g_stack", "single_layer", "solar", "every_nth"):
        with pytest.raises(UserError, match=f"{name} copies layers, and there are none yet"):
            growth_map(name, 0, 6)
    with pytest.raises(UserError, match="this one has 2"):
        growth_map("single_layer", 2, 6)
    assert growth_map("inherit_first", 3, 5).sources == (0, 1, 2, NEW, NEW)
    assert growth_map("inherit_first", 3, 5, k=1).sources == (0, NEW, NEW, NEW, NEW)
    assert growth_map("inherit_first", 5, 3) == DepthMap([0, 1, 2], stored=5)


def test_by_hand():
    assert growth_map("custom", 3, 4, sources=[0, 1, 1, 2]) == DepthMap([0, 1, 1, 2])
    assert growth_map("custom", 3, 2, sources=[2, 0]) == DepthMap([2, 0], stored=3)
    with pytest.raises(UserError, match="leads from 3 layers to 2, not from 3 to 4"):
        growth_map("custom", 3, 4, sources=[0, 1])
    with pytest.raises(UserError, match="names layer 3"):
        growth_map("custom", 3, 2, sources=[0, 3])
    with pytest.raises(UserError, match="custom needs the option sources"):
        growth_map("custom", 3, 4)


def test_shrinking():
    assert growth_map("every_nth", 12, 4) == every_nth(12, 3)
    assert growth_map("every_nth", 12, 6, n=2, first=1) == every_nth(12, 2, first=1)
    assert growth_map("drop_last", 12, 5) == DepthMap(range(5), stored=12)
    for depth in range(1, 12):
        for n in range(1, depth + 1):
            to = len(every_nth(depth, n))
            assert len(growth_map("every_nth", depth, to)) == to
        assert growth_map("drop_last", depth, depth) == growth_map("every_nth", depth, depth)
    with pytest.raises(UserError, match="from 12 layers to 5; it leads to 1, 2, 3, 4, 6, 12"):
        growth_map("every_nth", 12, 5)
    for name in ("every_nth", "drop_last"):
        with pytest.raises(UserError, match=f"{name} only shrinks a stack"):
            growth_map(name, 4, 6)


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_BLOCKS))
def test_whole_blocks_name_the_depths_that_they_reach(name):
    options = BY_BLOCKS[name]
    for to in (9, 14, 19):
        with pytest.raises(
            UserError, match=f"{name} with block 4 does not lead from 8 layers to {to}; .* 12, 16"
        ):
            growth_map(name, 8, to, block=4, **options)
    with pytest.raises(UserError, match="depth 10 is not a multiple of block 4"):
        growth_map(name, 10, 14, block=4, **options)


@pytest.mark.parametrize(
    "name", ["midas", "gradstack", "lidas", "g_stack", "interleave", "progressive", "solar", "loop"]
)
def test_growing_does_not_shrink(name):
    with pytest.raises(UserError, match=f"{name} only deepens a stack; .* drop_last, every_nth"):
        growth_map(name, 8, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("midsa", {}, "did you mean midas"),
        ("midas", {"reading": "literal"}, "midas takes no option 'reading'; it takes block, k"),
        ("lidas", {"readin": "literal"}, "'readin'; it takes block, reading, keep_first, k"),
        ("g_stack", {"block": 4}, "g_stack takes no option 'block'; it takes times"),
        ("progressive", {"times": 2}, "progressive takes no option 'times'"),
        ("loop", {"keep_first": 1}, "'keep_first'; it takes k, times, prefix, suffix"),
        ("drop_last", {"keep_last": 1}, "'keep_last'; it takes count"),
        ("custom", {"stored": 8}, "takes no option 'stored'; it takes sources"),
        ("inherit_first", {"keep_first": 2}, "'keep_first'; it takes k"),
        ("repeat_block", {}, "repeat_block needs the option index"),
        ("random_block", {}, "random_block needs the option seed"),
        ("midas", {"block": 0}, "midas: the block must be at least 1; got 0"),
        ("midas", {"block": "4"}, "must be a whole number; got '4'"),
        ("midas", {"keep_first": None}, "keep_first must be a whole number"),
        ("g_stack", {"times": 1}, "times must be at least 2"),
        ("gradstack", {"block": 9}, "a block of 9 layers, but there are only 8"),
        ("lidas", {"reading": 3}, "'in_place' or 'literal'"),
        ("midas", {"keep_first": 4, "keep_last": 4}, "none lies between"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(UserError, match=message):
        growth_map(name, 8, 16, **options)


def test_every_operator_has_its_way():
    """None of the names is forgotten: each leads somewhere from some depth."""
    ways = {
        "single_layer": (1, 4, {}), "inherit_first": (4, 6, {}), "every_nth": (4, 2, {}),
        "drop_last": (4, 2, {}), "custom": (4, 2, {"sources": [0, 1]}),
        "repeat_block": (4, 8, {"index": 0}), "random_block": (4, 8, {"seed": 0}),
    }
    for name in OPERATORS:
        depth, to, options = ways.get(name, (4, 8, {}))
        grown = growth_map(name, depth, to, **options)
        assert (grown.stored, len(grown)) == (depth, to)


# ---- stages -----------------------------------------------------------------------------------


def test_stages_of_equal_steps():
    for name in ("midas", "gradstack", "lidas", "first_block"):
        assert stage_depths(name, 24, 6) == [4, 8, 12, 16, 20, 24]
        assert stage_depths(name, 24, 1) == [24]
        assert stage_depths(name, 26, 3, keep_first=1, keep_last=1) == [10, 18, 26]
    with pytest.raises(
        UserError,
        match="26 with 2 layers kept cannot be reached in 5 equal stages; "
        "numbers of stages that divide it: 1, 2, 3, 4, 6",
    ):
        stage_depths("midas", 26, 5, keep_first=1, keep_last=1)


def test_stages_that_multiply():
    assert stage_depths("progressive", 24, 4) == [3, 6, 12, 24]
    assert stage_depths("interleave", 24, 2) == [12, 24]
    assert stage_depths("interleave", 27, 3, times=3) == [3, 9, 27]
    assert stage_depths("g_stack", 26, 2, times=4, keep_first=2) == [8, 26]
    with pytest.raises(UserError, match="g_stack needs the option times"):
        stage_depths("g_stack", 24, 2)
    with pytest.raises(UserError, match="progressive in 5 stages.*16 does not divide 24.*most 4"):
        stage_depths("progressive", 24, 5)


@pytest.mark.parametrize(
    "name", ["solar", "loop", "single_layer", "inherit_first", "custom", "every_nth", "drop_last"]
)
def test_methods_that_space_no_stages(name):
    assert stage_depths(name, 24, 1) == [24]
    with pytest.raises(UserError, match=f"{name} has no stages of its own; list .* ending at 24"):
        stage_depths(name, 24, 2)


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(["midas", "gradstack", "lidas", "progressive", "interleave"]),
    base=st.integers(1, 4), stages=st.integers(1, 4), first=st.integers(0, 2),
)
def test_stages_lead_to_each_other(name, base, stages, first):
    by_factor = name in ("progressive", "interleave")
    depth = first + (base * 2 ** (stages - 1) if by_factor else base * stages)
    depths = stage_depths(name, depth, stages, keep_first=first)
    assert len(depths) == stages and depths[-1] == depth
    for before, after in zip(depths, depths[1:]):
        grown = growth_map(name, before, after, keep_first=first)
        if not by_factor:
            # The block is the method's own: what one stage adds.
            assert grown == operator(name)(before, base, keep_first=first)


@pytest.mark.parametrize(
    ("name", "depth", "to", "options", "picture"),
    [
        ("midas", 8, 16, {"block": 4}, "(0..3)×3 4..7"),
        ("gradstack", 8, 14, {"block": 4}, "0..3 (4..7)×2 6 7"),
        ("lidas", 8, 16, {"block": 4}, "0 1 (2..5)×3 6 7"),
        ("g_stack", 4, 16, {}, "(0..3)×4"),
        ("interleave", 4, 6, {}, "(0)×2 1 (2)×2 3"),
        ("solar", 8, 12, {}, "0 1 (2..5)×2 6 7"),
        ("inherit_first", 4, 8, {}, "0..3 (+)×4"),
        ("every_nth", 8, 4, {}, "0 2 4 6"),
    ],
)
def test_pictures(name, depth, to, options, picture):
    assert str(growth_map(name, depth, to, **options)) == picture
