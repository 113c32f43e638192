"""The stack of layers: its initial values, and the ways to run it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, midas
from stacking_jax.models import LAYOUT
from stacking_jax.models.layer_stack import (
    CHECKPOINT_POLICIES,
    LayerStack,
    cast_matrices,
    check_offload,
    resolve_mode,
)

WIDTH = 8
X = jax.random.normal(jax.random.key(5), (2, 3, WIDTH))


class Toy(nnx.Module):
    """A layer with a matrix, a vector, and an extra input."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.scale = nnx.Param(jnp.ones((WIDTH,)))

    def __call__(self, x, shift, cache=None):
        scale = self.scale[...].astype(x.dtype)[None, None]
        x = checkpoint_name(x, "stream")
        new = x + jnp.tanh(x @ self.kernel[...] + shift) * scale
        return new if cache is None else (new, cache + new.mean(dtype=cache.dtype))


def make(depth=4, **kwargs):
    return LayerStack(Toy, depth, key=jax.random.key(0), **kwargs)


def kernels(stack):
    return stack.layers.kernel[...]


def loop(stack, x, shift, sources):
    for source in sources:
        kernel, scale = kernels(stack)[source], stack.layers.scale[...][source]
        x = x + jnp.tanh(x @ kernel + shift) * scale[None, None]
    return x


def test_parameters_are_stacked_on_axis_0():
    stack = make(4)
    assert kernels(stack).shape == (4, WIDTH, WIDTH)
    assert stack.layers.scale[...].shape == (4, WIDTH)


def test_stacks_of_different_depths_share_their_first_layers():
    deep = kernels(make(7))
    for depth in (1, 2, 6):
        np.testing.assert_array_equal(kernels(make(depth)), deep[:depth])
    assert len({leaf.tobytes() for leaf in np.asarray(deep)}) == 7, "layers differ"


def test_a_stack_can_be_made_under_jit_and_abstractly():
    def build(key):
        return nnx.to_pure_dict(nnx.state(LayerStack(Toy, 3, key=key)))

    eager, jitted = build(jax.random.key(1)), jax.jit(build)(jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
    shapes = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(build, jax.random.key(1)))
    assert shapes == jax.tree.map(jnp.shape, eager)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize(
    "depth_map",
    [None, midas(4, 2), DepthMap([0, 1, 2, 3] * 3), DepthMap([0, 1, 2, 1, 2, 3]),
     DepthMap([0, 3], stored=4), jnp.array([0, 2, 2, 3])],
    ids=["plain", "midas", "loop", "middle loop", "sub-path", "traced"],
)
def test_every_map_equals_a_loop(depth_map, mode):
    stack, shift = make(mode=mode), jnp.asarray(0.1)
    sources = range(4) if depth_map is None else getattr(depth_map, "sources", depth_map)
    got = stack(X, shift, depth_map=depth_map)
    np.testing.assert_allclose(got, loop(stack, X, shift, sources), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth_map", [None, DepthMap([0, 1, 2, 3] * 2), jnp.array([0, 2, 3])],
                         ids=["plain", "loop", "traced"])
