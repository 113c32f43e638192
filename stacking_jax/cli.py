"""The command line. Thin: it reads arguments and hands them on.

Nothing heavy is imported before a subcommand is chosen, so that `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from stacking_jax import __version__
from stacking_jax.errors import UserError

_EXAMPLES = """\
examples:
  stacking-jax plan     --gin_file gin/experiments/midas_1b_prop2.gin
  stacking-jax train    --gin_file gin/experiments/demo.gin --run_dir runs/demo
  stacking-jax train    --gin_file gin/experiments/demo.gin --gin.TEXT_DIR='"my/texts"' \\
                        --gin.TRAIN_STEPS=200 --run_dir runs/mine
  stacking-jax generate --run_dir runs/demo --prompt "def "
  stacking-jax compare  runs/a runs/b --out report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0 done; 2 the user can put it right (one line says how); 128 + n stopped by
    signal n with everything saved.
    """
    from stacking_jax import gin_config

    try:
        bindings, rest = gin_config.split_argv(sys.argv[1:] if argv is None else argv)
        parser = _parser()
        arguments = parser.parse_args(rest)
        if bindings and not hasattr(arguments, "gin_file"):
            raise UserError(f"{arguments.command} takes no --gin bindings")
        arguments.bindings = bindings
        return arguments.run(arguments) or 0
    except UserError as error:
        # One line, whatever the message quotes.
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader of a pipe has gone, as in `... | head`.
        sys.stderr.close()
        return 141


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments as everything else here does: in one line."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stacking-jax",
        description="Pretrains language models by growing their depth.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "train, or go on where the run directory stopped")
    _gin_arguments(train)
    train.add_argument("--run_dir", required=True, metavar="D", help="where the run is kept")
    train.add_argument(
        "--stop_at", type=int, metavar="N", help="save and leave off after N steps in all"
    )

    plan = command("plan", _plan, "print the stages of a run and their cost, before it starts")
    _gin_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object instead")

    cache = command("cache", _cache, "tokenise and pack the data of a run, if not done yet")
    _gin_arguments(cache)

    sample = command("generate", _generate, "continue a prompt with a trained model")
    sample.add_argument("--run_dir", required=True, metavar="D", help="a run of `train`")
    sample.add_argument("--prompt", required=True, help="text to continue")
    sample.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    sample.add_argument("--max_new_tokens", type=int, default=200, metavar="N")
    sample.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    sample.add_argument("--top_k", type=int, metavar="K")
    sample.add_argument("--top_p", type=float, default=1.0, metavar="P")
    sample.add_argument("--num_samples", type=int, default=1, metavar="N")
    sample.add_argument("--seed", type=int, default=0)

    compare = command("compare", _compare, "set runs side by side, in a table and a report")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    compare.add_argument("--out", metavar="report.html", help="write one self-contained HTML page")
    compare.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _gin_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin_file", action="append", default=[], metavar="F", required=True,
        help="a .gin file (repeatable; a later one overrides an earlier one)",
    )
    parser.add_argument(
        "--gin.NAME", dest="_documented", metavar="VALUE",
        help="bind a macro or a parameter, such as --gin.TRAIN_STEPS=200 (repeatable)",
    )


def _configure(arguments):
    from stacking_jax import configurables, gin_config

    gin_config.load(arguments.gin_file, arguments.bindings, configurables.register)
    return configurables.configured()


def _train(arguments) -> int:
    from stacking_jax import gin_config
    from stacking_jax.training import Stopped, train

    config = _configure(arguments)
    try:
        summary = train(
            config, arguments.run_dir,
            gin_text=gin_config.operative_text(), stop_at=arguments.stop_at,
        )
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 0 if stopped.signal_number is None else 128 + stopped.signal_number
    print(
        f"{summary['name']}: step {summary['final_step']}, held-out loss "
        f"{summary['eval_loss']:.4f} nats per token ({summary['bits_per_byte']:.4f} bits per "
        f"byte), {summary['wall_seconds']:.0f} s; see {arguments.run_dir}"
    )
    return 0


def _plan(arguments) -> int:
    plan = _configure(arguments).describe_plan()
    if arguments.json:
        print(json.dumps(plan))
    else:
        from stacking_jax.reporting import plan_table

        print(plan_table(plan, color=sys.stdout.isatty()))
    return 0


def _cache(arguments) -> int:
    from stacking_jax.data import open_cache

    manifest = open_cache(_configure(arguments).data).manifest
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.records:,} records of {manifest.sequence_length}, digest {split.digest[:12]}"
        )
    return 0


def _generate(arguments) -> int:
    from stacking_jax.training.generation import sample_from_run

    texts = sample_from_run(
        arguments.run_dir, arguments.prompt, step=arguments.step,
        num_samples=arguments.num_samples, max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for number, text in enumerate(texts):
        if number:
            print("-" * 40)
        print(arguments.prompt + text)
    return 0


def _compare(arguments) -> int:
    from stacking_jax.reporting import compare

    compare(arguments.runs, arguments.out, as_json=arguments.json)
    return 0
