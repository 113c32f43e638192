"""`grow` on trees of every kind, abstract, concrete and sharded."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Scanned, Unrolled, gradstack, grow, midas

MAPS = {
    "midas": midas(6, 2),
    "gradstack": gradstack(6, 3),
    "g_stack": DepthMap([*range(6)] * 2),
    "interleave": DepthMap([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "shrink": DepthMap([0, 2, 5], stored=6),
    "reverse": DepthMap([5, 4, 3, 2, 1, 0]),
    "identity": DepthMap.identity(6),
}


def stack(depth: int = 6, axis: int = 0, dtype=np.float32) -> dict:
    """A small model whose every number is different."""
    counter = iter(range(10_000))

    def leaf(*shape):
        shape = [*shape]
        shape.insert(axis, depth)
        size = int(np.prod(shape))
        start = next(counter) * 100
        return np.arange(start, start + size).reshape(shape).astype(dtype)

    return {
        "embedding": np.arange(8).reshape(4, 2).astype(dtype),
        "decoder": {"layers": {"wi": leaf(3, 2), "wo": leaf(2, 3)}, "norm": np.ones(6, dtype)},
    }


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_same(actual, expected):
    """Equal structure, types, dtypes, and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


# ---- scanned ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAPS))
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_scanned_equals_numpy_indexing(name, axis, dtype, kind):
    place = axis if axis >= 0 else 2
    tree = stack(axis=place, dtype=dtype)
    expected = {**tree, "decoder": dict(tree["decoder"])}
    expected["decoder"]["layers"] = {
        key: np.take(leaf, MAPS[name].sources, axis=place)
        for key, leaf in tree["decoder"]["layers"].items()
    }
    given_tree = tree if kind == "numpy" else to_jax(tree)
    grown = grow(given_tree, MAPS[name], Scanned("decoder/layers", axis=axis))
    assert_same(grown, expected)
    wanted = np.ndarray if kind == "numpy" else jax.Array
    assert all(isinstance(leaf, wanted) for leaf in jax.tree.leaves(grown))


def test_leaves_outside_the_stack_are_the_same_objects():
    tree = to_jax(stack())
    grown = grow(tree, midas(6, 2), Scanned("decoder/layers"))
    assert grown["embedding"] is tree["embedding"]
    # Six entries in a norm are no reason to take it for six layers.
    assert grown["decoder"]["norm"] is tree["decoder"]["norm"]


def test_the_given_tree_is_not_changed():
    tree = stack()
    before = jax.tree.map(np.copy, tree)
    grown = grow(tree, midas(6, 2), Scanned("decoder/layers"))
    grown["decoder"]["layers"]["wi"][:] = -1
    assert_same(tree, before)


def test_a_plain_list_is_read_against_the_stack():
    tree = stack()
    layout = Scanned("decoder/layers")
    assert_same(grow(tree, [0, 2, 2], layout), grow(tree, DepthMap([0, 2, 2], stored=6), layout))
    with pytest.raises(UserError, match="names layer 6, but the stack stores layers 0 to 5"):
        grow(tree, [0, 6], layout)
    uneven = {"layers": {"a": np.zeros((3, 2)), "b": np.zeros((4, 2))}}
    with pytest.raises(UserError, match="layers/b has shape"):
        grow(uneven, [0, 1, 2], Scanned("layers"))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=15),
    st.lists(st.integers(0, 14), min_size=1, max_size=15),
)
def test_growing_twice_is_growing_by_the_composition(first, second):
    first = DepthMap(first, stored=6)
    second = DepthMap([layer % len(first) for layer in second], stored=len(first))
    layout = Scanned("decoder/layers")
    tree = stack()
    twice = grow(grow(tree, first, layout), second, layout)
    assert_same(twice, grow(tree, first.then(second), layout))


# ---- states around parameters -------------------------------------------------------


