"""What the settings of a teacher make of a plan, and which of them are refused."""

from __future__ import annotations

import dataclasses

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.training import GrowthConfig
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.within_run import config_of_teacher, smaller


def taught(plan):
    return [(stage.depth, stage.start, stage.steps, stage.taught) for stage in plan.stages]


def test_without_a_fraction_nothing_changes():
    plan = Plan.prop(8, 2, 30)
    assert DistillConfig().apply(plan) is plan


@pytest.mark.parametrize(
    ("fraction", "want"),
    [
        (0.1, [(4, 0, 3, True), (4, 3, 7, False), (8, 10, 20, False)]),
        # On a boundary that is there anyway.
        (1 / 3, [(4, 0, 10, True), (8, 10, 20, False)]),
        (0.5, [(4, 0, 10, True), (8, 10, 5, True), (8, 15, 15, False)]),
        (1.0, [(4, 0, 10, True), (8, 10, 20, True)]),
    ],
)
def test_the_teacher_leaves_at_a_boundary(fraction, want):
    plan = Plan.prop(8, 2, 30)
    found = DistillConfig(fraction=fraction).apply(plan)
    assert taught(found) == want
    assert found.growth_steps == plan.growth_steps == (10,)
    assert [stage.operator for stage in found.stages if stage.grows] == ["midas"]


def test_a_split_keeps_what_runs(config):
    plan = Plan.prop(8, 2, 30)
    assert plan.split(30) == plan.split(10) == plan
    looped = dataclasses.replace(plan.stages[0], path=2)
    first, second = Plan((looped,)).split(4).stages
    assert (first.path, second.path, second.grows, second.start) == (2, 2, False, 4)


def test_the_teacher_does_not_leave_while_copies_are_let_in():
    plan = Plan.prop(8, 2, 30)
    with pytest.raises(UserError, match="the copies of the growth at step 10 are let in"):
        DistillConfig(fraction=0.5).apply(plan, ramp_steps=8)
    DistillConfig(fraction=0.5).apply(plan, ramp_steps=5)
    growth = GrowthConfig(operator="midas", num_stages=2, ramp_steps=8)
    assert growth.plan(8, 30).growth_steps == (10,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction": 1.5}, "share from 0 to 1"),
        ({"weight": -0.1}, "share from 0 to 1"),
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"tail": "cut"}, "one of drop, renormalise, uniform"),
        ({"top_k": 0}, "whole number of at least 1"),
        ({"anneal": 1}, "True or False"),
        ({"teacher": ""}, "a path or None"),
        ({"select": 0.0, "cache": "c"}, "share above 0"),
        ({"select": 0.5}, "stacking-jax distill-cache"),
        ({"teacher": "a", "cache": "b"}, "set one of the two to None"),
        ({"teacher_step": 3}, "which is not set"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        DistillConfig(**settings)
    assert "\n" not in str(caught.value)


def test_a_share_that_is_no_step(config):
    with pytest.raises(UserError, match="of 9 steps is none"):
        dataclasses.replace(config, distill=DistillConfig(fraction=0.01)).plan()


def test_the_runs_own_teacher_is_a_smaller_plain_run(config):
    salted = dataclasses.replace(config, distill=DistillConfig(fraction=0.5, teacher_steps=0.4))
    own = config_of_teacher(salted)
    assert own.total_steps == 4 and own.data == config.data and own.seed == config.seed
    assert (own.model.num_layers, own.model.d_model, own.model.num_heads) == (2, 16, 1)
    assert own.model.d_ff == 32 and own.model.vocab_size == config.model.vocab_size
    assert not own.distill.on and [stage.depth for stage in own.plan().stages] == [2]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, None, 0.5), (8, 2, 0.3), (4, 4, 1)])
def test_a_smaller_model_fits_together(config, heads, kv_heads, width):
    model = dataclasses.replace(
        config.model, d_model=96, num_heads=heads, num_kv_heads=kv_heads, d_ff=100
    )
    made = smaller(model, 0.5, width)
    assert made.head_width == model.head_width and made.num_heads % made.kv_heads == 0
    assert made.d_model <= model.d_model and made.d_ff % 8 == 0


def test_methods_have_names(config):
    def name(**distill):
        return dataclasses.replace(config, distill=DistillConfig(**distill)).method

    assert name() == "midas" and name(fraction=0.2) == "midas + salt"
    assert name(fraction=0.2, cache="c", select=0.5) == "midas + salt_ds (score)"
    flat = dataclasses.replace(
        config, growth=GrowthConfig(), distill=DistillConfig(fraction=0.2)
    )
    assert flat.method == "salt"
