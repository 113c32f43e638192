"""How the layers of a stage and of a checkpoint run."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop, Stage
from stacking_jax.training.stack_runs import inference_stack, stored_runs, training_stack

LOOP = Loop(1, 1, 3, inject="stream", backprop=2, exits=2)
STAGE = Stage(3, 10, 0, run_map=LOOP.depth_map(3), loop=LOOP)


def meta_of(stage, depth=None):
    depth = stage.depth if depth is None else depth
    return {"step": 5, "stage": 0, "depth": depth, "plan": [stage.to_dict()]}


def test_a_loop_is_trained_with_its_exits_and_evaluated_with_one(config):
    assert training_stack(config, STAGE)(0) == {"depth_map": STAGE.run_map, "loop": LOOP}
    evaluated = {"depth_map": STAGE.run_map, "loop": Loop(1, 1, 3, inject="stream")}
    assert inference_stack(config, STAGE)(0) == stored_runs(meta_of(STAGE)) == evaluated


def test_more_loops_are_more_positions():
    runs = stored_runs(meta_of(STAGE), loops=5)
    assert runs["loop"].turns == 5 and runs["depth_map"].sources == (0, 1, 1, 1, 1, 1, 2)


def test_a_map_without_a_loop():
    stage = Stage(2, 10, 0, run_map=DepthMap([0, 1, 0]))
    assert stored_runs(meta_of(stage)) == {"depth_map": DepthMap([0, 1, 0])}


def test_what_is_plain_or_was_grown_on_disk_runs_every_layer_once():
    assert stored_runs(meta_of(Stage(3, 10, 0))) == {}
    assert stored_runs(meta_of(STAGE, depth=6)) == {}
    # As versions before loops wrote it.
    old = {"step": 5, "stage": 0, "depth": 3, "plan": [{"depth": 3, "steps": 10, "start": 0}]}
    assert stored_runs(old) == stored_runs({"step": 0, "stage": 0, "depth": 3}) == {}
    with pytest.raises(UserError, match="checkpoint 5 has no loop, so it cannot run 2 of them"):
        stored_runs(old, loops=2)
