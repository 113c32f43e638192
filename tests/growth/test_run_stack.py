"""`run_stack` against a Python loop: values, gradients, programs, memory."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from stacking_jax.errors import UserError
from stacking_jax.growth import NEW, DepthMap, Scanned, grow, midas, run_stack

STORED, WIDTH = 6, 8
MAPS = {
    "plain": None,
    "midas": midas(6, 2),
    "loop": DepthMap([*range(6)] * 3),
    "interleaved": DepthMap([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "middle loop": DepthMap([0, *[1, 2, 3] * 3, 4, 5]),
    "sub-path": DepthMap([0, 2, 3, 5]),
    "scattered loop": DepthMap([*[5, 0, 2] * 2, 1], stored=6),
    "early exit": DepthMap([0, 1], stored=6),
    "list": [0, 5, 3],
}
TRACED = {
    "sub-path": [0, 2, 3, 5],
    "all": [*range(6)],
    "repeats": [0, 3, 3, 3, 1, 0, 5],
    "one": [4],
}


def make_layers(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": (0.3 * jax.random.normal(keys[0], (STORED, WIDTH, WIDTH))).astype(dtype),
        "b": (0.1 * jax.random.normal(keys[1], (STORED, WIDTH))).astype(dtype),
    }


LAYERS = make_layers()
X = jax.random.normal(jax.random.key(9), (3, WIDTH))


def body(layer, x):
    return x + jnp.tanh(x @ layer["w"] + layer["b"][None])


def python_loop(layers, x, sources, gates=None):
    for position, source in enumerate(sources):
        new = body(jax.tree.map(lambda leaf: leaf[source], layers), x)
        x = new if gates is None else x + gates[position] * (new - x)
    return x


def sources_of(depth_map):
    if depth_map is None:
        return tuple(range(STORED))
    return depth_map.sources if isinstance(depth_map, DepthMap) else tuple(depth_map)


def loss(run):
    return lambda *args: jnp.sum(jnp.sin(run(*args)))


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


# ---- values and gradients ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("name", sorted(MAPS))
def test_static_maps_equal_a_loop(name, mode):
    depth_map = MAPS[name]
    got = jax.jit(jax.value_and_grad(
        loss(lambda layers, x: run_stack(body, layers, x, depth_map, mode=mode)), (0, 1)
    ))(LAYERS, X)
    want = jax.value_and_grad(
        loss(lambda layers, x: python_loop(layers, x, sources_of(depth_map))), (0, 1)
    )(LAYERS, X)
    assert_close(got, want)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("name", sorted(TRACED))
def test_traced_maps_equal_a_loop(name, mode):
    run = jax.jit(lambda layers, x, i: run_stack(body, layers, x, i, mode=mode))
    got = jax.value_and_grad(loss(run), (0, 1))(LAYERS, X, jnp.array(TRACED[name]))
    want = jax.value_and_grad(
        loss(lambda layers, x: python_loop(layers, x, TRACED[name])), (0, 1)
    )(LAYERS, X)
    assert_close(got, want)


def test_a_traced_map_is_drawn_anew_without_compiling_again():
    traces = []

    @jax.jit
    def run(indices):
        traces.append(1)
        return run_stack(body, LAYERS, X, indices)

    for sources in ([0, 2, 5], [0, 1, 5], [0, 4, 5]):
        assert_close(run(jnp.array(sources)), python_loop(LAYERS, X, sources))
    assert len(traces) == 1


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=10), st.sampled_from(["scan", "unroll"]))
def test_random_maps(sources, mode):
    want = python_loop(LAYERS, X, sources)
    assert_close(run_stack(body, LAYERS, X, DepthMap(sources, stored=6), mode=mode), want)


def test_running_a_map_equals_running_what_grow_unties():
    depth_map = DepthMap([0, *[1, 2, 3] * 3, 4, 5])
    untied = grow({"layers": LAYERS}, depth_map, Scanned("layers"))["layers"]
    for mode in ("scan", "unroll"):
        looped = run_stack(body, LAYERS, X, depth_map, mode=mode)
        assert_close(looped, run_stack(body, untied, X, mode=mode), 1e-6)


def test_entries_of_a_traced_map_are_clipped_into_range():
    got = run_stack(body, LAYERS, X, jnp.array([-3, 99]))
    assert_close(got, python_loop(LAYERS, X, [0, 5]))


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_higher_derivatives_and_batches_of_a_traced_map(mode):
    indices = jnp.array([0, 3, 3, 5])
    run = loss(lambda layers, x: run_stack(body, layers, x, indices, mode=mode))
    reference = loss(lambda layers, x: python_loop(layers, x, [0, 3, 3, 5]))

    def along_itself(f):
        return jax.jvp(lambda layers: jax.grad(f)(layers, X), (LAYERS,), (LAYERS,))

    assert_close(along_itself(run), along_itself(reference), 1e-4)
    many = jnp.stack([X, 2 * X])
    assert_close(
        jax.vmap(jax.grad(run), (None, 0))(LAYERS, many),
        jax.vmap(jax.grad(reference), (None, 0))(LAYERS, many),
    )
    paths = jnp.array([[0, 3], [1, 5]])
    got = jax.vmap(lambda path: run_stack(body, LAYERS, X, path, mode=mode))(paths)
    assert_close(got, jnp.stack([python_loop(LAYERS, X, path) for path in paths.tolist()]))


# ---- gates --------------------------------------------------------------------------------


def run_kinds():
    """Every way to run: mode × (static or traced)."""
    return [
        pytest.param(mode, traced, id=f"{mode}-{'traced' if traced else 'static'}")
        for mode in ("scan", "unroll")
        for traced in (False, True)
    ]


def as_kind(sources, traced):
    return jnp.array(sources) if traced else DepthMap(sources, stored=STORED)


@pytest.mark.parametrize(("mode", "traced"), run_kinds())
def test_fractional_gates_and_their_gradients(mode, traced):
    sources = [0, 1, 2, 1, 2, 5]
    gates = jnp.array([1.0, 0.5, 2.0, 0.0, 1 / 3, 1.0])
    got = jax.value_and_grad(
        loss(lambda layers, x, gates: run_stack(
            body, layers, x, as_kind(sources, traced), gates, mode=mode)), (0, 1, 2)
    )(LAYERS, X, gates)
    want = jax.value_and_grad(
        loss(lambda layers, x, gates: python_loop(layers, x, sources, gates)), (0, 1, 2)
    )(LAYERS, X, gates)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("mode", "traced"), run_kinds())
def test_gates_of_one_and_zero_are_exact(mode, traced, dtype):
    layers, x = make_layers(dtype), X.astype(dtype)
    sources = [0, 1, 2, 3]
    run = functools.partial(run_stack, body, layers, x, mode=mode)
    plain = run(as_kind(sources, traced))
    np.testing.assert_array_equal(run(as_kind(sources, traced), jnp.ones(4)), plain)
    np.testing.assert_array_equal(run(as_kind(sources, traced), jnp.zeros(4)), x)
    gates = jnp.array([1, 0, 0, 1])
    np.testing.assert_array_equal(
        run(as_kind(sources, traced), gates), run(as_kind([0, 3], traced))
    )


def test_gates_may_be_numpy_or_a_list():
    want = python_loop(LAYERS, X, range(6), [0.5] * 6)
    for gates in ([0.5] * 6, np.full(6, 0.5), jnp.full(6, 0.5, jnp.bfloat16)):
        for mode in ("scan", "unroll"):
            assert_close(run_stack(body, LAYERS, X, None, gates, mode=mode), want)


def test_integers_in_the_carry_are_counted_not_gated():
    def counting(layer, carry):
        return {"x": body(layer, carry["x"]), "n": carry["n"] + 1}

    out = run_stack(counting, LAYERS, {"x": X, "n": jnp.asarray(0)}, None, jnp.full(6, 0.5))
    assert int(out["n"]) == 6


# ---- what goes by position -------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "traced"), run_kinds())
def test_caches_go_by_position_and_not_by_layer(mode, traced):
    sources = [0, 1, 2, 1, 2, 5]
    cache = {"a": jnp.arange(6.0), "b": jnp.arange(12.0).reshape(6, 2)}

    def with_cache(layer, x, item):
        assert item["a"].shape == () and item["b"].shape == (2,)
        return body(layer, x) + item["a"], {"seen": x.mean(), "a": item["a"] + 1}

    x, outputs = run_stack(
        with_cache, LAYERS, X, as_kind(sources, traced), per_position=cache, mode=mode
    )
    want, seen = X, []
    for position, source in enumerate(sources):
        seen.append(want.mean())
        want = body(jax.tree.map(lambda leaf: leaf[source], LAYERS), want) + position
    assert_close(x, want)
    assert_close(outputs, {"seen": jnp.stack(seen), "a": jnp.arange(6.0) + 1})


@pytest.mark.parametrize(("mode", "traced"), run_kinds())
def test_the_carry_keeps_its_dtype(mode, traced):
    layers = make_layers(jnp.bfloat16)
    out = run_stack(
        body, layers, X.astype(jnp.bfloat16), as_kind([0, 1, 0, 1], traced),
        jnp.full(4, 0.5, jnp.float32), mode=mode,
    )
    assert out.dtype == jnp.bfloat16


# ---- programs ----------------------------------------------------------------------------------


def big_layers(width=64):
    return {"w": jnp.full((STORED, width, width), 0.01)}


def plain_body(layer, x):
    return x + jnp.tanh(x @ layer["w"])


def count(jaxpr, name: str) -> int:
    """How often a primitive appears in a jaxpr and everything within."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        total += sum(count(inner, name) for inner in jaxprs_in_params(eqn.params))
    return total


