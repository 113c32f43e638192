"""Host memory that a program uses again, rather than give it back after every step.

On a CPU all that a train step needs for a while is one large piece of memory. glibc asks the
system for such a piece every time and gives it back behind the step, so that each step touches
every page of it for the first time: 67,000 faults in a step of 0.4 s, a sixth of its time. Told
to take large pieces from its heap and to keep them, it asks once.

Where an accelerator computes, the large pieces are copies on their way to disk, which are better
given back: nothing is changed there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed, if this process can only compute on CPUs.

    To be called before JAX starts its threads, which else take memory from places of their own
    that cannot grow so far. Whoever has set `GLIBC_TUNABLES` or `MALLOC_...` is not overruled.

    Returns:
      Whether anything was changed.
    """
    set_by_hand = any(
        name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ
    )
    if set_by_hand or platform.libc_ver()[0] != "glibc" or not _cpu_alone():
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT), (_ARENA_MAX, 1))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])


def _cpu_alone() -> bool:
    """Whether JAX was told to use CPUs, or has nothing that could drive anything else."""
    asked = os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
