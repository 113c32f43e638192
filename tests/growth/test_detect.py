"""`detect_layout` on listings of real models, on unseen models of their families, and on traps."""

from __future__ import annotations

import json
from pathlib import Path

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.errors import UserError
from stacking_jax.growth import Scanned, Unrolled, detect_layout, grow

TREES = Path(__file__).resolve().parent / "trees"
REAL = {
    "t5x_scalable_scanned_axis1": {
        "encoder": Scanned("encoder/encoder", axis=1), "decoder": Scanned("decoder/decoder", axis=1)},
    "maxtext_llama_scanned_axis1": {"decoder": Scanned("decoder/layers", axis=1)},
    "maxtext_llama_unrolled": {"decoder": Unrolled("decoder/layers_{}")},
    "big_vision_vit_scan": {"Transformer": Scanned("Transformer/encoderblock")},
    "big_vision_vit_loop": {"Transformer": Unrolled("Transformer/encoderblock_{}")},
    "flax_gemma2_nnx_list": {"layers": Unrolled("layers/{}", period=2)},
}


def shape(*sizes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


def nested(leaves: dict[str, tuple]) -> dict:
    tree: dict = {}
    for path, sizes in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = shape(*sizes)
    return tree


def listing(name: str) -> dict[str, tuple]:
    return {
        path: tuple(sizes)
        for path, sizes, _ in json.loads((TREES / f"{name}.json").read_text())["leaves"]
    }


def around(params) -> dict:
    """What trainers keep parameters in."""
    adam = jax.eval_shape(optax.adam(1e-3).init, params)
    inner = params["params"] if "params" in params else params
    return {
        "params": params,
        "frozen": flax.core.freeze(params),
        "dict": {"params": inner, "opt_state": adam, "step": shape()},
        "T5X": {"target": inner, "state": {"param_states": jax.eval_shape(
            lambda p: jax.tree.map(lambda x: {"m": x, "v": x}, p), inner)}},
        "with an average": {"params": inner, "ema_params": inner},
        "moments alone": adam,
        "TrainState": jax.eval_shape(lambda p: TrainState.create(
            apply_fn=print, params=p, tx=optax.adam(1e-3)), inner),
        "boxed": jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * len(x.shape)), params),
    }


@pytest.mark.parametrize("kind", list(around({})))
@pytest.mark.parametrize("name", REAL)
def test_real_models(name, kind):
    found = detect_layout(around(nested(listing(name)))[kind])
    assert found.layouts == REAL[name]
    assert set(found.depths.values()) == {6} and found.depth == 6
    assert "6" in found.reason


def other_model(name: str, depth: int, sizes: dict[int, int]) -> dict:
    """The same family with another depth and other widths (old size -> new)."""
    leaves = {}
    layouts = REAL[name].values()
    for path, old in listing(name).items():
        keys = path.split("/")
        scanned = [one for one in layouts if isinstance(one, Scanned) and one.matches(keys)]
        new = [sizes.get(size, size) for size in old]
        if scanned:
            new[scanned[0].axis] = depth
            leaves[path] = tuple(new)
            continue
        unrolled = [
            (at, one) for one in layouts if isinstance(one, Unrolled)
            for at, key in enumerate(keys) if "/".join([*keys[:at], key]).endswith(
                one.pattern.format(Unrolled(one.pattern).number(key) or 0))
            and Unrolled(one.pattern).number(key) is not None
        ]
        if not unrolled:
            leaves[path] = tuple(new)
        elif Unrolled(unrolled[0][1].pattern).number(keys[unrolled[0][0]]) == 0:
            at, one = unrolled[0]
            for number in range(depth):
                leaves["/".join([*keys[:at], one.key(number), *keys[at + 1 :]])] = tuple(new)
    return nested(leaves)


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(sorted(REAL)), st.integers(2, 24),
    st.fixed_dictionaries({4: st.integers(1, 24), 16: st.integers(1, 24),
                           64: st.integers(1, 64), 128: st.integers(1, 64)}),
)
def test_unseen_models_are_read_right_or_refused(name, depth, sizes):
    """Whatever coincides (a width and the depth, say): never a wrong layout."""
    if name == "flax_gemma2_nnx_list":
        depth += depth % 2
    tree = other_model(name, depth, sizes)
    try:
        found = detect_layout(tree)
    except UserError as error:
        assert "two readings" in str(error)
        return
    assert found.layouts == REAL[name]
    assert set(found.depths.values()) == {depth}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(REAL)), st.integers(2, 96), st.integers(97, 512))
def test_models_of_usual_widths_are_read(name, depth, width):
    """Heads, width and hidden width all apart: no reason to refuse."""
    if name == "flax_gemma2_nnx_list":
        depth += depth % 2
    tree = other_model(name, depth, {64: width, 128: 4 * width})
    assert detect_layout(tree).layouts == REAL[name]


