"""The programs of the next stage, traced and compiled in the background while this one trains.

A thread of low priority does it: of the lowest, where the stage is long enough for that
(`niceness`). XLA compiles in threads of its own as well, one set for the whole process: while
something is compiled in the background they have that priority too, and their own again as soon
as somebody waits, or half of the stage is over. (Linux lets a thread's priority rise for
the superuser alone, or within RLIMIT_NICE. Elsewhere theirs stays low from then on, which costs
time only where others keep the machine busy.) A process of its own, which fills the compilation
cache, would yield to the steps as well; but it cannot have the accelerator, or be one of a run's
several processes, for which these programs are.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp

from stacking_jax.console import say, warn

FIRST_STEPS = 5
"""Updates of a stage, or a quarter of a shorter one, before the next is compiled: they show what
the boundary cost, and are not to be held up by it."""

_LOWEST, _LOW = 19, 10
_found = threading.Event()
_compiler_threads: set[int] = set()

T = TypeVar("T")


class CompileAhead(Generic[T]):
    """Makes one thing in the background, step by step.

    Attributes:
      stage: the number of the stage that it is for.
    """

    def __init__(self, stage: int, make: Callable[[], Iterator[T]], nice: int = _LOWEST):
        """Starts at once.

        Args:
          stage: a number.
          make: a generator whose last item is the result. Between its items it may be given up.
          nice: how far below its own the process's priority the work has, 0 to 19.
        """
        self.stage = stage
        self._below = nice
        self._make, self._given_up = make, threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0
        self._lowered: set[int] = set()
        self._nice = 0
        self._thread = threading.Thread(target=self._run, name="compile-ahead", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return not self._thread.is_alive()

    def hurry(self) -> None:
        """Gives it the priority of everything else, where the system lets one rise."""
        self._raise()

    def take(self) -> tuple[T | None, float]:
        """Waits for the result.

        Returns:
          It and the seconds that making it took, waiting included; None for it where making it
          failed, with a word.
        """
        self._raise()
        self._thread.join()
        if self._error is not None:
            reason = (str(self._error).splitlines() or [""])[0] or type(self._error).__name__
            warn(
                f"stage {self.stage + 1} could not be compiled ahead ({reason}); it is compiled now"
            )
        return self._result, self._seconds

    def close(self) -> None:
        """Gives up after the program that is being compiled: XLA does not let go of one."""
        self._given_up.set()
        self._raise()
        self._thread.join(timeout=3)
        if self._thread.is_alive():
            say(f"waiting for a compilation of stage {self.stage + 1}, which cannot be broken off")
            self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        self._lower()
        try:
            for made in self._make():
                self._result = made
                # On GPUs the processes share the work of compiling, and each waits for the others'.
                if self._given_up.is_set() and jax.process_count() == 1:
                    return
        except BaseException as error:  # noqa: BLE001  the run goes on, and compiles in its turn
            self._result, self._error = None, error
        finally:
            self._raise()
            self._lowered = set()  # This thread's number may be another's soon.
            self._seconds = time.monotonic() - began

    def _lower(self) -> None:
        """Lowers this thread and XLA's, on systems where threads have priorities of their own."""
        if sys.platform == "linux":
            self._nice = os.getpriority(os.PRIO_PROCESS, os.getpid())
            self._lowered = {threading.get_native_id(), *_compiler_threads}
            _set_priority(self._lowered, min(self._nice + self._below, _LOWEST))

    def _raise(self) -> None:
        _set_priority(self._lowered, self._nice)


def niceness(seconds_left: float, needed: float) -> int:
    """How low a priority leaves a compilation likely to be done in time.

    Where the steps keep every core busy, the lowest gets some hundredths of one, and 10 a tenth.
    Where they leave cores idle, as beside an accelerator, each is as good as the other.

    Args:
      seconds_left: of the stage that trains.
      needed: seconds that such a compilation takes where nothing else runs.
    """
    if seconds_left >= 30 * needed:
        return _LOWEST
    return _LOW if seconds_left >= 8 * needed else 0


def find_compiler_threads() -> None:
    """Finds out which threads XLA compiles in: those that the first program brings into being.

    Of use before anything else has been compiled; later it finds none, and only the thread in
    the background will have a low priority.
    """
    if _found.is_set() or sys.platform != "linux":
        return
    _found.set()
    jax.devices()  # What programs run in comes with the devices.
    before = _threads()
    jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1,), jnp.float32)).compile()
    ours = {thread.native_id for thread in threading.enumerate()}
    _compiler_threads.update(_threads() - before - ours)


def _threads() -> set[int]:
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:  # No /proc: as if none were found.
        return set()


def _set_priority(threads: Iterable[int], nice: int) -> None:
    for thread in threads:
        # Such a thread may have ended, or may not rise again.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, nice)
