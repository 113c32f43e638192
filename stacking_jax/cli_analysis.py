"""The command that looks into a trained stack: diagnose."""

from __future__ import annotations

from collections.abc import Callable

from stacking_jax import cli_processes


def add_commands(command: Callable) -> None:
    """Adds the subparser; `command` is (name, what runs it, its help) -> a new subparser."""
    diagnose = command(
        "diagnose", _diagnose, "look into a checkpoint: similarity and use of its layers"
    )
    diagnose.add_argument("--run_dir", required=True, metavar="D", help="a run of `train`")
    diagnose.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    diagnose.add_argument(
        "--blocks", type=int, metavar="B", help="layers of a block; those of the first stage"
    )
    diagnose.add_argument(
        "--batches", type=int, default=8, metavar="N", help="held-out batches per source (8)"
    )
    diagnose.add_argument(
        "--rows", type=int, metavar="R", help="of a batch; the run's own, 16 at most"
    )
    diagnose.add_argument(
        "--parts", metavar="P,Q", help="of similarity,maps,layers,effects; all by default"
    )
    diagnose.add_argument("--json", action="store_true", help="print one JSON object instead")
    diagnose.add_argument("--out", metavar="DIR", help="in place of RUN/diagnostics")
    cli_processes.add_arguments(diagnose)


def _diagnose(arguments) -> int:
    from stacking_jax.analysis.command import run
    from stacking_jax.analysis.diagnose import PARTS

    parts = PARTS if arguments.parts is None else arguments.parts.split(",")
    run(
        arguments.run_dir, step=arguments.step, block=arguments.blocks,
        batches=arguments.batches, rows=arguments.rows, parts=parts, as_json=arguments.json,
        out=arguments.out,
    )
    return 0
