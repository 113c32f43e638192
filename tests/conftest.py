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
