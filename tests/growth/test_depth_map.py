"""The depth map: what it holds, how it composes, how it looks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.errors import UserError
from stacking_jax.growth import NEW, DepthMap, Scanned, Segment, as_depth_map, grow, midas
from stacking_jax.growth.depth_map import contiguous_runs

layers = st.integers(min_value=0, max_value=5)
maps = st.lists(layers, min_size=1, max_size=24)
maps_with_new = st.lists(st.one_of(layers, st.just(NEW)), min_size=1, max_size=24)


@settings(deadline=None, max_examples=200)
@given(maps_with_new)
def test_folding_into_segments_keeps_the_sources(sources):
    folded = DepthMap(sources, stored=6)
    assert folded.sources == tuple(sources)
    assert len(folded) == len(sources)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.lists(layers, min_size=1, max_size=4), st.integers(1, 3)), min_size=1))
def test_segments_flatten_in_order(parts):
    built = DepthMap([Segment(tuple(unit), repeats) for unit, repeats in parts], stored=6)
    flat = [layer for unit, repeats in parts for _ in range(repeats) for layer in unit]
    assert built.sources == tuple(flat)
    assert built == DepthMap(flat, stored=6)
    assert hash(built) == hash(DepthMap(flat, stored=6))


@settings(deadline=None, max_examples=100)
@given(first=maps, data=st.data())
def test_composition_equals_growing_twice(first, data):
    first = DepthMap(first, stored=6)
    position = st.integers(0, len(first) - 1)
    second = DepthMap(data.draw(st.lists(position, min_size=1, max_size=12)), stored=len(first))
    tree = {"layers": np.arange(12).reshape(6, 2)}
    twice = grow(grow(tree, first, Scanned("layers")), second, Scanned("layers"))
    once = grow(tree, first.then(second), Scanned("layers"))
    np.testing.assert_array_equal(twice["layers"], once["layers"])


@settings(deadline=None, max_examples=50)
@given(maps_with_new)
def test_identity_is_neutral(sources):
    some = DepthMap(sources, stored=6)
    assert DepthMap.identity(6).then(some) == some
    assert some.then(DepthMap.identity(len(some))) == some
    assert some.is_identity == (some.sources == tuple(range(6)))


@pytest.mark.parametrize(
    ("sources", "segments"),
    [
        (range(8), [Segment(tuple(range(8)))]),
        ([*range(8)] * 3, [Segment(tuple(range(8)), 3)]),
        ([0, 0, 1, 1, 2, 2], [Segment((0,), 2), Segment((1,), 2), Segment((2,), 2)]),
        (
            [0, 1, *[2, 3, 4, 5] * 3, 6, 7],
            [Segment((0, 1)), Segment((2, 3, 4, 5), 3), Segment((6, 7))],
        ),
        ([0, 0, 1, 0, 0, 1], [Segment((0, 0, 1), 2)]),
    ],
)
def test_loops_are_found_in_a_flat_list(sources, segments):
    assert DepthMap(sources).segments == tuple(segments)


@pytest.mark.parametrize(
    ("sources", "picture"),
    [
        ([0], "0"),
        ([0, 1], "0 1"),
        (range(8), "0..7"),
        ([0, 2, 3, 5, 7], "0 2 3 5 7"),
        ([0, 0, 1, 1], "(0)×2 (1)×2"),
        ([0, 1, 1, 2, 2, 3, 3, 4], "0 (1)×2..(3)×2 4"),
        ([0, 0, 1, 1, 2, 2, 2, 3, 3, 3, NEW, NEW, 0, 0], "(0)×2 (1)×2 (2)×3 (3)×3 (+)×2 (0)×2"),
        ([0, 1, *[2, 3, 4, 5] * 3, 6, 7], "0 1 (2..5)×3 6 7"),
        (midas(8, 4).sources, "(0..3)×2 4..7"),
        ([3, 2, 1, 0], "3 2 1 0"),
        ([0, 1, NEW, 2, 3, 4], "0 1 + 2..4"),
        ([NEW, 0, 1, 2], "+ 0..2"),
        ([0, 1, 2, NEW, NEW, NEW], "0..2 (+)×3"),
        ([0, NEW, 1, NEW], "0 + 1 +"),
    ],
)
def test_picture(sources, picture):
    assert str(DepthMap(sources)) == picture


def test_repr_shows_what_equality_sees():
    assert repr(DepthMap([0, 1, 1], stored=4)) == "DepthMap([0, 1, 1], stored=4)"


def test_maps_are_values():
    one, other = DepthMap([0, 1, 0, 1]), DepthMap([Segment((0, 1), 2)])
    assert one == other and len({one, other}) == 1
    assert one != DepthMap([0, 1, 0, 1], stored=3), "the same list over more stored layers"
    assert one != (0, 1, 0, 1)
    assert copy.deepcopy(one) == one
    with pytest.raises(AttributeError):
        one.stored = 5


def test_copies_are_the_later_appearances():
    assert midas(8, 4).copies == (False,) * 4 + (True,) * 4 + (False,) * 4
    assert DepthMap([2, 1, 2]).copies == (False, False, True)


def test_numpy_integers_are_layers():
    built = DepthMap(np.array([0, 1, 1]), stored=np.int64(2))
    assert built.sources == (0, 1, 1)
    assert all(type(layer) is int for layer in built.sources)
    assert hash(built) == hash(DepthMap([0, 1, 1]))


def test_a_stack_of_no_layers_has_a_map():
    nothing = DepthMap([], stored=0)
    assert nothing == DepthMap.identity(0) == copy.deepcopy(nothing)
    assert nothing.is_identity and len(nothing) == 0 and str(nothing) == "none"
    born = DepthMap([NEW] * 3, stored=0)
    assert nothing.then(born) == born and str(born) == "(+)×3"


@pytest.mark.parametrize(
    ("sources", "stored", "message"),
    [
        ([], None, "at least one layer"),
        ([Segment(())], None, "at least one layer"),
        ([], 2, "at least one layer"),
        ([0, 3], 3, "names layer 3"),
        ([-2, 0], None, "names layer -2, but the stack stores layers 0 to 0; NEW"),
        ([0], 0, "names layer 0, but the stack stores none"),
        ([NEW], -1, "0 or more stored layers; got -1"),
        ([0.0, 1.0], None, "whole layer numbers"),
        (["0", "1"], None, "whole layer numbers"),
        ([True, False, True], None, "whole layer numbers"),
        (np.eye(2, dtype=int), None, "whole layer numbers"),
        ([Segment((0,)), 1], None, "whole layer numbers"),
        ([0, 1], 2.5, "whole layer numbers"),
    ],
)
def test_bad_maps(sources, stored, message):
    with pytest.raises(UserError, match=message):
        DepthMap(sources, stored=stored)


def test_bad_segments():
    with pytest.raises(UserError, match="at least once"):
        Segment((0, 1), 0)
    with pytest.raises(UserError, match="whole layer numbers"):
        Segment((0, 1), 1.5)
    assert hash(Segment([0, 1], 2)) == hash(Segment((0, 1), 2)), "a list of layers is fine"


def test_composition_needs_matching_depths():
    with pytest.raises(UserError, match="makes 3 layers, the second reads from 4"):
        DepthMap([0, 1, 1]).then(DepthMap.identity(4))


def test_as_depth_map_checks_the_stored_depth():
    some = DepthMap([0, 1])
    assert as_depth_map(some, 2) is some
    assert as_depth_map([0, 1], 3) == DepthMap([0, 1], stored=3)
    with pytest.raises(UserError, match="reads from 2 stored layers, but the stack holds 3"):
        as_depth_map(some, 3)


@settings(deadline=None, max_examples=50)
@given(maps_with_new)
def test_contiguous_runs_are_a_partition(sources):
    runs = contiguous_runs(sources)
    assert [layer for first, last in runs for layer in range(first, last + 1)] == sources
    assert all(first == last for first, last in runs if NEW in (first, last))
    # Maximal: the next run never goes on where one ended.
    assert all(
        after[0] != before[1] + 1 for before, after in zip(runs, runs[1:]) if before[1] != NEW
    )


# ---- layers without a source ------------------------------------------------------------------


def test_new_layers_have_no_source_and_are_no_copies():
    some = DepthMap([0, NEW, 0, NEW, 2], stored=3)
    assert some.sources == (0, NEW, 0, NEW, 2)
    assert some.fresh == (False, True, False, True, False)
    assert some.copies == (False, False, True, False, False)
    assert DepthMap([0, NEW, 1]).stored == 2, "NEW names no stored layer"
    assert DepthMap([NEW, NEW]).stored == 0
    assert not DepthMap([0, NEW]).is_identity
    assert not any(midas(8, 4).fresh)


def test_maps_with_new_layers_are_values():
    one = DepthMap([0, NEW, NEW], stored=2)
    other = DepthMap([Segment((0,)), Segment((NEW,), 2)], stored=2)
    assert one == other and len({one, other}) == 1
    assert one != DepthMap([0, NEW, 1]) and one != DepthMap([0, NEW, NEW])
    assert copy.deepcopy(one) == one
    assert repr(one) == "DepthMap([0, -1, -1], stored=2)"
    assert as_depth_map([0, NEW], 1) == DepthMap([0, NEW])


@settings(deadline=None, max_examples=100)
@given(first=maps_with_new, data=st.data())
def test_new_layers_stay_new_through_composition(first, data):
    position = st.one_of(st.integers(0, len(first) - 1), st.just(NEW))
    second = data.draw(st.lists(position, min_size=1, max_size=12))
    composed = DepthMap(first, stored=6).then(DepthMap(second, stored=len(first)))
    labels = [f"old {layer}" if layer != NEW else "new" for layer in first]
    expected = [labels[layer] if layer != NEW else "new" for layer in second]
    assert [f"old {s}" if s != NEW else "new" for s in composed.sources] == expected
    assert composed.stored == 6
