"""`LoopConfig`: which stages it makes of a plan, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop, ModelCosts, Plan
from stacking_jax.training.growth_config import GrowthConfig
from stacking_jax.training.loop_config import LoopConfig

COSTS = ModelCosts(
    layer_params=10, other_params=100, layer_flops=7.0, attention_flops=2.0, head_flops=50.0
)


def stages(config, plan=None, depth=8, steps=100):
    return config.apply(plan or Plan.constant(depth, steps)).stages


def shown(config, **options):
    made = stages(config, **options)
    return [(s.start, s.depth, str(s.run_map or "-"), s.operator) for s in made]


def test_off_by_default():
    plan = Plan.constant(8, 100)
    assert LoopConfig().apply(plan) is plan and LoopConfig().method is None


def test_a_block_run_again_and_again():
    assert shown(LoopConfig(loops=4)) == [(0, 2, "(0 1)×4", None)]
    assert shown(LoopConfig(loops=4, block=2)) == [(0, 2, "(0 1)×4", None)]


@pytest.mark.parametrize("depth", [8, 12, 24, 48, 72])
def test_middle_looping_by_shares_of_the_depth(depth):
    config = LoopConfig(loops=4, first=0.1666, last=0.1666)
    (stage,) = stages(config, depth=depth)
    assert stage.run_depth == depth and stage.loop.turns == 4
    ends = {8: 2, 12: 2, 24: 4, 48: 8, 72: 12}[depth]
    assert stage.loop.start == ends and stage.depth - stage.loop.stop == ends


def test_a_curriculum_changes_what_runs_and_not_what_is_stored():
    config = LoopConfig(
        loops=3, first=1, last=1, curriculum=[1, 2, 3], curriculum_fractions=[0.5, 0.3, 0.2]
    )
    assert shown(config) == [
        (0, 4, "0..3", None),
        (50, 4, "0 (1 2)×2 3", "more loops"),
        (80, 4, "0 (1 2)×3 3", "more loops"),
    ]
    plan = config.apply(Plan.constant(8, 100))
    assert plan.growth_steps == () and [s.positions for s in plan.stages] == [4, 6, 8]
    described = plan.describe(COSTS, 10)
    assert [s["run_depth"] for s in described["stages"]] == [4, 6, 8]
    assert [s["params"] for s in described["stages"]] == [140] * 3


def test_untying_is_the_growth_by_the_map_that_ran():
    plan = LoopConfig(loops=2, first=2, untie_at=0.7).apply(Plan.constant(8, 100))
    looped, plain = plan.stages
    assert plain.grow_map == looped.run_map and plain.run_map is None
    assert (plain.start, plain.depth, plan.growth_steps) == (70, 8, (70,))


@pytest.mark.parametrize("tie", ["first", "average"])
def test_tying_a_grown_stack(tie):
    grown = GrowthConfig(operator="midas", num_stages=2).plan(8, 100)
    plan = LoopConfig(loops=3, first=1, last=1, tie_at=0.5, tie=tie).apply(grown)
    assert [(s.start, s.depth) for s in plan.stages] == [(0, 4), (33, 8), (50, 4)]
    last = plan.stages[-1]
    assert last.grow_map == DepthMap([0, 1, 2, 7], stored=8)
    assert last.run_map.sources == (0, 1, 2, 1, 2, 1, 2, 3)
    if tie == "first":
        assert last.mix is None
        return
    mix = np.array(last.mix)
    np.testing.assert_allclose(mix.sum(axis=1), 1)
    np.testing.assert_allclose(mix[1], [0, 1 / 3, 0, 1 / 3, 0, 1 / 3, 0, 0])
    np.testing.assert_array_equal(mix[[0, 3]].argmax(axis=1), [0, 7])


def test_exits_and_turns_without_gradients_are_counted():
    config = LoopConfig(loops=3, first=1, last=1, inject="stream", loss_loops=2, backprop_loops=2)
    (stage,) = stages(config)
    assert stage.loop == Loop(1, 2, 3, "stream", backprop=2, exits=2)
    # 9 positions and 2 heads, of which the 2 positions of the first loop run forward alone.
    assert stage.flops_per_token(COSTS) == 3 * (9 * 9 + 2 * 50) - 2 * 2 * 9
    assert stage.flops_per_token(COSTS, head=False, attention=False) == 3 * 9 * 7 - 2 * 2 * 7
    # In a stage of a curriculum with fewer loops, all of them.
    short = LoopConfig(
        loops=3, first=1, last=1, inject="stream", loss_loops=2, backprop_loops=2,
        curriculum=[1, 3],
    )
    assert stages(short)[0].loop == Loop(1, 2, 1, "stream", backprop=1, exits=1)


def test_methods_have_names():
    assert LoopConfig(loops=2).method == "looped"
    assert LoopConfig(loops=2, first=1, untie_at=0.5).method == "middle looped, untied"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(inject="input"), "LoopConfig.inject is set, but nothing loops"),
        (dict(loops=0), "LoopConfig.loops must be a whole number of at least 1; got 0"),
        (dict(loops=2, first=-1), "LoopConfig.first is a number of layers from 0"),
        (dict(loops=2, last=1.0), "a share of them below 1; got 1.0"),
        (dict(loops=2, inject="noise"), "LoopConfig.inject is 'input', 'stream' or None"),
        (dict(loops=2, tie="last"), "LoopConfig.tie is 'first' or 'average'"),
        (dict(loops=2, untie_at=1.0), "LoopConfig.untie_at is a share of the run"),
        (dict(loops=2, curriculum=[1, 3]), "ends at LoopConfig.loops = 2; got .1, 3."),
        (dict(loops=2, curriculum=[0, 2]), "every entry of LoopConfig.curriculum"),
        (
            dict(loops=2, curriculum=[1, 2], curriculum_fractions=[0.5]),
            "curriculum_fractions are 2 positive shares",
        ),
        (dict(loops=2, loss_loops=3), "the last 2 have gradients .* the last 3 a loss"),
        (
            dict(loops=3, backprop_loops=1),
            "backprop_loops = 1 of 3 .* LoopConfig.inject = 'input' or 'stream'",
        ),
        (dict(loops=3, backprop_loops=1, first=1, inject="input"), "LoopConfig.inject = 'stream'"),
        (dict(loops=2, inject="input", untie_at=0.5), "injects nothing"),
        (dict(loops=2, tie_at=0.5, untie_at=0.5), "comes before LoopConfig.untie_at"),
    ],
)
def test_settings_out_of_range_or_at_odds(values, message):
    with pytest.raises(UserError, match=message):
        LoopConfig(**values)


@pytest.mark.parametrize(
    ("config", "plan", "message"),
    [
        (LoopConfig(loops=3), None, "num_layers = 8, .* leave 8, which is not 3 loops of whole"),
        (LoopConfig(loops=2, block=3), None, "which is not 2 × 3 layers"),
        (LoopConfig(loops=2, first=4, last=4), None, "leave 0, which is not 2 loops"),
        (LoopConfig(loops=2), Plan.prop(8, 2, 100), "bind GrowthConfig.operator = None"),
        (
            LoopConfig(loops=2, tie_at=0.2), Plan.prop(8, 2, 100),
            r"at LoopConfig.tie_at = 0.2 \(step 20\) the stack has 4 of 8 layers",
        ),
        (LoopConfig(loops=2, untie_at=0.001), None, "leave none for stage 1"),
    ],
)
def test_plans_that_do_not_fit(config, plan, message):
    with pytest.raises(UserError, match=message):
        config.apply(plan or Plan.constant(8, 100))


def test_growth_that_looping_excludes():
    with pytest.raises(UserError, match="GrowthConfig.ramp_steps lets copies in"):
        LoopConfig(loops=2).check_growth(GrowthConfig(ramp_steps=3))
    with pytest.raises(UserError, match="bind GrowthConfig.init = 'copy'; got 'identity'"):
        LoopConfig(loops=2, untie_at=0.5).check_growth(GrowthConfig(init="identity"))
    LoopConfig().check_growth(GrowthConfig(ramp_steps=3, init="identity"))