OPTIMISERS = {
    "adam": lambda: optax.adam(1e-3),
    "adamw + clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "sgd momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-4),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-3), every_k_schedule=2),
}


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_growing_a_state_commutes_with_the_update(name):
    """grow(update(p, s, g)) == update(grow(p), grow(s), grow(g)): moments follow their layers."""
    optimiser = OPTIMISERS[name]()
    layout, depth_map = Scanned("decoder/layers"), DepthMap([0, 0, 1, 2, 3, 4, 5, 5])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1e-3, stack())
    # Small enough that the one thing that couples layers, the global clip, is at rest.
    grads = jax.tree.map(lambda leaf: 1e-4 * jnp.cos(leaf), params)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = update(params, optimiser.init(params), grads)
    updated_then_grown = grow(update(params, state, grads), depth_map, layout)
    grown_then_updated = update(*grow((params, state, grads), depth_map, layout))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-9),
        updated_then_grown, grown_then_updated,
    )


class Averages(NamedTuple):
    ema: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Any
    params: Any
    opt_state: Any
    averages: Averages
    none: None = None


def make_state(params) -> TrainState:
    return TrainState(
        step=jnp.asarray(7),
        params=params,
        opt_state=optax.adam(1e-3).init(params),
        averages=Averages(ema=params, count=np.float32(0.5)),
    )


def test_a_nested_train_state_grows_everywhere_at_once():
    params = to_jax(stack())
    state = make_state(params)
    grown = grow(state, midas(6, 2), Scanned("decoder/layers"))
    expected = make_state(grow(params, midas(6, 2), Scanned("decoder/layers")))
    assert_same(grown, expected)
    assert isinstance(grown, TrainState) and isinstance(grown.averages, Averages)
    assert grown.step is state.step and grown.averages.count is state.averages.count
    assert grown.opt_state[0].count is state.opt_state[0].count


def test_flax_containers():
    params = stack()
    layout = Scanned("decoder/layers")
    plain = grow(params, midas(6, 2), layout)
    frozen = grow(flax.core.freeze(params), midas(6, 2), layout)
    assert isinstance(frozen, flax.core.FrozenDict)
    assert_same(flax.core.unfreeze(frozen), plain)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), params)
    grown = grow(boxed, midas(6, 2), layout)
    assert isinstance(grown["decoder"]["layers"]["wi"], nn.Partitioned)
    assert_same(nn.unbox(grown), plain)

    @flax.struct.dataclass
    class Linen:
        params: Any
        name: str = flax.struct.field(pytree_node=False, default="run")

    assert_same(grow(Linen(params), midas(6, 2), layout), Linen(plain))


def test_nnx_state():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.layers.kernel.set_value(jnp.arange(36.0).reshape(6, 2, 3))
            self.layers.bias.set_value(jnp.arange(18.0).reshape(6, 3))
            self.head = nnx.Linear(2, 3, rngs=nnx.Rngs(1))

    graph, state = nnx.split(Model())
    grown = grow(state, midas(6, 2), Scanned("layers"))
    assert isinstance(grown, nnx.State)
    model = nnx.merge(graph, grown)
    expected = np.arange(36.0, dtype=np.float32).reshape(6, 2, 3)[list(midas(6, 2).sources)]
    np.testing.assert_array_equal(model.layers.kernel[...], expected)
    assert model.head.kernel.shape == (2, 3)


def test_random_keys_and_empty_nodes_pass_through():
    tree = {"layers": {"key": jax.random.split(jax.random.key(0), 2), "none": None, "empty": ()}}
    grown = grow(tree, [0, 1, 1], Scanned("layers"))
    assert grown["layers"]["key"].shape == (3,)
    assert grown["layers"]["none"] is None and grown["layers"]["empty"] == ()


# ---- abstract, traced, sharded ----------------------------------------------------------


def mesh8():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shardings_for(tree, mesh):
    """Every matrix of the stack over the whole mesh, the rest replicated."""

    def of(path, leaf):
        wide = leaf.ndim == 3 and leaf.shape[1] % 2 == 0 and leaf.shape[2] % 4 == 0
        return NamedSharding(mesh, P(None, "fsdp", "tensor") if wide else P())

    return jax.tree_util.tree_map_with_path(of, tree)


