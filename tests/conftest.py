"""What every test shares: eight CPU devices, strict shapes, its own cache folder.

The settings are environment variables, set before JAX is imported, so that the
processes which tests start see the same machine as the tests themselves.
"""

from __future__ import annotations

import os
import sys

import pytest

NUM_DEVICES = 8

# A value that is already set wins: JAX_PLATFORMS=cuda python -m pytest tests/growth.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile the same small programs again and again, in this process and in those they start.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# An operation that would silently repeat [L] over [B, L] raises instead.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(NUM_DEVICES))


def pytest_configure(config: pytest.Config) -> None:
    if "jax" in sys.modules:
        raise pytest.UsageError(
            "a pytest plugin imported jax before tests/conftest.py could set up its devices; "
            "run with -p no:NAME for that plugin"
        )


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory):
    """Keeps the caches of the tests out of the user's own, shared by the xdist workers."""
    if "STACKING_JAX_CACHE" in os.environ:
        yield os.environ["STACKING_JAX_CACHE"]
        return
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "stacking_jax_cache"
    folder.mkdir(exist_ok=True)
    os.environ["STACKING_JAX_CACHE"] = str(folder)
    yield str(folder)
    del os.environ["STACKING_JAX_CACHE"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """gs://bucket, in memory: what epath reaches by fsspec. Yields all objects, by their names.

    As in a store, there are no folders to make, nothing is appended to and nothing renamed.
    """
    import fsspec
    from etils.epath import backend, gpath
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Store(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store: dict = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("gs://").strip("/")

        def _open(self, path, mode="rb", **options):
            assert mode in ("rb", "wb"), f"{path} is opened to {mode}"
            return super()._open(path, mode, **options)

        def _refuse(self, *args, **options):
            raise AssertionError(f"a store cannot do this: {args}")

        mkdir = makedirs = mv = rename = _refuse

    monkeypatch.setenv("EPATH_USE_TF", "false")
    kept = gpath._is_tf_installed.cache_clear, backend.fsspec_backend._get_filesystem.cache_clear
    before = {name: _registry.get(name) for name in Store.protocol}
    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    for forget in kept:
        forget()
    yield Store.store
    for name, was in before.items():
        _registry.pop(name)
        if was is not None:
            _registry[name] = was
    for forget in kept:
        forget()
