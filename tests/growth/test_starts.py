"""How copies start: what changes, what does not, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stacking_jax.errors import UserError
from stacking_jax.growth import (
    NEW,
    Average,
    DepthMap,
    Identity,
    Interpolate,
    Noise,
    Part,
    Random,
    Scale,
    Scanned,
    Tensors,
    Unrolled,
    gates_ramp,
    gradstack,
    grow,
    interleave,
    midas,
    run_stack,
    start_copies,
)
from stacking_jax.models import LAYOUT, Decoder, DecoderConfig

TREES = Path(__file__).resolve().parent / "trees"
GROWTH = midas(4, 2)  # 0 1 0 1 2 3
COPIES = [2, 3]
LAYOUTS = [Scanned("layers"), Scanned("layers", axis=1), Scanned("layers", axis=-1),
           Unrolled("layers_{}"), Unrolled("h/{}")]
STARTS = {
    "identity": Identity(), "scale": Scale(outputs=0.5, queries_keys=0.25), "noise": Noise(0.1),
    "average": Average(), "interpolate": Interpolate(), "random": Random(),
}


def layers(depth: int, seed: int = 0, dtype=np.float32) -> dict:
    """`[depth, ...]` leaves under the decoder's names."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=(depth, *shape)).astype(dtype)  # noqa: E731
    return {
        "attention": {"query": draw(4, 6), "key": draw(4, 6), "out": draw(6, 4)},
        "mlp": {"down": draw(8, 4)}, "norm": {"scale": draw(4)},
    }


def placed(stacked: dict, layout) -> dict:
    embedding = np.arange(12, dtype=np.float32).reshape(3, 4)
    if isinstance(layout, Scanned):
        moved = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, layout.axis), stacked)
        return {"embedding": embedding, "layers": moved}
    depth = stacked["norm"]["scale"].shape[0]
    listed = [jax.tree.map(lambda leaf: leaf[i].copy(), stacked) for i in range(depth)]
    if layout.pattern == "h/{}":
        return {"embedding": embedding, "h": listed}
    return {"embedding": embedding, **{f"layers_{i}": one for i, one in enumerate(listed)}}


def taken(tree: dict, layout) -> dict:
    """The layers as `[depth, ...]` again."""
    if isinstance(layout, Scanned):
        front = lambda leaf: np.moveaxis(np.asarray(leaf), layout.axis, 0)  # noqa: E731
        return jax.tree.map(front, tree["layers"])
    listed = tree["h"] if "h" in tree else [tree[f"layers_{i}"] for i in range(len(tree) - 1)]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *listed)