def wide_stack(dtype) -> dict:
    rng = np.random.default_rng(0)
    return {
        "embedding": rng.normal(size=(4, 8)).astype(dtype),
        "decoder": {"layers": {"w": rng.normal(size=(6, 4, 8)).astype(dtype),
                               "scale": rng.normal(size=(6, 8)).astype(dtype)}},
    }


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", sorted(MAPS))
def test_sharded_growth_under_jit_is_bit_equal_and_stays_on_the_devices(name, dtype):
    assert jax.device_count() == 8
    host = make_state(wide_stack(dtype))
    mesh, layout = mesh8(), Scanned("decoder/layers")
    state = jax.device_put(host, shardings_for(host, mesh))
    target = jax.eval_shape(lambda tree: grow(tree, MAPS[name], layout), state)
    out = shardings_for(target, mesh)
    compiled = (
        jax.jit(lambda tree: grow(tree, MAPS[name], layout), out_shardings=out)
        .lower(state)
        .compile()
    )
    text = compiled.as_text()
    for op in ("all-gather", "all-to-all", "all-reduce", "collective-permute", "custom-call"):
        assert op not in text, f"growth along an unsharded axis needs no {op}"
    with jax.transfer_guard("disallow_explicit"):
        grown = compiled(state)
    for leaf, sharding in zip(jax.tree.leaves(grown), jax.tree.leaves(out), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert len(grown.params["decoder"]["layers"]["w"].addressable_shards) == 8
    numpy_state = jax.tree.map(np.asarray, host)
    assert_same(jax.device_get(grown), grow(numpy_state, MAPS[name], layout))


def test_growth_under_set_mesh():
    mesh = mesh8()
    tree = jax.device_put(wide_stack(np.float32), shardings_for(wide_stack(np.float32), mesh))
    with jax.set_mesh(mesh):
        grown = jax.jit(lambda tree: grow(tree, midas(6, 3), Scanned("decoder/layers")))(tree)
    assert_same(
        jax.device_get(grown), grow(wide_stack(np.float32), midas(6, 3), Scanned("decoder/layers"))
    )


def test_growth_outside_jit_keeps_the_mesh():
    mesh = mesh8()
    tree = jax.device_put(wide_stack(np.float32), shardings_for(wide_stack(np.float32), mesh))
    grown = grow(tree, midas(6, 3), Scanned("decoder/layers"))
    assert grown["decoder"]["layers"]["w"].sharding.device_set == set(mesh.devices.flat)
    assert_same(
        jax.device_get(grown), grow(wide_stack(np.float32), midas(6, 3), Scanned("decoder/layers"))
    )


def test_abstract_trees_keep_dtype_and_sharding():
    mesh = mesh8()
    shardings = shardings_for(wide_stack(np.float32), mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding),
        wide_stack(np.float32), shardings,
    )
    grown = grow(abstract, midas(6, 3), Scanned("decoder/layers"))
    leaf = grown["decoder"]["layers"]["w"]
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert (leaf.shape, leaf.dtype) == ((9, 4, 8), jnp.bfloat16)
    assert leaf.sharding == shardings["decoder"]["layers"]["w"]
    assert grown["embedding"] is abstract["embedding"]


@pytest.mark.parametrize("layout", [Scanned("decoder/layers"), Unrolled("layers_{}")])
def test_growth_is_differentiable(layout):
    if isinstance(layout, Scanned):
        tree = {"decoder": {"layers": {"w": jnp.arange(6.0)}}}
    else:
        tree = {f"layers_{i}": jnp.asarray(float(i)) for i in range(6)}
    grads = jax.grad(lambda tree: sum(map(jnp.sum, jax.tree.leaves(
        grow(tree, DepthMap([0, 1, 1, 1, 5], stored=6), layout)))))(tree)
    # Every layer gets the gradients of its copies.
    got = [float(x) for leaf in jax.tree.leaves(grads) for x in np.ravel(leaf)]
    assert got == [1, 3, 0, 0, 0, 1]


