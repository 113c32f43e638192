from __future__ import annotations

import pathlib

import pytest

from stacking_jax.data.config import CACHE_VARIABLE, DataConfig, cache_root
from stacking_jax.errors import UserError


@pytest.mark.parametrize(
    "field, value",
    [
        ("task", ""),
        ("task", None),
        ("text_dir", ""),
        ("text_dir", 3),
        ("vocabulary", None),
        ("extra_ids", -1),
        ("extra_ids", 1.5),
        ("sequence_length", 1),
        ("sequence_length", "512"),
        ("sequence_length", True),
        ("held_out", 1.0),
        ("held_out", -0.1),
        ("held_out", float("nan")),
        ("held_out", "2%"),
        ("shuffle_seed", -1),
        ("cache_dir", ""),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=field) as caught:
        DataConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_paths_and_whole_numbers_are_taken_as_they_are_meant():
    config = DataConfig(text_dir=pathlib.Path("texts"), held_out=0)
    assert config.text_dir == "texts"
    assert config.held_out == 0.0 and isinstance(config.held_out, float)


def test_which_texts_are_read_without_seqio():
    assert DataConfig().is_builtin
    assert DataConfig(task="c4", text_dir="texts").is_builtin
    assert not DataConfig(task="c4").is_builtin


def test_the_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "~/somewhere")
    assert cache_root() == pathlib.Path.home() / "somewhere"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_root() == pathlib.Path.home() / ".cache" / "stacking_jax"
