"""The command that runs a study: a grid of runs, its statistics and its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stacking_jax.errors import UserError


def add_commands(command: Callable, gin_arguments: Callable) -> None:
    """Adds the subparser; arguments as `cli_evaluation.add_commands`."""
    study = command("study", _study, "run a grid of methods and seeds, and report it")
    gin_arguments(study, required=False)
    study.add_argument("--run_dir", required=True, metavar="D", help="where the study is kept")
    study.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="cells that run at a time; the cores are divided among them (default 1)",
    )
    study.add_argument(
        "--launch", metavar="WORDS",
        help="what runs a cell in place of this machine, such as 'bash launch/processes.sh "
        "--processes 2 --devices 4 --'; {cell} in it is the cell's number",
    )
    study.add_argument(
        "--retry", action="store_true", help="run cells again that have failed or were submitted"
    )
    study.add_argument(
        "--report", action="store_true", help="run nothing: report what is complete so far"
    )


def is_study(arguments: argparse.Namespace) -> bool:
    """Whether what `compare` was given is one study."""
    from stacking_jax.study.grid import MANIFEST

    return len(arguments.runs) == 1 and (Path(arguments.runs[0]) / MANIFEST).exists()


def report(study: str, out: str | None = None, as_json: bool = False) -> int:
    from stacking_jax.study.command import report_study

    report_study(study, out, as_json)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from stacking_jax import configurables, gin_config
    from stacking_jax.study.command import run_study
    from stacking_jax.study.config import StudyConfig
    from stacking_jax.study.runner import Interrupted

    if arguments.report:
        return report(arguments.run_dir)
    if not arguments.gin_file:
        raise UserError("name the study with --gin_file, or --report to see what is there")

    def configure(files: Sequence[str], bindings: Sequence[str]):
        gin_config.load(files, bindings, configurables.register, imports=modules)
        return configurables.configured()

    gin_config.load(
        arguments.gin_file, arguments.bindings, configurables.register,
        imports=arguments.gin_import,
    )
    config = configurables.configured(StudyConfig)
    modules = [*arguments.gin_import, *config.imports]
    try:
        counts = run_study(
            config, arguments.run_dir, configure, jobs=arguments.jobs, launch=arguments.launch,
            retry=arguments.retry,
        )
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if counts.get("failed") else 0
