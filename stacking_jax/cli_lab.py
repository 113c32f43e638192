"""The command of small studies: lab icl."""

from __future__ import annotations

from collections.abc import Callable


def add_commands(command: Callable) -> None:
    """Adds the subparser `lab`.

    Args:
      command: (name, what runs it, its help) -> a new subparser.
    """
    lab = command("lab", _lab, "measure claims of theory on small synthetic tasks")
    lab.add_argument("study", choices=["icl"], help="icl: in-context linear regression")
    lab.add_argument("--out", default="runs/icl", metavar="DIR",
                     help="results, kept as they come (default runs/icl)")
    lab.add_argument("--quick", action="store_true", help="a minute, to see what there is")
    lab.add_argument("--seeds", type=int, metavar="N", help="runs per cell (4; quick: 2)")
    lab.add_argument("--json", action="store_true", help="print one JSON object instead")


def _lab(arguments) -> int:
    from stacking_jax.lab import IclSettings, icl, quick
    from stacking_jax.lab.command import show

    given = {} if arguments.seeds is None else {"seeds": arguments.seeds}
    settings = quick(**given) if arguments.quick else IclSettings(**given)
    show(icl(settings, arguments.out), arguments.out, arguments.json)
    return 0
