"""The settings of decisions, held against themselves and against a plan."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Plan, Stage
from stacking_jax.training import GrowthConfig
from stacking_jax.training.choice_config import ChoiceConfig, steps_of

GROWTH = GrowthConfig(operator="midas", num_stages=3)
PLAN = Plan.prop(6, 3, 60, 1.0, "midas")  # 10, 20 and 30 steps


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lag": 0}, "ChoiceConfig.lag is a share"),
        ({"lag": 1.5}, "ChoiceConfig.lag is a share"),
        ({"window": -1}, "ChoiceConfig.window is a share"),
        ({"lag_batches": 0}, "lag_batches"),
        ({"trigger": "moon"}, "plateau, tokens, flops, seconds"),
        ({"check_every": 0}, "check_every"),
        ({"plateau_on": "test"}, "'train' or 'held_out'"),
        ({"threshold": -0.1}, "threshold"),
        ({"budget": 0}, "budget is a positive"),
        ({"trigger": "seconds"}, "needs ChoiceConfig.budget"),
        ({"budget_shares": [0.5, 0.2]}, "rising"),
        ({"budget_shares": [0.5, 1.0]}, "rising"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings, said):
    with pytest.raises(UserError, match=said) as caught:
        ChoiceConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "growth", "said"),
    [
        ({"candidates": ["midas", "lidas"], "lag": 21}, {}, "lag of 21 steps is longer than stage"),
        (
            {"candidates": ["midas", {"operator": "midas", "block": 4}]}, {},
            "'midas 4' does not lead from 2 to 4",
        ),
        (
            {"candidates": ["midas", {"operator": "midas", "init": "hot"}]}, {},
            "GrowthConfig.init is one",
        ),
        ({"trigger": "plateau"}, {"ramp_steps": 2}, "ramp_steps"),
        ({"trigger": "plateau"}, {"align_data": True}, "align_data"),
        ({"trigger": "flops", "budget_shares": [0.2]}, {}, "1 entries for 2 stage"),
        ({"trigger": "plateau", "window": 15}, {}, "holds 1 looks"),
    ],
)
def test_what_does_not_fit_a_plan_is_refused(settings, growth, said):
    growth = GrowthConfig(operator="midas", num_stages=3, **growth)
    with pytest.raises(UserError, match=said) as caught:
        ChoiceConfig(**settings).check(PLAN, growth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"trigger": "plateau"}, {"candidates": ["midas", "lidas"]}])
def test_there_is_nothing_to_decide_where_nothing_grows(settings):
    with pytest.raises(UserError, match="single stage"):
        ChoiceConfig(**settings).check(Plan.constant(6, 60), GrowthConfig())
    ChoiceConfig().check(Plan.constant(6, 60), GrowthConfig())


def test_stages_that_only_run_more_have_no_growth_to_choose():
    stages = (Stage(4, 10, 0, path=2), Stage(4, 10, 10, DepthMap.identity(4)))
    with pytest.raises(UserError, match="no stage of this run grows"):
        ChoiceConfig(candidates=["midas", "lidas"]).check(Plan(stages), GrowthConfig())
    ChoiceConfig(trigger="plateau", window=20).check(Plan(stages), GrowthConfig())


def test_a_share_is_one_of_the_stage_and_a_number_is_itself():
    choice = ChoiceConfig(candidates=["midas", "lidas"], lag=0.25)
    assert [choice.lag_steps(stage) for stage in PLAN.stages] == [2, 5, 8]
    assert steps_of(7, 10, "it") == 7 and steps_of(0.01, 10, "it") == 1
    choice.check(PLAN, GROWTH)


def test_the_method_is_named_after_its_candidates():
    choice = ChoiceConfig(candidates=["midas", {"operator": "lidas", "moments": "zero"}])
    assert choice.method == "lag(midas, lidas zero)" and ChoiceConfig().method == ""
    assert ChoiceConfig(trigger="plateau").method == "plateau-triggered"
