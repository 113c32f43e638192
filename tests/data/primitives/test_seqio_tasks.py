"""Primitives as registered seqio Tasks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stacking_jax.data import primitives
from stacking_jax.data.primitives.seqio_tasks import exact_match, psm_calc
from stacking_jax.data.tasks import import_seqio
from stacking_jax.data.tasks import register as register_corpus
from stacking_jax.data.vocabularies import load_tokenizer
from stacking_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
DEPTH_1 = "variable_assignment/code/depth_1/range_3_30/5_shot"


@pytest.fixture(scope="module")
def seqio():
    return import_seqio()


def rows(seqio, name, split, count):
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset(None, split, shuffle=False, use_cached=False)
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    """A SentencePiece model that keeps newlines, and merges over the boundary of prompts."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "lossless"
    made = primitives.examples(primitives.find("arithmetic"), "train", 200)
    texts = [one.prompt + one.target for one in made]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=330,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, byte_fallback=True, user_defined_symbols=["\n"],
        split_by_unicode_script=False, split_by_number=False, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )
    return str(prefix.with_suffix(".model"))


def test_a_task_gives_the_examples_of_the_generator(seqio):
    name = primitives.register(DEPTH_1, train_examples=7, validation_examples=5, seed=3)
    assert name == "variable_assignment_code_depth_1_range_3_30_5_shot"
    primitive = primitives.find("variable_assignment/code/depth_1/range_3_30")
    tokenizer = load_tokenizer("bytes")
    for split, count in (("train", 7), ("validation", 5)):
        there = rows(seqio, name, split, 100)
        expected = list(primitives.examples(primitive, split, count, shots=5, seed=3))
        assert len(there) == count
        for row, example in zip(there, expected, strict=True):
            assert row["inputs_pretokenized"].decode() == example.prompt
            assert row["targets_pretokenized"].decode() == example.target
            assert row["inputs"].tolist() == tokenizer.encode(example.prompt)
            assert row["targets"].tolist() == [*tokenizer.encode(example.target), 1]
    # Registered once: the same settings give the same task, others need a name of their own.
    assert primitives.register(DEPTH_1, train_examples=7, validation_examples=5, seed=3) == name
    with pytest.raises(UserError, match="name of its own"):
        primitives.register(DEPTH_1, train_examples=8, validation_examples=5, seed=3)
    other = primitives.register(DEPTH_1, task="mine", train_examples=2)
    assert other == "mine" and len(rows(seqio, "mine", "train", 9)) == 2


def test_the_training_split_need_not_end(seqio):
    name = primitives.register("arithmetic", train_examples=None, task="endless")
    assert len(rows(seqio, name, "train", 2500)) == 2500
    assert len(rows(seqio, name, "validation", 2500)) == 1000


def test_prompt_and_target_are_one_text_to_the_vocabulary(seqio, lossless):
    """A token across the boundary belongs to the target."""
    name = primitives.register("arithmetic", vocabulary=lossless, extra_ids=4, task="merging")
    tokenizer = load_tokenizer(lossless, 4)
    vocabulary = seqio.get_mixture_or_task(name).output_features["targets"].vocabulary
    straddling = 0
    for row in rows(seqio, name, "validation", 50):
        text = row["inputs_pretokenized"].decode() + row["targets_pretokenized"].decode()
        ids = [*row["inputs"], *row["targets"][:-1]]
        assert ids == tokenizer.encode(text) == vocabulary.encode(text)
        assert vocabulary.decode(np.array(ids)) == text
        prompt = tokenizer.decode(row["inputs"])
        assert row["inputs_pretokenized"].decode().startswith(prompt)
        straddling += prompt != row["inputs_pretokenized"].decode()
    assert straddling


def test_a_vocabulary_that_deletes_newlines_is_refused_unless_allowed(
    seqio, sentencepiece_model, capsys
):
    with pytest.raises(UserError, match="does not survive the vocabulary") as caught:
        primitives.register("copying/real_words", vocabulary=str(sentencepiece_model))
    assert "\n" not in str(caught.value) and "allow_lossy" in str(caught.value)
    name = primitives.register(
        "copying/real_words", vocabulary=str(sentencepiece_model), allow_lossy=True, task="lossy"
    )
    assert "does not survive" in capsys.readouterr().err
    assert len(rows(seqio, name, "train", 3)) == 3


def test_metrics_through_seqio(seqio):
    name = primitives.register("preschool_math/0_shot")
    task = seqio.get_mixture_or_task(name)
    targets = ["-1+8=7", "-2-3=-5", "-4+4=0", "-5+1=-4"]
    said = ["-1+8=7", "-2-3=-6", " -4+4=0\n", "-5-1=-4"]
    scores = {}
    for metric in task.metric_fns:
        scores |= metric(targets, said)
    assert scores == {"exact_match": 50.0, "psm_calc": 75.0}
    json.dumps(scores)
    assert exact_match(targets, targets) == {"exact_match": 100.0}
    assert psm_calc(targets, ["" for _ in targets]) == {"psm_calc": 0.0}


def test_what_cannot_be_registered():
    register_corpus()
    with pytest.raises(UserError, match="there is no primitive"):
        primitives.register("copyng/real_words")
    with pytest.raises(UserError, match="train_examples is at least 1"):
        primitives.register("arithmetic", train_examples=0)
    with pytest.raises(UserError, match="another seqio task"):
        primitives.register("arithmetic", task="python_stdlib")


@pytest.mark.slow
def test_importing_a_module_registers_the_standard_ones():
    """In a process of its own: registering here would be seen by the other tests."""
    program = (
        "import seqio\n"
        "from stacking_jax.data.primitives import registered\n"
        "assert set(registered.NAMES) <= set(seqio.TaskRegistry.names())\n"
        "assert 'variable_assignment_code_depth_2_5_shot' in registered.NAMES\n"
        "row = next(seqio.get_mixture_or_task('p_hop_p_16_0_shot').get_dataset(\n"
        "    None, 'validation', shuffle=False).as_numpy_iterator())\n"
        "assert len(row['inputs']) == 258 and len(row['targets']) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
