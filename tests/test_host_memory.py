"""Steps on a CPU use their memory again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")

FAULTS = """
import resource, statistics
from stacking_jax.host_memory import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp
# Cumulative sums are not fused: temporaries of 64 MiB, more than glibc takes from a heap.
step = jax.jit(lambda x: jnp.cumsum(jnp.cumsum(x + 1) + 1).sum())
x = jnp.zeros(2**24)
touched = []
for _ in range(32):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    touched.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The heap grows now and then until it has room for what small pieces have broken up.
print(int(statistics.median(touched[16:])))
"""


def faults(**environment):
    clean = {
        name: value for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES", "XLA_FLAGS") and not name.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True,
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
    )
    changed, count = done.stdout.split()
    return changed == "True", int(count)


@pytest.mark.slow
def test_a_step_touches_no_page_for_the_first_time():
    changed, count = faults()
    assert changed and count < 1000
    # Who has decided otherwise is not overruled, and pays.
    changed, count = faults(MALLOC_TOP_PAD_="131072")
    assert not changed and count > 10_000


def test_beside_an_accelerator_nothing_changes():
    done = subprocess.run(
        [sys.executable, "-c", "from stacking_jax.host_memory import keep_freed_memory\n"
         "print(keep_freed_memory())"],
        capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "tpu,cpu"},
    )
    assert done.stdout.strip() == "False"
