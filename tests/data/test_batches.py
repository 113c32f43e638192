from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.data import DataConfig, PackedBatches, open_cache
from stacking_jax.errors import UserError

NAMES = ("tokens", "segment_ids", "positions")


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in NAMES)


def lines(batch):
    """Rows of a batch as hashable values, padding rows left out."""
    return [
        tuple(row) for row, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
        if segments.any()
    ]


@pytest.fixture(scope="module")
def train(small_cache):
    return PackedBatches(small_cache, "train", batch_size=8, seed=3)


def test_a_batch_depends_on_seed_and_step_alone(small_cache, train):
    again = PackedBatches(small_cache, "train", batch_size=8, seed=3)
    for step in (10_000, 0, 7, 10**9):
        assert same(train.batch(step), again.batch(step))
    other = PackedBatches(small_cache, "train", batch_size=8, seed=4)
    assert not same(train.batch(0), other.batch(0))


def test_a_batch_is_whole(train):
    batch = train.batch(0)
    for name in NAMES:
        assert batch[name].shape == (8, 64) and batch[name].dtype == np.int32
    real = batch["segment_ids"] > 0
    assert (batch["tokens"][real] > 0).all()
    assert not batch["tokens"][~real].any() and not batch["positions"][~real].any()


@settings(deadline=None)
@given(step=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 8), max_size=4))
def test_the_rows_of_all_hosts_are_the_global_batch(train, step, cuts):
    whole = train.batch(step)
    bounds = [0, *sorted(cuts), 8]
    parts = [train.batch(step, slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in NAMES}
    assert same(joined, whole)
    interleaved = [train.batch(step, slice(host, None, 2)) for host in range(2)]
    for host, part in enumerate(interleaved):
        assert same(part, {name: whole[name][host::2] for name in NAMES})


def test_each_pass_reads_every_record_once_and_in_its_own_order(small_cache):
    data = PackedBatches(small_cache, "train", batch_size=1, seed=3)
    n = data.num_records
    assert n == small_cache.manifest.splits["train"].records == data.num_batches
    in_order = PackedBatches(small_cache, "train", batch_size=1, shuffle=False)
    everything = sorted(row for _, batch in in_order.iterate() for row in lines(batch))
    passes = [[lines(data.batch(e * n + i))[0] for i in range(n)] for e in range(2)]
    assert [sorted(rows) for rows in passes] == [everything] * 2
    assert passes[0] != passes[1]


def test_neighbouring_seeds_do_not_replay_each_other(small_cache):
    first, second = (
        PackedBatches(small_cache, "train", batch_size=1, seed=seed) for seed in (0, 1)
    )
    n = first.num_records
    late = [lines(first.batch(n + i)) for i in range(n)]
    assert late != [lines(second.batch(i)) for i in range(n)]


def test_the_seed_of_the_configuration_is_the_default(many_texts):
    config = DataConfig(text_dir=str(many_texts), sequence_length=64, shuffle_seed=5)
    cache = open_cache(config)
    assert same(
        PackedBatches(cache, batch_size=8).batch(2),
        PackedBatches(cache, batch_size=8, seed=5).batch(2),
    )


@pytest.mark.parametrize("batch_size", [1, 7, 100_000])
def test_a_pass_in_order_is_filled_up_and_complete(small_cache, batch_size):
    batch_size = min(batch_size, small_cache.num_records("validation") + 5)
    data = PackedBatches(small_cache, "validation", batch_size=batch_size, shuffle=False)
    n = small_cache.num_records("validation")
    assert data.num_batches == -(-n // batch_size)
    batches = dict(data.iterate())
    assert list(batches) == list(range(data.num_batches))
    real_rows = sum(batch["segment_ids"].any(1).sum() for batch in batches.values())
    real_tokens = sum((batch["segment_ids"] > 0).sum() for batch in batches.values())
    assert real_rows == n
    assert real_tokens == small_cache.manifest.splits["validation"].tokens
    assert all(batch["tokens"].shape == (batch_size, 64) for batch in batches.values())
    last = data.num_batches - 1
    filled = n - last * batch_size
    assert not batches[last]["segment_ids"][filled:].any()
    halves = [data.batch(last, slice(0, 1)), data.batch(last, slice(1, None))]
    joined = {name: np.concatenate([half[name] for half in halves]) for name in NAMES}
    assert same(joined, batches[last])
    with pytest.raises(IndexError, match="has .* batches"):
        data.batch(data.num_batches)


def test_iterating_is_asking_for_each_step(train):
    steps = train.iterate(5, rows=slice(2, 6))
    for expected in range(5, 40):
        step, batch = next(steps)
        assert step == expected
        assert same(batch, train.batch(step, slice(2, 6)))


@pytest.mark.parametrize("placed", [0, 1, 3])
def test_placing_batches_ahead_changes_no_order(train, placed):
    threads = set()

    def place(batch):
        threads.add(threading.get_ident())
        return int(batch["tokens"].sum())

    steps = train.iterate(5, slice(2, 6), place=place, placed=placed)
    for expected in range(5, 15):
        step, batch, put = next(steps)
        want = train.batch(expected, slice(2, 6))
        assert (step, put) == (expected, want["tokens"].sum()) and same(batch, want)
    steps.close()
    assert len(threads) == 1 and (threading.get_ident() in threads) == (placed == 0)


def test_what_goes_wrong_in_placing_is_heard_of(train):
    steps = train.iterate(0, place=lambda batch: batch["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        next(steps)


def test_a_pass_in_order_can_start_late_and_ends(small_cache):
    data = PackedBatches(small_cache, "validation", batch_size=7, shuffle=False)
    last = data.num_batches - 1
    assert [step for step, _ in data.iterate(last)] == [last]
    assert list(data.iterate(data.num_batches)) == []


def test_documents_come_out_as_they_went_in(small_cache, many_texts):
    """Segments that do not fill a record are whole documents or the ends of long ones."""
    text = (many_texts / "00.txt").read_text(encoding="utf-8")
    data = PackedBatches(small_cache, "train", batch_size=32, shuffle=False)
    validation = PackedBatches(small_cache, "validation", batch_size=32, shuffle=False)
    decode = small_cache.tokenizer().decode
    found = set()
    for batches in (data, validation):
        for _, batch in batches.iterate():
            for tokens, segments, positions in zip(*(batch[name] for name in NAMES), strict=True):
                for segment in range(1, segments.max(initial=0) + 1):
                    chosen = segments == segment
                    assert positions[chosen].tolist() == list(range(chosen.sum()))
                    found.add(decode(tokens[chosen]))
    assert text in found


def test_nothing_to_read_is_refused(many_texts, small_cache):
    with pytest.raises(UserError, match="no 'test' records"):
        PackedBatches(small_cache, "test", batch_size=8)
    with pytest.raises(UserError, match="batch_size is 0"):
        PackedBatches(small_cache, "train", batch_size=0)
    everything = open_cache(DataConfig(text_dir=str(many_texts), held_out=0))
    with pytest.raises(UserError, match="no 'validation' records.*held_out above 0"):
        PackedBatches(everything, "validation", batch_size=8)


def test_negative_steps_are_refused(train):
    with pytest.raises(IndexError, match="count from 0"):
        train.batch(-1)


def test_a_split_of_one_record_is_repeated(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("first")
    (texts / "b.txt").write_text("second")
    cache = open_cache(DataConfig(text_dir=str(texts), sequence_length=16))
    data = PackedBatches(cache, "train", batch_size=3)
    assert data.num_records == 1
    assert len(set(lines(data.batch(12)))) == 1 and len(lines(data.batch(12))) == 3
