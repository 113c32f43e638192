"""A folder appears whole or not at all, and nothing is written over."""

from __future__ import annotations

import os

import pytest

from stacking_jax.errors import UserError
from stacking_jax.interop.folders import new_folder


def test_it_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), lambda path: path.write_text("x"),
    lambda path: path.symlink_to("nowhere"),
])
def test_whatever_is_there_stays(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(UserError, match="exists already and is not written over"):
        with new_folder(tmp_path / "out"):
            pytest.fail("nothing may begin")
    assert os.listdir(tmp_path) == ["out"]


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_refuses_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="was not made: .*file") as caught:
        with new_folder(tmp_path / "file" / "out"):
            pytest.fail("there is no such folder")
    assert "\n" not in str(caught.value)
