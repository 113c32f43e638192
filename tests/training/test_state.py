"""The training state: its shapes, where it lies, how it grows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import grow, midas
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import MeshConfig, OptimizerConfig, sharding
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import (
    abstract_params,
    abstract_state,
    initial_program,
    params_digest,
    sharded_initial_state,
    shardings_of,
)

MODEL = DecoderConfig(
    vocab_size=64, num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
    tied_embeddings=False,
)
OPTIMIZERS = {
    name: optimizer(OptimizerConfig(name=name, weight_decay=0.1), LAYOUT)
    for name in ("adamw", "adafactor")
}
MESHES = {
    "fsdp8": MeshConfig(),
    "fsdp4_tensor2": MeshConfig(fsdp=4, tensor=2),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def make(mesh, depth=1, name="adamw", seed=0):
    shape = abstract_state(MODEL, OPTIMIZERS[name], depth, mesh)
    return shape, sharded_initial_state(MODEL, OPTIMIZERS[name], seed, shape)


def single():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def assert_equal(got, want):
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "name"), [("fsdp4_tensor2", "adamw"), ("data2_fsdp2_tensor2", "adafactor")]
)
def test_a_state_is_born_as_it_was_announced(mesh, name):
    shape, state = make(sharding.make_mesh(MESHES[mesh]), depth=2, name=name)
    same = jax.tree.map(
        lambda want, got: (want.shape, want.dtype) == (got.shape, got.dtype)
        and want.sharding.is_equivalent_to(got.sharding, got.ndim),
        shape, state,
    )
    assert jax.tree.all(same), same
    assert int(state.step) == 0


def test_the_whole_state_never_lies_on_one_device():
    """Neither as a result of the compiled program nor on the way to it."""
    config = DecoderConfig(
        vocab_size=512, num_layers=4, d_model=64, d_ff=96, num_heads=8, tied_embeddings=False
    )
    transform = OPTIMIZERS["adamw"]
    shape = abstract_state(config, transform, 4, sharding.make_mesh(MESHES["fsdp4_tensor2"]))
    leaves = jax.tree.leaves(shape)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    share = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in leaves
    )
    assert share < whole / 7.8
    program = initial_program(config, transform, shape).lower(jax.random.key(0)).compile()
    memory = program.memory_analysis()
    pointers = 8 * len(leaves)
    assert share <= memory.output_size_in_bytes <= share + pointers
    assert memory.temp_size_in_bytes < share
    state = program(jax.random.key(0))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {share}


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_mesh():
    want = make(single())[1]
    for config in (MESHES["fsdp8"], MESHES["data2_fsdp2_tensor2"]):
        assert_equal(make(sharding.make_mesh(config))[1], want)


def test_stages_share_their_first_layers_and_all_the_rest():
    shallow, deep = (make(single(), depth)[1].params for depth in (1, 2))
    first = jax.tree.map(lambda leaf: leaf[:1], deep["stack"])
    assert_equal(shallow, deep | {"stack": first})
    other = make(single(), seed=1)[1].params
    assert not np.array_equal(other["embedding"], shallow["embedding"])


def test_moments_lie_where_their_parameters_lie():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    shape = abstract_state(MODEL, OPTIMIZERS["adamw"], 2, mesh)
    wanted = shardings_of(shape.params)
    state = shape.opt_state
    parts = {"stacked": state.stacked["stack"]["layers"], "rest": state.rest}
    for part, (adam, *_) in parts.items():
        for moments in (adam.mu, adam.nu):
            for path, leaf in jax.tree_util.tree_leaves_with_path(moments):
                want = wanted
                for entry in path:
                    want = want[entry.key]
                assert leaf.sharding == want, (part, path)
    kernel = shape.params["stack"]["layers"]["mlp"]["up"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 24)


def test_counts_grow_with_their_layers():
    for name, depth in (("adamw", 1), ("adafactor", 2)):
        state = abstract_state(MODEL, OPTIMIZERS[name], depth, single())
        grown = jax.eval_shape(lambda s: grow(s, midas(depth, 1), LAYOUT), state)  # noqa: B023
        before, after = (
            jax.tree.leaves(s.opt_state.stacked["stack"]["layers"][0])[0] for s in (state, grown)
        )
        assert before.shape == (depth,) and after.shape == (depth + 1,)
        assert after.dtype == jnp.int32


def test_a_parameter_that_the_mesh_cannot_divide_is_named():
    config = DecoderConfig(vocab_size=63, num_layers=2, d_model=32, d_ff=48, num_heads=2)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(UserError, match=r"embedding \(63, 32\): axis 0 \(vocab, 63\)"):
        abstract_params(config, 2, mesh)


def test_the_digest_is_of_the_values_alone():
    params = make(single())[1].params
    digest = params_digest(params)
    assert len(digest) == 64
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    sharded = jax.device_put(params, shardings_of(abstract_params(MODEL, 1, mesh)))
    assert params_digest(sharded) == digest
    assert params_digest(dict(reversed(params.items()))) == digest
    assert params_digest(jax.device_get(params)) == digest


def test_the_digest_sees_one_bit_and_every_name():
    params = jax.device_get(make(single())[1].params)
    digests = {params_digest(params)}
    leaves, treedef = jax.tree.flatten(params)
    for number, leaf in enumerate(leaves):
        flipped = leaf.copy()
        flipped.view(np.uint32).flat[-1] ^= 1
        changed = [*leaves[:number], flipped, *leaves[number + 1 :]]
        digests.add(params_digest(treedef.unflatten(changed)))
    renamed = {key if key != "head" else "tail": value for key, value in params.items()}
    digests.add(params_digest(renamed))
    assert len(digests) == len(leaves) + 2
