"""Every file of gin/methods: resumed to the bit, eight devices as one, FLOPs as compiled.

A new file there is taken in as it is. Each is laid over the demo experiment, cut down to four
narrow layers and ten steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from stacking_jax import configurables, gin_config
from stacking_jax.planning.hlo import Module
from stacking_jax.training import MeshConfig, Stopped, TrainConfig, sharding, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.state import abstract_params

METHODS = sorted(path.stem for path in gin_config.gin_root().glob("methods/*.gin"))
STEPS = 10
SETTINGS = (
    f"TRAIN_STEPS={STEPS}", "BATCH_SIZE=8", "SEQUENCE_LENGTH=32", "NUM_STAGES=2",
    "DecoderConfig.num_layers=4", "DecoderConfig.d_model=32", "DecoderConfig.d_ff=48",
    "DecoderConfig.num_heads=4", "DataConfig.held_out=0.1",
    # Far above the rounding of a gradient, so that an update is a smooth function of it.
    "OptimizerConfig.epsilon=1e-3", "MeshConfig.fsdp=4", "MeshConfig.tensor=2",
    "TrainConfig.log_every=1", "TrainConfig.eval_every=0", "TrainConfig.eval_batches=1",
    "TrainConfig.checkpoint_every=0", "TrainConfig.compile_ahead=False",
)
OF_METHOD = {
    # What a method of deeper or longer runs cannot have here.
    "middle_looped": ["LoopConfig.loops=2"],
    "plateau": ["ChoiceConfig.window=0.4", "ChoiceConfig.check_every=2"],
}
LOSS = {"rtol": 2e-6, "atol": 0}
PARAMS = {"rtol": 0, "atol": 2e-6}
# Some seconds for each method; in all well over ten.
pytestmark = pytest.mark.slow

TRAINING = importlib.import_module("stacking_jax.training.train")
COMPILE_STAGE = TRAINING.compile_stage


@dataclasses.dataclass(frozen=True)
class Done:
    """A run that is done, and the programs of its stages' steps."""

    config: TrainConfig
    run_dir: Path
    summary: dict
    steps: list[jax.stages.Compiled]

    def rows(self, kind: str) -> list[dict]:
        lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def params(self) -> dict:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        with contextlib.closing(Checkpoints(self.run_dir / "checkpoints", 2)) as saved:
            return saved.restore_params(
                STEPS, lambda depth: abstract_params(self.config.model, depth, mesh)
            )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "texts"
    folder.mkdir()
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    for number in range(40):
        text = " ".join(dice.choices(words, k=100)) + "\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quickly(cache_folder: str) -> Iterator[None]:
    """Compiling is nearly all of the time that these tests take."""
    use_compilation_cache(None)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    gin_config.clear()


@pytest.fixture(scope="module")
def done(
    texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Done]:
    """done(method, devices, stopped=False): that run, done once.

    With `stopped` it is left off within a stage and at a boundary, and taken up again.
    """

    @functools.cache
    def run(method: str, devices: int, stopped: bool = False) -> Done:
        files = ["gin/experiments/demo.gin", f"gin/methods/{method}.gin"]
        bindings = [*SETTINGS, f"TEXT_DIR={str(texts)!r}", *OF_METHOD.get(method, ())]
        if devices == 1:
            bindings += ["MeshConfig.fsdp=1", "MeshConfig.tensor=1"]
        gin_config.load(files, bindings, configurables.register)
        config, run_dir, steps = configurables.configured(), tmp_path_factory.mktemp(method), []

        def compile_stage(*arguments):
            programs = COMPILE_STAGE(*arguments)
            steps.append(programs.train_step)
            return programs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TRAINING, "compile_stage", compile_stage)
            patch.setattr(
                sharding, "make_mesh",
                functools.partial(sharding.make_mesh, devices=jax.devices()[:devices]),
            )
            stops = {within(config), config.plan().stages[-1].start} if stopped else set()
            for step in sorted(stops - {0}):
                with pytest.raises(Stopped):
                    train(config, run_dir / "run", stop_at=step)
            summary = train(config, run_dir / "run")
        return Done(config, run_dir / "run", summary, steps)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_resumed_within_a_stage_it_is_bit_equal(method, done):
    whole, parts = done(method, 8), done(method, 8, stopped=True)
    step = within(whole.config)
    assert step in [row["step"] for row in parts.rows("resume")]
    assert_same_steps(whole, parts, step)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_at_a_boundary_it_is_bit_equal(method, done):
    whole, parts = done(method, 8), done(method, 8, stopped=True)
    stages = whole.config.plan().stages
    if len(stages) == 1:
        pytest.skip("one stage from the first step to the last")
    assert stages[-1].start in [row["step"] for row in parts.rows("resume")]
    assert_same_steps(whole, parts, stages[-1].start)


