"""The table between the axes of arrays and those of the mesh, and what it refuses."""

from __future__ import annotations

import json

import pytest

from stacking_jax.errors import UserError
from stacking_jax.training.rules import AXES, TABLE, Rules


def test_the_table_names_axes_that_exist_and_splits_nothing_twice():
    assert {axis for axes in TABLE.values() for axis in axes} == set(AXES)
    assert Rules.of() == Rules.of({}) == Rules() and hash(Rules.of()) == hash(Rules())


@pytest.mark.parametrize(
    ("given", "axes"),
    [
        (("fsdp", "sequence"), ("fsdp", "sequence")), ("tensor", ("tensor",)), (None, ()), ((), ()),
        (["fsdp"], ("fsdp",)),
    ],
)
def test_a_line_can_be_replaced(given, axes):
    rules = Rules.of({"embed": given})
    assert rules.axes("embed") == axes and rules.axes(None) == ()
    assert all(rules.axes(name) == TABLE[name] for name in TABLE if name != "embed")


def test_a_table_survives_json():
    overrides = {"embed": ("fsdp", "sequence"), "vocab": None}
    assert Rules.of(json.loads(json.dumps(overrides))) == Rules.of(overrides)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"width": "fsdp"}, "no array has an axis 'width'; there are batch, length, keys"),
        ({"embed": "model"}, "'embed' cannot be split by 'model', which is no axis of the mesh"),
        ({"embed": ("fsdp", "fsdp")}, "'embed' names a mesh axis twice"),
        ({"embed": 3}, "'embed' is split by a mesh axis, several in parentheses, or None; got 3"),
        ([("embed", "fsdp")], "is a table such as"),
        (
            {"length": "fsdp"},
            "activations with the axes batch × length × stream would be split over 'fsdp' twice, "
            "by batch and by length",
        ),
        ({"keys": "tensor"}, "by keys and by kv_heads"),
        ({"keys": "sequence"}, "by length and by keys"),
        ({"stream": "tensor"}, "by stream"),
    ],
)
def test_what_cannot_be_is_one_line(overrides, part):
    with pytest.raises(UserError) as caught:
        Rules.of(overrides)
    message = str(caught.value)
    assert message.startswith("MeshConfig.rules") and part in message and "\n" not in message


def test_a_parameter_that_would_be_split_twice_is_named():
    with pytest.raises(UserError, match="query with the axes embed × heads .* 'tensor' twice"):
        Rules.of({"embed": "tensor"}).split(("embed", "heads"), "query")


def test_decoding_deals_out_rows_over_what_splits_the_length():
    rules = Rules.of().for_decoding()
    assert rules.axes("batch") == ("slice", "data", "fsdp", "sequence")
    assert rules.axes("length") == () and rules.for_decoding() == rules
    shared = Rules.of({"length": ("sequence", "data"), "batch": "fsdp"}).for_decoding()
    assert shared.axes("batch") == ("fsdp", "sequence", "data")
