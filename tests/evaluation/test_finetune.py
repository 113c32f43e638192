"""Fine-tuning through the command line, and the recipe of the paper."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics

import jax
import numpy as np
import pytest

from stacking_jax import configurables, gin_config
from stacking_jax.cli import main
from stacking_jax.errors import UserError
from stacking_jax.evaluation import finetune as module
from stacking_jax.evaluation import registry
from stacking_jax.evaluation.finetune import finetune
from stacking_jax.evaluation.finetune_config import FinetuneConfig
from stacking_jax.evaluation.finetune_data import encode_examples
from stacking_jax.evaluation.model import RunModels
from stacking_jax.evaluation.task import TRAIN, EvalTask, Example, Metric
from stacking_jax.training import MeshConfig, OptimizerConfig
from stacking_jax.training.mesh import make_decoding_mesh

DEPTHS = [f"variable_assignment/code/depth_{depth}/0_shot" for depth in (1, 2)]


def test_the_recipe_of_the_paper():
    gin_config.load(["gin/finetune/primitives.gin"], [], configurables.register)
    config = configurables.configured(FinetuneConfig)
    gin_config.clear()
    assert config.tasks == DEPTHS and config.examples_per_task * len(config.tasks) == 64
    assert config.batch_size is None and config.num_datasets == 3 and config.eval_examples == 1000
    assert config.evaluated_steps() == list(range(200, 301))
    assert (config.optimizer.name, config.optimizer.schedule) == ("adafactor", "constant")
    assert config.optimizer.peak_learning_rate == 0.001
    assert config.optimizer.warmup_fraction == 0
    assert FinetuneConfig(tasks=DEPTHS) == config


def test_rows_carry_loss_on_answers_alone(run_dir):
    model = RunModels(run_dir).load(4)
    tasks = registry.find(DEPTHS)
    found = encode_examples(model, tasks, 3, seed=5)
    examples = [example for task in tasks for example in task.source(TRAIN, 3, 5)]
    assert found.count == len(examples) == 6
    codec = model.tokenizer
    for row, example in enumerate(examples):
        inside = found.segment_ids[row] == 1
        tokens, prompt = found.tokens[row][inside], found.prefix[row][inside] == 1
        assert codec.decode(tokens[prompt]) == example.prompt
        assert tokens[~prompt].tolist() == [*codec.encode(example.target), codec.eos_id]
        assert found.positions[row][inside].tolist() == list(range(inside.sum()))
        assert not found.tokens[row][~inside].any() and not found.prefix[row][~inside].any()
    other = encode_examples(model, tasks, 3, seed=6)
    assert not np.array_equal(found.tokens, other.tokens)


@pytest.fixture
def copying():
    """Two letters and one of them again: learned in a few steps."""

    def source(split, count, seed):
        letters = "abcdefgh" if split == TRAIN else "abcd"
        for index in range(count or len(letters)):
            yield Example(f"{letters[index % len(letters)]}:", letters[index % len(letters)])

    def exact(predictions, examples):
        return [100.0 * (p == e.target) for p, e in zip(predictions, examples, strict=True)]

    task = registry.register(
        EvalTask("letters", "mine", source, (Metric("exact", exact),), max_new_tokens=2)
    )
    yield task
    registry.unregister(task.name)


CONFIG = FinetuneConfig(
    tasks="letters", examples_per_task=8, num_datasets=2, total_steps=120, evaluate_from=100,
    evaluate_every=15, eval_examples=4,
    optimizer=OptimizerConfig(
        schedule="constant", peak_learning_rate=0.01, warmup_fraction=0.0
    ),
)  # fmt: skip


@pytest.mark.slow
def test_it_learns_and_says_how_it_went(run_dir, tmp_path, copying):
    result = finetune(run_dir, tmp_path / "out", CONFIG)
    assert result["results"]["letters"]["value"] == 100.0
    curve = result["curves"][0]["curve"]
    assert [row["step"] for row in curve] == [100, 115, 120]
    done = json.loads((tmp_path / "out" / "dataset-1.json").read_text())
    assert len(done["losses"]) == 120 and done["losses"][-1] < 0.1 < done["losses"][0]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    rows = tmp_path / "out" / "dataset-0" / "step-120" / "letters.jsonl"
    assert [json.loads(row)["prediction"] for row in rows.read_text().splitlines()] == [*"abcd"]


@pytest.mark.slow
def test_it_learns_the_same_on_any_devices(run_dir, tmp_path, copying, monkeypatch):
    # A large epsilon: an update is then a smooth function of its gradient.
    optimizer = dataclasses.replace(CONFIG.optimizer, epsilon=1e-3)
    config = dataclasses.replace(
        CONFIG, optimizer=optimizer, num_datasets=1, total_steps=4, evaluate_from=4
    )
    results = []
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(fsdp=2, sequence=2, tensor=2), 8)):
        made = make_decoding_mesh(mesh, jax.devices()[:devices])
        monkeypatch.setattr("stacking_jax.evaluation.model.make_decoding_mesh", lambda _: made)  # noqa: B023
        results.append(finetune(run_dir, tmp_path / str(devices), config))
    one, eight = (
        json.loads((tmp_path / str(n) / "dataset-0.json").read_text())["losses"] for n in (1, 8)
    )
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1] < one[0] and results[0]["results"] == results[1]["results"]


def test_a_small_batch_sees_every_example(run_dir, copying):
    config = dataclasses.replace(CONFIG, batch_size=3)
    model = RunModels(run_dir).load(4)
    examples = encode_examples(model, [copying], 8, seed=0)
    batch_of = module._batches(model, examples, config, 0)
    seen = []
    for step in range(1, 9):  # three passes over eight examples
        tokens = np.asarray(jax.device_get(batch_of(step)["tokens"]))
        assert (tokens.any(axis=1)).sum() == 3
        seen += [int(row[0]) for row in tokens if row.any()]
    assert sorted(seen) == sorted(examples.tokens[:, 0].tolist() * 3)
    assert seen[:8] != seen[8:16]


@pytest.mark.slow
def test_the_command_goes_on_with_the_next_dataset(run_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["finetune", "--run_dir", str(run_dir), "--out", str(out), "--task", DEPTHS[0]]
    small = ["total_steps=3", "evaluate_from=2", "eval_examples=8", "num_datasets=2"]
    arguments += [f"--gin.FinetuneConfig.{setting}" for setting in small]
    files = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}

    learn = module._one_dataset

    def killed(*args):
        if args[-1] == 1:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(module, "_one_dataset", killed)
    assert main([*arguments, "--json"]) == 130
    assert (out / "dataset-0.json").exists() and not (out / "dataset-1.json").exists()
    first = (out / "dataset-0.json").read_bytes()
    monkeypatch.setattr(module, "_one_dataset", learn)
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert "dataset 1 of 2 is already there" in captured.err
    found = json.loads(captured.out)["results"][DEPTHS[0]]
    assert found["n"] == 8 and len(found["by_dataset"]) == 2
    assert found["value"] == statistics.fmean(found["by_dataset"])
    assert (out / "dataset-0.json").read_bytes() == first
    # The same command again only reads; another one is refused.
    assert main(arguments) == 0
    assert "mean over 2 evaluations from step 2 to 3" in capsys.readouterr().out
    assert main([*arguments, "--gin.FinetuneConfig.seed=1"]) == 2
    assert "holds another fine-tuning" in capsys.readouterr().err
    # The run itself is as it was.
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == files


@pytest.mark.slow
def test_an_uninterrupted_one_is_the_same(run_dir, tmp_path):
    config = dataclasses.replace(
        CONFIG, tasks=DEPTHS[0], total_steps=3, evaluate_from=2, evaluate_every=1, eval_examples=8
    )
    whole = finetune(run_dir, tmp_path / "a", config)
    (tmp_path / "b").mkdir()
    for name in ("settings.json", "dataset-1.json"):
        shutil.copy(tmp_path / "a" / name, tmp_path / "b")
    assert finetune(run_dir, tmp_path / "b", config) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": None}, "name the tasks to learn"),
        ({"examples_per_task": 4, "tasks": "long"}, "is not cut: choose a task that fits"),
        ({"examples_per_task": 9, "tasks": "long"}, "has 4 training examples, not 9"),
    ],
)
def test_what_cannot_be_learned(settings, message, run_dir, tmp_path):
    def source(split, count, seed):
        yield from [Example("x" * 511, "1")] * (4 if split == TRAIN else 1)

    registry.register(
        EvalTask("long", "mine", source, (Metric("m", lambda p, e: [0.0] * len(p)),))
    )
    try:
        with pytest.raises(UserError, match=message):
            finetune(run_dir, tmp_path / "out", dataclasses.replace(CONFIG, **settings))
    finally:
        registry.unregister("long")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_datasets": 0}, "num_datasets is a whole number of at least 1"),
        ({"evaluate_from": 301}, "comes after the last of 300 steps"),
    ],
)
def test_settings_out_of_their_range(setting, message):
    with pytest.raises(UserError, match=message):
        FinetuneConfig(**setting)
