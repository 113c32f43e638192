"""The manifest of a checkpoint: whatever happens to a file is seen and named."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.training import manifest

FILES = {
    "meta/metadata": b"{}",
    "state/_METADATA": b"tree" * 9,
    "state/manifest.ocdbt": b"root",
    "state/ocdbt.process_0/d/aa": bytes(range(256)) * 40,
    "state/ocdbt.process_1/d/bb": b"\0" * 5000,
    "state/array_metadatas/process_1": b"[]",
}
MARKS = (manifest.COMMIT_MARK, "state/" + manifest.COMMIT_MARK, manifest.STEP_METADATA)


def make(folder, processes=1, digests=True):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in MARKS:
        (folder / name).write_text('{"commit_timestamp_nsecs": 1}')
    for process in range(processes):
        manifest.write(folder, process, processes, digests=digests)
    return folder


def problem_of(folder, readers=1, **options):
    """The problem that the readers, together, find."""
    verdicts = [manifest.check(folder, reader, readers, **options) for reader in range(readers)]
    assert len({verdict.complete for verdict in verdicts}) == 1
    found = [verdict.problem for verdict in verdicts if verdict.problem]
    assert len(found) <= 1
    return found[0] if found else None


def test_every_file_but_the_marks_is_listed(tmp_path):
    listed = json.loads((make(tmp_path) / "digests.process_0.json").read_text())["files"]
    assert set(listed) == set(FILES)
    assert {name: about["bytes"] for name, about in listed.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert manifest.check(tmp_path) == manifest.Verdict(None, True)
    # Written again, of what lies there now, it is the same.
    before = (tmp_path / "digests.process_0.json").read_text()
    manifest.write(tmp_path)
    assert (tmp_path / "digests.process_0.json").read_text() == before


def test_each_process_describes_what_it_wrote(tmp_path):
    make(tmp_path, processes=2)
    first, second = (
        set(json.loads((tmp_path / f"digests.process_{k}.json").read_text())["files"])
        for k in range(2)
    )
    assert second == {"state/ocdbt.process_1/d/bb", "state/array_metadatas/process_1"}
    assert first == set(FILES) - second
    (tmp_path / "digests.process_1.json").unlink()
    # A part is missing: what the other describes is still held to it.
    assert manifest.check(tmp_path) == manifest.Verdict(None, False)
    (tmp_path / "state/manifest.ocdbt").write_bytes(b"roOt")
    assert "state/manifest.ocdbt has changed" in problem_of(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"), processes=2)


@given(
    name=st.sampled_from(sorted(FILES)), at=st.integers(0, 10**6), mask=st.integers(1, 255),
    how=st.sampled_from(["flip", "cut", "longer", "empty", "gone"]), readers=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_any_damage_to_any_file_is_named(whole, tmp_path_factory, name, at, mask, how, readers):
    folder = tmp_path_factory.mktemp("copy") / "7"
    shutil.copytree(whole, folder)
    data = bytearray(FILES[name])
    at %= len(data)
    if how == "flip":
        data[at] ^= mask
    changed = {
        "flip": bytes(data), "cut": bytes(data[:at]), "longer": bytes(data) + b"\0", "empty": b"",
    }
    if how == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(changed[how])
    assert name in problem_of(folder, readers)
    # Sizes alone see everything but a change in place.
    assert (problem_of(folder, readers, digests=False) is None) == (how == "flip")
    shutil.rmtree(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"process": 0, "files": []}'])
def test_a_damaged_manifest_is_no_manifest_at_all(tmp_path, text):
    (make(tmp_path) / "digests.process_0.json").write_text(text)
    assert "manifest" in problem_of(tmp_path)


def test_without_digests_there_are_sizes(tmp_path):
    make(tmp_path, digests=False)
    assert "sha256" not in (tmp_path / "digests.process_0.json").read_text()
    assert manifest.check(tmp_path) == manifest.Verdict(None, True)
    os.truncate(tmp_path / "state/_METADATA", 3)
    assert problem_of(tmp_path) == "state/_METADATA has 3 bytes instead of 36"


def test_marks_of_a_commit_are_not_missed(tmp_path):
    make(tmp_path)
    assert manifest.committed(tmp_path)
    for mark in MARKS:
        (tmp_path / mark).unlink()
    assert not manifest.committed(tmp_path)
    assert manifest.check(tmp_path) == manifest.Verdict(None, True)
    manifest.put_back_mark(tmp_path)
    assert manifest.committed(tmp_path)


def test_orbax_says_that_it_finished_by_either_mark(tmp_path):
    assert not manifest.committed(tmp_path)
    metadata = tmp_path / manifest.STEP_METADATA
    for text in ("", "[]", '{"commit_timestamp_nsecs": null}'):
        metadata.write_text(text)
        assert not manifest.committed(tmp_path)
    metadata.write_text('{"commit_timestamp_nsecs": 12}')
    assert manifest.committed(tmp_path)
    metadata.unlink()
    (tmp_path / manifest.COMMIT_MARK).write_text("")
    assert manifest.committed(tmp_path)


def test_a_manifest_appears_whole_or_not_at_all(tmp_path):
    make(tmp_path)
    (tmp_path / "digests.process_0.json").unlink()
    unreadable = tmp_path / "state/a_link_to_nothing"
    unreadable.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError):
        manifest.write(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if "digests" in path.name]