def started(start, layout=LAYOUTS[0], depth_map=GROWTH, dtype=np.float32, **options):
    grown = grow(placed(layers(4, dtype=dtype), layout), depth_map, layout)
    fresh = placed(layers(len(depth_map), seed=9, dtype=dtype), layout)
    changed = start_copies(
        grown, depth_map, layout, start, key=jax.random.key(0), fresh=fresh, **options
    )
    return taken(grown, layout), taken(changed, layout), changed


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", STARTS)
def test_originals_keep_every_bit_and_the_layout_does_not_matter(name, layout):
    before, after, whole = started(STARTS[name], layout)
    _, reference, _ = started(STARTS[name])
    originals = [i for i in range(6) if i not in COPIES]
    for old, new, same in zip(*map(jax.tree.leaves, (before, after, reference)), strict=True):
        np.testing.assert_array_equal(new[originals], old[originals])
        np.testing.assert_allclose(new, same, rtol=2e-7, atol=1e-7)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(whole))
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert any((one != other).any() for one, other in pairs)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_identity_zeroes_the_outputs_of_copies_alone(dtype):
    before, after, _ = started(Identity(), dtype=dtype)
    for path in (("attention", "out"), ("mlp", "down")):
        leaf = after[path[0]][path[1]]
        assert leaf.dtype == dtype and not leaf[COPIES].any() and leaf[[0, 1, 4, 5]].any()
    np.testing.assert_array_equal(after["attention"]["query"], before["attention"]["query"])
    np.testing.assert_array_equal(after["norm"]["scale"], before["norm"]["scale"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("depth_map", [midas(4, 2), gradstack(4, 2), interleave(4)], ids=str)
def test_identity_leaves_the_decoder_unchanged_to_the_bit(dtype, mode, depth_map):
    config = DecoderConfig(
        vocab_size=50, d_model=32, num_layers=8, num_heads=4, d_ff=48, dtype=dtype, stack=mode
    )
    small = Decoder(config, depth=4, key=jax.random.key(0))
    large = nnx.eval_shape(lambda: Decoder(config, depth=len(depth_map), key=jax.random.key(0)))
    params = nnx.to_pure_dict(nnx.state(small, nnx.Param))
    grown = start_copies(grow(params, depth_map, LAYOUT), depth_map, LAYOUT, "identity")
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)

    # Fused, unrolled bfloat16 layers would be rounded elsewhere in another program.
    run = jax.jit(
        lambda graph, params: nnx.merge(graph, params)(tokens), static_argnums=0,
        compiler_options={"xla_allow_excess_precision": False},
    )
    before = run(nnx.graphdef(small), params)
    after = run(nnx.graphdef(large), grown)
    assert float(jnp.max(jnp.abs(after - before))) == 0.0
    # It is the start that does it: plain copies change the logits.
    copied = run(nnx.graphdef(large), grow(params, depth_map, LAYOUT))
    assert float(jnp.max(jnp.abs(copied - before))) > 1e-3


def test_scaling_by_kind_and_by_name():
    before, after, _ = started(
        Scale(outputs=0.5, queries_keys=0.25, tensors={"norm/scale": 2.0, "*": 1.0})
    )
    for path, factor in {
        ("attention", "out"): 0.5, ("mlp", "down"): 0.5, ("attention", "query"): 0.25,
        ("attention", "key"): 0.25, ("norm", "scale"): 2.0,
    }.items():
        old, new = before[path[0]][path[1]], after[path[0]][path[1]]
        np.testing.assert_allclose(new[COPIES], factor * old[COPIES], rtol=1e-6)


def test_scaling_by_depth_is_that_of_an_initialiser_by_its_root():
    """Every layer, as if it had been drawn for the new depth."""
    before, after, _ = started(Scale(outputs="depth", layers="all"))
    np.testing.assert_allclose(
        after["mlp"]["down"], np.sqrt(4 / 6) * before["mlp"]["down"], rtol=1e-6
    )
    np.testing.assert_array_equal(after["attention"]["key"], before["attention"]["key"])


def test_scaling_a_part_of_a_fused_tensor():
    tree = {"h": {"attn": {"c_attn": {"kernel": np.ones((2, 4, 12)), "bias": np.ones((2, 12))},
                           "c_proj": {"kernel": np.ones((2, 4, 4))}},
                  "mlp": {"c_proj": {"kernel": np.ones((2, 16, 4))}}}}
    after = start_copies(tree, [0, 0], Scanned("h"), Scale(queries_keys=0.5), outputs="gpt2")
    fused = after["h"]["attn"]["c_attn"]
    for leaf in (fused["kernel"], fused["bias"]):
        assert (leaf[1, ..., :8] == 0.5).all() and (leaf[1, ..., 8:] == 1).all()
        assert (leaf[0] == 1).all()
    assert (after["h"]["mlp"]["c_proj"]["kernel"] == 1).all()


def test_noise_has_the_norm_that_it_should_and_follows_the_source():
    before, after, _ = started(Noise(0.1))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        for layer in COPIES:
            share = np.linalg.norm(new[layer] - old[layer]) / np.linalg.norm(old[layer])
            assert 0.03 < share < 0.25
    # The copies of layers 0 and 1, wherever the map puts them.
    _, other, _ = started(Noise(0.1), depth_map=DepthMap([0, 1, 2, 3, 1, 0]))
    for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one[[2, 3]], two[[5, 4]])


def test_noise_is_different_for_every_copy_and_every_key():
    tree = grow(placed(layers(2), LAYOUTS[0]), [0, 0, 0, 1], LAYOUTS[0])
    run = lambda seed: start_copies(  # noqa: E731
        tree, [0, 0, 0, 1], LAYOUTS[0], Noise(0.1), key=jax.random.key(seed)
    )["layers"]["mlp"]["down"]
    one, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(one, again)
    assert (one != other)[[1, 2]].any() and not np.array_equal(one[1], one[2])


def test_between_the_neighbours():
    """0 1 [0 1] 2 3: two copies between layers 1 and 2."""
    _, after, _ = started(Interpolate())
    leaf = layers(4)["mlp"]["down"]
    np.testing.assert_allclose(after["mlp"]["down"][2], (2 * leaf[1] + leaf[2]) / 3, rtol=1e-5)
    np.testing.assert_allclose(after["mlp"]["down"][3], (leaf[1] + 2 * leaf[2]) / 3, rtol=1e-5)
    _, after, _ = started(Average())
    for copy in COPIES:
        np.testing.assert_allclose(after["mlp"]["down"][copy], (leaf[1] + leaf[2]) / 2, rtol=1e-5)
    # On top of the stack there is one neighbour only.
    _, after, _ = started(Interpolate(), depth_map=gradstack(4, 2))
    np.testing.assert_allclose(after["mlp"]["down"][4:], np.stack([leaf[3]] * 2), rtol=1e-6)


