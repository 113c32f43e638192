"""Where growth happens: on the devices, compiled or not, also when they span processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stacking_jax.errors import UserError
from stacking_jax.growth import (
    NEW,
    DepthMap,
    Scanned,
    Unrolled,
    grow,
    midas,
    to_scanned,
    to_unrolled,
)

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "infeed",
    "outfeed", "callback", "custom-call", " send(", " recv(",
)


def mesh8():
    return jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))


def split(leaf, mesh=None):
    """Over the last axis, where it is 16 long; the layers stay whole."""
    shape = np.shape(leaf)
    spec = P(*[None] * (len(shape) - 1), "model") if shape and shape[-1] == 16 else P()
    return NamedSharding(mesh or mesh8(), spec)


def state(layout) -> dict:
    """A train state with Adam's moments, spread over eight devices."""
    if isinstance(layout, Scanned):
        stack = {"layers": {"w": jnp.arange(6 * 4 * 16.0).reshape(6, 4, 16)}}
    else:
        stack = {"layers": [{"w": jnp.arange(64.0).reshape(4, 16) + i} for i in range(6)]}
    params = {**stack, "head": jnp.ones((3, 16))}
    tree = {"params": params, "opt": optax.adam(1e-3).init(params), "step": jnp.zeros((), int)}
    return jax.tree.map(lambda leaf: jax.device_put(leaf, split(leaf)), tree)


BOTH = [Scanned("layers"), Unrolled("layers/{}")]
GROWTHS = {
    "midas": (midas(6, 2), False),
    "new": (DepthMap([0, NEW, 1, 2, NEW, 3, 4, 5]), True),
    "matrix": (np.eye(6)[[0, 1, 1, 2, 3, 4, 5]] * 0.5, False),
}


@pytest.fixture
def no_reads(monkeypatch):
    """Whoever reads values of an array on the host fails. (On CPU, transfer guards let it pass.)"""
    from jax._src.array import ArrayImpl

    def refuse(self, *args, **kwargs):
        raise AssertionError("growth read the values of an array")

    for name in ("_value", "__array__", "__int__", "__float__", "__bool__", "__index__", "tolist"):
        monkeypatch.setattr(ArrayImpl, name, property(refuse) if name == "_value" else refuse)
    # NumPy reads an array on a CPU through the buffer protocol, which cannot be replaced.
    for name in ("asarray", "array"):
        convert = getattr(np, name)
        monkeypatch.setattr(np, name, lambda x, *args, convert=convert, **kwargs: (
            refuse(x) if isinstance(x, ArrayImpl) else convert(x, *args, **kwargs)))


def test_the_guard_against_reads_bites(no_reads):
    for read in (np.asarray, np.array, int, float, bool, jax.device_get):
        with pytest.raises(AssertionError, match="read the values"):
            read(jnp.ones(()))


def test_the_compiler_uses_the_words_that_are_searched_for():
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh8(), P()))
    text = gather.lower(jax.device_put(jnp.ones(16), split(jnp.ones(16)))).compile().as_text()
    assert "all-gather" in text
    call = jax.jit(lambda x: jax.pure_callback(np.sin, x, x)).lower(jnp.ones(2)).compile()
    assert any(word in call.as_text() for word in ("callback", "custom-call"))


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("name", GROWTHS)
def test_compiled_growth_stays_on_the_devices(name, layout, no_reads):
    depth_map, needs_fresh = GROWTHS[name]
    before = state(layout)
    if not isinstance(depth_map, DepthMap):
        before = {"params": before["params"]}  # a matrix cannot mix Adam's counts
    fresh = grow(before, [0] * 8, layout) if needs_fresh else None
    target = jax.eval_shape(lambda tree, new: grow(tree, depth_map, layout, fresh=new), before, fresh)
    out = jax.tree.map(split, target)
    run = jax.jit(
        lambda tree, new: grow(tree, depth_map, layout, fresh=new, target=target), out_shardings=out
    )
    compiled = run.lower(before, fresh).compile()
    text = compiled.as_text()
    assert [word for word in FORBIDDEN if word in text] == []
    with jax.transfer_guard("disallow_explicit"):
        grown = compiled(before, fresh)
    for leaf, sharding in zip(jax.tree.leaves(grown), jax.tree.leaves(out), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("name", ["midas", "new"])
def test_growth_outside_jit_keeps_shardings_and_reads_nothing(name, layout, no_reads):
    depth_map, needs_fresh = GROWTHS[name]
    before = state(layout)
    grown = grow(before, depth_map, layout, fresh=grow(before, [0] * 8, layout) if needs_fresh else None)
    for leaf in jax.tree.leaves(grown):
        assert leaf.sharding.is_equivalent_to(split(leaf), leaf.ndim)


@pytest.mark.parametrize("layout", BOTH)
def test_fresh_layers_from_one_device_go_where_the_stack_lies(layout):
    before, depth_map = state(layout)["params"], [0, NEW]
    fresh = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)) * 2, grow(before, [0, 1], layout))
    grown = grow(before, depth_map, layout, fresh=fresh)
    for leaf in jax.tree.leaves(grown):
        assert leaf.sharding.is_equivalent_to(split(leaf), leaf.ndim)