def test_a_loop_is_two_scans_over_weights_that_stay_in_place():
    layers, x = big_layers(), jnp.ones((2, 64))
    looped = DepthMap([*range(6)] * 5)
    jaxpr = jax.make_jaxpr(lambda layers, x: run_stack(plain_body, layers, x, looped))(layers, x)
    (outer,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert outer.params["length"] == 5
    (inner,) = [eqn for eqn in outer.params["jaxpr"].eqns if eqn.primitive.name == "scan"]
    assert inner.params["length"] == 6
    text = str(jaxpr)
    assert "gather" not in text and "concatenate" not in text
    # The weights enter the outer loop as a constant, not as something repeated.
    shapes = [v.aval.shape for v in outer.invars]
    assert shapes.count((6, 64, 64)) == 1 and sum(map(np.prod, shapes)) < 1.1 * 6 * 64 * 64


@pytest.mark.parametrize("repeats", [2, 8])
def test_the_compiled_loop_holds_the_weights_once(repeats):
    layers, x = big_layers(128), jnp.ones((2, 128))
    weights = layers["w"].nbytes

    def compiled(depth_map):
        return jax.jit(lambda layers, x: run_stack(plain_body, layers, x, depth_map)).lower(
            layers, x).compile()

    whole = compiled(DepthMap([*range(6)] * repeats))
    assert whole.memory_analysis().temp_size_in_bytes < weights // 2
    # A loop in the middle is one slice of the stack, however often it runs.
    middle = compiled(DepthMap([0, *[1, 2, 3] * repeats, 4, 5]))
    assert middle.memory_analysis().temp_size_in_bytes < 1.5 * weights
    repeated = f"f32[{6 * repeats},128,128]"
    assert repeated not in whole.as_text() and repeated not in middle.as_text()


def test_unrolled_flops_follow_the_number_of_positions():
    layers, x = big_layers(), jnp.ones((32, 64))

    def flops(depth_map):
        program = jax.jit(
            lambda layers, x, m: run_stack(plain_body, layers, x, m, mode="unroll")
        ).lower(layers, x, depth_map)
        return program.compile().cost_analysis()["flops"]

    two, four, eight = (flops(jnp.arange(n) % 6) for n in (2, 4, 8))
    one_layer = 2 * 32 * 64 * 64
    assert four - two == pytest.approx(2 * one_layer, rel=0.05)
    assert eight - four == pytest.approx(4 * one_layer, rel=0.05)


@pytest.mark.parametrize("remat", [None, jax.checkpoint_policies.nothing_saveable])
def test_a_traced_map_keeps_no_copy_of_the_weights(remat):
    """From one pass to the other live the stack itself and activations, no gathered layer."""
    width, indices = 128, jnp.array([0, 2, 3, 5])
    layers, x = big_layers(width), jnp.ones((2, width))

    def run(layers, x, indices):
        return run_stack(plain_body, layers, x, indices, remat=remat).sum()

    def temporary_layers(function):
        compiled = jax.jit(function).lower(layers, x, indices).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * width * width)

    assert temporary_layers(run) < 1.5
    # The gradients of the positions, before they are added up, and little else.
    assert temporary_layers(jax.grad(run, (0, 1))) < len(indices) + 2.5


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_remat_keeps_only_what_its_policy_names(mode, traced):
    """The policy reaches every position, also within a traced map's own checkpoint."""
    depth_map = as_kind([0, 1, 2, 3, 4, 5], traced)

    def deep(layer, x):
        h = x
        for _ in range(4):
            h = jnp.tanh(jnp.sin(h @ layer["w"]))
        return x + h

    def activations(remat):
        _, pull = jax.vjp(
            lambda layers, x: run_stack(deep, layers, x, depth_map, mode=mode, remat=remat),
            LAYERS, X,
        )
        shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.shape[-2:] == X.shape]
        return sum(int(np.prod(shape)) // X.size for shape in shapes)

    everything = activations(None)
    dots = activations(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    nothing = activations(jax.checkpoint_policies.nothing_saveable)
    assert nothing <= 7, "one input per position, and the carry"
    assert nothing < dots < everything


@pytest.mark.parametrize(("mode", "traced"), run_kinds())
def test_remat_changes_no_number(mode, traced):
    depth_map, gates = as_kind([0, 1, 1, 5], traced), jnp.array([1.0, 0.5, 0.0, 1.0])

    def gradient(remat):
        return jax.jit(jax.grad(loss(lambda layers, x: run_stack(
            body, layers, x, depth_map, gates, mode=mode, remat=remat)), (0, 1)))(LAYERS, X)

    want = gradient(None)
    for policy in (
        jax.checkpoint_policies.nothing_saveable,
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ):
        assert_close(gradient(policy), want, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [2, 3, 10])
@pytest.mark.parametrize("name", ["plain", "middle loop", "traced"])
def test_partly_unrolled_scans_change_no_number(name, unroll):
    traced = name == "traced"
    depth_map = jnp.array([0, 3, 3, 1, 5]) if traced else MAPS[name]
    gates = jnp.linspace(0.5, 1.0, 6 if depth_map is None else len(depth_map))

    def gradient(unroll, remat=None):
        return jax.jit(jax.grad(loss(lambda layers, x: run_stack(
            body, layers, x, depth_map, gates, unroll=unroll, remat=remat)), (0, 1)))(LAYERS, X)

    want = gradient(1)
    assert_close(gradient(unroll), want, 1e-6)
    assert_close(gradient(unroll, jax.checkpoint_policies.nothing_saveable), want, 1e-6)


@pytest.mark.parametrize(("unroll", "bodies"), [(1, 1), (3, 3), (6, 6)])
def test_a_turn_of_the_loop_runs_as_many_layers(unroll, bodies):
    program = jax.jit(lambda layers, x: run_stack(body, layers, x, unroll=unroll))
    text = program.lower(LAYERS, X).compile().as_text()
    assert len(re.findall(r" dot\(", text)) == bodies
    assert (" while(" in text) == (unroll < 6)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_no_layers_change_nothing(mode):
    nothing = jax.tree.map(lambda leaf: leaf[:0], LAYERS)

    def run(layers, x):
        return run_stack(
            body, layers, x, gates=jnp.zeros(0), mode=mode,
            remat=jax.checkpoint_policies.nothing_saveable,
        )

    np.testing.assert_array_equal(run(nothing, X), X)
    gradient = jax.grad(loss(run), (0, 1))(nothing, X)
    assert jax.tree.map(jnp.shape, gradient[0]) == {"w": (0, WIDTH, WIDTH), "b": (0, WIDTH)}
    np.testing.assert_array_equal(gradient[1], jax.grad(loss(lambda _, x: x), 1)(nothing, X))
    x, outputs = run_stack(
        lambda layer, x, item: (body(layer, x), {"new": item["old"] + x.sum()}), nothing, X,
        per_position={"old": jnp.zeros((0, 5))}, mode=mode,
    )
    np.testing.assert_array_equal(x, X)
    assert outputs["new"].shape == (0, 5)
    with pytest.raises(UserError, match="the stack stores none"):
        run_stack(body, nothing, X, [0])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers={}), "no layers"),
        (dict(layers={"w": jnp.zeros(())}), r"\['w'\] is a scalar"),
        (
            dict(layers={"a": jnp.zeros((3, 2)), "b": jnp.zeros((4, 2))}),
            r"disagree on the number of layers: \['a'\] has 3, \['b'\] has 4",
        ),
        (dict(depth_map=[0, 6]), "names layer 6"),
        (dict(depth_map=[0, NEW, *range(1, 6)]), r"run the map 0 \+ 1..5: .* \+ are NEW"),
        (dict(depth_map=DepthMap([0, 1])), "reads from 2 stored layers, but the stack holds 6"),
        (dict(depth_map=jnp.array([0.0, 1.0])), r"integer array \[positions\].*float32\[2\]"),
        (dict(depth_map=jnp.array([[0, 1]])), r"int32\[1, 2\]"),
        (dict(depth_map=jnp.zeros((0,), jnp.int32)), "at least one position"),
        (dict(gates=jnp.ones(5)), r"gates has shape \(5,\), but the depth map runs 6"),
        (dict(gates=jnp.ones((6, 1))), r"gates has shape \(6, 1\)"),
        (dict(gates=jnp.ones(6), depth_map=jnp.array([0, 1])), "runs 2 positions"),
        (dict(mode="loop"), "mode is 'scan' or 'unroll'"),
        (dict(unroll=0), "unroll is a positive whole number; got 0"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(layers=LAYERS, x=X) | change
    with pytest.raises(UserError, match=message):
        run_stack(body, **arguments)


def test_a_cache_of_the_wrong_length():
    with pytest.raises(UserError, match="per_position has a leaf of shape .* runs 6 positions"):
        run_stack(lambda layer, x, item: (x, item), LAYERS, X, per_position=jnp.zeros((5, 2)))


@pytest.mark.parametrize(("mode", "traced"), run_kinds())
@pytest.mark.parametrize(
    "bad",
    [lambda layer, x: x.astype(jnp.bfloat16), lambda layer, x: x[:1], lambda layer, x: (x, x)],
    ids=["dtype", "shape", "structure"],
)
def test_a_body_that_changes_the_carry(mode, traced, bad):
    with pytest.raises(UserError, match="body takes a carry .* they must agree"):
        run_stack(bad, LAYERS, X, as_kind([0, 1], traced), mode=mode)
