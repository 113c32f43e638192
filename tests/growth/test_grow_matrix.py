"""Growth by a `[new, old]` matrix: weighted sums of layers, and their derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Scanned, Unrolled, grow

MATRIX = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5]], np.float32)


def arrays(depth: int = 3, dtype=np.float32) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"w": rng.normal(size=(4, 8)).astype(dtype), "b": rng.normal(size=8).astype(dtype)}
        for _ in range(depth)
    ]


def stacked(layers: list[dict], axis: int = 0) -> dict:
    return {"layers": jax.tree.map(lambda *leaves: np.stack(leaves, axis), *layers)}


def mixed(layers: list[dict], matrix: np.ndarray) -> list[dict]:
    """The reference: in float64, rounded once."""
    return [
        jax.tree.map(
            lambda *leaves, row=row: sum(
                weight * leaf.astype(np.float64) for weight, leaf in zip(row, leaves, strict=True)
            ).astype(leaves[0].dtype),
            *layers,
        )
        for row in np.asarray(matrix, np.float64)
    ]


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        # One unit in the last place, where bfloat16 rounds a float32 sum.
        tolerance = 1e-6 if a.dtype == np.float32 else 2**-7
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=tolerance, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("matrix_kind", [np.asarray, jnp.asarray, np.ndarray.tolist])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_layers_are_weighted_sums(axis, matrix_kind, kind, dtype):
    layers = arrays(dtype=dtype)
    build = (lambda ls: {"h": ls}) if axis is None else (lambda ls: stacked(ls, axis))
    layout = Unrolled("h/{}") if axis is None else Scanned("layers", axis)
    tree = jax.tree.map(kind, build(layers))
    assert_close(grow(tree, matrix_kind(MATRIX), layout), build(mixed(layers, MATRIX)))


def test_a_one_hot_matrix_is_the_map():
    depth_map = DepthMap([2, 0, 0, 1], stored=3)
    one_hot = np.eye(3)[list(depth_map.sources)]
    # Keys and counts, which cannot be averaged, and a value that 0 · x would spoil.
    tree = {"layers": {"w": np.array([1.0, np.inf, 3.0]), "count": np.arange(3)}}
    grown, expected = (grow(tree, it, Scanned("layers")) for it in (one_hot, depth_map))
    for a, e in zip(jax.tree.leaves(grown), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("layout", [Scanned("layers"), Unrolled("layers/{}")])
def test_what_is_no_number_is_taken_whole_or_refused(layout):
    tree = {"layers": {"w": np.ones((2, 3), np.float32), "count": np.array([4, 5])}}
    if isinstance(layout, Unrolled):
        tree = {"layers": [jax.tree.map(lambda leaf: leaf[i], tree["layers"]) for i in range(2)]}
    one_hot = jnp.array([[1.0, 0], [0, 1], [0, 1]])
    grown = grow(tree, one_hot, layout)
    counts = [leaf for leaf in jax.tree.leaves(grown) if leaf.dtype == np.int64]
    assert np.ravel(counts).tolist() == [4, 5, 5]
    with pytest.raises(UserError, match="layers/(0/)?count is int64: a matrix can mix floating"):
        grow(tree, one_hot * 0.5, layout)
    with pytest.raises(UserError, match="count is int64"):
        jax.jit(lambda matrix: grow(tree, matrix, layout))(one_hot)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_growth_can_be_learned(axis):
    """The gradient in the matrix is ⟨upstream of the new layer, old layer⟩."""
    layers = arrays()
    build = (lambda ls: {"h": ls}) if axis is None else (lambda ls: stacked(ls, axis))
    layout = Unrolled("h/{}") if axis is None else Scanned("layers", axis)
    tree = jax.tree.map(jnp.asarray, build(layers))
    upstream = build(arrays(4))

    @jax.jit
    @jax.grad
    def gradient(matrix):
        grown = grow(tree, matrix, layout)
        return sum(jnp.sum(g * u) for g, u in zip(
            jax.tree.leaves(grown), jax.tree.leaves(upstream), strict=True))

    expected = [
        [sum(float(np.vdot(u, w)) for u, w in zip(new.values(), old.values(), strict=True))
         for old in layers]
        for new in arrays(4)
    ]
    np.testing.assert_allclose(gradient(jnp.asarray(MATRIX)), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_a_matrix_counts_units(units, new, period, seed):
    """Layers of one kind are mixed with layers of that kind alone."""
    matrix = np.random.default_rng(seed).normal(size=(new, units)).astype(np.float32)
    layers = arrays(units * period)
    wide = np.kron(matrix, np.eye(period, dtype=np.float32))
    for build, layout in [(stacked, Scanned("layers", period=period)),
                          (lambda ls: {"h": ls}, Unrolled("h/{}", period=period))]:
        assert_close(grow(build(layers), matrix, layout), build(mixed(layers, wide)))


@pytest.mark.parametrize("layout", [Scanned("layers"), Unrolled("h/{}")])
def test_sharded_layers_stay_where_they_are(layout):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    build = stacked if isinstance(layout, Scanned) else (lambda ls: {"h": ls})
    split = lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "model"))  # noqa: E731
    tree = jax.tree.map(lambda x: jax.device_put(x, split(x)), build(arrays()))
    for matrix in (MATRIX, jnp.asarray(MATRIX)):
        grown = grow(tree, matrix, layout)
        assert_close(grown, build(mixed(arrays(), MATRIX)))
        for leaf in jax.tree.leaves(grown):
            assert leaf.sharding.is_equivalent_to(split(leaf), leaf.ndim)
    sensitivity = jax.grad(lambda m: sum(map(jnp.sum, jax.tree.leaves(grow(tree, m, layout)))))
    assert sensitivity(jnp.asarray(MATRIX)).shape == MATRIX.shape


def test_abstract_trees():
    tree = jax.eval_shape(lambda: stacked(arrays()))
    assert grow(tree, MATRIX, Scanned("layers")) == jax.eval_shape(lambda: stacked(arrays(4)))


def test_errors():
    tree = stacked(arrays())
    with pytest.raises(UserError, match="w has shape .*3 layers, but the depth map reads from 2|b has"):
        grow(tree, MATRIX[:, :2], Scanned("layers"))
    with pytest.raises(UserError, match=r"list of layers or a matrix \[new, old\]; got shape"):
        grow(tree, np.zeros((2, 3, 4)), Scanned("layers"))
    with pytest.raises(UserError, match="equally long"):
        grow(tree, [[1, 0, 0], [1, 0]], Scanned("layers"))
    unlike = {"h": [{"w": np.ones(2)}, {"w": np.ones(3)}, {"w": np.ones(2)}]}
    with pytest.raises(UserError, match="the layers 0 and 1 under h differ in keys or shapes"):
        grow(unlike, MATRIX, Unrolled("h/{}"))
