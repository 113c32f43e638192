"""Which programs a plan asks for."""

from __future__ import annotations

import dataclasses

import pytest

from stacking_jax.planning.topology_plan import full_depth, questions
from stacking_jax.training import GrowthConfig
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.path_config import PathConfig


def test_full_depth_is_the_last_stage_where_nothing_tells_them_apart(tiny):
    assert questions(tiny) == [(tiny, 0), (tiny, 1)]
    constant = full_depth(tiny)
    assert questions(constant) == [(constant, 0)]


def test_gates_make_the_last_stage_another_program(tiny):
    gated = dataclasses.replace(tiny, growth=dataclasses.replace(tiny.growth, ramp_steps=3))
    assert questions(gated) == [(gated, 0), (gated, 1), (full_depth(gated), 0)]


def test_full_depth_does_not_grow(tiny):
    (stage,) = full_depth(tiny).plan().stages
    assert (stage.depth, stage.steps) == (4, 30)


@pytest.mark.parametrize(
    "method",
    [
        {"choice": ChoiceConfig(candidates=["midas", "lidas"])}, {"growth": GrowthConfig(),
         "loops": LoopConfig(loops=2)}, {"growth": GrowthConfig(), "paths": PathConfig("raptr")},
    ],
    ids=["lag", "looped", "raptr"],
)  # fmt: skip
def test_full_depth_has_no_method_at_all(tiny, method):
    run = dataclasses.replace(tiny, **method)
    run.plan()
    (stage,) = full_depth(run).plan().stages
    assert (stage.depth, stage.run_depth, stage.positions) == (4, 4, 4)
    assert full_depth(run).method == "full depth"
