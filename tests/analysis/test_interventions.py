"""What is skipped, swapped, repeated and reversed."""

from __future__ import annotations

from stacking_jax.analysis.interventions import interventions


def maps(sources, block):
    found = {}
    for each in interventions(sources, block):
        found.setdefault((each.unit, each.kind), []).append("".join(map(str, each.sources)))
    return found


def test_layers_and_blocks_of_a_plain_stack():
    assert maps(range(4), 2) == {
        ("layer", "skip"): ["123", "023", "013", "012"],
        ("layer", "swap"): ["1023", "0213", "0132"],
        ("layer", "repeat"): ["00123", "01123", "01223", "01233"],
        ("block", "skip"): ["23", "01"],
        ("block", "swap"): ["2301"],
        ("block", "repeat"): ["010123", "012323"],
        ("block", "reverse"): ["1023", "0132"],
    }


def test_positions_of_a_loop_are_changed_not_its_stored_layers():
    found = maps((0, 1, 0, 1), 2)
    assert found["layer", "skip"] == ["101", "001", "011", "010"]
    assert found["block", "skip"] == ["01", "01"]


def test_blocks_that_are_layers_or_everything_are_left_out():
    assert {unit for unit, _ in maps(range(3), 1)} == {"layer"}
    assert {unit for unit, _ in maps(range(3), 3)} == {"layer"}
    assert maps((0,), 1) == {("layer", "repeat"): ["00"]}
