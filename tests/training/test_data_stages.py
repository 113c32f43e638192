"""Growth where the data change."""

from __future__ import annotations

import dataclasses

import pytest

from stacking_jax.data import DataConfig
from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.training import GrowthConfig, TrainConfig
from stacking_jax.training.growth_config import aligned

PLAN = Plan.prop(8, 4, 100, 1.0, "midas")  # 10, 20, 30 and 40 steps


def test_the_last_boundaries_come_where_the_data_stages_begin():
    assert [stage.steps for stage in aligned(PLAN, [80]).stages] == [13, 27, 40, 20]
    assert [stage.steps for stage in aligned(PLAN, [60, 90]).stages] == [20, 40, 30, 10]
    for steps in ([80], [60, 90], [20, 60, 90]):
        plan = aligned(PLAN, steps)
        assert plan.growth_steps[-len(steps) :] == tuple(steps) and plan.total_steps == 100
        assert [s.grow_map for s in plan.stages] == [s.grow_map for s in PLAN.stages]


@pytest.mark.parametrize("steps", [[], [20, 40, 60, 80]])
def test_there_must_be_boundaries_for_them(steps):
    with pytest.raises(UserError, match=f"puts {len(steps)} of 3 stage boundaries"):
        aligned(PLAN, steps)


def test_a_run_s_plan_meets_its_cool_down(config):
    data = DataConfig(
        text_dir=config.data.text_dir, mixture={"a": 1, "b": 0}, stages=[(0.8, {"b": 1})]
    )
    run: TrainConfig = dataclasses.replace(
        config, data=data, total_steps=50,
        growth=GrowthConfig(operator="midas", num_stages=2, align_data=True),
    )
    assert run.plan().growth_steps == (40,)
    ramp = dataclasses.replace(run.growth, ramp_steps=20)
    with pytest.raises(UserError, match="ramp_steps"):
        dataclasses.replace(run, growth=ramp).plan()
    plain = dataclasses.replace(config, growth=run.growth)
    with pytest.raises(UserError, match="puts 0 of 1"):
        plain.plan()