def within(config: TrainConfig) -> int:
    """A step in the middle of the longest stage."""
    stage = max(config.plan().stages, key=lambda stage: stage.steps)
    assert stage.steps > 1
    return stage.start + stage.steps // 2


def assert_same_steps(whole: Done, parts: Done, step: int) -> None:
    """From `step` to the end the run that was stopped did what the other one did."""
    losses = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in run.rows("train")]
        for run in (whole, parts)
    ]
    assert losses[0][step:] == losses[1][step:] and len(losses[1]) == STEPS
    for key in ("params_digest", "train_loss", "eval_loss", "tokens", "model_flops"):
        assert parts.summary[key] == whole.summary[key], key


@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_train_as_one_does(method, done):
    many, alone = done(method, 8), done(method, 1)
    losses = [[row["loss"] for row in run.rows("train")] for run in (many, alone)]
    np.testing.assert_allclose(*losses, **LOSS)
    wanted = alone.params()
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(many.params()), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(leaf, other, **PARAMS, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("method", METHODS)
def test_flops_as_counted_are_those_of_the_compiled_steps(method, done):
    """Matrix products alone: norms, softmax, activations and the optimiser are not counted."""
    run = done(method, 1)
    stages = run.summary["stages"]
    # A teacher of the run's own was trained, and so compiled, before its first stage.
    steps = run.steps[-len(stages):]
    compiled = [
        stage["steps"] * matrix_flops(step.as_text())
        for stage, step in zip(stages, steps, strict=True)
    ]
    # What it cost to choose how to grow is on top, in the stage that was chosen for: the last.
    tried = [0.0] * (len(stages) - 1) + [run.summary.get("choice_flops", 0.0)]
    counted = [stage["model_flops"] - more for stage, more in zip(stages, tried, strict=True)]
    assert counted == pytest.approx(compiled, rel=1e-9)
    name = "model_flops_without_teacher_training"
    whole = run.summary.get(name, run.summary["model_flops"])
    assert whole == pytest.approx(sum(compiled) + sum(tried), rel=1e-9)


def matrix_flops(text: str) -> int:
    """2 · M · N · K of every matrix product that one run of an optimised program computes."""
    shapes = {
        name: tuple(int(size) for size in sizes.split(",") if size)
        for name, sizes in re.findall(r"%?([\w.\-]+) = \w+\[([\d,]*)\]", text)
    }
    total = 0
    for visit in Module(text).visits():
        opcode = visit.instruction.opcode
        assert opcode != "custom-call" or "matmul" not in visit.instruction.attributes
        if opcode == "dot":
            assert visit.exact
            contracted = re.search(
                r"lhs_contracting_dims=\{([\d,]+)\}", visit.instruction.attributes
            )
            left = shapes[visit.instruction.operands[0]]
            inner = math.prod(left[int(axis)] for axis in contracted[1].split(","))
            total += visit.times * 2 * math.prod(shapes[visit.instruction.name]) * inner
    return total
