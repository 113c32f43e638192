"""The commands that say what a model can do: evaluate, finetune, isoplot."""

from __future__ import annotations

from collections.abc import Callable

from stacking_jax import cli_processes


def add_commands(command: Callable, gin_arguments: Callable) -> None:
    """Adds the subparsers.

    Args:
      command: (name, what runs it, its help) -> a new subparser.
      gin_arguments: (subparser, required) adds `--gin_file` and the like.
    """
    evaluate = command("evaluate", _evaluate, "score checkpoints of a run on tasks")
    evaluate.add_argument("--run_dir", required=True, metavar="D", help="a run of `train`")
    evaluate.add_argument(
        "--tasks", required=True, metavar="T,U",
        help="names of tasks or groups, such as primitives,math_word",
    )
    steps = evaluate.add_mutually_exclusive_group()
    steps.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    steps.add_argument("--all_steps", action="store_true", help="every checkpoint")
    evaluate.add_argument("--shots", type=int, metavar="K", help="of a group, these tasks alone")
    evaluate.add_argument("--limit", type=int, metavar="N", help="examples per task")
    evaluate.add_argument("--seed", type=int, metavar="S", help="of generated examples")
    evaluate.add_argument("--loops", type=int, metavar="N", help="of a looped model, how often")
    evaluate.add_argument("--out", metavar="DIR", help="in place of RUN/evaluations")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead")
    gin_arguments(evaluate, required=False)
    cli_processes.add_arguments(evaluate)

    finetune = command("finetune", _finetune, "train a checkpoint on a task, scoring as it goes")
    finetune.add_argument("--run_dir", required=True, metavar="D", help="a run of `train`")
    finetune.add_argument("--out", required=True, metavar="DIR", help="results, a new folder")
    finetune.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    finetune.add_argument("--task", metavar="T,U", help="in place of those of the gin file")
    finetune.add_argument("--json", action="store_true", help="print one JSON object instead")
    gin_arguments(finetune, required=False)
    cli_processes.add_arguments(finetune)

    isoplot = command("isoplot", _isoplot, "draw scores on tasks against loss, as a PNG")
    isoplot.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    isoplot.add_argument("--out", required=True, metavar="F.png", help="the picture")


def _evaluate(arguments) -> int:
    import dataclasses

    from stacking_jax import configurables, gin_config
    from stacking_jax.evaluation.command import default_out, evaluate_run, show
    from stacking_jax.evaluation.config import EvaluationConfig

    files = ["gin/evaluation.gin", *arguments.gin_file]
    gin_config.load(
        files, arguments.bindings, configurables.register, imports=arguments.gin_import
    )
    given = {name: getattr(arguments, name) for name in ("shots", "limit", "seed", "loops")}
    settings = dataclasses.replace(
        configurables.configured(EvaluationConfig),
        **{name: value for name, value in given.items() if value is not None},
    )
    out = arguments.out or default_out(arguments.run_dir, settings)
    found = evaluate_run(
        arguments.run_dir, arguments.tasks, settings, step=arguments.step,
        all_steps=arguments.all_steps, out=out,
    )
    show(found, out, arguments.json)
    return 0


def _finetune(arguments) -> int:
    import dataclasses

    from stacking_jax import configurables, gin_config
    from stacking_jax.evaluation.finetune import finetune, show
    from stacking_jax.evaluation.finetune_config import FinetuneConfig

    files = arguments.gin_file or ["gin/finetune/primitives.gin"]
    gin_config.load(
        files, arguments.bindings, configurables.register, imports=arguments.gin_import
    )
    config = configurables.configured(FinetuneConfig)
    if arguments.task is not None:
        config = dataclasses.replace(config, tasks=arguments.task)
    show(finetune(arguments.run_dir, arguments.out, config, step=arguments.step), arguments.json)
    return 0


def _isoplot(arguments) -> int:
    from stacking_jax.reporting import compare_runs, read_run
    from stacking_jax.reporting.isoplot import write_png

    write_png(compare_runs([read_run(path) for path in arguments.runs]), arguments.out)
    print(f"drawn: {arguments.out}")
    return 0
