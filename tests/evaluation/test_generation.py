"""Continuations of many prompts against one at a time."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from flax import nnx

from stacking_jax.data.vocabularies import Bytes
from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.generation import generate_texts
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.models.decoding import generate
from stacking_jax.training import MeshConfig
from stacking_jax.training.mesh import make_decoding_mesh

CODEC = Bytes()
PROMPTS = ["a", "", "some longer prompt " * 5, "Answer:", "q" * 70]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    # So few ids that all of them are printable text: every continuation can be compared.
    config = DecoderConfig(vocab_size=120, num_layers=2, d_model=16, d_ff=24, num_heads=2)
    graph, state = nnx.split(Decoder(config, key=jax.random.key(5)))
    return LanguageModel(
        graph, nnx.to_pure_dict(state), CODEC, 256, make_decoding_mesh(MeshConfig())
    )


def parts(model, prompts=PROMPTS):
    return [model.split(prompt, "") for prompt in prompts]


def alone(model, prompt, count):
    """The greedy text of one prompt, by itself."""
    (ids,) = generate(
        model.graph, model.params, [CODEC.encode(prompt)], max_new_tokens=count, temperature=0.0,
        eos_id=CODEC.eos_id,
    )  # fmt: skip
    return CODEC.decode([*CODEC.encode(prompt), *ids])[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 70], ids=["together", "small batches"])
def test_greedy_texts_equal_those_of_each_prompt_alone(model, budget):
    settings = EvaluationConfig(tokens_per_batch=budget)
    told = []
    texts = generate_texts(
        model, parts(model), max_new_tokens=40, settings=settings, advance=told.append
    )
    assert texts == [alone(model, prompt, 40) for prompt in PROMPTS]
    assert sum(told) == len(PROMPTS)
    assert len(set(texts)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 3])
def test_texts_end_before_a_stop_of_any_length(model, width):
    whole = [alone(model, prompt, 100) for prompt in PROMPTS]
    # A text that stands early in one continuation, over as many tokens.
    stop = next(text[5 : 5 + width] for text in whole if len(text) > 10)
    texts = generate_texts(model, parts(model), max_new_tokens=100, stop=(stop,))
    assert texts == [text.split(stop)[0] for text in whole]
    assert texts != whole


def test_what_is_drawn_does_not_depend_on_the_others(model):
    settings = EvaluationConfig(temperature=1.0, top_k=20, top_p=0.9, seed=4)
    whole = generate_texts(model, parts(model), max_new_tokens=20, settings=settings)
    again = generate_texts(
        model, parts(model), max_new_tokens=20,
        settings=dataclasses.replace(settings, tokens_per_batch=64),
    )  # fmt: skip
    assert whole == again
    other = generate_texts(
        model, parts(model), max_new_tokens=20, settings=dataclasses.replace(settings, seed=5)
    )
    assert other != whole
    # The same prompt twice is two draws.
    twice = generate_texts(
        model, parts(model, ["same"] * 2), max_new_tokens=20, settings=settings
    )
    assert twice[0] != twice[1]


def test_no_room_is_an_error_and_not_a_cut(model):
    long = parts(model, ["x" * 250])
    with pytest.raises(UserError, match="250 tokens and 7 new ones do not fit into a context of"):
        generate_texts(model, long, max_new_tokens=7)
    assert generate_texts(model, long, max_new_tokens=6)


def test_a_model_that_is_not_finite_is_refused(model):
    broken = dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf * float("nan"), model.params)
    )
    with pytest.raises(UserError, match="logits are not numbers"):
        generate_texts(broken, parts(model), max_new_tokens=3)
