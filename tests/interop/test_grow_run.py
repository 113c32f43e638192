"""Checkpoints of ours grown on disk: the same bits as growing in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, gradstack, grow, midas
from stacking_jax.growth.moments import POLICIES, grow_opt_state
from stacking_jax.growth.starts import Identity, start_copies
from stacking_jax.interop import export_run, grow_folder, stored_depth, stored_state
from stacking_jax.interop.stored_state import StoredState
from stacking_jax.models import LAYOUT
from stacking_jax.training import (
    GrowthConfig,
    OptimizerConfig,
    Stopped,
    TrainConfig,
    checkpoints,
    train,
)
from stacking_jax.training.generation import sample_from_run
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.run_directory import read_config


def _assert_same(a, b, exact=True):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        if exact:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), str(path))
        else:
            np.testing.assert_allclose(
                np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-30, err_msg=str(path)
            )


def _meta(run_dir, step):
    return json.loads((run_dir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


@pytest.mark.parametrize("sources", [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 3], [3, 0], [2, 2, 2, 2]])
def test_the_whole_state_is_that_of_grow(run_dir, restore, tmp_path, sources):
    grow_folder(run_dir, tmp_path / "out", sources, step=6)
    depth_map = DepthMap(sources, stored=4)
    before = jax.device_get(restore(run_dir, 6))
    _assert_same(restore(tmp_path / "out", 6), grow(before, depth_map, LAYOUT))
    assert stored_depth(tmp_path / "out") == len(sources)


@pytest.mark.slow
def test_silent_copies_are_those_of_start_copies(run_dir, restore, tmp_path):
    depth_map = gradstack(4, block=2)
    grow_folder(run_dir / "checkpoints" / "6", tmp_path / "out", depth_map, init="identity")
    grown = grow(jax.device_get(restore(run_dir, 6)), depth_map, LAYOUT)
    params = start_copies(grown.params, depth_map, LAYOUT, Identity(), outputs="decoder")
    _assert_same(restore(tmp_path / "out", 6), dataclasses.replace(grown, params=params))
    # The function is unchanged: so is what it says.
    small = tmp_path / "small"
    shutil.copytree(run_dir, small)
    assert sample_from_run(
        tmp_path / "out", "abc", max_new_tokens=8, temperature=0.0
    ) == sample_from_run(small, "abc", step=6, max_new_tokens=8, temperature=0.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:copy_first")
@pytest.mark.parametrize("policy", POLICIES)
def test_moments_are_those_of_grow_opt_state(run_dir, run_config, restore, tmp_path, policy):
    depth_map = midas(4, block=2)
    grow_folder(run_dir, tmp_path / "out", depth_map, step=6, moments=policy)
    before = jax.device_get(restore(run_dir, 6))
    expected = grow_opt_state(
        before.opt_state, depth_map, LAYOUT, policy, params=before.params,
        optimizer=optimizer(run_config.optimizer, LAYOUT),
    )
    after = restore(tmp_path / "out", 6)
    _assert_same(after.opt_state, expected, exact=policy != "copy_first")
    _assert_same(after.params, grow(before.params, depth_map, LAYOUT))
    assert int(after.step) == 6


@pytest.fixture(scope="module", params=["adafactor", "muon"])
def other_run(request, run_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config = dataclasses.replace(
        run_config, total_steps=2, growth=GrowthConfig(), optimizer=OptimizerConfig(request.param),
        model=dataclasses.replace(run_config.model, num_layers=2),
    )
    train(config, folder)
    return folder, config


@pytest.mark.parametrize("policy", ["copy", "zero", "reset_copies", "reset_all"])
def test_moments_of_other_optimisers_too(other_run, restore, tmp_path, policy):
    folder, config = other_run
    depth_map = DepthMap([0, 1, 1], stored=2)
    grow_folder(folder, tmp_path / "out", depth_map, moments=policy)
    before = jax.device_get(restore(folder, 2))
    expected = grow_opt_state(
        before.opt_state, depth_map, LAYOUT, policy, params=before.params,
        optimizer=optimizer(config.optimizer, LAYOUT),
    )
    _assert_same(restore(tmp_path / "out", 2).opt_state, expected)


def test_copy_first_is_for_adam_alone(other_run, tmp_path):
    with pytest.raises(UserError, match="copy_first knows Adam's moments, but the run trains with"):
        grow_folder(other_run[0], tmp_path / "out", [0, 1, 1], moments="copy_first")
    assert os.listdir(tmp_path) == []


def test_what_the_grown_run_says_of_itself(run_dir, run_config, tmp_path, snapshot_of):
    before = snapshot_of(run_dir)
    grow_folder(
        run_dir, tmp_path / "out", gradstack(4, block=2), step=6, operator="gradstack",
        moments="reset_copies", total_steps=12,
    )
    assert snapshot_of(run_dir) == before, "the source is read only"
    meta, old = _meta(tmp_path / "out", 6), _meta(run_dir, 6)
    assert (meta["step"], meta["depth"], meta["stage"], meta["scores"]) == (6, 6, 1, None)
    assert meta["history"] == [*old["history"], {
        "step": 6, "from_depth": 4, "to_depth": 6, "operator": "gradstack",
        "map": [0, 1, 2, 3, 2, 3], "init": "copy", "moments": "reset_copies",
    }]
    # Another operator than before: the stages stand there one by one.
    *done, coming = meta["counters"]["stages"]
    assert done == old["counters"]["stages"][:2] and (coming["depth"], coming["steps"]) == (6, 0)
    assert meta["counters"]["tokens"] == old["counters"]["tokens"]
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())
    assert recorded["data_digest"] == json.loads(
        (run_dir / "config.json").read_text()
    )["data_digest"]
    config = dataclasses.replace(
        run_config, total_steps=12, name=None,
        growth=dataclasses.replace(run_config.growth, operator=None, stages=[
            (2, 3), (4, 3, [0, 1, 0, 1]), (6, 6, [0, 1, 2, 3, 2, 3]),
        ]),
        model=dataclasses.replace(run_config.model, num_layers=6),
    )
    assert recorded["config"] == json.loads(json.dumps(config.to_dict()))


@pytest.mark.slow
def test_training_goes_on_as_if_the_plan_had_grown(run_config, tmp_path, restore):
    """Left off before the end, grown on disk and gone on with: the planned run, to the bit."""
    planned = dataclasses.replace(
        run_config, total_steps=6, checkpoint_every=2,
        growth=GrowthConfig(operator="midas", num_stages=2, alpha=0.0),
        model=dataclasses.replace(run_config.model, num_layers=4),
    )
    whole = train(planned, tmp_path / "planned")
    with pytest.raises(Stopped):
        train(planned, tmp_path / "stopped", stop_at=3)
    grow_folder(tmp_path / "stopped", tmp_path / "grown", midas(2, block=2), operator="midas")
    config = read_config(tmp_path / "grown")
    assert config.growth.stage_depths == [2, 4]
    summary = train(config, tmp_path / "grown")
    _assert_same(restore(tmp_path / "grown", 6), restore(tmp_path / "planned", 6))
    for name in ("params_digest", "model_flops", "tokens", "speedup_model", "growths", "eval_loss"):
        assert summary[name] == whole[name], name
    assert [s["tokens"] for s in summary["stages"]] == [s["tokens"] for s in whole["stages"]]


@pytest.mark.parametrize(
    "step, sources, settings, depths",
    [
        (3, [0, 1, 0, 1], {"operator": "midas", "total_steps": 9}, [2, 4]),
        (6, [0, 1, 0, 1, 2, 3], {"operator": "midas", "total_steps": 20}, [2, 4, 6]),
        (3, [0, 1, 1], {"operator": "gradstack", "options": {"block": 1}}, [2, 3]),
        # No one operator made it: the stages as they were.
        (3, [0, 1, 1], {"operator": "midas", "options": {"block": 1}}, [2, 3]),
        (3, [0, 1, 1], {}, [2, 3]),
        (9, [0, 1, 2, 3, 4, 5, 4, 5], {"operator": "gradstack", "total_steps": 12}, [2, 4, 6, 8]),
        # No step is left for a stage to come.
        (9, [0, 1, 2, 3, 2, 3, 4, 5], {"operator": "midas"}, None),
    ],
)
def test_the_plan_of_a_grown_run(run_dir, tmp_path, capsys, step, sources, settings, depths):
    grow_folder(run_dir, tmp_path / "out", sources, step=step, **settings)
    config = read_config(tmp_path / "out")
    plan = config.plan()
    told = "throughout: its model FLOPs" in capsys.readouterr().err
    assert told is (depths is None)
    assert plan.final_depth == config.model.num_layers == len(sources)
    assert plan.total_steps == settings.get("total_steps", 9)
    assert [stage.depth for stage in plan.stages] == (depths or [len(sources)])
    if depths:
        assert plan.stages[-1].start == step
        assert plan.stages[-1].grow_map == DepthMap(sources, stored=depths[-2])
    meta = _meta(tmp_path / "out", step)
    assert [stage["depth"] for stage in meta["counters"]["stages"]] == (depths or [len(sources)])
    assert sum(stage["steps"] for stage in meta["counters"]["stages"]) == step


def test_a_run_grown_after_its_last_step_has_nothing_to_train(run_dir, tmp_path, capsys):
    grow_folder(run_dir, tmp_path / "out", [0, 1, 2, 3, 4, 5, 5])
    assert "grow with more total_steps" in capsys.readouterr().err
    with pytest.raises(UserError, match="grown after its last step, 9: there is nothing left"):
        train(read_config(tmp_path / "out"), tmp_path / "out")
    # And nothing is taken for damaged.
    assert stored_depth(tmp_path / "out", step=9) == 7


def test_a_grown_run_can_be_exported_and_grown_again(run_dir, tmp_path, load_folder):
    grow_folder(run_dir, tmp_path / "a", [0, 1, 2, 3, 3], step=6)
    grow_folder(tmp_path / "a", tmp_path / "b", [0, 0, 1, 2, 3, 4], operator="custom")
    assert [event["map"] for event in _meta(tmp_path / "b", 6)["history"]][1:] == [
        [0, 1, 2, 3, 3], [0, 0, 1, 2, 3, 4],
    ]
    export_run(run_dir, tmp_path / "small", step=6)
    export_run(tmp_path / "b", tmp_path / "large")
    small, large = load_folder(tmp_path / "small"), load_folder(tmp_path / "large")
    for number, source in enumerate([0, 0, 1, 2, 3, 3]):
        name = "model.layers.{}.mlp.up_proj.weight"
        np.testing.assert_array_equal(large[name.format(number)], small[name.format(source)])


def test_a_layer_lies_in_chunks_of_its_own(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", 2000)
    grow_folder(run_dir, tmp_path / "out", [0, 1, 2, 3, 3], step=6)
    state = StoredState(tmp_path / "out" / "checkpoints" / "6")
    for keys in state.shapes():
        array = state.open(keys)
        chunk = stored_state.chunk_shape(array)
        assert np.prod(chunk) * array.dtype.numpy_dtype.itemsize <= 2000
        if LAYOUT.matches(keys):
            assert chunk[0] == 1, keys
    # And again, now read from such chunks: no piece in memory is larger.
    sizes, values = [], StoredState.values
    monkeypatch.setattr(
        StoredState, "values",
        lambda self, region: sizes.append(values(self, region).nbytes) or values(self, region),
    )
    grow_folder(tmp_path / "out", tmp_path / "again", [4, 0])
    assert len(sizes) > 100 and max(sizes) <= 2000
    again = StoredState(tmp_path / "again" / "checkpoints" / "6")
    keys = ("params", "stack", "layers", "mlp", "down")
    np.testing.assert_array_equal(again.read(keys, 0), state.read(keys, 4))
    np.testing.assert_array_equal(again.read(("params", "embedding")), state.read(
        ("params", "embedding")
    ))


def test_a_run_saved_with_all_layers_in_one_chunk(run_dir, restore, tmp_path, monkeypatch):
    """As versions did that knew nothing of growing on disk."""
    import orbax.checkpoint as ocp

    state, meta = restore(run_dir, 6), _meta(run_dir, 6)
    monkeypatch.setattr(
        checkpoints, "storage", lambda tree: jax.tree.map(lambda leaf: ocp.SaveArgs(), tree)
    )
    old = tmp_path / "old"
    saving = checkpoints.Checkpoints(old / "checkpoints")
    saving.save(state, meta)
    saving.close()
    shutil.copy(run_dir / "config.json", old)
    keys = ("params", "stack", "layers", "mlp", "up")
    array = StoredState(old / "checkpoints" / "6").open(keys)
    assert stored_state.chunk_shape(array)[0] == 4
    depth_map = midas(4, block=2)
    grow_folder(old, tmp_path / "out", depth_map)
    _assert_same(restore(tmp_path / "out", 6), grow(state, depth_map, LAYOUT))
    array = StoredState(tmp_path / "out" / "checkpoints" / "6").open(keys)
    assert stored_state.chunk_shape(array)[0] == 1


@pytest.mark.parametrize(
    "depth_map, settings, message",
    [
        (gradstack(6, block=2), {"step": 6}, "reads from 6 stored layers, but the stack holds 4"),
        ([0], {"step": 7}, "holds no checkpoint of step 7; it has 3, 6, 9"),
        ([0], {"step": 6, "total_steps": 5}, "has made more steps than the 5"),
        ([0], {"moments": "half"}, "moments of copies are one of"),
    ],
)
def test_bad_arguments_leave_nothing(run_dir, tmp_path, depth_map, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        grow_folder(run_dir, tmp_path / "out", depth_map, **settings)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_damaged_checkpoint_leaves_nothing(run_dir, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    for file in (broken / "checkpoints" / "6" / "state").rglob("*"):
        if file.parent.name == "d":
            file.write_bytes(b"damage")
    complaint = r"checkpoint 6 .*cannot be read \(state/.* has 6 bytes"
    with pytest.raises(UserError, match=complaint) as caught:
        grow_folder(broken, tmp_path / "out", [0, 1, 2, 3, 3], step=6)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["run"]


def test_configuration_of_a_run_without_checkpoints(run_config, tmp_path):
    assert isinstance(run_config, TrainConfig)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no run: there is no config.json"):
        grow_folder(tmp_path / "run", tmp_path / "out", [0])
