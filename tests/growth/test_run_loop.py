"""Loops with injection, truncation and exits, against a Python loop that says what they mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Loop, Scanned, grow, run_stack

STORED, WIDTH = 4, 8
LOOPS = {
    "plain": Loop(1, 2, 3),
    "one turn": Loop(1, 2, 1),
    "whole stack": Loop(0, 4, 3),
    "input": Loop(1, 2, 3, inject="input"),
    "stream": Loop(1, 2, 3, inject="stream"),
    "truncated": Loop(1, 2, 4, inject="stream", backprop=2),
    "truncated before nothing": Loop(0, 3, 3, inject="input", backprop=1),
    "exits": Loop(1, 2, 4, exits=3),
    "exits of no tail": Loop(2, 2, 3, exits=3),
    "exits of some turns": Loop(1, 2, 4, inject="stream", backprop=3, exits=2),
}


def make_layers(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "w": 0.3 * jax.random.normal(keys[0], (STORED, WIDTH, WIDTH)),
        "b": 0.1 * jax.random.normal(keys[1], (STORED, WIDTH)),
    }


LAYERS = make_layers()
X = jax.random.normal(jax.random.key(9), (3, WIDTH))


def body(layer, x):
    return x + jnp.tanh(x @ layer["w"] + layer["b"][None])


def reference(layer_of, x, loop, stored=STORED, gates=None):
    """What a loop means; `layer_of(position, layer)` gives the parameters."""
    position = 0

    def one(x, layer):
        nonlocal position
        new = body(layer_of(position, layer), x)
        new = new if gates is None else x + gates[position] * (new - x)
        position += 1
        return new

    given = x
    for layer in range(loop.start):
        x = one(x, layer)
    before, states = x, []
    for turn in range(loop.turns):
        if loop.backprop is not None and turn == loop.turns - loop.backprop:
            x = jax.lax.stop_gradient(x)
        if turn and loop.inject:
            x = x + (given if loop.inject == "input" else before)
        for layer in range(loop.start, loop.stop):
            x = one(x, layer)
        states.append(x)
    after, outs = position, []
    for x in states[-loop.exits :]:
        position = after
        for layer in range(loop.stop, stored):
            x = one(x, layer)
        outs.append(x)
    return jnp.stack(outs) if loop.exits > 1 else outs[0]


def loss(run):
    return lambda *args: jnp.sum(jnp.sin(run(*args)))


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def tied(layers):
    return lambda position, layer: jax.tree.map(lambda leaf: leaf[layer], layers)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_values_and_gradients(name, mode):
    loop = LOOPS[name]
    got = jax.jit(jax.value_and_grad(
        loss(lambda layers, x: run_stack(body, layers, x, loop=loop, mode=mode)), (0, 1)
    ))(LAYERS, X)
    want = jax.value_and_grad(
        loss(lambda layers, x: reference(tied(layers), x, loop)), (0, 1)
    )(LAYERS, X)
    assert_close(got, want)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("name", ["plain", "stream", "exits of some turns"])
def test_gradients_are_those_of_the_untied_stack_added_up_over_the_copies(name, mode):
    loop = LOOPS[name]
    depth_map = loop.depth_map(STORED)
    untied = grow({"layers": LAYERS}, depth_map, Scanned("layers"))["layers"]

    def plain(layers):
        return reference(
            lambda position, layer: jax.tree.map(lambda leaf: leaf[position], layers), X, loop
        )

    copies = jax.grad(loss(plain))(untied)
    summed = jax.tree.map(
        lambda leaf: jnp.stack([
            leaf[np.array([source == layer for source in depth_map.sources])].sum(axis=0)
            for layer in range(STORED)
        ]), copies,
    )  # fmt: skip
    got = jax.grad(loss(lambda layers: run_stack(body, layers, X, loop=loop, mode=mode)))(LAYERS)
    assert_close(got, summed)


@pytest.mark.parametrize("remat", [None, jax.checkpoint_policies.nothing_saveable])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_gates_and_remat_go_by_position(mode, remat):
    loop = LOOPS["stream"]
    gates = jnp.linspace(0.2, 1.0, len(loop.depth_map(STORED)))
    got = jax.jit(jax.grad(
        loss(lambda layers, x, gates: run_stack(
            body, layers, x, gates=gates, loop=loop, mode=mode, remat=remat)), (0, 1, 2)
    ))(LAYERS, X, gates)
    want = jax.grad(
        loss(lambda layers, x, gates: reference(tied(layers), x, loop, gates=gates)), (0, 1, 2)
    )(LAYERS, X, gates)
    assert_close(got, want)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_outputs_by_position(mode):
    loop = LOOPS["stream"]
    count = len(loop.depth_map(STORED))
    items = jnp.arange(count, dtype=jnp.float32)

    def with_item(layer, x, item):
        return body(layer, x), jnp.mean(x) + item

    x, outputs = run_stack(
        with_item, LAYERS, X, loop=loop, per_position=items, mode=mode
    )
    assert_close(x, reference(tied(LAYERS), X, loop))
    assert outputs.shape == (count,)
    assert_close(outputs[0], jnp.mean(X))
    more = run_stack(with_item, LAYERS, X, loop=loop, per_position=items + 1, mode=mode)[1]
    assert_close(more, outputs + 1)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_a_plain_loop_is_its_map_to_the_bit(mode):
    loop = LOOPS["plain"]
    got = jax.jit(lambda: run_stack(body, LAYERS, X, loop=loop, mode=mode))()
    want = jax.jit(lambda: run_stack(body, LAYERS, X, loop.depth_map(STORED), mode=mode))()
    np.testing.assert_array_equal(got, want)


def test_states_are_those_of_fewer_turns():
    loop = Loop(1, 2, 4, inject="input", exits=4)
    states = run_stack(body, LAYERS, X, loop=loop)
    for turns in range(1, 5):
        fewer = run_stack(body, LAYERS, X, loop=loop.with_turns(turns))
        assert_close(states[turns - 1], fewer, 1e-6)


def big_layers(width):
    return {"w": jax.random.normal(jax.random.key(0), (STORED, width, width)) / width**0.5}


def plain_body(layer, x):
    return x + jnp.tanh(x @ layer["w"])


@pytest.mark.parametrize("loop", [
    Loop(1, 2, 8, inject="stream"), Loop(1, 2, 8, inject="stream", backprop=4, exits=2),
])
def test_the_compiled_loop_holds_the_weights_once(loop):
    layers, x = big_layers(128), jnp.ones((2, 128))
    weights = layers["w"].nbytes
    program = jax.jit(lambda layers, x: run_stack(plain_body, layers, x, loop=loop)).lower(
        layers, x).compile()
    # The slice of the block, and one of each part beside it.
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * weights
    assert "f32[16,128,128]" not in program.as_text()


def test_truncated_turns_run_forward_alone():
    width, rows = 64, 32
    layers, x = big_layers(width), jnp.ones((rows, width))

    def flops(loop):
        run = loss(
            lambda layers, x: run_stack(plain_body, layers, x, loop=loop, mode="unroll")
        )
        program = jax.jit(jax.grad(run, (0, 1))).lower(layers, x)
        return program.compile().cost_analysis()["flops"]

    product = 2 * rows * width * width
    whole = flops(Loop(1, 2, 6, inject="stream"))
    assert whole == pytest.approx(3 * 14 * product, rel=0.05)
    cut = Loop(1, 2, 6, inject="stream", backprop=2)
    assert cut.forward_only == 8
    assert whole - flops(cut) == pytest.approx(2 * 8 * product, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(loop=Loop(3, 2, 2)), "over layers 3 to 4 needs 5 stored layers; there are 4"),
        (dict(depth_map=jnp.array([0, 1])), "not one that is drawn"),
        (dict(depth_map=[0, 1, 2, 3]), r"runs the map 0 \(1 2\)×2 3, but .* given is 0..3"),
        (dict(loop=Loop(1, 2, 2, exits=2), per_position=jnp.zeros(6)), "no outputs by position"),
    ],
)  # fmt: skip
def test_errors(change, message):
    with pytest.raises(UserError, match=message):
        run_stack(body, LAYERS, X, **(dict(loop=Loop(1, 2, 2)) | change))
