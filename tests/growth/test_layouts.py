"""Layouts: which paths belong to a stack."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.errors import UserError
from stacking_jax.growth import Scanned, Unrolled
from stacking_jax.growth.layouts import path_keys


@pytest.mark.parametrize(
    ("path", "leaf", "matches"),
    [
        ("layers", "params/decoder/layers/mlp/wi", True),
        ("decoder/layers", "opt_state/0/mu/params/decoder/layers/mlp/wi", True),
        ("decoder/layers", "params/decoder/encoder/layers/wi", False),
        ("decoder/layers", "layers/decoder/wi", False),
        ("layers", "params/layers_0/wi", False),
        ("layers", "params/my_layers/wi", False),
        ("a/a/b", "a/a/a/b", True),
        ("/layers/", "layers/w", True),
        ("x/y/z", "x/y", False),
    ],
)
def test_a_scanned_path_is_a_contiguous_run(path, leaf, matches):
    assert Scanned(path).matches(leaf.split("/")) is matches


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from("abc"), max_size=4),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    st.lists(st.sampled_from("abc"), max_size=4),
)
def test_a_run_is_found_wherever_it_stands(before, run, after):
    assert Scanned("/".join(run)).matches([*before, *run, *after])


@pytest.mark.parametrize(
    ("pattern", "key", "number"),
    [
        ("blocks_{}", "blocks_0", 0),
        ("blocks_{}", "blocks_12", 12),
        ("blocks_{}", "blocks_012", None),
        ("blocks_{}", "blocks_", None),
        ("blocks_{}", "blocks_-1", None),
        ("blocks_{}", "my_blocks_1", None),
        ("blocks_{}", "blocks_1_norm", None),
        ("h/{}", "7", 7),
        ("h/{}", "7a", None),
        ("layer{}_block", "layer3_block", 3),
        ("a.b{}", "axb1", None),
    ],
)
def test_the_number_of_an_unrolled_layer(pattern, key, number):
    layout = Unrolled(pattern)
    assert layout.number(key) == number
    if number is not None:
        assert layout.key(number) == key


@pytest.mark.parametrize("pattern", ["blocks", "", "{}_{}", "h/{}/{}"])
def test_a_pattern_needs_one_number(pattern):
    with pytest.raises(UserError, match="exactly one {}"):
        Unrolled(pattern)


def test_the_number_stands_in_the_last_key():
    with pytest.raises(UserError, match="last key"):
        Unrolled("h/{}/attention")


@pytest.mark.parametrize("path", ["", "/"])
def test_a_path_needs_a_key(path):
    with pytest.raises(UserError, match="at least one key"):
        Scanned(path)


def test_keys_of_every_kind_of_container():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        params: dict

    tree = State({"h": [np.zeros(1), {3: np.zeros(1)}]})
    paths = [path_keys(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert paths == [("params", "h", "0"), ("params", "h", "1", "3")]


def test_layouts_are_values():
    assert Scanned("a/b", axis=1) == Scanned("a/b", 1) != Scanned("a/b")
    assert len({Unrolled("h/{}"), Unrolled("h/{}")}) == 1
