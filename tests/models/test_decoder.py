"""The decoder: packing, caching, looping, growing, precision."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.growth import DepthMap, grow, midas
from stacking_jax.models import LAYOUT, Decoder, DecoderConfig
from stacking_jax.models.losses import cross_entropy, inputs_from_targets

# Scanned, since that compiles faster; both ways to run are compared where it matters.
CONFIG = DecoderConfig(
    vocab_size=40, num_layers=4, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, stack="scan"
)


def make(config=CONFIG, depth=None):
    """A decoder with parameters drawn by NumPy, which needs no compiling."""
    graph, params = make_parts(config, depth)
    return nnx.merge(graph, params)


@functools.cache
def make_parts(config, depth):
    graph, state = nnx.split(jax.eval_shape(lambda: initialise(config, depth)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        values = 1 + 0.1 * noise if "scale" in name else noise * leaf.shape[-2] ** -0.5
        return jnp.asarray(values, leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def initialise(config=CONFIG, depth=None):
    return Decoder(config, depth=depth, key=jax.random.key(0))


def forward(model, tokens, depth_map=None, **kwargs):
    traced = isinstance(depth_map, jax.Array)
    static, traced_map = (None, depth_map) if traced else (depth_map, None)
    return _forward(model, tokens, traced_map, kwargs, static=static)


@functools.partial(jax.jit, static_argnames="static")
def _forward(model, tokens, traced_map, kwargs, *, static):
    return model(tokens, depth_map=static if traced_map is None else traced_map, **kwargs)


def split(model):
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def pack(documents: list[list[int]], length: int):
    """One record: tokens, segment ids and positions, padded with zeros."""
    tokens, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for number, document in enumerate(documents, start=1):
        where = slice(start, start + len(document))
        tokens[0, where], segments[0, where] = document, number
        positions[0, where] = np.arange(len(document))
        start += len(document)
    return jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(positions)


DOCUMENTS = [[5, 9, 2, 7], [11, 3], [21, 22, 23, 24, 25]]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 40, (2, 12)))


def batch_loss(graph, params, tokens, segments=None, positions=None, **kwargs):
    segments = jnp.ones_like(tokens) if segments is None else segments
    logits = nnx.merge(graph, params)(
        inputs_from_targets(tokens, segments), segment_ids=segments, positions=positions, **kwargs
    )
    return cross_entropy(logits, tokens, (segments > 0).astype(jnp.float32))[0]


loss_and_grad = jax.jit(jax.value_and_grad(batch_loss, argnums=1), static_argnums=0)


# ---- initial values ------------------------------------------------------------------------


def test_initial_values_do_not_depend_on_the_depth_at_hand():
    full, small = split(initialise())[1], split(initialise(depth=2))[1]
    shared = grow(full, DepthMap([0, 1], stored=4), LAYOUT)
    assert jax.tree.structure(small) == jax.tree.structure(shared)
    for a, e in zip(jax.tree.leaves(small), jax.tree.leaves(shared), strict=True):
        np.testing.assert_array_equal(a, e)


def test_branches_start_smaller_by_the_root_of_the_final_depth():
    config = DecoderConfig(vocab_size=8, num_layers=32, d_model=64, d_ff=128, num_heads=2)
    layers = initialise(config, depth=2).stack.layers
    for kernel, scale in [
        (layers.attention.query, 1.0),
        (layers.attention.out, 64**-0.5),
        (layers.mlp.gate, 1.0),
        (layers.mlp.down, 64**-0.5),
    ]:
        inner = kernel[...].shape[1]
        assert float(jnp.std(kernel[...])) == pytest.approx(scale * inner**-0.5, rel=0.05)


def test_a_fresh_decoder_knows_nothing():
    graph, params = split(initialise())
    per_token = batch_loss(graph, params, TOKENS) / TOKENS.size
    assert float(per_token) == pytest.approx(np.log(40), rel=0.25)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_names_its_axes(tied):
    model = make(dataclasses.replace(CONFIG, tied_embeddings=tied))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert len(params) == (12 if not tied else 11)
    for path, variable in params:
        layers = int("layers" in path)
        assert len(variable.get_metadata()["axes"]) == variable[...].ndim - layers, path
        assert variable[...].dtype == jnp.float32


def test_tied_and_untied_heads():
    tied, untied = make(), make(dataclasses.replace(CONFIG, tied_embeddings=False))
    assert not hasattr(tied, "head")
    want = forward(tied, TOKENS)
    np.testing.assert_array_equal(tied.embedding[...], untied.embedding[...])
    assert np.abs(want - forward(untied, TOKENS)).max() > 1e-3
    untied.head.set_value(tied.embedding[...].T)
    assert_close(forward(untied, TOKENS), want)


# ---- packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_a_packed_record_equals_each_document_alone(mode):
    model = make(dataclasses.replace(CONFIG, stack=mode))
    tokens, segments, positions = pack(DOCUMENTS, 14)
    packed = forward(model, tokens, segment_ids=segments, positions=positions)
    assert packed.shape == (1, 14, 40) and packed.dtype == jnp.float32
    assert np.isfinite(packed).all(), "padding must not turn into NaN"
    start = 0
    for document in DOCUMENTS:
        alone = forward(model, jnp.asarray([document]))
        assert_close(packed[:, start : start + len(document)], alone)
        start += len(document)


def test_packed_loss_and_gradient_equal_the_sum_over_documents():
    graph, params = split(make())
    packed = loss_and_grad(graph, params, *pack(DOCUMENTS, 14))
    alone = [loss_and_grad(graph, params, *pack([document], 14)) for document in DOCUMENTS]
    assert_close(packed, jax.tree.map(lambda *parts: sum(parts), *alone), 1e-4)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_document_is_invisible_to_its_neighbours(changed):
    model = make()
    tokens, segments, positions = pack(DOCUMENTS, 14)
    mine = np.asarray(segments[0]) == changed + 1
    before = forward(model, tokens, segment_ids=segments, positions=positions)[0]
    other = jnp.where(jnp.asarray(mine)[None], (tokens + 3) % 40, tokens)
    after = forward(model, other, segment_ids=segments, positions=positions)[0]
    np.testing.assert_array_equal(before[~mine], after[~mine])
    assert np.abs(before[mine] - after[mine]).max() > 1e-3


def test_no_gradient_crosses_from_one_document_to_another():
    # Untied, so that rows of the embedding are reached through the inputs alone.
    graph, params = split(make(dataclasses.replace(CONFIG, tied_embeddings=False)))
    tokens, segments, positions = pack(DOCUMENTS, 14)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens, segment_ids=segments, positions=positions)
        return cross_entropy(logits, tokens, (segments == 2).astype(jnp.float32))[0]

    rows = np.abs(jax.jit(jax.grad(loss))(params)["embedding"]).sum(-1)
    touched = {row for row in range(40) if rows[row] > 0}
    assert touched == set(DOCUMENTS[1])


def test_padding_never_matters():
    graph, params = split(make())
    tokens, segments, positions = pack(DOCUMENTS, 14)
    loss = functools.partial(loss_and_grad, graph)
    want = loss(params, tokens, segments, positions)
    noisy = jnp.where(segments == 0, 33, tokens)
    assert_close(loss(params, noisy, segments, positions), want, 1e-6)
    assert_close(loss(params, *pack(DOCUMENTS, 20)), want, 1e-4)
    empty = jnp.zeros_like(tokens)
    value, grads = loss(params, empty, empty, empty)
    assert value == 0 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_attention_is_causal():
    model = make()
    before = forward(model, TOKENS)
    after = forward(model, TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 40))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1).min() > 0


# ---- ways to run ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "depth_map",
    [None, jnp.array([0, 2])],
    ids=["plain", "traced"],
)
def test_modes_and_remat_agree_in_loss_and_gradient(depth_map):
    # test_layer_stack.py goes through all of them; here, that the real layer has no trap.
    three = dataclasses.replace(CONFIG, num_layers=3)

    def run(mode, remat):
        graph, params = split(make(dataclasses.replace(three, stack=mode, remat=remat)))
        return jax.jit(jax.value_and_grad(
            lambda params: batch_loss(graph, params, TOKENS, depth_map=depth_map)))(params)

    want = run("unroll", "none")
    for mode, remat in [("scan", "dots"), ("scan", "minimal"), ("scan", "offload")]:
        assert_close(run(mode, remat), want, 1e-4)


def test_policies_keep_what_their_names_say():
    """Bytes from one pass to the other, and which arrays of a layer are among them."""

    def kept(remat):
        graph, params = split(make(dataclasses.replace(CONFIG, remat=remat)))
        loss = lambda params: batch_loss(graph, params, TOKENS[:, :10])  # noqa: E731
        pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        # Products are made, and kept, with rows and columns as one axis.
        return [
            (2, 10, *leaf.shape[3 if leaf.shape[1] == 2 else 2 :])
            for leaf in jax.tree.leaves(pull)
            if leaf.shape[:3] == (4, 2, 10) or leaf.shape[:2] == (4, 20)
        ]

    shapes = {remat: kept(remat) for remat in ("none", "dots", "minimal", "full")}
    sizes = [sum(int(np.prod(shape)) for shape in each) for each in shapes.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    stream, queries, keys = (2, 10, 16), (2, 10, 4, 4), (2, 10, 2, 4)
    assert shapes["full"] == [stream]
    # Input and middle; query and context; key and value.
    assert sorted(shapes["minimal"]) == sorted([stream] * 2 + [queries] * 2 + [keys] * 2)
    inner = (2, 10, 24)
    assert shapes["dots"].count(inner) == 2 and inner not in shapes["minimal"]


def test_grouped_keys_equal_repeated_keys():
    grouped = make()
    whole = make(dataclasses.replace(CONFIG, num_kv_heads=None))
    graph, params = split(whole)
    source = split(grouped)[1]
    attention = dict(source["stack"]["layers"]["attention"])
    for name in ("key", "value"):
        kernel = attention[name].reshape(4, 16, 2, 4)
        attention[name] = jnp.repeat(kernel, 2, axis=2).reshape(4, 16, 16)
    source["stack"]["layers"]["attention"] = attention
    assert jax.tree.map(jnp.shape, source) == jax.tree.map(jnp.shape, params)
    assert_close(forward(nnx.merge(graph, source), TOKENS), forward(grouped, TOKENS))


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize(
    "depth_map", [DepthMap([*range(4)] * 2), DepthMap([0, *[1, 2] * 3, 3]), midas(4, 2)],
    ids=["loop", "middle loop", "midas"],
)
def test_growing_unties_a_loop_without_changing_the_function(depth_map, mode):
    config = dataclasses.replace(CONFIG, stack=mode)
    model = make(config)
    looped = forward(model, TOKENS, depth_map=depth_map)
    untied = nnx.merge(split(model)[0], grow(split(model)[1], depth_map, LAYOUT))
    assert_close(forward(untied, TOKENS), looped, 1e-6)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_without_layers_a_decoder_is_embedding_norm_and_head(mode):
    model = make(dataclasses.replace(CONFIG, stack=mode), depth=0)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    wanted = model.norm(model.embedding[...][tokens]) @ model.head_matrix()[0].T
    assert_close(forward(model, tokens), wanted)
    cache = model.prefill(tokens[:, :4], 6)
    logits, cache = model.decode(tokens[:, 4:], np.array([[4, 5]] * 2), cache)
    assert_close(logits, wanted[:, 4:])
    assert jax.tree.leaves(cache)[0].shape[0] == 0


def test_gates_skip_layers():
    model = make()
    gated = forward(model, TOKENS, gates=jnp.array([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(gated, forward(model, TOKENS, depth_map=DepthMap([0, 3])))


@pytest.mark.slow
def test_bfloat16_computes_low_and_keeps_parameters_high():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    graph, params = split(make(low))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    value, grads = loss_and_grad(graph, params, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    want, want_grads = loss_and_grad(split(make())[0], params, TOKENS)
    assert float(value) == pytest.approx(float(want), rel=0.01)
    flat, want_flat = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (grads, want_grads)
    )
    cosine = flat @ want_flat / np.linalg.norm(flat) / np.linalg.norm(want_flat)
    assert cosine > 0.99
    # It really computes in bf16: products of its two dtypes are nowhere to be found.
    jaxpr = jax.make_jaxpr(lambda params: nnx.merge(graph, params)(TOKENS))(params)
    assert "bf16" in str(jaxpr)


# ---- decoding with a cache ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pieces", "depth_map", "mode"),
    [
        ([1] * 12, None, "scan"),
        ([6, 5, 1], None, "unroll"),
        ([6, 5, 1], DepthMap([0, 1, 2, 3] * 2), "scan"),
        ([6, 5, 1], DepthMap([0, 1, 2, 1, 2, 3]), "scan"),
        ([8, 4], DepthMap([0, 1, 2, 1, 2, 3]), "unroll"),
    ],
)
def test_decoding_in_pieces_equals_the_full_forward(pieces, depth_map, mode):
    model = make(dataclasses.replace(CONFIG, stack=mode))
    want = forward(model, TOKENS, depth_map=depth_map)
    cache = model.init_cache(2, 16, 4 if depth_map is None else len(depth_map))
    graph, params = split(model)

    @jax.jit
    def step(params, tokens, positions, cache):
        return nnx.merge(graph, params).decode(tokens, positions, cache, depth_map=depth_map)

    start, logits = 0, []
    for size in pieces:
        where = jnp.arange(start, start + size)
        positions = jnp.broadcast_to(where[None], (2, size))
        out, cache = step(params, TOKENS[:, start : start + size], positions, cache)
        logits.append(out)
        start += size
    assert_close(jnp.concatenate(logits, axis=1), want)


def test_rows_may_stand_at_different_positions():
    model = make()
    want = forward(model, TOKENS)
    cache = model.init_cache(2, 12, 4)
    positions = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
    decode = jax.jit(lambda model, *args: model.decode(*args))
    _, cache = decode(model, TOKENS[:, :8], positions, cache)
    # Row 1 goes back to position 5 and overwrites what it wrote there.
    tokens = jnp.stack([TOKENS[0, 8:10], TOKENS[1, 5:7]])
    logits, _ = decode(model, tokens, jnp.array([[8, 9], [5, 6]]), cache)
    assert_close(logits[0], want[0, 8:10])
    assert_close(logits[1], want[1, 5:7])


def test_the_cache_has_the_dtype_and_heads_of_the_keys():
    cache = make(dataclasses.replace(CONFIG, dtype="bfloat16")).init_cache(3, 7, 5)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in cache.items()} == {
        name: ((5, 3, 2, 7, 4), jnp.dtype("bfloat16")) for name in ("key", "value")
    }


def test_a_shared_layer_keeps_one_cache_per_loop():
    model, looped = make(), DepthMap([0, 1, 2, 3] * 2)
    positions = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    _, cache = jax.jit(lambda model, *args: model.decode(*args, depth_map=looped))(
        model, TOKENS, positions, model.init_cache(2, 12, 8)
    )
    assert np.abs(cache["key"][0] - cache["key"][4]).max() > 1e-3


def test_activations_are_placed_by_the_names_of_their_axes():
    seen = []

    def constrain(x, names):
        seen.append((names, x.ndim))
        return x

    model = make(dataclasses.replace(CONFIG, stack="unroll"))
    jax.eval_shape(lambda: model(TOKENS, constrain=constrain))
    # The table and its rows, the mask; queries, keys and values (these in parts and whole) and
    # two branches of each layer; the logits.
    assert len(seen) == 3 + (5 + 2) * 4 + 1
    assert all(len(names) == ndim for names, ndim in seen)
    assert seen[-1][0] == ("batch", "length", "vocab")
