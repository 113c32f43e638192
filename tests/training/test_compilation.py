"""The folder of compiled programs."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest

from stacking_jax.errors import UserError
from stacking_jax.training.compilation import private_folder, use_compilation_cache


@pytest.fixture(autouse=True)
def restore():
    before = jax.config.jax_compilation_cache_dir
    yield
    use_compilation_cache(before or "")


def compile_something(number: float):
    """A program of its own, whatever its compilation takes."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones((5, 7))).block_until_ready()


def test_it_lies_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path))
    use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    # What lies there is run as code: nobody else may write it.
    assert (tmp_path / "compiled").stat().st_mode & 0o077 == 0


def test_it_lies_where_it_is_told(tmp_path):
    use_compilation_cache(str(tmp_path / "there"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "there")


def test_the_empty_name_means_none(tmp_path):
    use_compilation_cache(str(tmp_path))
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_are_kept_there_even_if_others_were_compiled_before(tmp_path):
    use_compilation_cache("")
    compile_something(0.125)
    for name in ("one", "other"):
        use_compilation_cache(str(tmp_path / name))
        assert not any((tmp_path / name).iterdir())
        compile_something(0.25)
        jax.clear_caches()
        assert any((tmp_path / name).iterdir())


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o720, 0o1777])
def test_a_folder_that_is_open_to_others_is_closed(tmp_path, mode, capsys):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    (folder / "program").touch()
    use_compilation_cache(str(folder))
    assert folder.stat().st_mode & 0o7777 == 0o700
    assert "open to other users" in capsys.readouterr().err
    use_compilation_cache(str(folder))
    assert capsys.readouterr().err == ""


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(UserError, match=f"belongs to user {me}, not to you") as caught:
        use_compilation_cache(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_others_have_written_is_not_run(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "program").touch()
    os.chown(folder / "program", 12345, 12345)
    with pytest.raises(UserError, match="others could write there and have"):
        private_folder(folder)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        use_compilation_cache(str(tmp_path / "file" / "compiled"))
