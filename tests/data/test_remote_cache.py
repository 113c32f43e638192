"""A cache that is kept in an object store: made once, read by machines that have no text."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from stacking_jax.data import DataConfig, PackedBatches, open_cache, remote_cache
from stacking_jax.data.manifest import FILE
from stacking_jax.errors import UserError

URL = "gs://bucket/caches/mine"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "first"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"{number} is a number. " * 30)
    return DataConfig(text_dir=str(texts), sequence_length=64, held_out=0.2, cache_dir=URL)


@pytest.fixture
def elsewhere(config, tmp_path, monkeypatch):
    """The configuration on another machine, which has neither the texts nor the cache."""

    def move():
        monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "second"))
        shutil.rmtree(config.text_dir)
        return config

    return move


def test_a_cache_is_made_stored_and_read_elsewhere(bucket, config, elsewhere):
    made = open_cache(config)
    assert made.folder == remote_cache.local_folder(URL)
    shards = {f"/bucket/caches/mine/{shard.file}" for split in made.manifest.splits.values()
              for shard in split.shards}  # fmt: skip
    # The manifest came last: a store that holds one holds a whole cache.
    assert set(bucket) == shards | {f"/bucket/caches/mine/{FILE}"}
    assert list(bucket)[-1] == f"/bucket/caches/mine/{FILE}"
    before = PackedBatches(made, "train", batch_size=2, seed=1).batch(0)

    read = open_cache(elsewhere())
    assert read.folder != made.folder and read.manifest == made.manifest
    read.verify()
    after = PackedBatches(read, "train", batch_size=2, seed=1).batch(0)
    assert all((before[name] == after[name]).all() for name in before)
    # A second time nothing is copied.
    bucket.pop(next(name for name in bucket if name in shards))
    assert open_cache(config).manifest == made.manifest


def test_a_cache_that_changed_in_the_store_is_copied_again(bucket, config, tmp_path, monkeypatch):
    open_cache(config)
    first = remote_cache.local_folder(URL)
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "second"))
    bucket.clear()
    (tmp_path / "texts" / "new.txt").write_text("another text " * 90)
    changed = open_cache(config)
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "first"))
    assert first == remote_cache.local_folder(URL)
    assert open_cache(config).manifest == changed.manifest


def test_half_a_cache_is_none(bucket, config, elsewhere):
    """Stored without its manifest, or with a shard cut short."""
    open_cache(config)
    (shard, *_) = [name for name in bucket if not name.endswith(FILE)]
    elsewhere()
    bucket[shard].truncate(10)
    with pytest.raises(UserError, match="is damaged: 10 bytes instead of"):
        open_cache(config)
    assert not remote_cache.local_folder(URL).exists()
    del bucket[f"/bucket/caches/mine/{FILE}"]
    with pytest.raises(UserError, match="does not exist"):
        open_cache(config)


def test_sources_of_a_mixture_lie_below_the_url(bucket, config, tmp_path):
    texts = tmp_path / "texts"
    for name in ("a", "b"):
        (texts / name).mkdir()
        (texts / name / "one.txt").write_text(f"{name} says this. " * 200)
        (texts / name / "two.txt").write_text(f"{name} says that. " * 200)
    open_cache(dataclasses.replace(config, mixture={"a": 1, "b": 3}))
    stored = {name.split("/")[4] for name in bucket}
    assert stored == {"a", "b"}
