"""A cache of labels made by hand: record i belongs to record i, wherever a batch puts it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stacking_jax.data import PackedBatches
from stacking_jax.data.manifest import Shard
from stacking_jax.data.split_writer import file_sha256, open_shard
from stacking_jax.data.taught_batches import TaughtBatches
from stacking_jax.data.teacher_cache import (
    IDS_KEY,
    LOG_PROBS_KEY,
    PassInfo,
    TeacherManifest,
    decode_labels,
    encode_labels,
    open_teacher_cache,
    shards_of,
)
from stacking_jax.data.teacher_scores import chosen_records
from stacking_jax.errors import UserError

K = 2


def by_hand(cache, folder, **changes):
    """Labels whose ids tell record and token: token t of record i has (i, t) and −i − t/100."""
    folder.mkdir()
    info, name = cache.manifest.splits["train"], cache.name
    data = PackedBatches(cache, "train", batch_size=1, shuffle=False)
    shards, scores = [], np.arange(info.records, dtype=np.float32) % 7
    for part, records in enumerate(np.array_split(np.arange(info.records), 2)):
        path = folder / f"{part}.array_record"
        writer = open_shard(path)
        for record in records:
            real = int((data.batch(int(record))["segment_ids"] > 0).sum())
            at = np.arange(real)
            ids = np.stack([np.full(real, record % 200), at], axis=-1)
            log_probs = -(record + at[:, None] / 100 + np.zeros(K + 1))
            writer.write(encode_labels(ids, log_probs, 259, "float32"))
        writer.close()
        shards.append(Shard(path.name, len(records), path.stat().st_size, file_sha256(path)))
    np.save(folder / "scores.npy", scores)
    fields = dict(
        teacher={"source": "by hand"}, vocabulary=cache.manifest.vocabulary.digest,
        vocab_size=259, sequence_length=64, top_k=K, dtype="float32", select_k=10,
        forward_flops=1.0, training_flops=None,
        passes=(
            PassInfo(
                name, 0, info.records, info.digest, tuple(shards), "scores.npy",
                file_sha256(folder / "scores.npy"),
            ),
        ),
    )
    TeacherManifest(**fields | changes).save(folder)
    return open_teacher_cache(folder)


@pytest.fixture(scope="module")
def labels(small_cache, tmp_path_factory):
    return by_hand(small_cache, tmp_path_factory.mktemp("labels") / "made")


@pytest.fixture(scope="module")
def taught(small_cache, labels):
    return TaughtBatches(small_cache, labels, batch_size=8, seed=3)


def test_records_keep_what_was_written(labels):
    dice = np.random.default_rng(0)
    ids, log_probs = dice.integers(0, 259, (5, K)), dice.normal(size=(5, K + 1))
    for dtype, rtol in (("float32", 1e-7), ("float16", 1e-3)):
        manifest = dataclasses.replace(labels.manifest, dtype=dtype)
        found = decode_labels(encode_labels(ids, log_probs, 259, dtype), manifest)
        np.testing.assert_array_equal(found[0], ids)
        np.testing.assert_allclose(found[1], log_probs, rtol=rtol)


def test_the_plain_part_of_a_batch_is_that_of_every_other_run(small_cache, taught):
    plain = PackedBatches(small_cache, "train", batch_size=8, seed=3)
    for step in (0, 5, 400):
        batch, want = taught.batch(step), plain.batch(step)
        assert {*batch} == {*want, IDS_KEY, LOG_PROBS_KEY}
        for name, array in want.items():
            np.testing.assert_array_equal(batch[name], array)


def test_every_row_has_the_labels_of_its_record(taught):
    step = 400  # In a later pass over the records.
    batch = taught.batch(step)
    assert batch[IDS_KEY].shape == (8, 64, K) and batch[LOG_PROBS_KEY].shape == (8, 64, K + 1)
    assert batch[IDS_KEY].dtype == np.int32 and batch[LOG_PROBS_KEY].dtype == np.float32
    for row in range(8):
        _, number, record = taught.place_of(step, row)
        real = int((batch["segment_ids"][row] > 0).sum())
        assert number == 0 and real > 0
        assert (batch[IDS_KEY][row, :real, 0] == record % 200).all()
        np.testing.assert_array_equal(batch[IDS_KEY][row, :real, 1], np.arange(real))
        np.testing.assert_allclose(
            batch[LOG_PROBS_KEY][row, :real, 2], -(record + np.arange(real) / 100), rtol=1e-6
        )
        assert not batch[IDS_KEY][row, real:].any()


def test_the_rows_of_all_hosts_are_the_batch(taught):
    whole = taught.batch(2)
    parts = [taught.batch(2, rows) for rows in ([0, 3], [1, 2], slice(4, 8))]
    for name, array in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined, array[[0, 3, 1, 2, 4, 5, 6, 7]])


@pytest.mark.parametrize("by", ["score", "random"])
def test_only_chosen_records_are_read(small_cache, labels, by):
    records = small_cache.num_records("train")
    few = TaughtBatches(
        small_cache, labels, batch_size=1, seed=3, select=0.25, select_by=by
    )
    name = small_cache.name
    kept = chosen_records(labels.scores(name, 0), 0.25, by, 3, f"{name} 0")
    read = [few.place_of(step, 0)[2] for step in range(len(kept))]
    # All of them once, then all of them again in another order.
    assert sorted(read) == kept.tolist() and read != kept.tolist()
    again = [few.place_of(len(kept) + step, 0)[2] for step in range(len(kept))]
    assert sorted(again) == sorted(read) and again != read
    if by == "score":
        assert set(kept) <= {i for i in range(records) if i % 7 in (5, 6)}


def test_labels_of_other_records_are_refused(small_cache, labels, tmp_path):
    info = dataclasses.replace(labels.manifest.passes[0], data_digest="0" * 64)
    for change, words in (
        ({"passes": (info,)}, "belong to other records"),
        ({"vocabulary": "0" * 64}, "another vocabulary"),
    ):
        other = dataclasses.replace(
            labels, manifest=dataclasses.replace(labels.manifest, digest="", **change)
        )
        with pytest.raises(UserError, match=words):
            TaughtBatches(small_cache, other, batch_size=8, seed=0)
    with pytest.raises(UserError, match="no labels of a teacher"):
        open_teacher_cache(tmp_path)
    with pytest.raises(UserError, match="holds no labels of .*, pass 3"):
        labels.check_pass(small_cache.name, 3)


def test_damage_is_found(small_cache, tmp_path):
    made = by_hand(small_cache, tmp_path / "made")
    made.verify()
    shard = tmp_path / "made" / "1.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="1.array_record is damaged"):
        open_teacher_cache(tmp_path / "made").verify()
    shard.write_bytes(content[:-3])
    with pytest.raises(UserError, match="missing or cut short"):
        open_teacher_cache(tmp_path / "made")
    manifest = tmp_path / "made" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"top_k": 2', '"top_k": 3'))
    with pytest.raises(UserError, match="its digest does not fit"):
        open_teacher_cache(tmp_path / "made")


@pytest.mark.parametrize(("records", "size"), [(1, 10), (10, 2**26), (10, 2**27), (100, 2**23)])
def test_shards_share_all_records_in_order(records, size):
    parts = shards_of(records, size)
    assert [record for part in parts for record in part] == list(range(records))
    assert all(len(part) * size <= 2**26 or len(part) == 1 for part in parts)
