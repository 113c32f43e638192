"""`grow_module`: NNX modules in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.errors import UserError
from stacking_jax.growth import NEW, Scanned, Unrolled, grow_module


class Block(nnx.Module):
    def __init__(self, rngs, kind: str = "global"):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.kind = kind

    def __call__(self, x):
        return x + 0.1 * self.drop(jnp.tanh(self.linear(x)))


class Listed(nnx.Module):
    def __init__(self, depth, rngs):
        self.layers = nnx.List(
            [Block(rngs, "local" if i % 2 == 0 else "global") for i in range(depth)]
        )

    def blocks(self):
        return list(self.layers)


class Sequential(nnx.Module):
    def __init__(self, depth, rngs):
        self.body = nnx.Sequential(*[Block(rngs) for _ in range(depth)])

    def blocks(self):
        return list(self.body.layers)


class Named(nnx.Module):
    def __init__(self, depth, rngs):
        self.inner = nnx.Module()
        for i in range(depth):
            setattr(self.inner, f"block_{i}", Block(rngs))

    def blocks(self):
        number = sum(name.startswith("block_") for name in vars(self.inner))
        return [getattr(self.inner, f"block_{i}") for i in range(number)]


class Keyed(nnx.Module):
    def __init__(self, depth, rngs):
        self.h = nnx.Dict({f"b{i}": Block(rngs) for i in range(depth)})

    def blocks(self):
        return [self.h[f"b{i}"] for i in range(len(self.h))]


CONTAINERS = {
    "list": (Listed, Unrolled("layers/{}")),
    "sequential": (Sequential, Unrolled("body/layers/{}")),
    "attributes": (Named, Unrolled("inner/block_{}")),
    "dict": (Keyed, Unrolled("h/b{}")),
}


def kernels(blocks) -> list[np.ndarray]:
    return [np.asarray(block.linear.kernel[...]) for block in blocks]


def run(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("sources", [[0, 1, 1, 2], [0, 2], [2, 0, 1, 1, 1], [0, 1, 2]])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_lists_of_layers(kind, sources):
    build, layout = CONTAINERS[kind]
    model = build(3, nnx.Rngs(0))
    old, values = model.blocks(), kernels(model.blocks())
    grow_module(model, sources, layout)
    new = model.blocks()
    assert len(new) == len(sources)
    for block, source, value in zip(new, sources, kernels(new), strict=True):
        np.testing.assert_array_equal(value, values[source])
        assert block.kind == old[source].kind
    # Those that stay keep their identity, the copies have variables of their own.
    for source in set(sources):
        assert new[sources.index(source)] is old[source]
    new[-1].linear.bias[...] = jnp.full(4, 9.0)
    assert sum(float(block.linear.bias[0]) == 9 for block in new) == 1
    # What was grown still trains.
    model.eval()
    grads = nnx.grad(lambda m: run(m.blocks(), jnp.ones((2, 4))).sum())(model)
    assert len(jax.tree.leaves(grads)) == 2 * len(sources)


def test_copies_drop_other_units_than_their_sources():
    model = Listed(1, nnx.Rngs(0))
    grow_module(model, [0, 0], Unrolled("layers/{}"))
    first, second = (np.asarray(block.drop(jnp.ones(200))) for block in model.layers)
    assert (first != second).any()


def test_a_stacked_module():
    class Stacked(nnx.Module):
        def __init__(self, depth, rngs):
            self.layers = nnx.vmap(Block)(rngs.fork(split=depth))

    model = Stacked(3, nnx.Rngs(0))
    before = np.asarray(model.layers.linear.kernel[...])
    variable = model.layers.linear.kernel
    grow_module(model, [0, 1, 1, 2], Scanned("layers"))
    assert model.layers.linear.kernel is variable
    np.testing.assert_array_equal(variable[...], before[[0, 1, 1, 2]])
    y = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        jnp.ones((2, 4)), model.layers
    )
    assert y.shape == (2, 4)


def test_units_matrices_and_new_layers():
    model = Listed(4, nnx.Rngs(0))
    grow_module(model, [0, 1, 1], Unrolled("layers/{}", period=2))
    assert [block.kind for block in model.layers] == ["local", "global"] * 3

    model = Listed(2, nnx.Rngs(0))
    before = kernels(model.layers)
    state = nnx.state(model, nnx.Param)
    # A matrix mixes parameters only: keys and counts of dropout are no numbers.
    for block in model.layers:
        del block.drop
    del state
    grow_module(model, np.array([[1, 0], [0.5, 0.5], [0, 1]]), Unrolled("layers/{}"))
    np.testing.assert_allclose(kernels(model.layers)[1], (before[0] + before[1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(kernels(model.layers)[2], before[1])

    model, fresh = Listed(2, nnx.Rngs(0)), Listed(3, nnx.Rngs(1))
    before = kernels(model.layers)
    grow_module(model, [0, NEW, 1], Unrolled("layers/{}"), fresh=fresh)
    for got, expected in zip(
        kernels(model.layers), [before[0], kernels(fresh.layers)[1], before[1]], strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert model.layers[1] is not fresh.layers[1]


def test_several_stacks():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.decoder = Listed(2, rngs), Listed(3, rngs)

    model = Both(nnx.Rngs(0))
    layouts = {side: Unrolled(f"{side}/layers/{{}}") for side in ("encoder", "decoder")}
    grow_module(model, {"encoder": [0, 0, 1], "decoder": [0, 2]}, layouts)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (3, 2)


def test_what_is_refused_leaves_the_module_alone():
    model = Listed(2, nnx.Rngs(0))
    model.layers[1].linear.bias = model.layers[0].linear.bias
    tied = Listed(2, nnx.Rngs(0))
    tied.head_bias = tied.layers[1].linear.bias
    in_a_tuple = nnx.Module()
    in_a_tuple.layers = nnx.data((Block(nnx.Rngs(0)), Block(nnx.Rngs(1))))
    fine = Listed(2, nnx.Rngs(0))
    layout = Unrolled("layers/{}")
    for module, depth_map, message in [
        (model, [0, 1, 1], "share the variable linear/bias"),
        (tied, [0, 1, 1], "the rest of the module and 1 share the variable linear/bias"),
        (in_a_tuple, [0, 1, 1], "stand in a tuple"),
        (fine, [0, 2], "names layer 2"),
        (fine, [0, NEW, 1], "give grow"),
    ]:
        with pytest.raises(UserError, match=message):
            grow_module(module, depth_map, layout)
        assert len(module.layers) == 2
    with pytest.raises(UserError, match="grows an NNX module in place; got dict"):
        grow_module({"layers": []}, [0], layout)
