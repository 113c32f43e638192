"""The arguments with which a command becomes one of several processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from stacking_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to a subcommand; `joined` reads them."""
    group = parser.add_argument_group("several processes, the same command in each")
    group.add_argument(
        "--distributed", choices=["auto"],
        help="let JAX find the others: TPU pods, SLURM, GKE, Open MPI",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, free there")
    group.add_argument("--num_processes", type=int, metavar="N", help="of the run")
    group.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")
    group.add_argument(
        "--heartbeat_timeout", type=int, default=100, metavar="S",
        help="seconds of silence after which a process is lost and all end (default 100)",
    )
    group.add_argument(
        "--start_timeout", type=int, default=300, metavar="S",
        help="seconds in which all must have come (default 300)",
    )


def _trains(arguments: argparse.Namespace) -> bool:
    """Whether the command is a run, which saves when it is asked to stop, or goes on as one."""
    return arguments.command == "train" or (
        arguments.command == "select" and arguments.out is not None
    )


@contextlib.contextmanager
def joined(
    arguments: argparse.Namespace, report: Callable[[BaseException], int]
) -> Iterator[None]:
    """Joins the other processes for the time of a command, if it has any.

    Process 0 alone prints results; what goes to standard error comes from all.

    Args:
      arguments: of the command line.
      report: prints an error as the command line does, and says its exit code.

    Raises:
      UserError: the arguments do not fit together, or the others cannot be joined.
    """
    given = [getattr(arguments, name, None)
             for name in ("coordinator", "num_processes", "process_id")]
    automatic = getattr(arguments, "distributed", None) == "auto"
    if not automatic and not any(value is not None for value in given):
        yield
        return
    if automatic and any(value is not None for value in given):
        raise UserError(
            "--distributed auto asks the cluster: leave out --coordinator, --num_processes and "
            "--process_id"
        )
    from stacking_jax.training import distributed

    distributed.join(
        distributed.Processes(*given, arguments.heartbeat_timeout, arguments.start_timeout),
        stop_together=_trains(arguments),
    )
    import jax

    with contextlib.ExitStack() as stack:
        if jax.process_index() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except BaseException as error:
            code = report(error)
            sys.stderr.flush()
            distributed.leave_after_error(error, code)
            raise SystemExit(code) from error
        distributed.leave()
