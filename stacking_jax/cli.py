"""The command line. Thin: it reads arguments and hands them on.

Nothing heavy is imported before a subcommand is chosen, so that `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence

from stacking_jax import (
    __version__,
    cli_analysis,
    cli_evaluation,
    cli_lab,
    cli_processes,
    cli_select,
    cli_study,
    host_memory,
)
from stacking_jax.errors import UserError

_COMPUTES = ("train", "finetune", "evaluate", "generate", "diagnose", "select", "lag-study", "lab")
"""Commands that run steps of a model, over and over."""

_EXAMPLES = """\
examples:
  stacking-jax plan     --gin_file gin/experiments/midas_1b_prop2.gin
  stacking-jax plan     --gin_file gin/experiments/midas_8b_prop2.gin --topology v5p:4x4x8
  stacking-jax train    --gin_file gin/experiments/demo.gin --run_dir runs/demo
  stacking-jax train    --gin_file gin/experiments/demo.gin --gin.TEXT_DIR='"my/texts"' \\
                        --gin.TRAIN_STEPS=200 --run_dir runs/mine
  stacking-jax distill-cache --gin_file gin/experiments/demo.gin \\
                        --gin.DistillConfig.teacher='"runs/small"' \\
                        --gin.DistillConfig.top_k=16 --out labels
  stacking-jax vocab    --gin_file gin/experiments/demo.gin --vocab_size 8000 --out code.model
  stacking-jax generate --run_dir runs/demo --prompt "def "
  stacking-jax evaluate --run_dir runs/demo --tasks primitives --shots 0 --limit 200
  stacking-jax diagnose --run_dir runs/demo
  stacking-jax compare  runs/a runs/b --out report.html
  stacking-jax select   --run_dir runs/demo --step 100 --candidates midas,gradstack --lag 20
  stacking-jax study    --gin_file gin/studies/demo.gin --run_dir runs/study
  stacking-jax grow     runs/demo runs/deeper --operator midas --block 2 --to 12 --total_steps 640
  stacking-jax export   runs/demo demo_hf
  stacking-jax import   SmolLM-135M runs/smol
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0 done; 2 the user can put it right (one line says how); 75 try again later; 128 + n stopped by
    signal n with everything saved. docs/surviving.md has the codes that others give.
    """
    from stacking_jax import gin_config

    try:
        bindings, rest = gin_config.split_argv(sys.argv[1:] if argv is None else argv)
        parser = _parser()
        arguments = parser.parse_args(_joined(rest))
        if bindings and not hasattr(arguments, "gin_file"):
            raise UserError(f"{arguments.command} takes no --gin bindings")
        arguments.bindings = bindings
        if argv is None and arguments.command in _COMPUTES:
            host_memory.keep_freed_memory()
        gin_config.import_modules(getattr(arguments, "gin_import", ()))
        with cli_processes.joined(arguments, _report):
            return arguments.run(arguments) or 0
    except (UserError, KeyboardInterrupt, BrokenPipeError) as error:
        return _report(error)


def _report(error: BaseException) -> int:
    """Prints what ended a command; returns its exit code."""
    if isinstance(error, UserError):
        # One line, whatever the message quotes.
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # The reader of a pipe has gone, as in `... | head`.
        sys.stderr.close()
        return 141
    traceback.print_exception(error)
    return 1


def _joined(words: Sequence[str]) -> list[str]:
    """Keeps together `--pipeline_options --a=1`, whose value looks like an option itself."""
    words, name = list(words), "--pipeline_options"
    if name in words[:-1]:
        place = words.index(name)
        words[place : place + 2] = [f"{name}={words[place + 1]}"]
    return words


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
    _gin_arguments(train, required=False)
    train.add_argument("--run_dir", required=True, metavar="D", help="where the run is kept")
    train.add_argument(
        "--stop_at", type=int, metavar="N", help="save and leave off after N steps in all"
    )
    train.add_argument(
        "--profile", metavar="FIRST:LAST",
        help="write a trace of these steps, such as 10:15, below the run directory (process 0)",
    )
    cli_processes.add_arguments(train)

    plan = command("plan", _plan, "print the stages of a run and their cost, before it starts")
    _gin_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object instead")
    plan.add_argument(
        "--topology", nargs="?", const="", metavar="T",
        help="compile every stage for chips that need not be here, such as v5p:4x4x8 or v5e:16x16; "
        "h100:8x4 by formula; local measures too; no value: PlanConfig.topology",
    )

    cache = command("cache", _cache, "tokenise and pack the data of a run, if not done yet")
    _gin_arguments(cache)
    cache.add_argument(
        "--runner", metavar="NAME",
        help="make it by an Apache Beam pipeline on this runner, such as DirectRunner",
    )
    cache.add_argument(
        "--pipeline_options", default="", metavar="A=B,C=D",
        help="of that runner, such as direct_num_workers=2,direct_running_mode=multi_processing",
    )

    labels = command(
        "distill-cache", _distill_cache,
        "keep a teacher's most probable tokens and its scores for all training records",
    )
    _gin_arguments(labels)
    labels.add_argument("--out", required=True, metavar="F", help="the folder of the labels")
    labels.add_argument(
        "--dtype", default="float32", metavar="T",
        help="of the log-probabilities: float32 (default) or float16",
    )
    cli_processes.add_arguments(labels)  # Refused: a job's processes would all write.

    vocab = command("vocab", _vocab, "train a SentencePiece vocabulary from the texts of a run")
    _gin_arguments(vocab)
    vocab.add_argument("--out", required=True, metavar="F", help="the new .model file")
    vocab.add_argument("--vocab_size", type=int, default=32000, metavar="N",
                       help="ids in all, sentinels included (default 32000)")
    vocab.add_argument("--extra_ids", type=int, default=100, metavar="N",
                       help="room for sentinels, which DataConfig.extra_ids appends (100)")
    vocab.add_argument("--sample", default="10MB", metavar="SIZE",
                       help="text to learn from, such as 500kB, or all (default 10MB)")
    vocab.add_argument("--seed", type=int, default=0, help="of the sample")
    vocab.add_argument("--model_type", default="bpe", metavar="KIND",
                       help="bpe (default), or unigram as T5's")
    vocab.add_argument("--symbol", action="append", default=[], metavar="TEXT",
                       help="one piece wherever it occurs (repeatable)")

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
    sample.add_argument("--loops", type=int, metavar="N", help="of a looped model, how often")
    cli_processes.add_arguments(sample)

    cli_evaluation.add_commands(command, _gin_arguments)
    cli_select.add_commands(command)
    cli_analysis.add_commands(command)
    cli_study.add_commands(command, _gin_arguments)
    cli_lab.add_commands(command)

    compare = command("compare", _compare, "set runs side by side, in a table and a report")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or one study")
    compare.add_argument("--out", metavar="report.html", help="write one self-contained HTML page")
    compare.add_argument("--json", action="store_true", help="print one JSON object instead")

    grow = command("grow", _grow, "deepen a checkpoint on disk: a run's, or a Hugging Face folder")
    grow.add_argument("source", metavar="SRC", help="RUN, RUN/checkpoints/N or a model folder")
    grow.add_argument("target", metavar="DST", help="the new folder, of the same kind")
    grow.add_argument("--operator", metavar="NAME", help="such as midas, gradstack or g_stack")
    grow.add_argument("--to", type=int, metavar="N", help="layers to reach")
    grow.add_argument("--block", type=int, metavar="B", help="layers per block")
    grow.add_argument("--keep_first", type=int, default=0, metavar="N", help="never repeated")
    grow.add_argument("--keep_last", type=int, default=0, metavar="N", help="never repeated")
    grow.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="another argument of the operator, such as reading=literal (repeatable)",
    )
    grow.add_argument(
        "--map", metavar="'0 1 0 1'", help="in place of an operator: the source of each layer"
    )
    grow.add_argument(
        "--init", default="copy", metavar="START",
        help="how copies begin: copy, or identity (the function is unchanged)",
    )
    grow.add_argument(
        "--moments", metavar="POLICY",
        help="what the optimiser knows of copies: copy (default), zero, reset_copies, ...",
    )
    grow.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    grow.add_argument("--total_steps", type=int, metavar="N", help="of the grown run")
    _max_shard_size(grow)

    export = command("export", _export, "write a run's model as a Hugging Face Llama folder")
    export.add_argument("source", metavar="RUN", help="RUN or RUN/checkpoints/N")
    export.add_argument("out", metavar="OUT", help="the new folder")
    export.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    export.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    _max_shard_size(export)

    imports = command("import", _import, "make a run of a Hugging Face folder (Llama family)")
    imports.add_argument("source", metavar="HF_FOLDER", help="config.json and safetensors")
    imports.add_argument("out", metavar="OUT", help="the new run directory")
    _gin_arguments(imports, required=False)
    return parser


def _max_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE",
        help="more goes into several safetensors files, such as 500MB",
    )


def _gin_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--gin_file", action="append", default=[], metavar="F", required=required,
        help="a .gin file (repeatable; a later one overrides an earlier one)",
    )
    _gin_import(parser)
    parser.add_argument(
        "--gin.NAME", dest="_documented", metavar="VALUE",
        help="bind a macro or a parameter, such as --gin.TRAIN_STEPS=200 (repeatable)",
    )


def _gin_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin_import", action="append", default=[], metavar="MODULE",
        help="import a module of yours first, one that registers seqio tasks say; .gin files may "
        "import it too (repeatable)",
    )


def _configure(arguments):
    from stacking_jax import configurables, gin_config

    gin_config.load(
        arguments.gin_file, arguments.bindings, configurables.register,
        imports=arguments.gin_import,
    )
    return configurables.configured()


def _train(arguments) -> int:
    from stacking_jax import gin_config
    from stacking_jax.training import Stopped, train
    from stacking_jax.training.profiling import parse_steps

    profile = None if arguments.profile is None else parse_steps(arguments.profile)
    if arguments.gin_file:
        config, gin_text = _configure(arguments), gin_config.operative_text()
    else:
        config, gin_text = _recorded(arguments), None
    try:
        summary = train(
            config, arguments.run_dir, gin_text=gin_text, stop_at=arguments.stop_at,
            profile=profile,
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


def _recorded(arguments):
    """The configuration of the run that lies in the run directory."""
    from stacking_jax.paths import open_path
    from stacking_jax.training.run_directory import read_config

    if arguments.bindings:
        raise UserError("--gin bindings change a configuration; name it with --gin_file")
    if not (open_path(arguments.run_dir) / "config.json").exists():
        raise UserError(
            f"{arguments.run_dir} holds no run to go on with; name its configuration with "
            "--gin_file"
        )
    return read_config(arguments.run_dir)


def _plan(arguments) -> int:
    config = _configure(arguments)
    if arguments.topology is not None:
        from stacking_jax import configurables
        from stacking_jax.planning import PlanConfig, command

        return command.run(
            config, configurables.configured(PlanConfig), arguments.topology,
            as_json=arguments.json, modules=arguments.gin_import,
        )
    plan = config.describe_plan()
    if arguments.json:
        print(json.dumps(plan))
    else:
        from stacking_jax.reporting import plan_table

        print(plan_table(plan, color=sys.stdout.isatty()))
    return 0


def _cache(arguments) -> int:
    from stacking_jax.data import PackedBatches, open_cache
    from stacking_jax.data.beam_pipeline import options_of

    pipeline = options_of(arguments.runner, arguments.pipeline_options, arguments.gin_import)
    config = _configure(arguments)
    cache = open_cache(config.data, pipeline)
    manifest = cache.manifest
    data = PackedBatches(
        cache, batch_size=config.batch_size, seed=config.seed, total_steps=config.total_steps
    )
    passes = data.passes(config.total_steps)
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.records:,} records of {manifest.sequence_length}, digest {split.digest[:12]}"
        )
    for name, times in passes.items():
        print(f"{name}: read {times:.2f} times in {config.total_steps:,} steps")
    return 0


def _distill_cache(arguments) -> int:
    from stacking_jax.training.teach_cache import make_teacher_cache

    labels = make_teacher_cache(_configure(arguments), arguments.out, arguments.dtype)
    manifest = labels.manifest
    for info in manifest.passes:
        print(
            f"{info.source}, pass {info.number}: {info.records:,} records, {manifest.top_k} tokens "
            f"each, digest {manifest.digest[:12]}"
        )
    return 0


def _vocab(arguments) -> int:
    from stacking_jax.data import vocab_command

    vocab_command.run(_configure(arguments).data, arguments)
    return 0


def _generate(arguments) -> int:
    from stacking_jax.training.generation import sample_from_run

    texts = sample_from_run(
        arguments.run_dir, arguments.prompt, step=arguments.step,
        num_samples=arguments.num_samples, max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        seed=arguments.seed, loops=arguments.loops,
    )
    for number, text in enumerate(texts):
        if number:
            print("-" * 40)
        print(arguments.prompt + text)
    return 0


def _compare(arguments) -> int:
    if cli_study.is_study(arguments):
        return cli_study.report(arguments.runs[0], arguments.out, arguments.json)
    from stacking_jax.reporting import compare

    compare(arguments.runs, arguments.out, as_json=arguments.json)
    return 0


def _grow(arguments) -> int:
    from stacking_jax.growth import growth_map
    from stacking_jax.interop import grow_folder

    options = {"keep_first": arguments.keep_first, "keep_last": arguments.keep_last}
    options = {name: value for name, value in options.items() if value}
    options |= dict(_option(text) for text in arguments.option)
    if arguments.block is not None:
        options["block"] = arguments.block
    if arguments.map is not None:
        given = {"operator": arguments.operator, "to": arguments.to, "option": options or None}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--map says what each layer is, so there is no --{name} beside it")
        depth_map = _layers(arguments.map)
    elif arguments.operator is None or arguments.to is None:
        raise UserError("name an operator and the depth to reach, such as --operator midas --to 16")
    else:

        def depth_map(depth):
            return growth_map(arguments.operator, depth, arguments.to, **options)

    grow_folder(
        arguments.source, arguments.target, depth_map, init=arguments.init,
        moments=arguments.moments, step=arguments.step, total_steps=arguments.total_steps,
        operator=arguments.operator, options=options, max_shard_size=arguments.max_shard_size,
    )
    print(f"grown: {arguments.target}")
    return 0


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--option takes NAME=VALUE, such as reading=literal; got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _layers(text: str) -> list[int]:
    try:
        return [int(layer) for layer in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--map holds numbers of layers, such as '0 1 0 1'; got {text!r}") from None


def _export(arguments) -> int:
    from stacking_jax.interop import export_run

    export_run(
        arguments.source, arguments.out, step=arguments.step, dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
    )
    print(f"exported: {arguments.out}")
    return 0


def _import(arguments) -> int:
    from stacking_jax.interop import import_folder

    config = digest = None
    if arguments.gin_file:
        from stacking_jax.data import open_cache

        config = _configure(arguments)
        digest = open_cache(config.data).manifest.digest
    elif arguments.bindings:
        raise UserError("--gin bindings change a configuration; name it with --gin_file")
    import_folder(arguments.source, arguments.out, config=config, data_digest=digest)
    print(f"imported: {arguments.out}")
    return 0
