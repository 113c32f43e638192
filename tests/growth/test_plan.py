"""Plans: stages, their steps, their cost."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stacking_jax.errors import UserError
from stacking_jax.growth import (
    NEW,
    DepthMap,
    ModelCosts,
    Plan,
    Stage,
    g_stack,
    gradstack,
    lidas,
    midas,
)
from stacking_jax.growth.plan import divide_steps

LAYERS_ONLY = ModelCosts(
    layer_params=1, other_params=0, layer_flops=1.0, attention_flops=0.0, head_flops=0.0
)
# 12 layers of 12 D² (an ungated MLP, as in GPT-2), tied head of 50,257.
GPT2_124M = ModelCosts(
    layer_params=12 * 768**2,
    other_params=50_257 * 768 + 768,
    layer_flops=24.0 * 768**2,
    attention_flops=4.0 * 1024 * 768,
    head_flops=2.0 * 50_257 * 768,
)


@pytest.mark.parametrize(
    ("depth", "stages", "figures"),
    [
        (24, 8, "1.78 1.41 1.26 1.18"),
        (24, 6, "1.71 1.385 1.238 1.163"),
        (24, 4, "1.60 1.33 1.20 1.13"),
        (24, 3, "1.50 1.29 1.17 1.10"),
    ],
)
def test_the_papers_speedups(depth, stages, figures):
    for alpha, figure in zip((0, 1, 2, 3), figures.split(), strict=True):
        speedup = Plan.prop(depth, stages, 10_000_000, alpha).speedup(LAYERS_ONLY, head=False)
        digits = len(figure.split(".")[1])
        assert abs(speedup - float(figure)) < 0.51 * 10**-digits


def test_the_closed_form():
    for k, alpha in [(4, 1.0), (6, 2.0), (8, 0.5)]:
        steps = [i**alpha for i in range(1, k + 1)]
        share = sum(t / sum(steps) * i / k for i, t in enumerate(steps, start=1))
        plan = Plan.prop(24, k, 10**8, alpha)
        assert plan.speedup(LAYERS_ONLY) == pytest.approx(1 / share, rel=1e-6)


def test_gpt2_speedup_with_and_without_the_head():
    plan = Plan.prop(12, 6, 1_000_000, 1)
    assert plan.speedup(GPT2_124M, attention=False) == pytest.approx(1.24, abs=0.005)
    assert plan.speedup(GPT2_124M, head=False) == pytest.approx(1.385, abs=0.001)
    assert plan.speedup(GPT2_124M, head=False, attention=False) == pytest.approx(1.385, abs=0.001)
    assert Plan.constant(12, 500).speedup(GPT2_124M) == 1.0


@settings(deadline=None, max_examples=200)
@given(
    total=st.integers(1, 10**12),
    stages=st.integers(1, 12),
    alpha=st.floats(-2, 5, allow_nan=False),
    block=st.integers(1, 4),
)
def test_stage_steps_sum_exactly_to_the_total(total, stages, alpha, block):
    weights = [i**alpha for i in range(1, stages + 1)]
    exact = [total * weight / math.fsum(weights) for weight in weights]
    assume(min(exact) >= 1)
    plan = Plan.prop(stages * block, stages, total, alpha)
    assert sum(stage.steps for stage in plan.stages) == total == plan.total_steps
    assert [stage.depth for stage in plan.stages] == [i * block for i in range(1, stages + 1)]
    for stage, wanted in zip(plan.stages, exact, strict=True):
        assert abs(stage.steps - wanted) <= 1 + 1e-9 * total
    starts = [stage.start for stage in plan.stages]
    assert plan.growth_steps == tuple(starts[1:])
    assert starts == [sum(s.steps for s in plan.stages[:i]) for i in range(stages)]


@settings(deadline=None, max_examples=50)
@given(total=st.integers(10_000, 10**9), stages=st.integers(1, 6))
def test_exponential_stages(total, stages):
    plan = Plan.exponential(stages * 2, stages, total)
    assert sum(stage.steps for stage in plan.stages) == total
    for before, after in zip(plan.stages, plan.stages[1:]):
        # The shortest stage has at least 67 steps here; rounding shifts both by one.
        assert after.steps / before.steps == pytest.approx(math.e, rel=0.05)


def test_many_exponential_stages_do_not_overflow():
    assert sum(divide_steps(10**6, [float(i) for i in range(1000, 1005)])) == 10**6
    with pytest.raises(UserError, match="leave none for stage 1"):
        Plan.exponential(1000, 1000, 10**6)


@pytest.mark.parametrize(("name", "operator"), [("midas", midas), ("gradstack", gradstack)])
def test_maps_lead_from_stage_to_stage(name, operator):
    plan = Plan.prop(24, 6, 1000, 2, operator=name)
    assert plan.stages[0].grow_map is None
    for before, stage in zip(plan.stages, plan.stages[1:]):
        assert stage.grow_map == operator(before.depth, 4)
        assert stage.operator == name
    assert plan.final_depth == 24


def test_the_step_at_a_boundary_belongs_to_the_later_stage():
    plan = Plan.prop(8, 4, 100, 1)
    assert [stage.steps for stage in plan.stages] == [10, 20, 30, 40]
    assert plan.growth_steps == (10, 30, 60)
    stages = [plan.stage_at(step) for step in (0, 9, 10, 29, 30, 59, 60, 99, 100)]
    assert stages == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    for step in (-1, 101):
        with pytest.raises(UserError, match="outside the plan's 100 steps"):
            plan.stage_at(step)


def test_equal_stages_with_alpha_zero():
    assert [stage.steps for stage in Plan.prop(6, 3, 10, 0).stages] == [3, 4, 3]


# ---- other operators, other stages --------------------------------------------------------------


def test_options_reach_the_operator():
    plan = Plan.prop(24, 6, 1000, operator="lidas", reading="literal")
    for before, stage in zip(plan.stages, plan.stages[1:]):
        assert stage.grow_map == lidas(before.depth, 4, reading="literal")
    halves = Plan.prop(24, 3, 1000, operator="midas", block=4)
    assert [stage.depth for stage in halves.stages] == [8, 16, 24]
    assert halves.stages[1].grow_map == midas(8, 4).then(midas(12, 4))
    with pytest.raises(UserError, match="midas takes no option 'reading'"):
        Plan.exponential(24, 6, 1000, reading="literal")


def test_kept_layers_stand_in_every_stage():
    plan = Plan.prop(14, 3, 100, operator="gradstack", keep_first=1, keep_last=1)
    assert [stage.depth for stage in plan.stages] == [6, 10, 14]
    for before, stage in zip(plan.stages, plan.stages[1:]):
        assert stage.grow_map == gradstack(before.depth, 4, keep_first=1, keep_last=1)
        assert stage.grow_map.sources[0] == 0 and stage.grow_map.sources.count(0) == 1


def test_operators_that_multiply():
    plan = Plan.exponential(24, 3, 1000, operator="progressive")
    assert [stage.depth for stage in plan.stages] == [6, 12, 24]
    assert plan.stages[2].grow_map == g_stack(12, 2)
    plan = Plan.prop(12, 2, 100, 0, "g_stack", times=4)
    assert [stage.depth for stage in plan.stages] == [3, 12]
    assert plan.stages[1].operator == "g_stack"


def test_stages_of_any_depth():
    plan = Plan.growing([3, 5, 12], [0.0, 0.0, math.log(2)], 100, "gradstack")
    assert [(stage.depth, stage.steps) for stage in plan.stages] == [(3, 25), (5, 25), (12, 50)]
    assert plan.stages[1].grow_map == gradstack(3, 2)
    assert plan.stages[2].grow_map == gradstack(5, 5).then(gradstack(10, 2))
    with pytest.raises(UserError, match="2 depths and 1 shares"):
        Plan.growing([3, 5], [0.0], 100)
    with pytest.raises(UserError, match="midas with block 2 does not lead from 4 layers to 7"):
        Plan.growing([4, 7], [0.0, 0.0], 100, block=2)


def test_a_plan_by_hand():
    plan = Plan.custom(
        [
            (4, 10),
            (8, 20, "midas"),
            (12, 30, {"operator": "lidas", "block": 4, "reading": "literal"}),
            (3, 5, [0, 5, 11]),
            (4, 5, DepthMap([0, 1, 2, NEW])),
        ]
    )
    assert [(s.depth, s.steps, s.start, s.operator) for s in plan.stages] == [
        (4, 10, 0, None), (8, 20, 10, "midas"), (12, 30, 30, "lidas"), (3, 5, 60, "custom"),
        (4, 5, 65, "custom"),
    ]
    assert [stage.grow_map for stage in plan.stages[1:]] == [
        midas(4, 4), lidas(8, 4, reading="literal"), DepthMap([0, 5, 11], stored=12),
        DepthMap([0, 1, 2, NEW], stored=3),
    ]
    assert plan.total_steps == 70
    described = plan.describe(GPT2_124M, tokens_per_step=8)
    assert described["stages"][4]["map_text"] == "0..2 +"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([(4, 10, "midas")], r"stage 1 of a plan by hand is \(depth, steps\)"),
        ([(4, 10), (8, 10)], r"stage 2 of a plan by hand is \(depth, steps, growth\)"),
        ([(4, 10), 8], "stage 2 of a plan by hand"),
        ([(4, 0)], "the steps of a stage must be a positive whole number"),
        ([(4.0, 1)], "the depth of a stage must be a positive whole number"),
        ([(0, 1)], "a plan ends with one layer at least"),
        ([(False, 1), (2, 1, [0])], "the depth of a stage must be a positive whole number"),
        ([(0, 10), (8, 10, "midas")], "midas copies layers, and there are none yet"),
        ([(4, 10), (8, 10, "midsa")], "did you mean midas"),
        ([(4, 10), (6, 10, {"operator": "midas", "block": 4})], "does not lead from 4 layers to 6"),
        ([(4, 10), (8, 10, {"block": 4})], "needs the name of an 'operator'"),
        ([(4, 10), (8, 10, [0, 1])], "from 4 layers to 2, not from 4 to 8"),
        ([(4, 10), (8, 10, None)], "custom needs a list of layers"),
    ],
)
def test_plans_by_hand_that_cannot_be(stages, message):
    with pytest.raises(UserError, match=message):
        Plan.custom(stages)


# ---- cost -------------------------------------------------------------------------------------


def test_flops_are_steps_times_tokens_times_the_stage_cost():
    plan = Plan.prop(12, 3, 60, 1)
    by_hand = sum(
        stage.steps * 100 * GPT2_124M.flops_per_token(stage.depth) for stage in plan.stages
    )
    assert plan.flops(GPT2_124M, 100) == pytest.approx(by_hand)


def test_describe_adds_up_and_is_json():
    plan = Plan.prop(12, 6, 1000, 2)
    description = json.loads(json.dumps(plan.describe(GPT2_124M, tokens_per_step=8)))
    stages = description["stages"]
    assert [stage["depth"] for stage in stages] == [2, 4, 6, 8, 10, 12]
    assert sum(stage["steps"] for stage in stages) == description["total_steps"] == 1000
    assert sum(stage["tokens"] for stage in stages) == description["total_tokens"] == 8000
    assert sum(stage["flops"] for stage in stages) == pytest.approx(description["model_flops"])
    assert sum(stage["cost_share"] for stage in stages) == pytest.approx(1)
    assert stages[-1]["params"] == description["params"] == GPT2_124M.params(12)
    assert stages[0]["map"] is None and stages[0]["map_text"] == "0 1"
    assert stages[1]["map"] == [0, 1, 0, 1] and stages[1]["map_text"] == "(0 1)×2"
    assert description["speedup_blocks"] > description["speedup_model"] > 1
    assert description["speedup_blocks"] == plan.speedup(GPT2_124M, head=False)
    assert description["model_flops_without_head"] < description["model_flops"]


def test_a_stage_may_have_no_layers():
    plan = Plan.growing([0, 8], [math.log(0.8), math.log(0.2)], 100, "inherit_first")
    assert plan == Plan.custom([(0, 80), (8, 20, {"operator": "inherit_first"})])
    assert plan.stages[1].grow_map == DepthMap([NEW] * 8, stored=0) and plan.growth_steps == (80,)
    described = json.loads(json.dumps(plan.describe(GPT2_124M, tokens_per_step=8)))
    first, second = described["stages"]
    assert (first["depth"], first["run_depth"], first["map_text"]) == (0, 0, "none")
    assert first["params"] == GPT2_124M.params(0) > 0
    assert first["flops_per_token_without_head"] == 0 < first["flops_per_token"]
    assert second["map"] == [NEW] * 8
    assert described["speedup_blocks"] == pytest.approx(5)

    # A boundary at which nothing grows, such as the end of a teacher's steps.
    parts = plan.split(30)
    assert [stage.grows for stage in parts.stages] == [False, False, True]
    assert parts.stages[1].to_dict()["grow_map"] == []
    assert parts.describe(GPT2_124M, 8)["stages"][1]["map"] == []
    assert parts.flops(GPT2_124M, 8) == plan.flops(GPT2_124M, 8)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, -5, True, 10.0, "10", None])
@pytest.mark.parametrize("make", ["prop", "exponential", "constant"])
def test_totals_that_are_no_number_of_steps(make, total):
    makers = {
        "prop": lambda: Plan.prop(8, 4, total),
        "exponential": lambda: Plan.exponential(8, 4, total),
        "constant": lambda: Plan.constant(8, total),
    }
    with pytest.raises(UserError, match="steps must be a positive whole number"):
        makers[make]()


def test_a_depth_that_the_stages_do_not_divide():
    with pytest.raises(UserError, match="24 cannot be reached in 5 equal stages.* 1, 2, 3, 4, 6"):
        Plan.prop(24, 5, 1000)


@pytest.mark.parametrize(("total", "stage"), [(3, 1), (9, 1)])
def test_a_stage_without_steps(total, stage):
    with pytest.raises(UserError, match=f"{total} steps leave none for stage {stage} of 6"):
        Plan.prop(24, 6, total, 3)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "2", None, True])
def test_an_alpha_that_is_no_number(alpha):
    with pytest.raises(UserError, match="finite number"):
        Plan.prop(24, 6, 1000, alpha)


@pytest.mark.parametrize(
    ("depth", "stages"), [(0, 1), (-8, 4), (8, 0), (8, -2), (8.0, 4), (8, 2.0)]
)
def test_sizes_that_are_no_counts(depth, stages):
    with pytest.raises(UserError, match="positive whole number"):
        Plan.prop(depth, stages, 1000)


def test_an_unknown_operator():
    with pytest.raises(UserError, match="did you mean gradstack"):
        Plan.prop(8, 4, 1000, operator="gradstak")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((Stage(2, 0, 0),), "stage 1 of 1 .* 0 steps"),
        ((Stage(2, 5, 1),), "starts at step 1, expected 0"),
        ((Stage(2, 5, 0, midas(1, 1)),), "nothing to grow from"),
        ((Stage(2, 5, 0), Stage(4, 5, 5)), "no map to grow"),
        ((Stage(2, 5, 0), Stage(4, 5, 6, midas(2, 2))), "starts at step 6, expected 5"),
        ((Stage(2, 5, 0), Stage(5, 5, 5, midas(2, 2))), "leads from 2 to 4"),
        ((Stage(2, 5, 0), Stage(4, 5, 5, DepthMap([0, 1, 2, 2]))), "leads from 3 to 4"),
    ],
)
def test_plans_that_do_not_hang_together(stages, message):
    with pytest.raises(UserError, match=message):
        Plan(stages)


def test_a_plan_may_shrink():
    plan = Plan((Stage(4, 5, 0), Stage(2, 5, 5, DepthMap([0, 3]))))
    assert plan.final_depth == 2


def test_what_runs_costs_and_what_is_stored_weighs():
    """A loop of 4 stored layers run twice, and paths of 3 of 8: FLOPs by position."""
    looped = Plan((Stage(4, 10, 0, run_map=DepthMap(list(range(4)) * 2)),))
    paths = Plan((Stage(8, 10, 0, path=3), Stage(8, 10, 10, DepthMap.identity(8))))
    described = looped.describe(GPT2_124M, 100)

    assert looped.flops(GPT2_124M, 100) == Plan.constant(8, 10).flops(GPT2_124M, 100)
    assert described["params"] == GPT2_124M.params(4)
    assert (described["stages"][0]["depth"], described["stages"][0]["run_depth"]) == (4, 8)
    assert described["speedup_model"] == 1
    assert paths.flops(LAYERS_ONLY, 1) == 3 * 10 * (3 + 8)
    assert paths.final_run_depth == 8
    assert paths.growth_steps == (), "nothing grows where only what runs changes"
    assert paths.stages[0].to_dict()["path"] == 3
    assert looped.stages[0].to_dict()["run_map"] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run_map": DepthMap([0, 1, 0, 1])}, "reads from 2"),
        ({"path": 5}, "a path of 5 layers does not fit into a depth of 4"),
        ({"path": 0}, "a path of 0"),
    ],
)
def test_a_stage_that_cannot_run_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Stage(4, 10, 0, **settings)
