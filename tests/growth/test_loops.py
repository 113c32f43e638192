"""`Loop`: its map, its cuts, what it costs, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Loop


def test_the_map():
    loop = Loop(1, 2, 3)
    assert loop.depth_map(4).sources == (0, 1, 2, 1, 2, 1, 2, 3)
    assert str(loop.depth_map(4)) == "0 (1 2)×3 3"
    assert Loop(0, 2, 2).depth_map(2).sources == (0, 1, 0, 1)
    assert Loop(1, 1, 1).depth_map(3).is_identity
    with pytest.raises(UserError, match="needs 3 stored layers; there are 2"):
        loop.depth_map(2)


@pytest.mark.parametrize(
    ("loop", "spans"),
    [
        (Loop(0, 1, 4), [(0, 4)]),
        (Loop(0, 1, 4, backprop=4), [(0, 4)]),
        (Loop(0, 1, 4, backprop=1), [(0, 3), (3, 4)]),
        (Loop(0, 1, 4, exits=4), [(0, 4)]),
        (Loop(0, 1, 6, backprop=4, exits=2), [(0, 2), (2, 4), (4, 6)]),
    ],
)
def test_turns_are_cut_only_where_something_changes(loop, spans):
    assert loop.spans() == spans


def test_positions():
    loop = Loop(2, 3, 5, inject="stream", backprop=2, exits=2)
    assert loop.forward_only == 9
    assert loop.exit_positions(9) == 4
    assert dataclasses.replace(loop, inject="input").forward_only == 11
    assert Loop(2, 3, 5).forward_only == Loop(2, 3, 5).exit_positions(9) == 0


def test_more_turns_at_inference():
    loop = Loop(2, 3, 4, inject="stream", backprop=2, exits=2)
    assert loop.with_turns(9) == Loop(2, 3, 9, inject="stream")
    assert not loop.is_plain and Loop(2, 3, 4).is_plain
    assert Loop.of_dict(dataclasses.asdict(loop)) == loop and Loop.of_dict(None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(turns=0), "turns of a loop is a whole number of at least 1; got 0"),
        (dict(block=True), "block of a loop"),
        (dict(inject="noise"), "injects 'input' or 'stream'"),
        (dict(backprop=4), "through 1 to 3 turns of this loop; got 4"),
        (dict(backprop=1, exits=2), "at most so many states; got 2"),
    ],
)
def test_errors(values, message):
    with pytest.raises(UserError, match=message):
        Loop(**(dict(start=0, block=1, turns=3) | values))
