"""Stopping on request: a signal is noted, and the run saves and leaves after a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from stacking_jax.console import say
from stacking_jax.training import distributed


@contextlib.contextmanager
def stop_signals(first_step: int) -> Iterator[Callable[[int], int | None]]:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave in order.

    A second signal of the kind acts as if nobody had listened. Of several processes
    any one may be told; JAX's preemption service tells the others, and all stop after
    the same step. There a second SIGTERM changes nothing.

    Args:
      first_step: updates done when the loop begins; the same for all processes.

    Yields:
      A function of the number of the update that was just dispatched, to be asked
      once after each: the number of the signal to stop for, or None.
    """
    received: list[int] = []
    before: dict[int, Any] = {}
    together = distributed.stops_together()

    def note(number, frame):
        del frame
        received.append(number)
        signal.signal(number, before[number])
        say(f"{signal.Signals(number).name}: saving, then stopping (again to stop at once)")
        if together:
            signal.raise_signal(signal.SIGTERM)  # What JAX's service listens to.

    def ask(step: int) -> int | None:
        if not together:
            return received[0] if received else None
        from jax.experimental import multihost_utils

        # Counted from the loop's beginning: a process that has not called yet stands at 0,
        # and the step agreed on is one above the highest. All then stop for the same reason,
        # whoever was told, and by which signal.
        reached = multihost_utils.reached_preemption_sync_point(step - first_step)
        return int(signal.SIGTERM) if reached else None

    if threading.current_thread() is threading.main_thread():
        # SIGTERM is JAX's where it decides: a handler of Python's would keep it from it.
        for number in (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
