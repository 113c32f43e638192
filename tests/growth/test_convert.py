"""Converters: exact round trips between stacked and unrolled layers."""

from __future__ import annotations

import collections

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Scanned, Unrolled, grow, to_scanned, to_unrolled
from stacking_jax.growth.layerwise import layerwise


def model(depth: int = 3, axis: int = 0) -> dict:
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return rng.normal(size=(*shape[:axis], depth, *shape[axis:])).astype(np.float32)

    return {
        "params": {
            "decoder": {
                "layers": {"attn": {"w": leaf(4, 5)}, "scale": leaf(4)}, "norm": np.ones(4)
            },
            "embed": np.ones((7, 4)),
        }
    }


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(e) and a.dtype == e.dtype and a.shape == e.shape
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


PATTERNS = [
    ("decoder/layers_{}", str), ("decoder/layers/{}", str), ("decoder/layers/{}", int),
    ("decoder/layers/{}", list), ("decoder/layers/{}", tuple), ("decoder/blocks/h_{}", str),
    ("{}", str), ("other/place/block{}_x", str),
]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.sampled_from([0, 1, -1]), st.sampled_from(PATTERNS), st.booleans())
def test_there_and_back(depth, axis, pattern, on_device):
    pattern, numbered_by = pattern
    place = axis if axis >= 0 else 2
    tree = model(depth, place if place < 2 else 1)
    if axis == -1:  # the last axis of each array, whatever its rank
        stack = tree["params"]["decoder"]["layers"]
        tree["params"]["decoder"]["layers"] = jax.tree.map(lambda x: np.moveaxis(x, 1, -1), stack)
    tree = jax.tree.map(jnp.asarray, tree) if on_device else tree
    scanned = Scanned("decoder/layers", axis)
    apart = to_unrolled(tree, scanned, pattern, numbered_by=numbered_by)
    node = apart["params"]
    for key in Unrolled(pattern).parents:
        node = node[key]
    if numbered_by in (list, tuple):
        assert type(node) is numbered_by
    last = node[depth - 1] if numbered_by is not str else node[Unrolled(pattern).key(depth - 1)]
    old = tree["params"]["decoder"]["layers"]["attn"]["w"]
    np.testing.assert_array_equal(last["attn"]["w"], np.take(np.asarray(old), depth - 1, axis))
    assert apart["params"]["embed"] is tree["params"]["embed"]
    assert_same(to_scanned(apart, pattern, "decoder/layers", axis), tree)


def test_growing_and_converting_commute():
    tree, depth_map = model(6, axis=1), DepthMap([0, 1, 1, 4, 5], stored=6)
    scanned, unrolled = Scanned("decoder/layers", 1), Unrolled("decoder/layers_{}")
    first = to_unrolled(grow(tree, depth_map, scanned), scanned, unrolled)
    assert_same(first, grow(to_unrolled(tree, scanned, unrolled), depth_map, unrolled))


def test_a_train_state_is_converted_everywhere():
    params = jax.tree.map(jnp.asarray, model()["params"])
    optimizer = optax.adam(1e-3)
    state = {"params": params, "opt": optimizer.init(params), "ema": params}
    apart = to_unrolled(state, Scanned("decoder/layers"), "decoder/layers_{}")
    assert_same(apart["opt"], optimizer.init(apart["params"]))
    assert_same(to_scanned(apart, "decoder/layers_{}", "decoder/layers"), state)


def test_stacks_beside_and_below_one_another():
    tree = {"layers": {"w": np.arange(2)}, "side": {"layers": {"w": np.arange(3)}}}
    apart = to_unrolled(tree, Scanned("layers"), "layers_{}")
    assert sorted(apart) == ["layers_0", "layers_1", "side"]
    assert sorted(apart["side"]) == ["layers_0", "layers_1", "layers_2"]
    assert_same(to_scanned(apart, "layers_{}", "layers"), tree)


def test_containers_stay_what_they_are():
    frozen = flax.core.freeze(model())
    apart = to_unrolled(frozen, Scanned("decoder/layers"), "decoder/layers/{}")
    assert isinstance(apart["params"]["decoder"], flax.core.FrozenDict)
    assert_same(to_scanned(apart, "decoder/layers/{}", "decoder/layers"), frozen)
    ordered = collections.OrderedDict(embed=np.ones(1), layers={"w": np.ones((2, 3))})
    assert type(to_unrolled(ordered, Scanned("layers"), "h_{}")) is collections.OrderedDict


