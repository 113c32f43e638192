from __future__ import annotations

import dataclasses
import json

import pytest

from stacking_jax import configurables, gin_config
from stacking_jax.errors import UserError
from stacking_jax.study.config import StudyConfig
from stacking_jax.study.grid import MANIFEST, Grid, check_same_cells, equal_flops_steps

ROOT = gin_config.gin_root()
BASELINE, MIDAS = "gin/growth/baseline.gin", "gin/growth/midas_prop2.gin"
ARMS = {
    "full depth": {"gin": [BASELINE]},
    "less": {"gin": [BASELINE], "flops_of": "midas"},
    "midas": {"gin": [MIDAS]},
}


@pytest.fixture(autouse=True)
def clean():
    yield
    gin_config.clear()


def configure(files, bindings):
    gin_config.load(files, bindings, configurables.register, imports=["benchmarks"])
    return configurables.configured()


def test_cells_come_seed_by_seed():
    grid = Grid.of(StudyConfig(arms=ARMS, seeds=[3, 1]), configure)
    assert [(cell.seed, cell.arm) for cell in grid.cells] == [
        (seed, arm) for seed in (3, 1) for arm in ARMS
    ]
    assert len({cell.folder for cell in grid.cells}) == 6


def test_arguments_are_those_of_train():
    config = StudyConfig(
        arms=ARMS, seeds=[3], tasks=["primitives"], bindings=["BATCH_SIZE=4"], imports=["mine"]
    )
    cell = Grid.of(config, configure).cells[1]
    for word in ("--gin.SEED=3", "--gin.BATCH_SIZE=4", "--gin_import", "mine", BASELINE,
                 "--gin.TrainConfig.evaluate_tasks=['primitives']"):
        assert word in cell.arguments
    bindings, rest = gin_config.split_argv(cell.arguments)
    run = configure([w for w in rest if w.endswith(".gin")], bindings)
    assert (run.seed, run.batch_size, run.evaluate_tasks) == (3, 4, ["primitives"])
    assert run.name == "less, seed 3"


@pytest.mark.parametrize("steps", [320, 1000, 4567])
def test_equal_flops_are_equal_and_the_schedule_ends_there(steps):
    config = StudyConfig(arms=ARMS, bindings=[f"TRAIN_STEPS={steps}"])
    grid = Grid.of(config, configure)
    midas, less = grid.budgets["midas"], grid.budgets["less"]
    assert grid.budgets["full depth"].steps == steps > less.steps
    # The nearest number of steps: no more than half a step away.
    assert abs(less.model_flops - midas.model_flops) <= 0.5 * less.model_flops_per_step
    assert f"--gin.TRAIN_STEPS={less.steps}" in grid.cells[1].arguments


def test_a_plan_of_stages_can_have_the_flops_of_full_depth():
    run = configure(["gin/experiments/demo.gin"], [])
    target = 2 * run.describe_plan()["model_flops"]
    steps = equal_flops_steps(run, target)
    found = dataclasses.replace(run, total_steps=steps).describe_plan()["model_flops"]
    assert found == pytest.approx(target, rel=0.01)


def test_a_sweep_makes_an_arm_of_each_value():
    config = StudyConfig(arms=ARMS, sweep={"LEARNING_RATE": [0.001, 0.002]}, seeds=[0])
    arms = config.all_arms()
    assert [arm.name for arm in arms][:2] == [
        "full depth, LEARNING_RATE=0.001", "full depth, LEARNING_RATE=0.002"
    ]
    assert arms[2].flops_of == "midas, LEARNING_RATE=0.001"
    assert len(Grid.of(config, configure).cells) == 6


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"arms": {}}, "at least one"),
        ({"arms": {"a": {"flops_of": "b"}}}, "which is no arm"),
        ({"arms": {"a": {"flops_of": "a"}}}, "of itself"),
        ({"arms": {"a": {"file": "x.gin"}}}, "no 'file'"),
        ({"arms": {"a": {"gin": "x.gin"}}}, "a list of texts"),
        ({"arms": {"a b": {}, "a/b": {}}}, "differ more"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"comparisons": [["midas", "nobody"]]}, "names 'nobody'"),
        ({"comparisons": [["midas", "less"]], "exploratory": ["midas"]}, "is exploratory"),
        ({"endpoints": ["score"]}, "name some"),
        ({"endpoints": ["speed"]}, "endpoints are of"),
        ({"informative": ["midas", 30]}, "[arm, low, high]"),
        ({"sweep": {"LEARNING_RATE": []}}, "a list of values"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(UserError) as error:
        StudyConfig(**{"arms": ARMS, **settings})
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arms, says",
    [
        ({"a": {"gin": ["gin/nothing.gin"]}}, "the arm 'a': "),
        ({"a": {"bindings": ["TRAIN_STEP=3"]}}, "the arm 'a': "),
        ({"a": {"bindings": ["NUM_STAGES=5"]}}, "the arm 'a': "),
        ({"a": {"flops_of": "b"}, "b": {"flops_of": "a"}}, "of one another: a, b"),
    ],
)
def test_an_arm_that_makes_no_run_is_named_before_anything_runs(arms, says):
    with pytest.raises(UserError, match=says):
        Grid.of(StudyConfig(arms=arms), configure)


def test_a_folder_keeps_its_cells(tmp_path):
    grid = Grid.of(StudyConfig(arms=ARMS, seeds=[0]), configure)
    (tmp_path / MANIFEST).write_text(json.dumps(grid.to_dict()))
    longer = Grid.of(StudyConfig(arms=ARMS, seeds=[0, 1]), configure)
    check_same_cells(tmp_path, longer)
    changed = Grid.of(StudyConfig(arms=ARMS, seeds=[0], bindings=["BATCH_SIZE=4"]), configure)
    check_same_cells(tmp_path, changed)  # Nothing was begun yet.
    (tmp_path / grid.cells[0].folder).mkdir(parents=True)
    with pytest.raises(UserError, match="full depth, seed 0 was begun otherwise .*BATCH_SIZE=4"):
        check_same_cells(tmp_path, changed)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("studies/*.gin")))
def test_the_studies_here_make_their_grids(name):
    gin_config.load([f"gin/studies/{name}.gin"], [], configurables.register)
    config = configurables.configured(StudyConfig)
    missing = [
        file for arm in config.all_arms() for file in arm.gin
        if file.startswith("gin/methods/") and not (ROOT.parent / file).exists()
    ]
    if missing:
        pytest.skip(f"not here yet: {', '.join(sorted(set(missing)))}")
    grid = Grid.of(config, configure)
    assert len(grid.cells) == len(config.seeds) * len(config.all_arms())