@pytest.mark.parametrize("axis", [0, 1])
def test_depth_equal_to_width(axis):
    square = {"layers": {"w": shape(8, 8, 8), "b": shape(8, 8)}, "embed": shape(32, 8)}
    with pytest.raises(UserError, match="8 layers on axis 0 or 8 layers on axis 1; say which"):
        detect_layout(square)
    assert detect_layout(square, axis=axis).layout == Scanned("layers", axis)


def test_a_width_is_told_by_what_stands_outside():
    stack = {"layers": {"w": shape(6, 8, 8), "b": shape(6, 8)}}
    with pytest.raises(UserError, match="6 layers on axis 0 or 8 layers on axis 1"):
        detect_layout(stack)
    found = detect_layout({**stack, "norm": shape(8)})
    assert found.layout == Scanned("layers") and "8 (axis 1) is a width" in found.reason
    assert detect_layout(stack, depth=8).layout == Scanned("layers", axis=1)
    # As many buckets as layers, and the width nowhere else: no proof.
    with pytest.raises(UserError, match="two readings"):
        detect_layout({**stack, "buckets": shape(6, 3)})


def test_one_block_that_is_not_stacked():
    block = {"q": shape(64, 64), "o": shape(64, 64), "norm": shape(64)}
    with pytest.raises(UserError, match="64 layers on axis 0, or be one layer of that width"):
        detect_layout({"block": block, "embed": shape(100, 64)})


def test_parts_of_a_model_are_no_layers():
    for parts in (
        {f"Dense_{i}": {"kernel": shape(8, 8), "bias": shape(8)} for i in range(3)},
        {f"LayerNorm_{i}": {"scale": shape(8), "bias": shape(8)} for i in range(2)},
        {"head": {"kernel": shape(64, 64), "bias": shape(64)}},
        {"attention": {"query": {"kernel": shape(8, 8)}, "out": {"kernel": shape(8, 8)}}},
    ):
        with pytest.raises(UserError, match="no stack of layers found"):
            detect_layout(parts)
        layer = {"Mlp_0": {"Dense_0": {"kernel": shape(8, 4)}, "Dense_1": {"kernel": shape(4, 8)}},
                 "LayerNorm_0": {"scale": shape(8)}, "LayerNorm_1": {"scale": shape(8)}}
        model = {**parts, **{f"TransformerBlock_{i}": layer for i in range(3)}}
        assert detect_layout(model).layout == Unrolled("TransformerBlock_{}")