def test_between_unlike_layers_stays_among_the_like():
    """With a period of 2, the neighbours of a local layer are local."""
    layout = Scanned("layers", period=2)
    tree = grow({"layers": np.arange(6.0)}, [0, 0, 1, 2], layout)
    after = start_copies(tree, [0, 0, 1, 2], layout, Interpolate())
    np.testing.assert_allclose(after["layers"], [0, 1, 1, 2, 2, 3, 4, 5])


def test_random_copies_are_those_of_the_fresh_model():
    _, after, _ = started(Random())
    fresh = layers(6, seed=9)
    for one, new in zip(jax.tree.leaves(after), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(one[COPIES], new[COPIES])


def test_layers_without_a_source_are_started_too():
    depth_map = DepthMap([0, NEW, 1], stored=2)
    tree = {"layers": {"w": np.array([1.0, 7.0, 2.0])}}
    assert start_copies(tree, depth_map, Scanned("layers"), "average")["layers"]["w"][1] == 1.5


def test_several_starts_in_turn():
    _, after, _ = started([Noise(0.1), "identity"])
    assert not after["mlp"]["down"][COPIES].any()
    before, _, _ = started("copy")
    assert (after["attention"]["query"] != before["attention"]["query"])[COPIES].any()


def test_several_stacks_by_name():
    layouts = {"encoder": Scanned("encoder/layers"), "decoder": Scanned("decoder/layers")}
    tree = {name: {"layers": layers(3)} for name in layouts}
    maps = {"encoder": DepthMap([0, 0, 1]), "decoder": DepthMap([0, 1, 1])}
    after = start_copies(tree, maps, layouts, "identity")
    silent = {name: [i for i in range(3) if not after[name]["layers"]["mlp"]["down"][i].any()]
              for name in layouts}
    assert silent == {"encoder": [1], "decoder": [2]}
    # Stacks of the same names draw noise of their own.
    after = start_copies(tree, maps, layouts, Noise(0.1), key=jax.random.key(0))
    down = lambda tree, name: tree[name]["layers"]["mlp"]["down"]  # noqa: E731
    changes = [down(after, name) - down(tree, name) for name in layouts]
    assert not np.allclose(changes[0][1], changes[1][2])


@pytest.mark.parametrize("name", STARTS)
def test_under_jit_with_shardings(name):
    """8 devices: the result is the same, and lies where it is told to."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    layout = LAYOUTS[0]
    tree = {"layers": {"attention": {k: np.ones((6, 8, 8), np.float32) * np.arange(8)
                                     for k in ("query", "key", "out")},
                       "mlp": {"down": np.random.default_rng(0).normal(size=(6, 16, 8)).astype(
                           np.float32)}}}
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    placed_tree = jax.device_put(tree, sharding)
    run = jax.jit(
        lambda t, key: start_copies(t, GROWTH, layout, STARTS[name], key=key, fresh=t),
        out_shardings=jax.tree.map(lambda _: sharding, tree),
    )
    after = run(placed_tree, jax.random.key(0))
    plain = start_copies(tree, GROWTH, layout, STARTS[name], key=jax.random.key(0), fresh=tree)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(plain), strict=True):
        assert one.sharding == sharding
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-5, atol=1e-6)


def test_abstract_trees_are_returned_as_they_are():
    tree = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, placed(layers(6), LAYOUTS[0])))
    for start in STARTS.values():
        after = start_copies(tree, GROWTH, LAYOUTS[0], start, key=jax.random.key(0), fresh=tree)
        assert after == tree


@pytest.mark.parametrize(
    "name, layouts",
    {
        "big_vision_vit_loop": Unrolled("encoderblock_{}"),
        "big_vision_vit_scan": Scanned("encoderblock"),
        "flax_gemma2_nnx_list": Unrolled("layers/{}", period=2),
        "maxtext_llama_scanned_axis1": Scanned("layers", axis=1),
        "maxtext_llama_unrolled": Unrolled("layers_{}"),
        "t5x_scalable_scanned_axis1": {
            "encoder": Scanned("encoder/encoder", axis=1),
            "decoder": Scanned("decoder/decoder", axis=1),
        },
    }.items(),
)
def test_identity_finds_the_outputs_of_real_models(name, layouts):
    """Without a preset: in the copies whatever is an output is zero, and nothing else is."""
    tree: dict = {}
    for path, shape, dtype in json.loads((TREES / f"{name}.json").read_text())["leaves"]:
        node, keys = tree, path.split("/")
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.ones(shape, dtype)
    units = 6 // (layouts.period if not isinstance(layouts, dict) else 1)
    depth_map = DepthMap([*range(units), units - 1])
    maps = {key: depth_map for key in layouts} if isinstance(layouts, dict) else depth_map
    after = start_copies(grow(tree, maps, layouts), maps, layouts, "identity")
    silent = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_flatten_with_path(after)[0] if not leaf.all()
    }
    assert silent and all(
        any(word in path for word in ("/out/", "/wo/", "Dense_1/", "attn_vec_einsum", "down_proj"))
        for path in silent
    )
    count = len(silent)
    assert count == {"big_vision_vit_loop": 4, "big_vision_vit_scan": 4, "flax_gemma2_nnx_list": 4,
                     "maxtext_llama_scanned_axis1": 2, "maxtext_llama_unrolled": 2,
                     "t5x_scalable_scanned_axis1": 5}[name]


def test_gates_open_over_the_steps():
    run = jax.jit(lambda step: gates_ramp(step, GROWTH, 10, begin=100))
    np.testing.assert_allclose(run(100), [1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(run(105), [1, 1, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(run(110), np.ones(6))
    np.testing.assert_allclose(run(500), np.ones(6))
    np.testing.assert_allclose(run(7), [1, 1, 0, 0, 1, 1])
    with pytest.raises(UserError, match="at least 1 step"):
        gates_ramp(0, GROWTH, 0)


def test_closed_gates_leave_the_function_as_it_was():
    stacked = {"w": jax.random.normal(jax.random.key(0), (4, 8, 8))}
    body = lambda layer, x: jnp.tanh(x @ layer["w"])  # noqa: E731
    x = jax.random.normal(jax.random.key(1), (2, 8))
    grown = grow({"layers": stacked}, GROWTH, Scanned("layers"))["layers"]
    before = run_stack(body, stacked, x)
    np.testing.assert_array_equal(run_stack(body, grown, x, gates=gates_ramp(0, GROWTH, 5)), before)
    opened = run_stack(body, grown, x, gates=gates_ramp(5, GROWTH, 5))
    np.testing.assert_array_equal(opened, run_stack(body, grown, x))


@pytest.mark.parametrize(
    "start, options, message",
    [
        ("silent", {}, "there is no start 'silent'; choose from copy, identity"),
        (3, {}, "a start is one of"),
        (Noise(), {"key": None}, "Noise needs a random key"),
        (Noise(-1.0), {}, "must be a finite number ≥ 0"),
        (Random(), {"fresh": None}, "Random needs fresh"),
        (Scale(outputs=float("nan")), {}, "must be a finite number"),
        (Scale(layers="some"), {}, "is 'copies' or 'all'"),
        (Scale(tensors={"nothing": 2.0}), {}, "no tensor of a layer matches 'nothing'"),
        (Identity(), {"outputs": "bert"}, "there is no preset 'bert'"),
        (Identity(), {"outputs": "gpt2"}, "no tensor of a layer matches the attention outputs"),
        (Identity(), {"outputs": Tensors({"MLP": ("mlp/down",)})}, "attention looks like a branch"),
        (Scale(queries_keys=0.5), {"outputs": Tensors({"both": ("attention/out", "mlp/down")})},
         "needs Tensors"),
    ],
)
def test_what_it_refuses(start, options, message):
    tree = placed(layers(6), LAYOUTS[0])
    options = {"key": jax.random.key(0), "fresh": tree} | options
    with pytest.raises(UserError, match=message):
        start_copies(tree, GROWTH, LAYOUTS[0], start, **options)


def test_it_refuses_trees_of_another_depth():
    tree = placed(layers(4), LAYOUTS[0])
    with pytest.raises(UserError, match="holds 4 layers, but the depth map makes 6"):
        start_copies(tree, GROWTH, LAYOUTS[0], "identity")
    with pytest.raises(UserError, match="no leaf of the tree lies in"):
        start_copies(tree, GROWTH, Scanned("blocks"), "identity")
    grown = placed(layers(6), LAYOUTS[0])
    with pytest.raises(UserError, match="4 layers of shape .*expected 6"):
        start_copies(grown, GROWTH, LAYOUTS[0], "random", fresh=tree)
    with pytest.raises(UserError, match="cannot be read from a traced matrix"):
        jax.jit(lambda m: start_copies(grown, m, LAYOUTS[0], "identity"))(np.eye(6))


def test_a_part_needs_its_axis():
    with pytest.raises(UserError, match="no axis -3 to cut"):
        Part("kv", 0, 0.5, axis=-3).span((4, 5))
