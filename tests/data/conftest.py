"""What the data tests share: a place for caches, text to read, a trained vocabulary."""

from __future__ import annotations

import json
import random

import pytest

from stacking_jax.data import DataConfig, open_cache
from stacking_jax.data.config import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def cache_place(tmp_path, monkeypatch):
    """Caches without a folder of their own go below the test's folder."""
    place = tmp_path / "cache_root"
    monkeypatch.setenv(CACHE_VARIABLE, str(place))
    return place


def make_text(seed: int, characters: int) -> str:
    """Lines of words drawn from a small vocabulary, not all of them ASCII."""
    words = "the stack grows döwn 層 def return λ x = 1 ( ) : block copies".split()
    chosen = random.Random(seed)
    lines, size = [], 0
    while size < characters:
        line = " ".join(chosen.choices(words, k=chosen.randint(1, 12)))
        lines.append(line)
        size += len(line) + 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def many_texts(tmp_path_factory):
    """A folder of 80 documents: text files, JSONL and nested folders."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "inner").mkdir()
    for i in range(50):
        place = folder / "inner" if i % 3 else folder
        (place / f"{i:02d}.txt").write_text(make_text(i, 40 * i + 1), encoding="utf-8")
    rows = (json.dumps({"text": make_text(100 + i, 700), "source": "made"}) for i in range(30))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_cache(many_texts, tmp_path_factory):
    """A finished cache of `many_texts` with records of 64 tokens, a fifth held out."""
    folder = tmp_path_factory.mktemp("cache") / "small"
    return open_cache(
        DataConfig(
            text_dir=str(many_texts), sequence_length=64, held_out=0.2, cache_dir=str(folder)
        )
    )


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """A small SentencePiece model with T5's special ids, trained here."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text(7, 40_000).splitlines()),
        model_prefix=str(prefix),
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
