"""The model of a run answers alike on any devices: scores, texts, and where they are computed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.generation import generate_texts
from stacking_jax.evaluation.model import LanguageModel, RunModels
from stacking_jax.evaluation.scoring import likelihoods
from stacking_jax.models.decoding import pad_prompts, prefill
from stacking_jax.training import MeshConfig
from stacking_jax.training.mesh import make_decoding_mesh

# Of like lengths, so that they share compiled programs.
PROMPTS = ["abc ", "", "hij gfe dcb ", "j"]
CHOICES = [["a", "bcd"], ["h", "hh"], ["abc", "cb"], ["a", "b"]]
MESHES = [
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, sequence=2, tensor=2, rules={"embed": ("fsdp", "sequence")}),
]


def load(run_dir, config: MeshConfig, devices: int) -> LanguageModel:
    run = RunModels(run_dir)
    run.mesh = make_decoding_mesh(config, jax.devices()[:devices])
    return run.load(4)


def answers(model: LanguageModel):
    scores = likelihoods(model, PROMPTS, CHOICES, stop=("\n",))
    settings = EvaluationConfig(temperature=1.0, top_k=8, seed=3)
    splits = [model.split(prompt, "") for prompt in PROMPTS]
    texts = generate_texts(model, splits, max_new_tokens=12, settings=settings)
    return [choice.log_probability for row in scores for choice in row], texts


@pytest.fixture(scope="module")
def on_one(run_dir):
    return answers(load(run_dir, MeshConfig(), 1))


@pytest.mark.parametrize("config", MESHES, ids=["data_fsdp_tensor", "fsdp_sequence_tensor"])
def test_eight_devices_answer_as_one_does(config, run_dir, on_one):
    model = load(run_dir, config, 8)
    scores, texts = answers(model)
    np.testing.assert_allclose(scores, on_one[0], rtol=1e-5)
    assert texts == on_one[1] and len(set(texts)) == len(texts)


def test_what_splits_the_length_in_training_splits_rows_here(run_dir):
    model = load(run_dir, MeshConfig(fsdp=2, sequence=2, tensor=2), 8)
    assert model.parts == 4 and model.local_rows(8) == tuple(range(8))
    inputs, lengths = pad_prompts([[1, 2, 3]] * 8)
    cache = prefill(
        model.graph, model.params, model.place(inputs), model.place(lengths), capacity=96,
        constrain=model.constrain,
    )
    # Layers, rows, key heads, slots, width: a device holds 2 rows of 8 and one head of 2.
    assert cache["key"].shape == (2, 8, 2, 96, 16)
    assert cache["key"].sharding.shard_shape(cache["key"].shape) == (2, 2, 1, 96, 16)
