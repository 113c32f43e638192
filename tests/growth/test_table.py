"""Every operator × every layout × {float32, bfloat16} × {one device, eight}: grown == reference.

The reference takes layers from a Python list. Operators come from `OPERATORS` and are
called with the arguments in `EXAMPLE`, so that a new one is tested as soon as it is
registered, or fails here until its arguments are given.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import flax.core
import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stacking_jax.growth import NEW, OPERATORS, DepthMap, Scanned, Unrolled, grow

EXAMPLE = {
    "depth": 6, "block": 2, "times": 2, "seed": 1, "index": 1, "k": 4, "to": 8, "drop": 1, "n": 2,
    "count": 2, "sources": [0, 2, 1, 1, NEW],
}


def example(name: str) -> DepthMap:
    """The operator's map, with optional arguments left at their defaults."""
    operator = OPERATORS[name]
    arguments = {}
    for parameter in inspect.signature(operator).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            assert parameter.name in EXAMPLE, f"give {name} an example of {parameter.name!r}"
            arguments[parameter.name] = EXAMPLE[parameter.name]
    return operator(**arguments)


MAPS = {name: example(name) for name in sorted(OPERATORS)}
MAPS["all new"] = DepthMap([NEW, NEW], stored=2)
MAPS["shrink"] = DepthMap([0, 3], stored=6)


# No stack below is as deep: what is as long is the width, which eight devices share.
WIDTH = 40


# ---- layouts: a tree from a list of layers -----------------------------------------------


def make_layers(number: int, start: int, dtype) -> list[dict]:
    """Layers whose every number is different, up to rounding."""
    def array(layer, at, *shape):
        first = start + 97 * layer + 31 * at
        return np.arange(first, first + np.prod(shape)).reshape(shape).astype(dtype)

    return [
        {"attn": {"out": array(i, 0, WIDTH, 3)}, "scale": array(i, 1, WIDTH)} for i in range(number)
    ]


def stacked(layers: list[dict], axis: int) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *layers)


def linen_boxes(layers: list[dict]) -> dict:
    box = lambda leaf: nn.LogicallyPartitioned(  # noqa: E731
        leaf, names=("embed", "layers", *["mlp"] * (leaf.ndim - 2))
    )
    return {"params": {"decoder": jax.tree.map(box, {"layers": stacked(layers, 1)})}}


def nnx_state(tree: dict) -> nnx.State:
    return nnx.State(jax.tree.map(lambda leaf: nnx.Param(leaf), tree))


def train_state(layers: list[dict]) -> Any:
    params = {"blocks": stacked(layers, 0), "head": np.ones((WIDTH, 2), np.float32)}
    moments = optax.ScaleByAdamState(
        np.int32(3), jax.tree.map(lambda leaf: -leaf, params), jax.tree.map(np.square, params)
    )
    return TrainState(np.int32(7), params, (moments, optax.EmptyState()), params)


class TrainState(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any


class Case(NamedTuple):
    layout: Any
    build: Any


LAYOUTS = {
    "axis 0": Case(Scanned("layers"), lambda ls: {"layers": stacked(ls, 0)}),
    "axis 1": Case(Scanned("decoder/decoder", 1), lambda ls: {"decoder": {"decoder": stacked(ls, 1)}}),
    "axis -1": Case(Scanned("layers", -1), lambda ls: {"layers": stacked(ls, -1)}),
    "axis 0, period 2": Case(Scanned("layers", period=2), lambda ls: {"layers": stacked(ls, 0)}),
    "frozen": Case(Scanned("layers"), lambda ls: flax.core.freeze({"layers": stacked(ls, 0)})),
    "boxed": Case(Scanned("decoder/layers", 1), linen_boxes),
    "NNX scanned": Case(Scanned("layers"), lambda ls: nnx_state({"layers": stacked(ls, 0)})),
    "names": Case(Unrolled("enc/layers_{}"), lambda ls: {
        "enc": {f"layers_{i}": one for i, one in enumerate(ls)}}),
    "digits": Case(Unrolled("h/{}"), lambda ls: {"h": {str(i): x for i, x in enumerate(ls)}}),
    "numbers": Case(Unrolled("h/{}"), lambda ls: {"h": dict(enumerate(ls))}),
    "list": Case(Unrolled("h/{}"), lambda ls: {"h": list(ls)}),
    "tuple": Case(Unrolled("h/{}"), lambda ls: {"h": tuple(ls)}),
    "list, period 2": Case(Unrolled("h/{}", period=2), lambda ls: {"h": list(ls)}),
    "NNX list": Case(Unrolled("layers/{}"), lambda ls: nnx_state({"layers": dict(enumerate(ls))})),
    "train state": Case(Scanned("blocks"), train_state),
}


def mesh8():
    return jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))


def sharding_of(leaf: Any, mesh) -> NamedSharding:
    shape = np.shape(leaf)
    return NamedSharding(mesh, P(*["model" if size == WIDTH else None for size in shape]))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("operator", MAPS)
def test_grown_equals_reference(operator, layout_name, dtype, devices):
    depth_map, (layout, build) = MAPS[operator], LAYOUTS[layout_name]
    period = layout.period
    old = make_layers(depth_map.stored * period, 0, dtype)
    new = make_layers(len(depth_map) * period, 5000, dtype)
    expected = build([
        new[i * period + slot] if source == NEW else old[source * period + slot]
        for i, source in enumerate(depth_map.sources) for slot in range(period)
    ])
    tree, fresh = build(old), build(new) if any(depth_map.fresh) else None
    if devices == 1:
        assert_same(grow(tree, depth_map, layout, fresh=fresh, target=expected), expected)
        return
    mesh = mesh8()
    put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, sharding_of(x, mesh)), tree)  # noqa: E731
    grown = grow(put(tree), depth_map, layout, fresh=fresh if fresh is None else put(fresh))
    assert_same(grown, expected)
    for leaf in jax.tree.leaves(grown):
        assert leaf.sharding.is_equivalent_to(sharding_of(leaf, mesh), leaf.ndim)
