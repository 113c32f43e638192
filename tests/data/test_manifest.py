from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from stacking_jax.data.manifest import FILE, Identity, Manifest
from stacking_jax.errors import UserError


@pytest.fixture
def folder(small_cache, tmp_path):
    """A copy of a cache, to be damaged."""
    return shutil.copytree(small_cache.folder, tmp_path / "copy")


def test_a_manifest_reads_back_as_it_was_written(small_cache, folder):
    assert Manifest.load(folder) == small_cache.manifest
    small_cache.manifest.save(folder)
    assert (folder / FILE).read_bytes() == (small_cache.folder / FILE).read_bytes()


def test_the_digest_is_of_the_content_alone(small_cache):
    manifest = small_cache.manifest
    elsewhere = dataclasses.replace(manifest, source="elsewhere", task="another", digest="")
    assert elsewhere.digest == manifest.digest
    longer = dataclasses.replace(manifest, sequence_length=128, digest="")
    assert longer.digest != manifest.digest


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_each_part_of_the_identity_changes_the_key(field):
    identity = Identity("text", "print", "digest", 512, 0.02)
    other = {"sequence_length": 513, "held_out": 0.03}.get(field, "other")
    assert dataclasses.replace(identity, **{field: other}).key != identity.key


def edit(change):
    def damage(text):
        fields = json.loads(text)
        change(fields)
        return json.dumps(fields)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00" * 100,
        edit(lambda fields: fields.pop("splits")),
        edit(lambda fields: fields.pop("format")),
        edit(lambda fields: fields.update(surplus=1)),
        edit(lambda fields: fields["splits"]["train"].pop("shards")),
        edit(lambda fields: fields["splits"]["train"].update(tokens=1)),
        edit(lambda fields: fields["vocabulary"].update(digest="another")),
    ],
)
def test_a_damaged_manifest_is_refused(folder, damage):
    path = folder / FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="is damaged") as caught:
        Manifest.load(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_manifest_of_another_format_is_refused(folder):
    path = folder / FILE
    path.write_text(edit(lambda fields: fields.update(format=99))(path.read_text()))
    with pytest.raises(UserError, match="has format 99"):
        Manifest.load(folder)


def test_missing_and_cut_shards_are_named(folder):
    shard = folder / "train-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="train-00000.array_record is damaged"):
        Manifest.load(folder)
    shard.unlink()
    with pytest.raises(UserError, match="train-00000.array_record is missing"):
        Manifest.load(folder)