FAMILIES = {
    # Names as these codebases have them.
    "EasyLM": ({f"transformer/h/{i}/attention/wq/kernel": (8, 4) for i in range(4)}
               | {f"transformer/h/{i}/ffn_norm/kernel": (8,) for i in range(4)},
               Unrolled("transformer/h/{}")),
    "DeepMind Gemma 3": (
        {f"transformer/layer_{i}/{name}": size for i in range(6) for name, size in {
            "attn/_query_norm/scale": (4,), "attn/_key_norm/scale": (4,),
            "attn/q_einsum/w": (2, 8, 4), "post_attention_norm/scale": (8,),
            "post_ffw_norm/scale": (8,)}.items()},
        Unrolled("transformer/layer_{}", period=6)),
    "MaxText Gemma 3": (
        {f"decoder/layers/layers_{i}/{name}": size for i in range(6) for name, size in {
            "mlp/wi_0/kernel": (8, 3, 16), "mlp/wo/kernel": (16, 3, 8),
            "pre_ffw_norm/scale": (8, 3)}.items()} | {"decoder/decoder_norm/scale": (8,)},
        Scanned("decoder/layers", axis=1)),
    "AXLearn": (
        {"decoder/transformer/repeat/layer/self_attention/norm/scale": (5, 8),
         "decoder/transformer/repeat/layer/feed_forward/linear1/weight": (5, 8, 16),
         "decoder/transformer/repeat/layer/feed_forward/linear2/weight": (5, 16, 8),
         "decoder/emb/token_emb/weight": (100, 8)},
        Scanned("decoder/transformer/repeat")),
    "Praxis": (
        {"lm/transformer/repeat/sub/x_layers_0/layer_norm/scale": (5, 8),
         "lm/transformer/repeat/sub/x_layers_0/ff_layer/ffn_layer1/linear/w": (5, 8, 16),
         "lm/transformer/repeat/sub/x_layers_0/ff_layer/ffn_layer2/linear/w": (5, 16, 8),
         "lm/softmax/logits_ffn/linear/w": (8, 100)},
        Scanned("lm/transformer/repeat")),
    "nn.scan without a name": (
        {"ScanBlock_0/Dense_0/kernel": (5, 8, 16), "ScanBlock_0/Dense_1/kernel": (5, 16, 8),
         "Embed_0/embedding": (100, 8)},
        Scanned("ScanBlock_0")),
    "Hugging Face BERT": (
        {f"bert/encoder/layer/{i}/output/dense/kernel": (8, 4) for i in range(4)}
        | {f"bert/encoder/layer/{i}/output/LayerNorm/scale": (4,) for i in range(4)}
        | {"bert/pooler/dense/kernel": (4, 4), "bert/pooler/dense/bias": (4,)},
        Unrolled("bert/encoder/layer/{}")),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    leaves, layout = FAMILIES[name]
    for tree in (nested(leaves), {"params": nested(leaves)}):
        assert detect_layout(tree).layout == layout


def test_unlike_layers_that_recur():
    layers = [{"w": shape(8, 4), "norm": shape(8), **({"moe": shape(2, 4)} if i % 3 == 2 else {})}
              for i in range(6)]
    found = detect_layout({"layers": layers})
    assert found.layout == Unrolled("layers/{}", period=3) and "recur every 3" in found.reason
    assert detect_layout({"layers": layers}, period=6).layout.period == 6
    with pytest.raises(UserError, match="recur every 3, not every 2"):
        detect_layout({"layers": layers}, period=2)


def test_layers_that_do_not_recur_are_named():
    """Hugging Face's T5: only the first block has position biases."""
    blocks = {str(i): {"w": shape(4, 3), **({"rel": shape(3)} if i == 0 else {})} for i in range(4)}
    with pytest.raises(UserError, match="encoder/block/{} are numbered, but 0 and 1 differ in rel"):
        detect_layout({"encoder": {"block": blocks}})


def test_gemma_3_of_26_layers_is_no_whole_cycle():
    leaves = {path.replace("_0/", f"_{i}/"): size for i in range(26)
              for path, size in FAMILIES["DeepMind Gemma 3"][0].items() if "layer_0/" in path}
    with pytest.raises(UserError, match="Gemma 3, .* every 6 layers, but there are 26"):
        detect_layout(nested(leaves))
    assert detect_layout(nested(leaves), period=1).layout == Unrolled("transformer/layer_{}")


def test_stacks_of_different_depths():
    tree = {side: {f"layer_{i}": {"w": shape(4, 3), "b": shape(3)} for i in range(depth)}
            for side, depth in [("encoder", 4), ("decoder", 2)]}
    found = detect_layout(tree)
    assert found.depths == {"encoder": 4, "decoder": 2}
    with pytest.raises(UserError, match="different depths: encoder 4, decoder 2|decoder 2, encoder 4"):
        _ = found.depth
    with pytest.raises(UserError, match="several stacks"):
        _ = found.layout
    grown = grow(tree, {"encoder": [0, 1, 2, 3, 3], "decoder": [0, 0, 1]}, found.layouts)
    assert (len(grown["encoder"]), len(grown["decoder"])) == (5, 3)


def test_two_towers_of_one_shape_are_two_stacks():
    tower = {"encoderblock": {"w": shape(6, 4, 5), "x": shape(6, 5, 4)}}
    found = detect_layout({"img": {"Transformer": tower}, "txt": {"Encoder_0": tower}})
    assert found.layouts == {"img": Scanned("img/Transformer/encoderblock"),
                             "txt": Scanned("txt/Encoder_0/encoderblock")}


def test_a_path_that_claims_more_than_its_stack():
    stack = {"w": shape(6, 4, 5), "x": shape(6, 5, 4)}
    with pytest.raises(UserError, match="would also claim side/layers/w"):
        detect_layout({"layers": stack, "side": {"layers": {"w": shape(3, 9), "x": shape(2, 7)}}})


def test_numbered_within_numbered():
    inner = {"blocks": {str(i): {"w": shape(4, 3), "b": shape(3)} for i in range(2)}}
    with pytest.raises(UserError, match="two readings: stages_blocks_{} and, within it"):
        detect_layout({f"stages_blocks_{i}": inner for i in range(3)})


def test_nnx_modules_and_states():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Block(rngs) for _ in range(3)])
            self.stack = nnx.vmap(Block)(rngs.fork(split=5))
            self.head = nnx.Linear(4, 7, rngs=rngs)

    model = Model(nnx.Rngs(0))
    for tree in (model, nnx.state(model), nnx.state(model, nnx.Param)):
        found = detect_layout(tree)
        assert found.layouts == {"layers": Unrolled("layers/{}"), "stack": Scanned("stack")}
        assert found.depths == {"layers": 3, "stack": 5}


def test_a_stack_of_one_layer():
    one = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    assert detect_layout({"layers_0": one, "head": jnp.ones((3, 4))}).layout == Unrolled("layers_{}")
    stacked = {"layers": {"w": jnp.ones((1, 4, 3)), "v": jnp.ones((1, 3, 4))}}
    found = detect_layout({**stacked, "head": jnp.ones((3, 4))})
    assert (found.layout, found.depth) == (Scanned("layers"), 1)


def test_nothing_to_find():
    with pytest.raises(UserError, match="no stack of layers found.*no leaves"):
        detect_layout({})
    with pytest.raises(UserError, match="no stack of layers found of depth 4"):
        detect_layout(nested(listing("big_vision_vit_scan")), depth=4)
