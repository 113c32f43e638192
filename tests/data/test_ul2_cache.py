"""UL2 on disk: passes, splits, prompts in the records."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from stacking_jax.data import (
    DataConfig,
    PackedBatches,
    UL2Config,
    load_cache,
    mode_ids,
    open_cache,
)
from stacking_jax.data.records import decode_record, token_dtype
from stacking_jax.errors import UserError


@pytest.fixture
def config(many_texts, tmp_path):
    return DataConfig(
        text_dir=str(many_texts), sequence_length=96, held_out=0.2, extra_ids=60,
        objective="ul2", cache_dir=str(tmp_path / "ul2"),
    )


def records(cache, split="train"):
    reader = cache.reader(split)
    return list(reader.read(range(len(reader))))


def spans_of(cache):
    """The long chunks under span corruption, as they are stored."""
    dtype = token_dtype(cache.manifest.vocab_size)
    mode = mode_ids(cache.manifest.vocabulary)["span"]
    found = set()
    for record in records(cache):
        tokens, lengths, _ = decode_record(record, dtype)
        for segment in np.split(tokens, np.cumsum(lengths)[:-1]):
            if segment[0] == mode and len(segment) > 60:
                found.add(segment.tobytes())
    return found


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"
    }


def test_the_shares_count_chunk_tokens_and_loss_is_reported(config):
    manifest = open_cache(config).manifest
    plain = open_cache(
        dataclasses.replace(config, objective="causal", cache_dir=None)
    ).manifest
    info = manifest.splits["train"]
    total = sum(counts["chunk_tokens"] for counts in info.objectives.values())
    assert total == plain.splits["train"].tokens  # every token is in one chunk
    assert info.documents == plain.splits["train"].documents
    for name, share in config.ul2.shares.items():
        assert abs(info.objectives[name]["chunk_tokens"] / total - share) < 0.005
    assert sum(c["loss_tokens"] for c in info.objectives.values()) == info.loss_tokens
    assert sum(c["tokens"] for c in info.objectives.values()) == info.tokens
    causal, span = info.objectives["causal"], info.objectives["span"]
    assert causal["loss_tokens"] == causal["chunk_tokens"]
    assert span["loss_tokens"] < 0.3 * span["chunk_tokens"]


def test_validation_is_there_under_each_objective_whole(config):
    manifest = open_cache(config).manifest
    assert set(manifest.splits) == {
        "train", "validation", "validation_prefix", "validation_span"
    }
    plain = open_cache(
        dataclasses.replace(config, objective="causal", cache_dir=None)
    ).manifest.splits["validation"]
    causal = manifest.splits["validation"]
    assert set(causal.objectives) == {"causal"}
    assert causal.loss_tokens == plain.tokens and causal.text_bytes == plain.text_bytes
    for name in ("prefix", "span"):
        objectives = manifest.splits[f"validation_{name}"].objectives
        assert sum(c["chunk_tokens"] for c in objectives.values()) == plain.tokens
        assert objectives[name]["chunk_tokens"] > 0.99 * plain.tokens


def test_each_pass_is_corrupted_its_own_way_whenever_it_is_made(config, tmp_path):
    cache = open_cache(config)
    passes = [cache.train_pass(number) for number in range(3)]
    assert passes[0] is cache
    stored = [records(one) for one in passes]
    assert len({tuple(rows) for rows in stored}) == 3
    corrupted = [spans_of(one) for one in passes]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert len(corrupted[a]) > 100 and not corrupted[a] & corrupted[b]
    assert set(passes[1].manifest.splits) == {"train"}
    # The text under the noise is the same in every pass.
    for one in passes:
        counts = one.manifest.splits["train"].objectives.values()
        assert sum(c["chunk_tokens"] for c in counts) == sum(
            c["chunk_tokens"] for c in cache.manifest.splits["train"].objectives.values()
        )
    later = dataclasses.replace(config, cache_dir=str(tmp_path / "later"))
    open_cache(later).train_pass(2)
    again = open_cache(later)
    again.train_pass(1)
    assert files(again.folder) == files(cache.folder)


def test_a_pass_in_an_object_store_lies_in_its_cache(config, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "first"))
    remote = dataclasses.replace(config, cache_dir="gs://bucket/cache")
    made = open_cache(remote).train_pass(1)
    assert "/bucket/cache/pass-001/manifest.json" in bucket
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "second"))
    copied = open_cache(remote).train_pass(1)
    assert copied.folder != made.folder and records(copied) == records(made)


def test_the_digest_is_the_same_however_many_passes_are_there(config):
    cache = open_cache(config)
    digest = cache.manifest.digest
    cache.train_pass(1)
    assert open_cache(config).manifest.digest == digest


@pytest.mark.parametrize(
    "change",
    [
        {"ul2": UL2Config(causal=0.5)}, {"ul2": UL2Config(noise_density=0.2)},
        {"ul2": UL2Config(mean_span=4)}, {"ul2": UL2Config(seed=1)}, {"mode_tokens": False},
        {"objective": "causal"},
    ],
)
def test_every_setting_of_the_objective_leads_to_another_cache(config, change):
    cache = open_cache(config)
    other = dataclasses.replace(config, **change)
    with pytest.raises(UserError, match="made differently"):
        open_cache(other)
    elsewhere = open_cache(dataclasses.replace(other, cache_dir=None))
    assert elsewhere.manifest.digest != cache.manifest.digest
    assert elsewhere.folder != open_cache(dataclasses.replace(config, cache_dir=None)).folder


def test_batches_read_pass_after_pass(config):
    cache = open_cache(config)
    data = PackedBatches(cache, batch_size=1, seed=3)
    sizes = [cache.train_pass(number).num_records("train") for number in range(3)]
    rows = [data.batch(step)["tokens"][0].tobytes() for step in range(sum(sizes))]
    ends = np.cumsum([0, *sizes])
    for number in range(3):
        expected = PackedBatches(cache.train_pass(number), batch_size=1, shuffle=False)
        there = sorted(batch["tokens"][0].tobytes() for _, batch in expected.iterate())
        drawn = rows[ends[number] : ends[number + 1]]
        assert sorted(drawn) == there and drawn != there
    fresh = PackedBatches(open_cache(config), batch_size=1, seed=3)
    assert fresh.batch(int(ends[2]))["tokens"][0].tobytes() == rows[ends[2]]


def test_the_passes_of_a_plan_are_made_before_it_runs(config):
    cache = open_cache(config)
    data = PackedBatches(cache, batch_size=8)
    steps = 3 * cache.num_records("train") // 8
    (times,) = data.passes(steps).values()
    assert 2.5 < times < 3.5
    made = {path.name for path in cache.folder.iterdir() if path.is_dir()}
    assert made == {f"pass-{number:03d}" for number in range(1, int(np.ceil(times)))}
    assert list(data.passes(0).values()) == [0.0]


def test_a_pass_that_is_missing_is_made_from_the_text_or_named(config, many_texts):
    cache = open_cache(config)
    alone = load_cache(cache.folder)
    with pytest.raises(UserError, match="holds no pass 1"):
        alone.train_pass(1)
    made = cache.train_pass(1)
    assert load_cache(cache.folder).train_pass(1).manifest == made.manifest


def test_a_text_that_changed_makes_no_further_pass(config, many_texts, tmp_path):
    copy = shutil.copytree(many_texts, tmp_path / "copy")
    moved = dataclasses.replace(config, text_dir=str(copy))
    cache = open_cache(moved)
    (copy / "more.txt").write_text("something new " * 50)
    with pytest.raises(UserError, match="has changed since"):
        cache.train_pass(1)


def test_a_vocabulary_without_sentinels_is_refused_before_any_work(config):
    with pytest.raises(UserError, match="sentinels, and UL2 needs them"):
        open_cache(dataclasses.replace(config, extra_ids=0))


def test_prompts_are_in_the_batches_of_ul2_alone(config):
    cache = open_cache(config)
    data = PackedBatches(cache, batch_size=16)
    assert data.keys == ("tokens", "segment_ids", "positions", "prefix")
    batch = data.batch(0)
    assert tuple(batch) == data.keys
    for row in range(16):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            mine = batch["segment_ids"][row] == segment
            prefix = batch["prefix"][row][mine]
            assert prefix[0] == 1 and prefix[-1] == 0  # a mode token; something to predict
            assert (np.diff(prefix) <= 0).all()
    assert not batch["prefix"][batch["segment_ids"] == 0].any()
    plain = open_cache(dataclasses.replace(config, objective="causal", cache_dir=None))
    assert tuple(PackedBatches(plain, batch_size=4).batch(0)) == (
        "tokens", "segment_ids", "positions"
    )
    assert "prefix" in PackedBatches(plain, batch_size=4, prompts=True).batch(0)


def test_a_segment_has_one_objective(config):
    """Packing puts chunks of several objectives into a record, never into a segment."""
    cache = open_cache(config)
    dtype = token_dtype(cache.manifest.vocab_size)
    modes = {cache.manifest.vocab_size - 60 + k for k in range(3)}
    several = 0
    for record in records(cache):
        tokens, lengths, prompts = decode_record(record, dtype)
        kinds = set()
        for segment in np.split(tokens, np.cumsum(lengths)[:-1]):
            assert int(segment[0]) in modes and not modes & set(segment[1:].tolist())
            kinds.add(int(segment[0]))
        assert len(prompts) == len(lengths)
        several += len(kinds) > 1
    assert several


def test_a_damaged_shard_of_a_pass_is_named(config):
    made = open_cache(config).train_pass(1)
    shard = made.folder / made.manifest.splits["train"].shards[0].file
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match="pass-001/train-00000.array_record is damaged"):
        open_cache(config).train_pass(1).verify()
