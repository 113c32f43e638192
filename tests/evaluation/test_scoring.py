"""Likelihoods of choices against plain forward passes, one per choice."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.data.vocabularies import Bytes, SentencePiece
from stacking_jax.errors import UserError
from stacking_jax.evaluation.model import LanguageModel
from stacking_jax.evaluation.scoring import Likelihood, likelihoods, tokens_needed
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.training import MeshConfig
from stacking_jax.training.mesh import make_decoding_mesh

PROMPTS = ["one", "", "a much longer prompt " * 5, "Answer:", "x"]
CHOICES = [["1", "17"], ["a", "bcdef"], ["yes", "no"], ["1", "2", "333"], ["é", "zz"]]


@pytest.fixture(scope="module", params=[False, True], ids=["causal", "bidirectional"])
def model(request) -> LanguageModel:
    config = DecoderConfig(
        vocab_size=320, num_layers=2, d_model=16, d_ff=24, num_heads=2,
        bidirectional_prompts=request.param,
    )  # fmt: skip
    graph, state = nnx.split(Decoder(config, key=jax.random.key(3)))
    params = nnx.to_pure_dict(state)
    return LanguageModel(graph, params, Bytes(), 256, make_decoding_mesh(MeshConfig()))


def by_full_pass(model, prompt, choice, ends=()):
    parts = model.split(prompt, choice)
    ids = [*parts.prompt_ids, *parts.target_ids]
    tokens = np.zeros((1, 160), np.int32)
    tokens[0, 1 : len(ids) + 1] = ids
    begun = len(parts.prompt_ids)
    options = {}
    if model.graph and nnx.merge(model.graph, model.params).config.bidirectional_prompts:
        options["bidirectional"] = jnp.asarray(np.arange(160)[None] <= begun) & (begun > 0)
    logits = forward(model.graph, model.params, jnp.asarray(tokens), options)
    logs = np.asarray(jax.nn.log_softmax(logits[0]))
    total = sum(logs[place, token] for place, token in enumerate(ids) if place >= begun)
    if ends:
        total += np.log(sum(np.exp(logs[len(ids), end]) for end in ends))
    return total


def forward(graph, params, tokens, options):
    return jax.jit(lambda params: nnx.merge(graph, params)(tokens, **options))(params)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 100], ids=["together", "small batches"])
def test_likelihoods_equal_full_passes(model, budget):
    found = likelihoods(model, PROMPTS, CHOICES, tokens_per_batch=budget)
    for prompt, choices, likely in zip(PROMPTS, CHOICES, found, strict=True):
        for choice, one in zip(choices, likely, strict=True):
            assert one.log_probability == pytest.approx(
                by_full_pass(model, prompt, choice), abs=1e-4
            )
            assert one.tokens == one.bytes == len(choice.encode())


def test_the_end_of_an_answer_counts_where_it_is_asked_for(model):
    newline = Bytes().encode("\n")[0]
    found = likelihoods(model, PROMPTS[:1], CHOICES[:1], stop=("\n",))[0]
    for choice, one in zip(CHOICES[0], found, strict=True):
        want = by_full_pass(model, PROMPTS[0], choice, ends=(newline, 1))
        assert one.log_probability == pytest.approx(want, abs=1e-4)


def test_normalisations():
    one = Likelihood(-6.0, tokens=2, bytes=3)
    assert [one.by(name) for name in ("sum", "token", "byte")] == [-6.0, -3.0, -2.0]
    with pytest.raises(UserError, match="sum, token, byte; got 'word'"):
        one.by("word")


def test_what_does_not_fit_is_refused_and_progress_is_told(model):
    assert tokens_needed(model, "a" * 200, ["b", "c" * 55]) == 256
    done = []
    likelihoods(model, ["a" * 200], [["b", "c" * 55]], advance=done.append)
    assert sum(done) == 1
    with pytest.raises(UserError, match="257 tokens, which do not fit into a context of 256"):
        likelihoods(model, ["a" * 200], [["b", "c" * 56]])
    with pytest.raises(UserError, match="the choice '' has no token"):
        likelihoods(model, ["a"], [["", "b"]])


def test_choices_that_merge_with_the_prompt_run_apart(model):
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab abc abcd a b c d"] * 50), model_writer=written, vocab_size=12,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    merging = LanguageModel(
        model.graph, model.params, SentencePiece(written.getvalue()), 64, model.mesh
    )
    prompts, choices = ["a"], [["bc", " b", "d"]]
    starts = {tuple(merging.split("a", choice).prompt_ids) for choice in choices[0]}
    assert len(starts) > 1, "no choice merges with the prompt: the test says nothing"
    (found,) = likelihoods(merging, prompts, choices)
    for choice, one in zip(choices[0], found, strict=True):
        want = by_full_pass(merging, "a", choice)
        assert one.log_probability == pytest.approx(want, abs=1e-4)
