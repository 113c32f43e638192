"""`grow` on the parameter listings of public models, with and without their Adam state.

The listings in trees/ are paths, shapes and dtypes, six layers each; `source`
in each names the repository, commit and file that they were read from.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import optax
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Scanned, Unrolled, grow, midas

TREES = Path(__file__).resolve().parent / "trees"
REAL = {
    "t5x_scalable_scanned_axis1": Scanned("decoder/decoder", axis=1),
    "maxtext_llama_scanned_axis1": Scanned("decoder/layers", axis=1),
    "maxtext_llama_unrolled": Unrolled("decoder/layers_{}"),
    "big_vision_vit_scan": Scanned("Transformer/encoderblock"),
    "big_vision_vit_loop": Unrolled("Transformer/encoderblock_{}"),
    "flax_gemma2_nnx_list": Unrolled("layers/{}"),
}


def read_listing(name: str) -> dict:
    """A real model's abstract parameters as nested dicts."""
    tree: dict = {}
    for path, shape, dtype in json.loads((TREES / f"{name}.json").read_text())["leaves"]:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), dtype)
    return tree


def paths_and_shapes(tree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in leaves}


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_models_grow_from_6_to_8_layers(name):
    layout = REAL[name]
    tree = read_listing(name)
    before, after = paths_and_shapes(tree), paths_and_shapes(grow(tree, midas(6, 2), layout))
    if isinstance(layout, Scanned):
        in_stack = {path for path in before if f"{layout.path}/" in path}
        assert in_stack and after.keys() == before.keys()
        for path, shape in before.items():
            wanted = list(shape)
            if path in in_stack:
                assert shape[layout.axis] == 6
                wanted[layout.axis] = 8
            assert after[path] == tuple(wanted), path
        return
    # Two more layers, each with as many leaves and the same shapes as layer 0.
    inside = f"/{layout.pattern.format(0)}/"
    first = {path: shape for path, shape in before.items() if inside in f"/{path}"}
    for new in (6, 7):
        for path, shape in first.items():
            renamed = f"/{path}".replace(inside, f"/{layout.pattern.format(new)}/")[1:]
            assert after.pop(renamed) == shape
    assert first and after == before


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_models_grow_with_their_adam_state(name):
    layout = REAL[name]
    params = read_listing(name)
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    grown = grow({"params": params, "opt": state}, midas(6, 2), layout)
    expected = jax.eval_shape(optax.adam(1e-3).init, grow(params, midas(6, 2), layout))
    assert grown["opt"] == expected


def test_t5x_encoder_and_decoder_are_told_apart():
    tree = read_listing("t5x_scalable_scanned_axis1")
    grown = grow(tree, midas(6, 2), Scanned("encoder/encoder", axis=1))
    assert grown["params"]["decoder"] == tree["params"]["decoder"]
    kernel = grown["params"]["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"]
    assert kernel.shape == (64, 8, 128)
    with pytest.raises(UserError, match="axis 0 holds 64 layers"):
        grow(tree, midas(6, 2), Scanned("encoder/encoder"))
