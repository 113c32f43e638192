from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.data.packing import best_fit, cut, pack


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 20))
def test_unpacking_gives_back_every_token_of_every_document(lengths, capacity):
    records = pack(lengths, capacity)
    found = [np.zeros(length, int) for length in lengths]
    for record in records:
        assert 1 <= sum(len(piece) for piece in record) <= capacity
        for piece in record:
            found[piece.document][piece.start : piece.stop] += 1
    assert all((tokens == 1).all() for tokens in found)
    assert records == pack(lengths, capacity)


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 20))
def test_only_documents_longer_than_a_record_are_cut(lengths, capacity):
    pieces = cut(lengths, capacity)
    for document, length in enumerate(lengths):
        sizes = [len(piece) for piece in pieces if piece.document == document]
        assert sizes == [capacity] * (length // capacity) + [length % capacity] * (
            length % capacity > 0
        )


def fullest_first(sizes, capacity):
    """Best-fit decreasing as it is defined, with a search through all bins."""
    rooms, bins = [], []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [b for b, room in enumerate(rooms) if room >= sizes[item]]
        if not fitting:
            rooms.append(capacity)
            bins.append([])
            fitting = [len(bins) - 1]
        # Of equally full ones, the bin that came to this room last.
        chosen = min(fitting, key=lambda b: rooms[b])
        rooms[chosen] -= sizes[item]
        bins[chosen].append(item)
    return sorted(rooms), len(bins)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 24), max_size=60))
def test_best_fit_is_best_fit(sizes):
    bins = best_fit(sizes, 24)
    rooms = sorted(24 - sum(sizes[i] for i in items) for items in bins)
    assert (rooms, len(bins)) == fullest_first(sizes, 24)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))


def test_rests_of_long_documents_waste_next_to_nothing():
    lengths = np.random.default_rng(0).integers(1, 3000, 5000)
    records = pack(lengths, 512)
    assert lengths.sum() / (len(records) * 512) > 0.995


def test_an_item_that_fits_no_bin_is_refused():
    for sizes in ([5, 9], [0, 3]):
        with pytest.raises(ValueError, match="1 to 8 tokens"):
            best_fit(sizes, 8)


def test_no_documents_make_no_records():
    assert pack([], 8) == [] and pack([0, 0], 8) == []
