"""What every test shares: eight CPU devices, strict shapes, its own cache folder.

The settings are environment variables, set before JAX is imported, so that the
processes which tests start see the same machine as the tests themselves.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

NUM_DEVICES = 8

# A value that is already set wins: JAX_PLATFORMS=cuda python -m pytest tests/growth.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile the same small programs again and again, in this process and in those they start.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# JAX's caches for GPUs put the folder's path into the key of every program, and that of the tests
# is another each time.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
# An operation that would silently repeat [L] over [B, L] raises instead.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(NUM_DEVICES))


_EFFORT_IS_GIVEN = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_EFFORT_IS_GIVEN] = "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ
    if "jax" in sys.modules:
        raise pytest.UsageError(
            "a pytest plugin imported jax before tests/conftest.py could set up its devices; "
            "run with -p no:NAME for that plugin"
        )


# The rooms, or files beside them, in which a file takes minutes, not seconds.
_LONG = (
    "test_methods.py", "training", "interop", "evaluation", "planning", "models", "growth",
    "test_benchmarks.py", "test_examples.py", "analysis",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: one that a worker begins last would be waited for by all others."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        inside = item.path.is_relative_to(here) and item.path.relative_to(here).parts[0]
        return _LONG.index(inside) if inside in _LONG else len(_LONG)

    items.sort(key=place)


# Rooms and files in which numbers are compared with those of other computations, compiled programs
# are looked at, or steps are large: there programs are compiled as for users. A run that the files
# of a room share holds the room together.
_OPTIMISED = ("growth", "models", "lab", "planning", "test_benchmarks.py", "test_host_memory.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Elsewhere, whole runs are compared with whole runs, and most time went into LLVM.

    A hook, as the fixtures of a session come before those of a module. The processes that tests
    start inherit it. JAX_DISABLE_MOST_OPTIMIZATIONS, where it was set before, holds for all.
    """
    if item.config.stash[_EFFORT_IS_GIVEN]:
        return
    import jax

    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    inside = item.path.relative_to(Path(__file__).parent)
    little = not any(inside.is_relative_to(room) for room in _OPTIMISED)
    if little != (name in os.environ):
        if little:
            os.environ[name] = "1"
        else:
            del os.environ[name]
        jax.config.update(name.lower(), little)
        jax.clear_caches()  # They do not tell programs apart by it.


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory):
    """Keeps the caches of the tests out of the user's own, shared by the xdist workers.

    Of these, compiled programs alone are kept from session to session, in the folder that
    STACKING_JAX_TEST_PROGRAMS names, where it does.
    """
    if "STACKING_JAX_CACHE" in os.environ:
        yield os.environ["STACKING_JAX_CACHE"]
        return
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "stacking_jax_cache"
    folder.mkdir(exist_ok=True)
    kept = os.environ.get("STACKING_JAX_TEST_PROGRAMS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):  # Another worker was first.
            (folder / "compiled").symlink_to(Path(kept).absolute())
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
