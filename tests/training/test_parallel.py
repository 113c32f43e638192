"""The same training on any mesh: every axis alone, and in pairs, against one device.

Everything is float32. AdamW's epsilon is far above the rounding of a gradient here, so that
an update is a smooth function of it and parameters can be held to a tight tolerance.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from stacking_jax.growth import Stage, midas
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import GrowthConfig, MeshConfig, OptimizerConfig, sharding
from stacking_jax.training.growing import growth_program
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.rules import AXES
from stacking_jax.training.state import (
    abstract_state,
    model_graph,
    sharded_initial_state,
    shardings_of,
)
from stacking_jax.training.step import make_train_step

# Eight heads and key heads, so that every axis can have all eight devices. Some inputs see what
# comes after them: prompts of a prefix LM.
MODEL = DecoderConfig(
    vocab_size=64, num_layers=2, d_model=16, d_ff=24, num_heads=8, bidirectional_prompts=True
)
TRANSFORM = optimizer(OptimizerConfig(epsilon=1e-3, weight_decay=0.1), LAYOUT)
RATE, STEPS, GROW_AFTER = 1e-2, 3, 1
LOSS = {"rtol": 2e-6, "atol": 0}
PARAMS = {"rtol": 0, "atol": 2e-6}
# Compiling is nearly all of the time that these tests take.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def alone(axis: str, size: int) -> MeshConfig:
    return MeshConfig(**({"fsdp": 1} | {axis: size}))


MESHES = [alone(axis, size) for size in (2, 4, 8) for axis in AXES] + [
    MeshConfig(**({"fsdp": 1} | {one: 2, other: 4 if number % 2 else 2}))
    for number, (one, other) in enumerate(itertools.combinations(AXES, 2))
]
SPREAD = {"embed": ("fsdp", "sequence"), "vocab": None}


def name_of(config: MeshConfig) -> str:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    return "_".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


def batch_of(seed: int, rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    """Two documents of any length in every row, each with a prompt, and padding behind them."""
    dice = np.random.default_rng(seed)
    ends = dice.integers(3, length // 2 + 2, rows), dice.integers(length // 2 + 4, length, rows)
    at = np.arange(length)[None]
    segments = 1 + (at >= ends[0][:, None]).astype(np.int32)
    segments[at >= ends[1][:, None]] = 0
    starts = np.where(segments == 2, ends[0][:, None], 0)
    positions = np.where(segments > 0, at - starts, 0)
    prompts = dice.integers(1, 5, (rows, 3))[np.arange(rows)[:, None], segments]
    return {
        "tokens": np.where(segments > 0, dice.integers(1, 64, (rows, length)), 0).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "prefix": ((segments > 0) & (positions < prompts)).astype(np.int32),
    }


def mesh_of(config: MeshConfig):
    devices = int(np.prod([getattr(config, axis) for axis in AXES]))
    return sharding.make_mesh(config, jax.devices()[:devices])


def make_step(mesh, model=MODEL, **settings):
    train_step = make_train_step(
        model_graph(model), TRANSFORM, lambda step: RATE, z_loss=1e-3, clip_norm=1.0,
        constrain=sharding.constrainer(mesh), **settings,
    )
    return jax.jit(train_step, donate_argnums=0, compiler_options=QUICKLY)


@functools.cache
def initial():
    """One layer, on the host."""
    shape = abstract_state(MODEL, TRANSFORM, 1, mesh_of(MeshConfig(fsdp=1)))
    return jax.device_get(sharded_initial_state(MODEL, TRANSFORM, 0, shape))


@functools.cache
def train(mesh: sharding.LogicalMesh, **settings):
    """Three steps with a growth after the first: losses, and parameters on the host."""
    state = jax.device_put(initial(), shardings_of(abstract_state(MODEL, TRANSFORM, 1, mesh)))
    step, losses = make_step(mesh, **settings), []
    for number in range(STEPS):
        if number == GROW_AFTER:
            after = abstract_state(MODEL, TRANSFORM, 2, mesh)
            stage = Stage(2, STEPS - GROW_AFTER, GROW_AFTER, midas(1, 1))
            state = growth_program(MODEL, GrowthConfig(), TRANSFORM, stage, after)(state)
        state, metrics = step(state, sharding.place_batch(batch_of(number), mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("config", MESHES, ids=name_of)
def test_every_mesh_trains_as_one_device_does(config):
    assert_trains_as_one_device(*train(mesh_of(config)))


def test_so_it_does_by_other_rules():
    config = MeshConfig(fsdp=2, sequence=2, tensor=2, rules=SPREAD)
    assert_trains_as_one_device(*train(mesh_of(config)))


def test_so_it_does_in_microbatches_with_scanned_layers_that_are_computed_again():
    mesh = mesh_of(MeshConfig(fsdp=2, sequence=2, tensor=2))
    model = dataclasses.replace(MODEL, stack="scan", remat="full")
    assert_trains_as_one_device(*train(mesh, model=model, microbatches=2))


def assert_trains_as_one_device(losses, params):
    wanted_losses, wanted = train(mesh_of(MeshConfig(fsdp=1)))
    np.testing.assert_allclose(losses, wanted_losses, **LOSS)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(one, other, **PARAMS, err_msg=jax.tree_util.keystr(path))


# ---- What goes from device to device --------------------------------------------------------


def collectives(config: MeshConfig) -> list[tuple[str, str, np.ndarray]]:
    """Of a compiled step: kind, shapes of the results, devices [groups, members]."""
    mesh = mesh_of(config)
    rows = jax.ShapeDtypeStruct((8, 32), np.int32, sharding=mesh.sharding(sharding.BATCH))
    abstract = abstract_state(MODEL, TRANSFORM, 2, mesh)
    text = make_step(mesh).lower(abstract, dict.fromkeys(batch_of(0), rows)).compile().as_text()
    found = re.findall(
        r"= (.+?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(.*?"
        r"(?:replica_groups|source_target_pairs)=(.+?), (?!device_ids)\w+=", text
    )
    return [
        (kind, re.sub(r"\{[\d,]*\}", "", shapes), groups(text)) for shapes, kind, text in found
    ]


def groups(text: str) -> np.ndarray:
    """Groups of devices as XLA writes them, in three ways."""
    numbers = lambda part: [int(n) for n in part.split(",")]  # noqa: E731
    # {{0,1},{2,3}}
    if text.startswith("{"):
        return np.array([numbers(part) for part in re.findall(r"\{([\d,]+)\}", text)])

    def counted(shape, order):
        devices = np.arange(np.prod(numbers(shape))).reshape(numbers(shape))
        return devices.transpose(numbers(order)) if order else devices

    # [4,2]<=[2,4]T(1,0)
    if match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return counted(match[2], match[3]).reshape(numbers(match[1]))
    # mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}
    match = re.fullmatch(
        r"mesh\[(.+?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{((?:'axis_\d+',?)+)\}", text,
    )
    assert match, text
    sizes = [int(n) for n in re.findall(r"=(\d+)", match[1])]
    devices = counted(match[2] or str(np.prod(sizes)), match[3]).reshape(sizes)
    axes = [int(n) for n in re.findall(r"axis_(\d+)", match[4])]
    devices = np.moveaxis(devices, axes, range(-len(axes), 0))
    return devices.reshape(-1, np.prod([sizes[axis] for axis in axes]))


def test_between_slices_go_sums_alone():
    """Gradients and a few scalars: nothing that a layer waits for crosses the slow network."""
    found = collectives(MeshConfig(slice=2, fsdp=2, tensor=2))
    across = [
        (kind, shapes) for kind, shapes, devices in found
        if any(len(set(group // 4)) > 1 for group in devices)
    ]
    assert {kind for kind, _ in across} == {"all-reduce"}
    assert {kind for kind, *_ in found} == {"all-reduce", "all-gather"}
    summed = [shape for _, shapes in across for shape in re.findall(r"\[([\d,]*)\]", shapes)]
    # No activation: a device has 2 rows of 32 columns.
    assert not any(shape.startswith("2,32") for shape in summed)
    # The gradient of each matrix in the parts that `fsdp` and `tensor` leave of it.
    assert "12,8" in summed and "8,12" in summed and "16,12" not in summed


def test_keys_and_values_alone_are_gathered_over_the_sequence():
    """A device holds 8 of 32 columns. Of its 4 heads of width 2 it gathers keys and values, in
    both layers, and of each row which documents and prompts there are."""
    found = collectives(MeshConfig(fsdp=1, sequence=4, tensor=2))
    gathered = sorted(shapes for kind, shapes, _ in found if kind == "all-gather")
    assert gathered == ["f32[8,32,4,2]"] * 4 + ["pred[8,32]", "s32[8,32]"]