def test_modes_and_remat_agree_in_loss_and_gradient(depth_map):
    def value_and_grad(mode, remat, scan_unroll=1):
        graph, params = nnx.split(make(mode=mode, remat=remat, scan_unroll=scan_unroll))

        def loss(params, x):
            out = nnx.merge(graph, params)(x, jnp.asarray(0.1), depth_map=depth_map)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)

    want = jax.tree.leaves(value_and_grad("unroll", "none"))
    ways = [("scan", remat) for remat in CHECKPOINT_POLICIES] + [
        ("unroll", "dots"), ("unroll", "offload"), ("scan", "none", 2), ("scan", "offload", 3),
        ("scan", "full", 8),
    ]
    for way in ways:
        for got, expected in zip(jax.tree.leaves(value_and_grad(*way)), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=str(way))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_remat_holds_fewer_activations(mode, traced):
    """Also with a traced map, whose own checkpoint must not overrule the policy."""
    depth_map = jnp.array([0, 1, 2, 3]) if traced else None

    def activations(remat):
        graph, params = nnx.split(make(mode=mode, remat=remat))
        _, pull = jax.vjp(
            lambda x: nnx.merge(graph, params)(x, jnp.asarray(0.1), depth_map=depth_map), X
        )
        leaves = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape[-3:] == X.shape]
        return sum(leaf.size for leaf in leaves) // X.size

    assert activations("full") < activations("none")


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_gates(mode):
    stack, shift = make(mode=mode), jnp.asarray(0.1)
    plain = stack(X, shift)
    np.testing.assert_array_equal(stack(X, shift, gates=jnp.ones(4)), plain)
    np.testing.assert_array_equal(stack(X, shift, gates=jnp.zeros(4)), X)
    first = stack(X, shift, depth_map=DepthMap([0], stored=4))
    np.testing.assert_array_equal(stack(X, shift, gates=jnp.array([1, 0, 0, 0])), first)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_a_cache_goes_by_position(mode):
    stack, looped = make(2, mode=mode), DepthMap([0, 1] * 3)
    out, cache = stack(X, jnp.asarray(0.1), depth_map=looped, cache=jnp.arange(6.0))
    assert cache.shape == (6,)
    np.testing.assert_allclose(out, stack(X, jnp.asarray(0.1), depth_map=looped), rtol=1e-6)
    means = [
        stack(X, jnp.asarray(0.1), depth_map=DepthMap(looped.sources[: n + 1], stored=2)).mean()
        for n in range(1, 6)
    ]
    np.testing.assert_allclose(cache[1:] - jnp.arange(1.0, 6.0), jnp.array(means), atol=1e-4)


def test_low_precision_casts_matrices_once_and_leaves_vectors_alone():
    stack = make(dtype="bfloat16", mode="scan")
    x = X.astype(jnp.bfloat16)
    graph, params = nnx.split(stack)

    def run(params, x):
        return nnx.merge(graph, params)(
            x, jnp.asarray(0.1, jnp.bfloat16), depth_map=DepthMap([0, 1, 2, 3] * 2)
        )

    assert run(params, x).dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(run)(params, x)
    (outer,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    dtypes = {v.aval.shape: v.aval.dtype for v in outer.invars if v.aval.shape[:1] == (4,)}
    assert dtypes == {(4, WIDTH, WIDTH): jnp.bfloat16, (4, WIDTH): jnp.float32}
    grads = jax.grad(lambda params: run(params, x).astype(jnp.float32).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_auto_unrolls_shallow_stacks_on_cpu():
    shallow = "unroll" if jax.default_backend() == "cpu" else "scan"
    assert resolve_mode("auto", 24) == shallow
    assert resolve_mode("auto", 25) == "scan"
    assert resolve_mode("unroll", 99) == "unroll" and resolve_mode("scan", 1) == "scan"


def test_offloaded_arrays_lie_in_the_hosts_memory():
    graph, params = nnx.split(make(mode="scan", remat="offload"))
    _, pull = jax.jit(
        lambda x: jax.vjp(lambda x: nnx.merge(graph, params)(x, jnp.asarray(0.1)), x)
    )(X)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == (4, *X.shape)]
    assert [leaf.sharding.memory_kind for leaf in kept] == ["pinned_host"]


def test_a_device_without_the_hosts_memory_is_refused():
    check_offload(jax.devices()[0])

    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return [m for m in jax.devices()[0].addressable_memories() if m.kind == "device"]

    with pytest.raises(UserError, match="needs devices with the memory 'pinned_host'; abacus has"):
        check_offload(Device())


def test_matrices_are_cast_and_vectors_are_not():
    params = {
        "embedding": jnp.ones((5, 4)), "norm": {"scale": jnp.ones(4)},
        "stack": {"layers": {"kernel": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}},
    }
    assert LAYOUT.matches(("stack", "layers", "kernel"))
    cast = jax.tree.map(lambda leaf: str(leaf.dtype), cast_matrices(params, "bfloat16"))
    assert cast == {
        "embedding": "bfloat16", "norm": {"scale": "float32"},
        "stack": {"layers": {"kernel": "bfloat16", "scale": "float32"}},
    }