# ---- unrolled -------------------------------------------------------------------------


def layer(i: int) -> dict:
    return {"w": np.full((2, 3), i, np.float32), "b": {"x": np.full(2, 10 + i, np.float32)}}


def numbers(layers) -> list[int]:
    return [int(one["w"][0, 0]) for one in layers]


UNROLLED = {
    "text keys": ("h/{}", lambda n: {"h": {str(i): layer(i) for i in range(n)}},
                  lambda tree: [tree["h"][str(i)] for i in range(len(tree["h"]))]),
    "int keys": ("h/{}", lambda n: {"h": {i: layer(i) for i in range(n)}},
                 lambda tree: [tree["h"][i] for i in range(len(tree["h"]))]),
    "list": ("h/{}", lambda n: {"h": [layer(i) for i in range(n)]}, lambda tree: tree["h"]),
    "names": ("blocks_{}", lambda n: {f"blocks_{i}": layer(i) for i in range(n)},
              lambda tree: [tree[f"blocks_{i}"] for i in range(len(tree))]),
    "nested names": (
        "encoder/layers_{}",
        lambda n: {"params": {"encoder": {f"layers_{i}": layer(i) for i in range(n)}}},
        lambda tree: [tree["params"]["encoder"][f"layers_{i}"]
                      for i in range(len(tree["params"]["encoder"]))],
    ),
    "frozen": ("h/{}", lambda n: flax.core.freeze({"h": {str(i): layer(i) for i in range(n)}}),
               lambda tree: [tree["h"][str(i)] for i in range(len(tree["h"]))]),
}


@pytest.mark.parametrize("depth_map", sorted(MAPS))
@pytest.mark.parametrize("kind", sorted(UNROLLED))
def test_unrolled(kind, depth_map):
    pattern, make, read = UNROLLED[kind]
    tree = make(6)
    grown = grow(tree, MAPS[depth_map], Unrolled(pattern))
    assert numbers(read(grown)) == list(MAPS[depth_map].sources)
    assert numbers(read(tree)) == list(range(6)), "the given tree is left alone"
    assert jax.tree.structure(grown) == jax.tree.structure(make(len(MAPS[depth_map])))


def test_more_than_ten_layers_are_in_numeric_order():
    tree = {f"blocks_{i}": layer(i) for i in range(12)}
    grown = grow(tree, midas(12, 4), Unrolled("blocks_{}"))
    assert numbers(grown[f"blocks_{i}"] for i in range(16)) == list(midas(12, 4).sources)


def test_unrolled_copies_share_nothing():
    tree = {"h": [layer(0), layer(1)]}
    grown = grow(tree, [0, 0, 1], Unrolled("h/{}"))
    grown["h"][1]["w"][:] = 9
    grown["h"][1]["b"]["new"] = 1
    assert numbers(grown["h"]) == [0, 9, 1]
    assert "new" not in grown["h"][0]["b"] and "new" not in tree["h"][0]["b"]


def test_an_unrolled_state_can_be_donated_after_growth():
    tree = grow(to_jax({"h": [layer(0), layer(1)]}), [0, 0, 1], Unrolled("h/{}"))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
    assert len(set(pointers)) == len(pointers)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(tree)
    assert numbers(doubled["h"]) == [0, 0, 2]


def test_unrolled_optimiser_state_and_neighbours():
    params = {"h": [layer(i) for i in range(3)], "norm": np.ones(3), "h2": [layer(7)]}
    state = make_state(params)
    grown = grow(state, [0, 1, 1, 2], Unrolled("h/{}"))
    expected = make_state({**params, "h": [layer(i) for i in (0, 1, 1, 2)]})
    assert_same(grown, expected)
    assert grown.params["norm"] is params["norm"] and grown.params["h2"] is params["h2"]