def test_layers_that_are_split_over_devices_must_divide():
    mesh = mesh8()
    by_layer = NamedSharding(mesh, P("model"))
    stack = {"layers": jax.device_put(jnp.arange(16.0).reshape(8, 2), by_layer)}
    grown = grow(stack, [*range(8)] * 2, Scanned("layers"))["layers"]
    assert grown.sharding.is_equivalent_to(by_layer, 2)
    np.testing.assert_array_equal(grown[:, 0], [*range(0, 16, 2)] * 2)
    abstract = {"layers": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=by_layer)}
    for tree in (stack, abstract):
        with pytest.raises(UserError, match=r"layers is sharded as .*'model'.*shape \(9, 2\)"):
            grow(tree, [*range(8), 7], Scanned("layers"))


@pytest.mark.parametrize("axis", [0, 1])
def test_converted_stacks_are_split_as_before(axis):
    mesh = mesh8()
    spec = P(*(["model", None] if axis == 1 else [None, "model"]))
    stack = jax.device_put(jnp.arange(256.0).reshape(16, 16), NamedSharding(mesh, spec))
    tree = {"layers": {"w": stack}}
    layers = to_unrolled(tree, Scanned("layers", axis), "layers_{}")
    for i in range(16):
        leaf = layers[f"layers_{i}"]["w"]
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("model")), 1)
        np.testing.assert_array_equal(leaf, np.take(np.asarray(stack), i, axis))
    back = to_scanned(layers, "layers_{}", "layers", axis)["layers"]["w"]
    assert back.sharding.is_equivalent_to(stack.sharding, 2)
    np.testing.assert_array_equal(back, stack)


def test_donated_leaves_outside_the_stack_are_reused():
    """Only what keeps its shape can be donated; of the rest JAX warns, see the guide."""
    before = state(Scanned("layers"))
    head = before["params"]["head"]
    pointers = [shard.data.unsafe_buffer_pointer() for shard in head.addressable_shards]
    del head
    run = jax.jit(lambda tree: grow(tree, midas(6, 2), Scanned("layers")), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        grown = run(before)
    after = grown["params"]["head"].addressable_shards
    assert [shard.data.unsafe_buffer_pointer() for shard in after] == pointers
    assert before["params"]["head"].is_deleted()


WORKER = textwrap.dedent("""
    import sys
    import jax, jax.numpy as jnp, numpy as np
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    from jax.sharding import NamedSharding, PartitionSpec as P
    from stacking_jax.growth import NEW, Scanned, Unrolled, grow, midas

    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, P(None, "model"))
    values = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    put = lambda values, where: jax.make_array_from_callback(values.shape, where, lambda i: values[i])
    stack = {"layers": {"w": put(values, where)}}
    assert not stack["layers"]["w"].is_fully_addressable
    depth_map, sources = midas(6, 2), list(midas(6, 2).sources)
    for run in (lambda t: grow(t, depth_map, Scanned("layers")),
                jax.jit(lambda t: grow(t, depth_map, Scanned("layers")),
                        out_shardings={"layers": {"w": where}})):
        grown = run(stack)["layers"]["w"]
        assert grown.sharding.is_equivalent_to(where, 2)
        for shard in grown.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[sources][shard.index])
    one = NamedSharding(mesh, P("model"))
    listed = {"h": [{"w": put(row, one)} for row in values]}
    fresh = {"h": [{"w": put(row + 100, one)} for row in values[:3]]}
    grown = grow(listed, [0, NEW, 0], Unrolled("h/{}"), fresh=fresh)["h"]
    for layer, row in zip(grown, [values[0], values[1] + 100, values[0]]):
        for shard in layer["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, row[shard.index])
    print("grown")
""")


@pytest.mark.slow
def test_arrays_that_span_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    workers = [
        subprocess.Popen([sys.executable, str(script), address, str(number)], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all("grown" in output for output in outputs), "\n".join(outputs)
