"""A run goes on with other devices: nothing is lost, repeated or rounded on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.data import PackedBatches, open_cache
from stacking_jax.growth import Stage, midas
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import (
    GrowthConfig,
    MeshConfig,
    OptimizerConfig,
    Stopped,
    sharding,
    train,
)
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.growing import growth_program
from stacking_jax.training.mesh import make_mesh
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import (
    abstract_state,
    params_digest,
    sharded_initial_state,
    shardings_of,
)

MODEL = DecoderConfig(vocab_size=64, num_layers=4, d_model=32, d_ff=48, num_heads=4)
WAY = {  # Devices, and how they are laid out.
    8: MeshConfig(fsdp=4, tensor=2),
    4: MeshConfig(fsdp=2, sequence=2),
    2: MeshConfig(fsdp=1, tensor=2),
    1: MeshConfig(),
}


def mesh_of(devices: int) -> sharding.LogicalMesh:
    return make_mesh(WAY[devices], jax.devices()[:devices])


@pytest.mark.slow
def test_a_checkpoint_goes_from_eight_devices_to_one_and_back_growing_on_the_way(tmp_path):
    """Whichever devices the state lies on when it grows, it grows to the same bits."""
    transform = optimizer(OptimizerConfig(), LAYOUT)
    stage = Stage(4, 1, 1, midas(2, 2))

    def shapes(depth, devices):
        return abstract_state(MODEL, transform, depth, mesh_of(devices))

    def grown(state, devices):
        target = shapes(4, devices)
        return growth_program(MODEL, GrowthConfig(), transform, stage, target)(state)

    state = sharded_initial_state(MODEL, transform, 0, shapes(2, 8))
    # No two leaves alike, the moments of both kinds included.
    values = jax.device_get(state)
    values = jax.tree.unflatten(
        jax.tree.structure(values),
        [leaf + number for number, leaf in enumerate(jax.tree.leaves(values))],
    )
    state = jax.device_put(values, shardings_of(state))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    small = params_digest(state)
    wanted = None
    checkpoints = Checkpoints(tmp_path, keep=10)
    for step, devices in enumerate([4, 2, 1, 8]):
        checkpoints.save(state, {"step": step, "depth": 2})
        checkpoints.wait()
        abstract = shapes(2, devices)
        state = checkpoints.restore(step, abstract)
        assert params_digest(state) == small
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        here = grown(copy(state), devices)
        wanted = wanted or params_digest(here)
        assert params_digest(here) == wanted
    checkpoints.close()


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(config, change, tmp_path, monkeypatch, read_rows):
    """8 devices until the boundary of a stage, growth on 4, then 2, 1, and 8 again."""
    config = change(
        config, total_steps=6, eval_every=0,
        model={"num_layers": 2, "d_model": 16, "d_ff": 16},
        # An update is then a smooth function of its gradient.
        optimizer={"epsilon": 1e-3},
        # No batch is placed before its step, so that those placed are those trained on.
        device_batches=0,
    )
    assert [stage.steps for stage in config.plan().stages] == [2, 4]
    placed, restored, place = [], [], sharding.place_batch
    restore_latest = Checkpoints.restore_latest

    def logged(batch, mesh):
        arrays = place(batch, mesh)
        placed.append(np.asarray(arrays["tokens"]))
        return arrays

    def watched(self, abstract):
        found = restore_latest(self, abstract)
        restored.append(found and params_digest(found[0].params))
        return found

    monkeypatch.setattr(sharding, "place_batch", logged)
    monkeypatch.setattr(Checkpoints, "restore_latest", watched)

    def run(folder, devices, stop_at=None):
        monkeypatch.setattr(sharding, "make_mesh", lambda _: mesh_of(devices))
        placed.clear()
        try:
            train(change(config, mesh=vars(WAY[devices])), tmp_path / folder, stop_at=stop_at)
        except Stopped as stopped:
            assert stopped.step == stop_at

    data = PackedBatches(open_cache(config.data), batch_size=8, seed=config.seed)
    done, saved = 0, None
    for devices, stop_at in ((8, 2), (4, 3), (2, 4), (1, 5), (8, 6)):
        run("moving", devices, stop_at)
        assert restored.pop() == saved
        # The next batch, and no other; behind the last one come those of the evaluation.
        for step, tokens in zip(range(done, stop_at), placed, strict=stop_at < 6):
            np.testing.assert_array_equal(tokens, data.batch(step)["tokens"])
        reader = Checkpoints(tmp_path / "moving/checkpoints", read_only=True)
        depth = 1 if stop_at == 2 else 2
        transform = optimizer(config.optimizer, LAYOUT)
        alone = sharding.LogicalMesh(mesh_of(1).physical)
        state = reader.restore(stop_at, abstract_state(config.model, transform, depth, alone))
        done, saved = stop_at, params_digest(state.params)

    run("staying", 8)
    moving, staying = (read_rows(tmp_path / name, "train") for name in ("moving", "staying"))
    assert [row["step"] for row in moving] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in moving] == [row["tokens"] for row in staying]
    np.testing.assert_allclose(
        [row["loss"] for row in moving], [row["loss"] for row in staying], rtol=1e-5
    )
