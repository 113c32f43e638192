"""What the program of a train step does not do: cast twice, branch, copy, call the host."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import MeshConfig, OptimizerConfig, sharding, spikes
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.spike_config import SpikeConfig
from stacking_jax.training.state import abstract_state, model_graph, shardings_of
from stacking_jax.training.step import make_train_step

# No two sizes are the same, so that a shape tells which parameter it belongs to.
MODEL = DecoderConfig(
    vocab_size=48, num_layers=3, d_model=16, d_ff=40, num_heads=4, num_kv_heads=2,
    dtype="bfloat16", stack="scan", remat="minimal", tied_embeddings=False, loss="chunked",
    loss_chunk=8,
)
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SPIKES = SpikeConfig(action="skip")


def step_of(model=MODEL, name="adamw", microbatches=2, config=None):
    """The jitted step as training makes it, and its abstract arguments."""
    config = config or MeshConfig(fsdp=1)
    devices = config.fsdp * config.tensor
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    transform = optimizer(OptimizerConfig(name=name), LAYOUT)
    state = abstract_state(model, transform, model.num_layers, mesh)
    state = spikes.with_window(state, SPIKES, mesh)
    step = make_train_step(
        model_graph(model), transform, lambda number: 1e-3, clip_norm=1.0, z_loss=1e-3,
        microbatches=microbatches, skip_nonfinite=True, spikes=SPIKES,
        constrain=sharding.constrainer(mesh),
    )
    rows = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=mesh.sharding(sharding.BATCH))
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), rows)
    jitted = jax.jit(
        step, donate_argnums=0, out_shardings=(shardings_of(state), None),
        compiler_options=QUICKLY,
    )
    return step, jitted, state, batch


def equations(jaxpr, in_loop=False):
    """Every equation of a program, and whether it lies in a loop."""
    for eqn in jaxpr.eqns:
        yield eqn, in_loop
        inside = in_loop or eqn.primitive.name in ("scan", "while")
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub, inside)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stack", ["scan", "unroll"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_weights_are_cast_once_and_outside_of_every_loop(stack, microbatches, tied):
    model = dataclasses.replace(MODEL, stack=stack, tied_embeddings=tied)
    step, _, state, batch = step_of(model, microbatches=microbatches)
    matrices = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    whole = [leaf.shape for leaf in matrices if leaf.shape != (3, 16)]
    of_a_layer = [shape[1:] for shape in whole if len(shape) == 3]
    casts = [
        (eqn.invars[0].aval.shape, in_loop)
        for eqn, in_loop in equations(jax.make_jaxpr(step)(state, batch).jaxpr)
        if eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval.dtype == jnp.float32 and eqn.outvars[0].aval.dtype == jnp.bfloat16
    ]
    outside = collections.Counter(shape for shape, in_loop in casts if not in_loop)
    for shape, count in collections.Counter(whole).items():
        # So is the gradient of the head, behind its loop over chunks: the sum, and scaled.
        of_gradients = 2 * (microbatches == 1) * (shape == ((48, 16) if tied else (16, 48)))
        assert outside[shape] == count + of_gradients, shape
    in_loops = {shape for shape, in_loop in casts if in_loop}
    head = {(48, 16) if tied else (16, 48)} if microbatches > 1 else set()
    assert in_loops & {*whole, *of_a_layer} == head


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_nothing_branches_and_nothing_asks_the_host(name):
    """A `cond` would copy the state that it may or may not change; a callback would wait."""
    step, _, state, batch = step_of(name=name)
    names = {eqn.primitive.name for eqn, _ in equations(jax.make_jaxpr(step)(state, batch).jaxpr)}
    assert {"scan", "dot_general"} <= names
    assert not {name for name in names if "cond" in name or "callback" in name or "print" in name}


@functools.cache
def compiled(fsdp, tensor):
    _, jitted, state, batch = step_of(config=MeshConfig(fsdp=fsdp, tensor=tensor))
    return jitted.lower(state, batch).compile(), state


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 2)])
def test_the_whole_state_is_written_where_it_was_read(fsdp, tensor):
    program, state = compiled(fsdp, tensor)
    leaves = jax.tree.leaves(state)
    held = sum(
        leaf.dtype.itemsize * int(jnp.prod(jnp.array(leaf.sharding.shard_shape(leaf.shape))))
        for leaf in leaves
    )
    assert program.memory_analysis().alias_size_in_bytes == held
    header = program.as_text().splitlines()[0]
    assert len(re.findall(r"may-alias|must-alias", header)) == len(leaves)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 2)])
def test_the_compiled_step_has_no_branch_and_no_way_to_the_host(fsdp, tensor):
    text = compiled(fsdp, tensor)[0].as_text()
    assert " while(" in text
    for instruction in (" conditional(", " infeed(", " outfeed(", " send(", " recv(", "callback"):
        assert instruction not in text, instruction