def test_boxes_gain_and_lose_the_name_of_the_axis():
    names = {2: ("embed", "layers"), 3: ("embed", "layers", "mlp")}
    boxed = jax.tree.map(
        lambda x: nn.LogicallyPartitioned(x, names=names[x.ndim]),
        {"decoder": {"layers": model(3, axis=1)["params"]["decoder"]["layers"]}},
    )
    apart = to_unrolled(boxed, Scanned("decoder/layers", 1), "decoder/layers_{}")
    box = apart["decoder"]["layers_1"]["attn"]["w"]
    assert isinstance(box, nn.LogicallyPartitioned) and box.names == ("embed", "mlp")
    assert apart["decoder"]["layers_1"]["scale"].names == ("embed",)
    assert_same(to_scanned(apart, "decoder/layers_{}", "decoder/layers", 1), boxed)
    # Boxes that do not name every axis cannot lose the right name.
    short = {"layers": {"w": nn.Partitioned(np.ones((2, 3)), names=("embed",))}}
    with pytest.raises(UserError, match="layers/w names 1 axes, .*, but has 2"):
        to_unrolled(short, Scanned("layers"), "layers_{}")


def test_nnx_states():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        param = nnx.Param(jnp.arange(12.0).reshape(3, 4), sharding_names=(None, "x"))
    state = nnx.State({"layers": {"w": param}, "head": nnx.Param(jnp.ones(2))})
    apart = to_unrolled(state, Scanned("layers"), "layers/{}", numbered_by=int)
    assert isinstance(apart, nnx.State) and list(apart["layers"]) == [0, 1, 2]
    variable = apart["layers"][1]["w"]
    assert isinstance(variable, nnx.Param)
    names = [x for x in variable.get_metadata().values() if isinstance(x, tuple | P)]
    assert list(map(tuple, names)) == [("x",)]
    np.testing.assert_array_equal(variable[...], [4, 5, 6, 7])
    assert tuple(param.get_metadata("out_sharding")) == (None, "x"), "the given tree is left alone"
    back = to_scanned(apart, "layers/{}", "layers", axis_name=None)
    assert_same(back, state)


def test_abstract_trees():
    tree = model()
    abstract = jax.eval_shape(lambda: tree)
    apart = to_unrolled(abstract, Scanned("decoder/layers"), "decoder/layers_{}")
    assert apart == jax.eval_shape(
        lambda: to_unrolled(tree, Scanned("decoder/layers"), "decoder/layers_{}"))
    assert to_scanned(apart, "decoder/layers_{}", "decoder/layers") == abstract


def test_conversion_under_jit():
    tree = jax.tree.map(jnp.asarray, model())
    go = lambda t: to_unrolled(t, Scanned("decoder/layers"), "decoder/layers_{}")  # noqa: E731
    assert_same(jax.jit(go)(tree), go(tree))


def test_errors():
    tree = model()
    scanned = Scanned("decoder/layers")
    adafactor = optax.scale_by_factored_rms().init(tree)
    wrapped = layerwise(optax.scale_by_adam(), scanned).init(tree)
    taken = {"layers": {"w": np.ones((2, 2))}, "h_0": {"w": np.ones(2)}}
    in_a_list = {"decoder": [{"layers": np.ones((2, 2))}]}
    for call, message in [
        (lambda: to_unrolled(tree, Scanned("blocks"), "b_{}"), "no leaf of the tree lies under 'blocks'"),
        (lambda: to_scanned(tree, "blocks_{}", "b"), "no leaf of the tree lies under 'blocks_{}'"),
        (lambda: to_unrolled(tree, Unrolled("h_{}"), "h_{}"), "starts from Scanned"),
        (lambda: to_scanned(tree, scanned, "h"), "starts from Unrolled"),
        (lambda: to_unrolled(tree, scanned, "h_{}", numbered_by=list), "'h_{}' makes names"),
        (lambda: to_unrolled(tree, scanned, "{}", numbered_by=list), "numbered layers need a key"),
        (lambda: to_unrolled(tree, scanned, "h/{}", numbered_by=set), "numbered by str, int, list or"),
        (lambda: to_unrolled(taken, Scanned("layers"), "h_{}"), "the tree is taken, so there is no place for 'h_{}'"),
        (lambda: to_unrolled(tree, scanned, "decoder/{}", numbered_by=int), "decoder is taken"),
        (lambda: to_unrolled(in_a_list, Scanned("0/layers"), "h_{}"), "does not lie in dicts"),
        (lambda: to_unrolled({"h": {"a": np.ones((2, 1)), "b": np.ones(3)}}, Scanned("h"), "h_{}"),
         "h/b has shape .* 3 layers, but h/a holds 2"),
        (lambda: to_scanned({"h_0": {"a": np.ones(2)}, "h_1": {"a": np.ones(3)}}, "h_{}", "h"),
         "the layers h_0 and h_1 under the tree differ in a"),
        (lambda: to_scanned({"h_0": {"a": np.ones(2)}, "h_2": {"a": np.ones(2)}}, "h_{}", "h"),
         r"numbered \[0, 2\]"),
        (lambda: to_scanned({"h_0": {"a": np.ones(2)}, "h": 1}, "h_{}", "h"), "h is taken"),
        (lambda: to_scanned({"h_0": {"a": np.float32(2)}}, "h_{}", "h", 1), "no room for layers on axis 1"),
        (lambda: to_unrolled(adafactor, scanned, "decoder/layers_{}"), "factored moments"),
        (lambda: to_unrolled(wrapped, scanned, "decoder/layers_{}"), "layerwise optimiser state"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
