from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.data.documents import Document
from stacking_jax.data.splits import (
    CHUNK_CHARACTERS,
    FEW_DOCUMENTS,
    TRAIN,
    VALIDATION,
    assign_splits,
    chunks,
    split_corpus,
)
from stacking_jax.errors import UserError


def assign(texts, held_out):
    sides = {TRAIN: [], VALIDATION: []}
    for split, text in assign_splits(texts, held_out, str.encode):
        sides[split].append(text)
    return sides


@given(st.lists(st.text(), min_size=2), st.floats(0.001, 0.999))
def test_nothing_is_lost_and_the_sides_share_nothing(texts, held_out):
    if len(set(texts)) == 1:
        with pytest.raises(UserError, match="too small"):
            assign(texts, held_out)
        return
    sides = assign(texts, held_out)
    assert sorted(sides[TRAIN] + sides[VALIDATION]) == sorted(texts)
    assert sides[TRAIN] and sides[VALIDATION]
    assert not set(sides[TRAIN]) & set(sides[VALIDATION])


def test_the_share_is_about_what_was_asked_for():
    sides = assign([f"document {i}" for i in range(20_000)], 0.05)
    assert 800 < len(sides[VALIDATION]) < 1200


def test_a_document_stays_where_it_is_when_others_come():
    few = [f"document {i}" for i in range(500)]
    before, after = assign(few, 0.1), assign([f"new {i}" for i in range(500)] + few, 0.1)
    assert set(before[VALIDATION]) == set(after[VALIDATION]) & set(few)


def test_the_order_of_documents_does_not_matter():
    texts = [f"document {i}" for i in range(30)]
    for held_out in (1e-9, 0.1, 1 - 1e-9):
        forth, back = assign(texts, held_out), assign(texts[::-1], held_out)
        assert {k: sorted(v) for k, v in forth.items()} == {k: sorted(v) for k, v in back.items()}


def test_nothing_held_out_leaves_all_for_training():
    assert assign(["same", "same"], 0) == {TRAIN: ["same", "same"], VALIDATION: []}
    pairs, method = split_corpus([Document("a", b"text " * 5000)], 0)
    assert [(split, d.name) for split, d in pairs] == [(TRAIN, "a")]
    assert method == "nothing held out"


@settings(deadline=None)
@given(
    st.lists(st.text("ab\nλ", max_size=40)).map("".join), st.integers(5, 60)
)
def test_chunks_joined_are_the_text(text, characters):
    parts = chunks(Document("d", text.encode()), characters)
    assert b"".join(part.text for part in parts).decode() == text
    assert all(part.text for part in parts)
    assert all(len(part.text.decode()) <= 2 * characters for part in parts)


def test_chunks_end_at_line_ends_where_there_are_any():
    text = "".join(f"line {i}\n" for i in range(10_000))
    parts = chunks(Document("d", text.encode(), source_bytes=7))
    assert len(parts) == -(-len(text) // CHUNK_CHARACTERS)
    assert all(part.text.endswith(b"\n") for part in parts)
    assert all(0.9 < len(part.text) / CHUNK_CHARACTERS < 1.1 for part in parts)
    assert [part.name for part in parts[:2]] == ["d#0", "d#1"]
    assert sum(part.source_bytes for part in parts) == 7


def test_a_text_without_line_ends_is_cut_evenly():
    parts = chunks(Document("d", b"x" * 20_000))
    assert [len(part.text) for part in parts] == [6666, 6667, 6667]


@pytest.mark.parametrize(
    "count, chunked", [(1, True), (FEW_DOCUMENTS - 1, True), (FEW_DOCUMENTS, False)]
)
def test_few_documents_are_chunked(count, chunked):
    documents = [
        Document(str(i), "".join(f"{i} line {n}\n" for n in range(5000)).encode())
        for i in range(count)
    ]
    pairs, method = split_corpus(documents, 0.02)
    pairs = list(pairs)
    assert method.startswith("chunks" if chunked else "documents")
    assert (len(pairs) > count) == chunked
    assert {split for split, _ in pairs} == {TRAIN, VALIDATION}
    assert sum(len(d.text) for _, d in pairs) == sum(len(d.text) for d in documents)


def test_too_little_text_says_how_much_is_needed():
    pairs, _ = split_corpus([Document("a", b"short")], 0.02)
    with pytest.raises(UserError, match="more than 8,000 characters"):
        list(pairs)
    with pytest.raises(UserError, match="empty"):
        split_corpus([], 0.02)