def test_unrolled_nnx_state():
    class Model(nnx.Module):
        def __init__(self, depth):
            self.layers = nnx.List(
                [nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(depth)]
            )
            self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(99))

    small, state = Model(3), nnx.state(Model(3))
    grown = grow(state, [0, 1, 1, 2], Unrolled("layers/{}"))
    assert isinstance(grown, nnx.State)
    large = Model(4)
    nnx.update(large, grown)
    for new, old in enumerate([0, 1, 1, 2]):
        np.testing.assert_array_equal(
            large.layers[new].kernel[...], small.layers[old].kernel[...]
        )


def test_unrolled_abstract_and_jitted():
    tree = to_jax({"h": {str(i): layer(i) for i in range(3)}})
    grow_it = lambda tree: grow(tree, [0, 0, 1, 2], Unrolled("h/{}"))  # noqa: E731
    assert_same(jax.jit(grow_it)(tree), grow_it(tree))
    abstract = jax.eval_shape(lambda tree: tree, tree)
    assert grow_it(abstract) == jax.eval_shape(grow_it, tree)


def test_encoder_and_decoder_grow_together_under_one_name():
    tree = {side: {f"layers_{i}": layer(i) for i in range(2)} for side in ("encoder", "decoder")}
    both = grow(tree, [0, 0, 1], Unrolled("layers_{}"))
    one = grow(tree, [0, 0, 1], Unrolled("encoder/layers_{}"))
    assert len(both["encoder"]) == len(both["decoder"]) == 3
    assert len(one["encoder"]) == 3 and one["decoder"] is tree["decoder"]


# ---- errors ----


def test_no_match_names_what_is_there():
    with pytest.raises(UserError, match="'blocks'; the tree holds .*decoder/layers/wi.*4 leaves"):
        grow(stack(), midas(6, 2), Scanned("blocks"))
    with pytest.raises(UserError, match=r"'h/\{\}'; the tree holds"):
        grow(stack(), midas(6, 2), Unrolled("h/{}"))
    with pytest.raises(UserError, match="no leaves"):
        grow({}, midas(6, 2), Scanned("layers"))


def test_wrong_depth():
    with pytest.raises(UserError, match="decoder/layers/wi .* holds 6 layers, .* reads from 8"):
        grow(stack(), midas(8, 4), Scanned("decoder/layers"))
    with pytest.raises(UserError, match="h holds 2 layers 'h/{}', but the depth map reads from 8"):
        grow({"h": [layer(0), layer(1)]}, midas(8, 4), Unrolled("h/{}"))


def test_a_stack_of_one_layer_is_not_told_by_its_size():
    with pytest.raises(UserError, match="axis 0 holds 1 layers, but the depth map reads from 2"):
        grow({"layers": {"w": np.zeros((1, 4))}}, midas(2, 1), Scanned("layers"))


@pytest.mark.parametrize(("shape", "axis"), [((6, 3), 2), ((6, 3), -3), ((), 0)])
def test_no_such_axis(shape, axis):
    with pytest.raises(UserError, match=r"layers/w has shape \(.*\): there is no axis"):
        grow({"layers": {"w": np.zeros(shape)}}, midas(6, 2), Scanned("layers", axis=axis))


def test_gaps_in_the_numbering():
    with pytest.raises(UserError, match=r"numbered \[0, 1, 3\]; expected 0, 1, 2, ... without"):
        grow({f"blocks_{i}": layer(i) for i in (0, 1, 3)}, [0, 1, 2], Unrolled("blocks_{}"))
    with pytest.raises(UserError, match=r"numbered \[1, 2\]"):
        grow({"h": {1: layer(1), 2: layer(2)}}, [0, 1], Unrolled("h/{}"))


def test_not_a_layout():
    with pytest.raises(UserError, match="a layout is Scanned"):
        grow(stack(), midas(6, 2), "decoder/layers")


def test_ordered_dicts_keep_their_order():
    tree = collections.OrderedDict(
        [("embed", np.zeros(1)), ("h_0", layer(0)), ("h_1", layer(1)), ("norm", np.zeros(1))]
    )
    grown = grow(tree, [0, 0, 1], Unrolled("h_{}"))
    assert list(grown) == ["embed", "h_0", "h_1", "h_2", "norm"]
