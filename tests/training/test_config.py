"""What a run may be, and when two of them are the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from stacking_jax import configurables, gin_config
from stacking_jax.errors import UserError
from stacking_jax.growth import gradstack, lidas, midas
from stacking_jax.training import GrowthConfig, MeshConfig, OptimizerConfig
from stacking_jax.training.config import OPERATIONAL, differences, with_defaults

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_without_growth_has_one_stage():
    plan = GrowthConfig(operator=None, num_stages=4).plan(8, 100)
    assert [(stage.depth, stage.steps) for stage in plan.stages] == [(8, 100)]


@pytest.mark.parametrize("operator", ["midas", "gradstack"])
def test_a_growing_run_follows_its_schedule(operator):
    plan = GrowthConfig(operator=operator, num_stages=4, alpha=2.0).plan(8, 300)
    assert [(stage.depth, stage.steps) for stage in plan.stages] == [
        (2, 10), (4, 40), (6, 90), (8, 160)
    ]
    exponential = GrowthConfig(operator=operator, num_stages=3, schedule="exp").plan(6, 100)
    assert [stage.steps for stage in exponential.stages] == [9, 24, 67]


def test_any_operator_with_its_options():
    literal = GrowthConfig(operator="lidas", num_stages=4, options={"reading": "literal"})
    assert literal.plan(16, 400).stages[2].grow_map == lidas(8, 4, reading="literal")
    kept = GrowthConfig(operator="midas", num_stages=2, keep_first=1, keep_last=1).plan(6, 60)
    assert [stage.depth for stage in kept.stages] == [4, 6]
    assert kept.stages[1].grow_map == midas(4, 2, keep_first=1, keep_last=1)
    stacked = GrowthConfig(operator="g_stack", num_stages=2, options={"times": 4}).plan(8, 60)
    assert [stage.depth for stage in stacked.stages] == [2, 8]


def test_stages_by_hand():
    growth = GrowthConfig(
        operator="gradstack", num_stages=9, schedule="none at all",
        stage_depths=(3, 4, 8), stage_fractions=[0.5, 0.3, 0.2],
    )
    plan = growth.plan(8, 100)
    assert [(stage.depth, stage.steps) for stage in plan.stages] == [(3, 50), (4, 30), (8, 20)]
    assert plan.stages[2].grow_map == gradstack(4, 4)
    by_alpha = GrowthConfig(operator="single_layer", stage_depths=[1, 8], alpha=2.0).plan(8, 100)
    assert [(stage.depth, stage.steps) for stage in by_alpha.stages] == [(1, 20), (8, 80)]
    assert GrowthConfig(stage_depths=[1, 4]).plan(8, 10).final_depth == 8, "without an operator"


def test_depths_may_be_shares_of_the_models():
    growth = GrowthConfig(
        operator="g_stack", options={"times": 4}, stage_depths=[0.25, 1.0],
        stage_fractions=[0.1, 0.9],
    )
    for depth in (8, 12, 24):
        assert [stage.depth for stage in growth.plan(depth, 50).stages] == [depth // 4, depth]
    one = GrowthConfig(operator="single_layer", stage_depths=[1, 1.0], stage_fractions=[0.8, 0.2])
    assert [(stage.depth, stage.steps) for stage in one.plan(12, 50).stages] == [(1, 40), (12, 10)]


def test_the_law_of_g_stack_times_the_growth(capsys):
    growth = GrowthConfig(
        operator="g_stack", options={"times": 4}, num_stages=2, stage_fractions="g_stack_law"
    )
    share, rest = growth.timed(7 * 10**9, 2 * 10**12).stage_fractions
    assert share == pytest.approx(11.11e9 / 2e12, rel=1e-3) and share + rest == 1
    later = dataclasses.replace(growth, law_flops=1e22).timed(7 * 10**9, 2 * 10**12)
    assert later.stage_fractions[0] > share
    assert capsys.readouterr().err == ""
    # A run far below those of the law: said aloud, and once.
    for _ in range(2):
        assert growth.timed(10**6, 10**6 + 7).stage_fractions == [0.5, 0.5]
    said = capsys.readouterr().err
    assert said.count("the law of G_stack would grow after") == 1 and "1,000,007 tokens" in said
    with pytest.raises(UserError, match="ask TrainConfig.plan"):
        growth.plan(8, 100)
    plain = json.loads(json.dumps(dataclasses.asdict(growth)))
    assert GrowthConfig(**plain) == growth


def test_a_whole_plan_by_hand():
    growth = GrowthConfig(stages=[(2, 10), (4, 20, "midas"), (5, 30, [0, 1, 2, 3, -1])])
    plan = growth.plan(5, 60)
    assert [(stage.depth, stage.steps) for stage in plan.stages] == [(2, 10), (4, 20), (5, 30)]
    assert plan.stages[2].grow_map.fresh == (False, False, False, False, True)
    assert growth.method == "stages by hand"
    assert GrowthConfig(stages=[(8, 100)]).method == "full depth"
    plain = json.loads(json.dumps(dataclasses.asdict(growth)))
    assert GrowthConfig(**plain).plan(5, 60) == plan


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "gin/growth").glob("*.gin")))
def test_every_growth_file_plans_the_demo(name):
    files = [ROOT / "gin/experiments/demo.gin", ROOT / f"gin/growth/{name}.gin"]
    gin_config.load(files, [], configurables.register)
    plan = configurables.configured().plan()
    assert plan.final_depth == 8 and plan.total_steps == 320
    if name == "baseline":
        assert len(plan.stages) == 1
    else:
        assert {stage.operator for stage in plan.stages[1:]} == {name.partition("_prop")[0]}
    # Laid over it, MIDAS knows nothing of what stood there before.
    files.append(ROOT / "gin/growth/midas_prop2.gin")
    gin_config.load(files, ["NUM_STAGES = 4"], configurables.register)
    over = configurables.configured()
    gin_config.load(files[::2], ["NUM_STAGES = 4"], configurables.register)
    assert over == configurables.configured()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"options": {"reading": "literal"}}, "midas takes no option 'reading'; it takes block"),
        ({"options": {"block": 3}}, "not a multiple of block 3"),
        ({"options": [4]}, "options is a dict of the operator's arguments"),
        ({"options": {4: 4}}, "options is a dict of the operator's arguments"),
        ({"options": {"keep_first": 1}}, "keep_first is no option: set GrowthConfig.keep_first"),
        ({"keep_first": -1}, "keep_first must be at least 0"),
        ({"keep_last": 8}, "none lies between"),
        ({"keep_last": 1}, "8 with 1 layers kept cannot be reached in 2 equal stages"),
        ({"stage_depths": [2, 4]}, "stage_depths ends at 4, but the model has 8 layers"),
        ({"stage_depths": []}, "stage_depths is a list, one entry per stage"),
        ({"stage_depths": 8}, "stage_depths is a list"),
        ({"stage_depths": [2, 3.5, 8]}, "depth of a stage must be a positive whole number"),
        ({"stage_depths": [8, 4, 8]}, "midas only deepens a stack"),
        ({"stage_fractions": [0.5, 0.25, 0.25]}, "3 entries for 2 stages"),
        ({"stage_fractions": [0.5, 0.6]}, "add up to 1"),
        ({"stage_fractions": [1.5, -0.5]}, "positive shares"),
        ({"stage_fractions": ["1", 0]}, "positive shares"),
        ({"stage_fractions": 0.5}, "stage_fractions is a list"),
        ({"stage_fractions": "g_law"}, "stage_fractions is a list"),
        ({"law_flops": -1}, "law_flops is a number of FLOPs"),
        ({"stage_depths": [0.5, 0.75]}, "stage_depths ends at 6, but the model has 8 layers"),
        ({"operator": "g_stack"}, "g_stack needs the option times"),
        ({"operator": "solar"}, "solar has no stages of its own"),
        ({"stages": [(8, 100)]}, "a plan by hand; GrowthConfig.operator makes one"),
        ({"operator": None, "stages": [(4, 50), (8, 40, "midas")]}, "8 layers after 90 steps"),
        ({"operator": None, "stages": [(4, 50), (8, 50, [0, 1])]}, "leads|layers"),
        ({"operator": None, "stages": [(4, 50), 8]}, "stage 2 of a plan by hand"),
        ({"operator": None, "stages": 8}, "stages is a list, one entry per stage"),
        ({"init": "silent"}, "init is one or a list of copy, identity"),
        ({"init": []}, "init is one or a list"),
        ({"init": "noise", "init_options": {"loud": 1}}, "a dict of relative; got"),
        ({"init": "copy", "init_options": {"relative": 1}}, "a dict of nothing; got"),
        ({"init": ["scale", "noise"], "init_options": {"relative": 1}}, "a single start"),
        ({"moments": "keep"}, "moments is one of copy, zero, copy_first"),
        ({"ramp_steps": 90}, "stage 2 trains for 67 steps, fewer than GrowthConfig.ramp_steps"),
        ({"ramp_steps": -1}, "ramp_steps must be a whole number of at least 0"),
        ({"rewarm_steps": 1.5}, "rewarm_steps must be a whole number"),
        ({"rewarm_initial": 1.5}, "rewarm_initial is a part of the rate"),
    ],
)
def test_growth_that_cannot_be(settings, part):
    with pytest.raises(UserError, match=part):
        GrowthConfig(**({"operator": "midas", "num_stages": 2} | settings)).plan(8, 100)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"operator": "midas", "num_stages": 3}, "cannot be reached in 3 equal stages"),
        ({"operator": "midas", "num_stages": 4, "alpha": 9.0}, "leave none for stage 1"),
        ({"operator": "midsa", "num_stages": 4}, "did you mean midas"),
        ({"operator": "midas", "num_stages": 4, "schedule": "linear"}, "'prop' or 'exp'"),
        ({"operator": "midas", "num_stages": 0}, "num_stages"),
        ({"operator": "midas", "num_stages": 4, "alpha": "two"}, "finite number"),
    ],
)
def test_plans_that_cannot_be(settings, part):
    with pytest.raises(UserError, match=part):
        GrowthConfig(**settings).plan(8, 100)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"name": "sgd"}, "one of adamw, adafactor, muon; got 'sgd'"),
        ({"schedule": "linear"}, "cosine, constant, wsd"),
        ({"peak_learning_rate": 0.0}, "peak_learning_rate must be a positive number"),
        ({"peak_learning_rate": float("nan")}, "peak_learning_rate"),
        ({"peak_learning_rate": "0.1"}, "peak_learning_rate"),
        ({"final_fraction": 1.5}, "final_fraction is a share"),
        ({"warmup_fraction": -0.1}, "warmup_fraction is a share"),
        ({"decay_fraction": True}, "decay_fraction is a share"),
        ({"beta1": 1.0}, "beta1 is at least 0 and less than 1"),
        ({"beta2": "a"}, "beta2"),
        ({"weight_decay": -1}, "weight_decay must be a number of at least 0"),
        ({"epsilon": None}, "epsilon"),
        ({"factored_decay": float("inf")}, "factored_decay"),
        ({"clip_norm": 0.0}, "clip_norm must be a positive number, or None"),
    ],
)
def test_optimisers_that_cannot_be(settings, part):
    with pytest.raises(UserError, match=part):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 0}, {"data": -1}, {"tensor": 2.0}, {"fsdp": "8"}, {"data": -2}]
)
def test_meshes_that_cannot_be(sizes):
    with pytest.raises(UserError, match="axes are positive whole numbers"):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"total_steps": -5}, "total_steps must be a whole number of at least 1; got -5"),
        ({"total_steps": 1.5}, "total_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "8"}, "batch_size"),
        ({"microbatches": 3}, "3 microbatches do not divide a batch of 8"),
        ({"log_every": 0}, "log_every"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"eval_every": -1}, "eval_every"),
        ({"eval_batches": 0}, "eval_batches"),
        ({"seed": True}, "seed"),
        ({"z_loss": -0.1}, "z_loss must be a number of at least 0"),
        ({"on_nan": "ignore"}, "'stop' or 'skip'"),
    ],
)
def test_runs_that_cannot_be(config, settings, part):
    with pytest.raises(UserError, match=part):
        dataclasses.replace(config, **settings)


def test_a_configuration_survives_json(config):
    plain = json.loads(json.dumps(config.to_dict()))
    assert differences(plain, config.to_dict()) == []


def test_lists_and_options_survive_json(config, change):
    growth = {"options": {"block": 2}, "stage_depths": (2, 4), "stage_fractions": [0.5, 0.5]}
    plain = json.loads(json.dumps(change(config, growth=growth).to_dict()))
    assert GrowthConfig(**plain["growth"]).plan(4, 10) == change(config, growth=growth).growth.plan(
        4, 10
    )
    other = json.loads(json.dumps(change(config, growth=growth | {"options": None}).to_dict()))
    assert differences(plain, other) == ["growth.options: {'block': 2} -> None"]


def test_every_difference_that_changes_a_number_is_named(config, change):
    other = change(
        config, seed=1, optimizer={"clip_norm": None}, model={"num_layers": 8},
        growth={"alpha": 2.0},
    )
    assert differences(config.to_dict(), other.to_dict()) == [
        "growth.alpha: 1.0 -> 2.0",
        "model.num_layers: 4 -> 8",
        "optimizer.clip_norm: 1.0 -> None",
        "seed: 0 -> 1",
    ]


def test_how_a_run_is_carried_out_is_no_difference(config, change):
    other = change(
        config, name="other", mesh={"fsdp": 4, "tensor": 2}, log_every=7, eval_every=3,
        checkpoint_every=1, keep_checkpoints=9, compilation_cache="", data={"cache_dir": "x"},
    )
    assert differences(config.to_dict(), other.to_dict()) == []
    for name in OPERATIONAL:
        part, _, field = name.rpartition(".")
        owner = getattr(config, part) if part else config
        assert field in {known.name for known in dataclasses.fields(owner)}


def test_a_setting_that_only_one_version_knows_is_a_difference(config):
    old = config.to_dict()
    del old["z_loss"]
    assert differences(old, config.to_dict()) == ["z_loss: '(absent)' -> 0.0"]


def test_a_run_of_an_older_version_goes_on_with_the_defaults(config, change):
    old = config.to_dict()
    del old["z_loss"], old["growth"]["ramp_steps"], old["mesh"]
    assert differences(with_defaults(old, config), config.to_dict()) == []
    other = change(config, growth={"ramp_steps": 2})
    assert differences(with_defaults(old, other), other.to_dict()) == ["growth.ramp_steps: 0 -> 2"]
    # What has no default was never unsaid.
    del old["data"]["sequence_length"], old["model"]["d_model"]
    lines = differences(with_defaults(old, config), config.to_dict())
    assert lines == [
        "data.sequence_length: 512 -> 64", "model.d_model: '(absent)' -> 32",
    ]


def test_the_described_plan_is_plain_data(config):
    described = config.describe_plan()
    assert json.loads(json.dumps(described)) == described
    assert described["total_tokens"] == 9 * 8 * 64
