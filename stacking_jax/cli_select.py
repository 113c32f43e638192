"""The commands that hold ways to grow against each other: select, lag-study."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from stacking_jax import cli_processes
from stacking_jax.console import say
from stacking_jax.errors import UserError


def add_commands(command: Callable) -> None:
    """Adds the subparsers; `command` takes a name, what runs it and its help."""
    select = command(
        "select", _select, "try ways to grow a checkpoint, and say which is best after a lag"
    )
    _what(select)
    select.add_argument(
        "--out", metavar="NEW", help="go on with the best, in this new run directory, to the end"
    )
    select.add_argument(
        "--stop_at", type=int, metavar="N", help="there leave off after N steps in all"
    )
    select.add_argument("--json", action="store_true", help="print one JSON object instead")

    study = command(
        "lag-study", _study,
        "train ways to grow a checkpoint to the end: does the loss after a lag say which is best?",
    )
    _what(study)
    study.add_argument(
        "--out", required=True, metavar="DIR", help="lag.json, lag.png and lag.html go there"
    )
    study.add_argument(
        "--points", type=int, default=12, metavar="P", help="lags that are looked at (12)"
    )
    study.add_argument("--json", action="store_true", help="print one JSON object instead")


def _what(parser) -> None:
    parser.add_argument("--run_dir", required=True, metavar="D", help="a run of `train`")
    parser.add_argument(
        "--candidates", metavar="A,B",
        help="such as midas,gradstack, or a JSON list as ChoiceConfig.candidates; those of the run",
    )
    parser.add_argument(
        "--lag", type=int, metavar="N", help="steps to train each; ChoiceConfig.lag of the run"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument(
        "--batches", type=int, metavar="K",
        help="held-out batches of each source; ChoiceConfig.lag_batches of the run",
    )
    cli_processes.add_arguments(parser)


def _start(arguments):
    """The checkpoint, the candidates, the lag and the held-out batches that are asked for."""
    from stacking_jax.training.select import Start

    if arguments.batches is not None and arguments.batches < 1:
        raise UserError(f"--batches is at least 1; got {arguments.batches}")
    start = Start.of(arguments.run_dir, arguments.step)
    choice = start.setup.config.choice
    lag = arguments.lag
    if lag is None:
        lag = choice.lag_steps(start.setup.plan.stages[start.number])
    batches = choice.lag_batches if arguments.batches is None else arguments.batches
    return start, start.ways(_entries(arguments.candidates)), lag, batches


def _entries(text: str | None):
    if text is None:
        return None
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"--candidates is no JSON list ({error}): {text}") from None
    return [name.strip() for name in text.split(",") if name.strip()]


def _select(arguments) -> int:
    from stacking_jax.training.select import branch, select

    if arguments.stop_at is not None and arguments.out is None:
        raise UserError("--stop_at is of the run that goes on: name its folder with --out")
    if arguments.out is not None:
        from stacking_jax.interop.folders import refuse_existing

        refuse_existing(arguments.out)
    start, ways, lag, batches = _start(arguments)
    decision = select(start, ways, lag, batches)
    if arguments.json:
        print(json.dumps({"run": str(start.setup.run_dir), **decision}, allow_nan=False))
    else:
        from stacking_jax.reporting.choices import ranking_table
        from stacking_jax.reporting.command import terminal

        print(ranking_table(decision, **terminal()), end="")
    if arguments.out is None:
        say("no run goes on with it: name a folder for one with --out")
        return 0
    branch(start, decision, arguments.out)
    del start  # Its state; the run has its own.
    from stacking_jax.training import Stopped, train
    from stacking_jax.training.run_directory import read_config

    try:
        train(read_config(arguments.out), arguments.out, stop_at=arguments.stop_at)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 0 if stopped.signal_number is None else 128 + stopped.signal_number
    return 0


def _study(arguments) -> int:
    import jax

    from stacking_jax.paths import local_path
    from stacking_jax.reporting.lag import study_table, write_png, write_report
    from stacking_jax.training.lag_study import lag_study

    out = local_path(arguments.out)
    start, ways, lag, batches = _start(arguments)
    found = lag_study(start, ways, lag, out, batches=batches, points=arguments.points)
    if jax.process_index():
        return 0
    write_png(found, out / "lag.png")
    write_report(found, out / "lag.html")
    if arguments.json:
        print(json.dumps(found, allow_nan=False))
    else:
        from stacking_jax.reporting.command import terminal

        print(study_table(found, **terminal()), end="")
        print(f"see {out / 'lag.html'}", file=sys.stderr)
    return 0
