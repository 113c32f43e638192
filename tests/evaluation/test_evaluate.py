"""One task on one model: what is scored, what is skipped, what a value is."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest
from flax import nnx

from stacking_jax.data.vocabularies import Bytes
from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.evaluate import evaluate_task, prepare
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.evaluation.results import read_results, rows_path, write_results
from stacking_jax.evaluation.task import EvalTask, Example, Metric
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.training import MeshConfig
from stacking_jax.training.mesh import make_decoding_mesh

SETTINGS = EvaluationConfig()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = DecoderConfig(vocab_size=320, num_layers=1, d_model=16, d_ff=24, num_heads=2)
    graph, state = nnx.split(Decoder(config, key=jax.random.key(1)))
    return LanguageModel(
        graph, nnx.to_pure_dict(state), Bytes(), 64, make_decoding_mesh(MeshConfig())
    )


def first_letter(predictions, examples):
    return [100.0 * one.facts["right"] for one in examples]


def task(examples, **settings) -> EvalTask:
    defaults = {"name": "t", "group": "g", "metrics": (Metric("m", first_letter),)}
    return EvalTask(
        source=lambda split, count, seed: iter(examples), max_new_tokens=4, **defaults | settings
    )


def made(count, right=lambda i: i % 2):
    return [Example(f"{i}:", "x", facts={"right": right(i)}) for i in range(count)]


def test_a_value_is_the_mean_and_the_others_stand_beside_it(model):
    half = Metric("half", lambda predictions, examples: [50.0] * len(predictions))
    one = task(made(40), metrics=(Metric("m", first_letter), half), chance=12.5)
    result = evaluate_task(model, prepare(one, SETTINGS), SETTINGS)
    assert (result.metric, result.value, result.n, result.chance) == ("m", 50.0, 40, 12.5)
    assert result.interval[0] < 50 < result.interval[1]
    assert result.others == {"half": (50.0, (50.0, 50.0))}
    assert [row["scores"]["m"] for row in result.rows] == [0.0, 100.0] * 20
    assert json.loads(json.dumps(result.to_dict()))["others"]["half"]["value"] == 50.0


def test_a_value_that_is_no_mean_has_an_interval_of_its_own(model):
    def spread(predictions, examples):
        share = sum(one.facts["right"] for one in examples) / len(examples)
        return 100 * (share * (1 - share)) ** 0.5

    one = task(made(60, lambda i: i % 3 == 0), metrics=(Metric("m", first_letter, spread),))
    result = evaluate_task(model, prepare(one, SETTINGS), SETTINGS)
    assert result.value == pytest.approx(100 * (2 / 9) ** 0.5)
    assert result.interval[0] < result.value < result.interval[1]


def test_a_limit_takes_the_first_examples_and_none_is_an_error(model):
    few = prepare(task(made(40)), EvaluationConfig(limit=3))
    assert [one.prompt for one in few.examples] == ["0:", "1:", "2:"]
    with pytest.raises(UserError, match="the task t has no validation example"):
        prepare(task([]), SETTINGS)


def test_choices_that_do_not_fit_are_skipped_as_prompts_are(model):
    wide = [Example("a" * 60, "yes", choices=("yes", "no")), Example("b", "no", ("yes", "no"))]
    right = Metric("m", lambda p, e: [100.0 * (a == b.target) for a, b in zip(p, e, strict=True)])
    fits = evaluate_task(
        model, prepare(task(wide, mode="rank", metrics=(right,)), SETTINGS), SETTINGS
    )
    assert (fits.skipped, fits.n) == (0, 2)
    wide[0] = dataclasses.replace(wide[0], prompt="a" * 61)
    over = evaluate_task(
        model, prepare(task(wide, mode="rank", metrics=(right,)), SETTINGS), SETTINGS
    )
    assert (over.skipped, over.n, over.value) == (1, 1, None)
    assert over.rows[0]["skipped"] == "needs 65 tokens, the context has 64"


def test_everything_too_long_is_no_crash(model):
    result = evaluate_task(model, prepare(task([Example("a" * 99, "b")] * 3), SETTINGS), SETTINGS)
    assert (result.n, result.skipped, result.value) == (0, 3, None)
    assert "3 of 3 prompts do not fit" in result.reason


@pytest.mark.parametrize("choices", [(), ("x",), ("y", "z")])
def test_a_ranked_example_needs_choices_with_the_target(model, choices):
    one = task([Example("a", "x", choices)], mode="rank")
    with pytest.raises(UserError, match="the task t ranks choices, but an example has"):
        evaluate_task(model, prepare(one, SETTINGS), SETTINGS)


def test_results_may_lie_in_an_object_store(model, bucket):
    from stacking_jax.evaluation.results import step_folder
    from stacking_jax.paths import open_path
    from stacking_jax.reporting.evaluations import read_evaluations

    folder = step_folder("gs://bucket/run/evaluations", 7)
    for name in ("one", "two/b"):
        result = evaluate_task(model, prepare(task(made(2), name=name), SETTINGS), SETTINGS)
        write_results(folder, [result], SETTINGS)
    assert set(read_results(folder)) == {"one", "two/b"}
    assert {name.rpartition("/step-7/")[2] for name in bucket} == {
        "one.jsonl", "two/b.jsonl", "results.json"
    }
    rows = read_evaluations(open_path("gs://bucket/run"))
    assert [(row["step"], row["task"]) for row in rows] == [(7, "one"), (7, "two/b")]


def test_files_of_odd_names_stay_in_their_folder(model, tmp_path):
    names = ["../up", "a/../../b", "x:y z", ".hidden/t"]
    results = [
        evaluate_task(model, prepare(task(made(2), name=name), SETTINGS), SETTINGS)
        for name in names
    ]
    folder = tmp_path / "step-1"
    write_results(folder, results, SETTINGS)
    assert set(read_results(folder)) == set(names)
    files = [path for path in tmp_path.rglob("*.jsonl")]
    assert len(files) == len(names)
    assert {rows_path(folder, name) for name in names} == set(files)
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in files)
    (folder / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no object of tasks"):
        read_results(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"limit": 0}, "limit is None or a whole number of at least 1"),
        ({"shots": True}, "shots is None or a whole number"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "top_p <= 1"),
        ({"mode": "chat"}, "mode is None, causal, prefix or span"),
        ({"bidirectional_prompts": "yes"}, "bidirectional_prompts is None, True or False"),
    ],
)
def test_settings_out_of_their_range(setting, message):
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**setting)
