"""Every .gin file of the package, and what each experiment comes to.

The golden texts beside this file hold the whole configuration of every experiment,
one setting a line, so that a change of a default anywhere is seen in review. After a
change that is meant:

    python tests/test_configurables.py
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from stacking_jax import configurables, gin_config
from stacking_jax.errors import UserError

ROOT = gin_config.gin_root()
GOLDEN = Path(__file__).resolve().parent / "golden"
EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiments/*.gin"))
PARTS = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.rglob("*.gin") if path.parent.name != "experiments"
)


@pytest.fixture(autouse=True)
def clean():
    yield
    gin_config.clear()


def load(*files: str, bindings=()):
    gin_config.load([f"gin/{name}" for name in files], list(bindings), configurables.register)
    return configurables.configured()


def experiment(name: str, bindings=()):
    return load(f"experiments/{name}.gin", bindings=bindings)


def as_text(config) -> str:
    def lines(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from lines(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} = {value!r}\n"

    return "".join(sorted(lines(config.to_dict())))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_what_its_golden_text_says(name):
    golden = GOLDEN / f"{name}.txt"
    assert as_text(experiment(name)) == golden.read_text(encoding="utf-8"), (
        "if the change is meant: python tests/test_configurables.py"
    )


def test_there_is_no_golden_text_without_an_experiment():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_makes_a_plan(name):
    config = experiment(name)
    plan = config.describe_plan()
    assert sum(stage["steps"] for stage in plan["stages"]) == config.total_steps
    assert plan["stages"][-1]["depth"] == config.model.num_layers
    assert 1 < plan["speedup_model"] <= plan["speedup_blocks"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_saved_text_of_a_run_gives_the_same_run(name, tmp_path):
    config = experiment(name)
    saved = tmp_path / "config.gin"
    saved.write_text(gin_config.operative_text())
    gin_config.load([saved], [], configurables.register)
    assert configurables.configured() == config


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_laid_over_the_demo(part):
    base = ["experiments/demo.gin"] if part != "train.gin" else []
    if not base:
        load("train.gin", "models/tiny.gin")
    else:
        load(*base, part)


@pytest.mark.parametrize(
    ("size", "depth", "d_ff", "heads", "block", "billions"),
    [("1b", 24, 5120, 32, 4, 1.2), ("2b", 48, 5120, 32, 8, 2.4), ("8b", 72, 16384, 16, 12, 8.5)],
)
def test_the_models_of_the_midas_paper(size, depth, d_ff, heads, block, billions):
    config = experiment(f"midas_{size}_prop2")
    model, plan = config.model, config.describe_plan()
    assert (model.num_layers, model.d_model, model.d_ff, model.num_heads) == (
        depth, 2048, d_ff, heads
    )
    assert [stage["depth"] for stage in plan["stages"]] == [block * i for i in range(1, 7)]
    squares = [i * i / 91 for i in range(1, 7)]
    shares = [stage["steps"] / config.total_steps for stage in plan["stages"]]
    assert shares == pytest.approx(squares, abs=1e-5)
    # The paper's 24 %, which counts the blocks alone.
    assert plan["speedup_blocks"] == pytest.approx(1.238, abs=5e-4)
    assert plan["params"] == pytest.approx(billions * 1e9, rel=0.03)
    assert config.optimizer.name == "adafactor" and config.optimizer.schedule == "cosine"
    assert config.data.sequence_length == 1280
    # 512 B tokens for all three.
    assert config.total_steps * config.tokens_per_step == pytest.approx(512e9, rel=1e-3)
    assert config.optimizer.warmup_fraction * config.total_steps == pytest.approx(10_000)
    peak = {"8b": 0.001}.get(size, 0.01)
    assert config.optimizer.peak_learning_rate == peak
    assert config.optimizer.final_fraction == pytest.approx(0.1)


def test_gpt2_small_has_its_size():
    config = experiment("gpt2_124m_prop1")
    assert config.describe_plan()["params"] == pytest.approx(124e6, rel=0.01)
    # With the head in it, PROP-1 in six stages gives 1.24 and not 1.385.
    costs = config.model.costs(config.data.sequence_length)
    assert config.plan().speedup(costs, attention=False) == pytest.approx(1.24, abs=0.005)
    assert config.describe_plan()["speedup_blocks"] == pytest.approx(1.385, abs=0.005)


@pytest.mark.parametrize("operator", ["midas", "gradstack"])
@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_the_growth_files(operator, alpha):
    config = load("experiments/demo.gin", f"growth/{operator}_prop{alpha}.gin")
    growth = config.growth
    assert (growth.operator, growth.schedule, growth.alpha) == (operator, "prop", alpha)
    assert config.plan().stages[-1].operator == operator


def test_a_baseline_over_the_demo_does_not_grow():
    config = load("experiments/demo.gin", "growth/baseline.gin")
    assert [stage.depth for stage in config.plan().stages] == [8]
    grown = experiment("demo")
    assert config.model == grown.model and config.optimizer == grown.optimizer


def test_the_demo_is_small_and_byte_level():
    config = experiment("demo")
    assert config.model.num_layers == 8 and len(config.plan().stages) == 4
    assert config.data.vocabulary == "bytes" and config.data.task == "python_stdlib"
    # Two CPU cores do a few 10^14 of these in the minutes that one run may take.
    assert config.describe_plan()["model_flops"] < 2e14


def test_one_line_overrides_anything():
    config = experiment(
        "demo", ["TRAIN_STEPS=200", "TEXT_DIR='my/texts'", "OptimizerConfig.clip_norm=None"]
    )
    assert config.total_steps == 200 and config.data.text_dir == "my/texts"
    assert config.optimizer.clip_norm is None
    assert config.plan().total_steps == 200


@pytest.mark.parametrize(
    ("files", "part"),
    [
        (["models/tiny.gin"], "nothing sets TrainConfig.data, TrainConfig.model"),
        (["train.gin"], "nothing sets DecoderConfig.d_ff, DecoderConfig.d_model"),
    ],
)
def test_half_a_configuration_says_what_is_missing(files, part):
    with pytest.raises(UserError) as caught:
        load(*files)
    assert part in str(caught.value) and "gin/experiments" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_of_the_wrong_kind_is_one_line():
    with pytest.raises(UserError, match="DecoderConfig is of the wrong kind") as caught:
        experiment("demo", ["DecoderConfig.rope_theta='large'"])
    assert "\n" not in str(caught.value)


def test_registering_twice_changes_nothing():
    assert configurables.register() is configurables.register()
    assert math.isclose(experiment("demo").optimizer.beta1, 0.9)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in EXPERIMENTS:
        (GOLDEN / f"{name}.txt").write_text(as_text(experiment(name)), encoding="utf-8")
