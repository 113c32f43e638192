"""Local paths stay what they are; URLs are checked before anything is done with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from stacking_jax.errors import UserError
from stacking_jax.paths import identity, is_remote, local_path, make_folder, open_path


def test_local_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_path("runs/a") == tmp_path / "runs" / "a"
    assert type(open_path("runs/a")) is type(Path())
    make_folder(open_path("runs/a"))
    (tmp_path / "link").symlink_to("runs")
    assert identity(open_path("link/a")) == (tmp_path / "runs" / "a").resolve()


def test_urls_are_read_and_written(bucket):
    path = open_path("gs://bucket/runs/a") / "x.json"
    assert is_remote(path) and str(path) == "gs://bucket/runs/a/x.json"
    make_folder(path.parent)
    assert not bucket and not path.exists()
    path.write_text("1")
    assert path.read_text() == "1" and list(bucket) == ["/bucket/runs/a/x.json"]
    assert identity(path) == path


@pytest.mark.parametrize(
    "name, what",
    [
        ("ftp://host/runs", "ftp:// is not known here"),
        (Path("gs://bucket/runs"), "has lost a slash"),
        ("gs:/bucket/runs", "has lost a slash"),
    ],
)
def test_what_cannot_be_opened_is_one_line(name, what):
    with pytest.raises(UserError, match=what):
        open_path(name)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "false")
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements/gcs.txt") as caught:
        open_path("gs://bucket/runs")
    assert "\n" not in str(caught.value)


def test_a_store_that_does_not_answer_is_one_line(bucket, monkeypatch):
    import fsspec

    def fails(*args, **options):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(fsspec.get_filesystem_class("gcs"), "exists", fails)
    with pytest.raises(UserError, match="gs://bucket/runs cannot be reached: no network"):
        open_path("gs://bucket/runs")


def test_what_works_on_local_folders_alone_says_so():
    with pytest.raises(UserError, match="gs://bucket/runs/a: this works on local folders alone"):
        local_path("gs://bucket/runs/a")
