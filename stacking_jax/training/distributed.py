"""Several processes that are one run: how they join, compare notes and leave.

The coordinator is a service that process 0 runs beside its training. Through it
JAX's processes find each other, hear when one of them is lost, and agree on a step
to stop at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax

from stacking_jax.console import say
from stacking_jax.errors import NotYet, UserError

LOST = 128 + 6
"""Exit code of a process that has lost another: that of SIGABRT, by which JAX ends it."""

_DAY_MS = 24 * 3600 * 1000
_LEAVE_MS = 5000
_LOST_MS = 15000
_rounds = itertools.count()
"""Keys of the coordinator's store are used once; all processes count alike."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process finds the others of its run.

    Attributes:
      coordinator: HOST:PORT of process 0; None lets JAX ask the cluster it runs on
        (TPU pod, SLURM, GKE, Open MPI), as it then does for the next two.
      num_processes: of the run.
      process_id: of this one, from 0.
      heartbeat_timeout: seconds of silence after which a process counts as lost, and
        all others end.
      start_timeout: seconds in which all processes must have come.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 100
    start_timeout: int = 300

    def __post_init__(self):
        given = {
            "--coordinator": self.coordinator, "--num_processes": self.num_processes,
            "--process_id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise UserError(
                f"{' and '.join(missing)} missing: a run of several processes is told all of "
                f"{', '.join(given)}, or --distributed auto alone"
            )
        for name in ("heartbeat_timeout", "start_timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is in whole seconds, from 1; got {getattr(self, name)}")
        if self.coordinator is None:
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--coordinator is HOST:PORT; got {self.coordinator!r}")
        if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id counts from 0 to --num_processes - 1; got {self.process_id} of "
                f"{self.num_processes}"
            )


def join(processes: Processes, *, stop_together: bool) -> None:
    """Joins the other processes; returns when all are there. Before any other use of JAX.

    Args:
      processes: who and where they are.
      stop_together: let JAX's preemption service listen to SIGTERM, for a program that
        asks it after each step. Without, SIGTERM ends a process as always.

    Raises:
      UserError: the coordinator cannot be reached, or its port is taken.
    """
    jax.config.update("jax_enable_preemption_service", stop_together)
    if processes.process_id is not None and processes.process_id != 0:
        _await_coordinator(processes)
    # JAX would abort the process in the middle of a page of C++; this comes before it.
    deadline = threading.Timer(processes.start_timeout, _nobody_came, (processes,))
    deadline.daemon = True
    deadline.start()
    try:
        jax.distributed.initialize(
            processes.coordinator, processes.num_processes, processes.process_id,
            initialization_timeout=processes.start_timeout + 60,
            heartbeat_timeout_seconds=processes.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if processes.coordinator is None:
            raise UserError(
                f"--distributed auto found no cluster to join ({reason}); it knows TPU pods, "
                "SLURM, GKE and Open MPI; elsewhere use --coordinator, --num_processes and "
                "--process_id"
            ) from error
        raise UserError(
            f"process {processes.process_id} cannot join at {processes.coordinator}: {reason}"
        ) from error
    finally:
        deadline.cancel()


def leave() -> None:
    """Leaves when all have come here, so that nobody takes the others for lost."""
    jax.distributed.shutdown()


def leave_after_error(error: BaseException, code: int) -> None:
    """Leaves in order if the others end too, as after an error that all have met.

    Else it ends the process here and now with `code`: they wait for it in vain, and
    learn from its silence that it is gone. An error of the runtime is most often the
    loss of another process, which the coordinator notices later: then JAX aborts this
    process while it waits, or it ends with the same code, 134.
    """
    client = _client()
    if client is None:
        return
    lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    try:
        client.wait_at_barrier("stacking_jax/leave", _LOST_MS if lost else _LEAVE_MS)
    except Exception:  # noqa: BLE001  whatever it is, the others are not leaving
        if lost:
            say("error: another process of the run is lost; start all of them again")
        os._exit(LOST if lost else code)
    jax.distributed.shutdown()


def gather(name: str, value: str) -> list[str]:
    """What each process has to say, by process: all call this alike, and wait for all.

    No device takes part: it works before the first program is compiled.
    """
    client = _client()
    if client is None:
        return [value]
    folder = f"stacking_jax/{name}/{next(_rounds)}"
    client.key_value_set(f"{folder}/{jax.process_index():06d}", value)
    client.wait_at_barrier(f"{folder}/all", _DAY_MS)
    return [said for _, said in sorted(client.key_value_dir_get(folder))]


def meet(name: str) -> None:
    """Waits until all processes are here.

    To be called between compiling and running: Gloo, by which CPUs talk, gives the others half a
    minute to come to their first collective, and on a busy machine one may compile longer.
    """
    client = _client()
    if client is not None:
        client.wait_at_barrier(f"stacking_jax/{name}/{next(_rounds)}", _DAY_MS)


@contextlib.contextmanager
def main_process_first(name: str) -> Iterator[None]:
    """Process 0 runs the block, then the others do; all must come by."""
    client = _client()
    if client is None:
        yield
        return
    barrier = f"stacking_jax/{name}/{next(_rounds)}"
    main = jax.process_index() == 0
    if not main:
        client.wait_at_barrier(barrier, _DAY_MS)
    try:
        yield
    finally:
        if main:
            client.wait_at_barrier(barrier, _DAY_MS)


def stops_together() -> bool:
    """Whether JAX's preemption service decides when this run stops."""
    from jax._src import distributed

    return jax.process_count() > 1 and distributed.global_state.preemption_sync_manager is not None


def _client():
    """The connection to the coordinator; None where a process is alone.

    JAX has no public name for it; Orbax takes it from here too.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _await_coordinator(processes: Processes) -> None:
    host, _, port = processes.coordinator.rpartition(":")
    deadline = time.monotonic() + processes.start_timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise NotYet(
                    f"the coordinator {processes.coordinator} cannot be reached from process "
                    f"{processes.process_id} on {socket.gethostname()} "
                    f"({error.strerror or error}, {processes.start_timeout} s long); process 0 "
                    "runs it: see that it has started, and that host and port are right and open"
                ) from error
        time.sleep(0.2)


def _nobody_came(processes: Processes) -> None:
    which = "this process" if processes.process_id is None else f"process {processes.process_id}"
    others = "" if processes.num_processes is None else f"{processes.num_processes - 1} "
    say(
        f"error: {which} on {socket.gethostname()} waited {processes.start_timeout} s for "
        f"{others}other process(es), and not all have come; start all of them within "
        "--start_timeout"
    )
    os._exit(NotYet.exit_code)
