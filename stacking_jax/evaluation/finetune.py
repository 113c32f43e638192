"""Fine-tuning of a checkpoint on a few examples of a task, scored as it goes.

The recipe of the MIDAS paper (App. B.2) is `gin/finetune/primitives.gin`: what a model can
*learn* of a primitive from 64 examples says more than what it does without any.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.console import progress, say
from stacking_jax.errors import UserError
from stacking_jax.evaluation import model as models
from stacking_jax.evaluation import registry, results
from stacking_jax.evaluation.evaluate import PreparedTask, TaskResult, evaluate_task, prepare
from stacking_jax.evaluation.finetune_config import FinetuneConfig
from stacking_jax.evaluation.finetune_data import Examples, encode_examples
from stacking_jax.evaluation.finetune_results import read_dataset, summarise, write_dataset
from stacking_jax.evaluation.model import LanguageModel, RunModels
from stacking_jax.evaluation.task import EvalTask
from stacking_jax.models import LAYOUT
from stacking_jax.paths import make_folder, open_path
from stacking_jax.training import consensus, distributed, sharding
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.schedules import learning_rate
from stacking_jax.training.state import TrainState, abstract_state, shardings_of
from stacking_jax.training.step import make_train_step
from stacking_jax.training.telemetry import write_json


def finetune(
    run_dir: str | Path, out: str | Path, config: FinetuneConfig, *, step: int | None = None
) -> dict[str, Any]:
    """Fine-tunes a checkpoint, once per dataset, and scores it on the way.

    A dataset that is done is kept in `out`, so that the same command goes on after an
    interruption with the next one.

    Args:
      run_dir: of a run of `train`, which is left as it is.
      out: the folder of the results.
      config: what is learned, how, and when it is scored.
      step: of the checkpoint; None for the newest.

    Returns:
      What `result.json` holds: per task the mean over steps and datasets, and the curves.

    Raises:
      UserError: for what the user can put right, such as an `out` that holds the results
        of another fine-tuning, or an example that does not fit into the context.
    """
    if config.tasks is None:
        raise UserError("name the tasks to learn: --task NAME, or bind FinetuneConfig.tasks")
    run = models.RunModels(run_dir, config.evaluation)
    step = run.choose(step)
    out = open_path(out)
    settings = dataclasses.replace(config.evaluation, limit=config.eval_examples, seed=config.seed)
    tasks = registry.find(
        config.tasks, eval_data_dir=settings.data_dir, bad_rows=settings.bad_rows,
        shots=settings.shots,
    )
    about = {
        "run": str(run_dir), "step": step, "tasks": [task.name for task in tasks],
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }  # fmt: skip
    with distributed.main_process_first("finetune"):
        _check_folder(out, about)
    prepared = [prepare(task, settings) for task in tasks]
    datasets = []
    for number in range(config.num_datasets):
        done = consensus.from_first(read_dataset(out, number))
        if done is None:
            done = _one_dataset(run, step, out, config, settings, tasks, prepared, number)
            if jax.process_index() == 0:
                write_dataset(out, number, done)
        else:
            say(f"dataset {number + 1} of {config.num_datasets} is already there")
        datasets.append(done)
    result = about | summarise(tasks, datasets)
    if jax.process_index() == 0:
        write_json(out / "result.json", result)
    return result


def _check_folder(out: Path, about: dict[str, Any]) -> None:
    path = out / "settings.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != about:
            raise UserError(f"{out} holds another fine-tuning; use another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no fine-tuning; use another --out")
    if jax.process_index() == 0:
        try:
            make_folder(out)
        except OSError as error:
            raise UserError(f"{out} cannot be made: {error.strerror}; use another --out") from error
        write_json(path, about)


def _one_dataset(
    run: RunModels, step: int, out: Path, config: FinetuneConfig, settings: Any,
    tasks: Sequence[EvalTask], prepared: Sequence[PreparedTask], number: int,
) -> dict[str, Any]:  # fmt: skip
    """Learns one dataset; returns its curve."""
    model = run.load(step)
    examples = encode_examples(model, tasks, config.examples_per_task, config.seed + number)
    train_step, state = _start(run, step, model, config)
    batch_of = _batches(model, examples, config, number)
    evaluated = set(config.evaluated_steps())
    curve: list[dict[str, Any]] = []
    latest: list[TaskResult] = []
    losses: list[Any] = []
    title = f"dataset {number + 1} of {config.num_datasets}"
    with progress(title, config.total_steps, "steps") as advance:
        for done in range(config.total_steps + 1):
            if done:
                state, metrics = train_step(state, batch_of(done))
                losses.append(metrics["loss"])
                # One step ahead at most, as in training.
                jax.block_until_ready(losses[-2:-1])
                advance(1)
            if done in evaluated:
                now = dataclasses.replace(model, params=state.params)
                latest = [evaluate_task(now, each, settings) for each in prepared]
                loss = float(losses[-1]) if losses else None
                curve.append(
                    {
                        "step": done, "loss": loss,
                        "scores": {result.task: result.value for result in latest},
                    }
                )  # fmt: skip
                shown = [f"{r.value:.1f}" if r.value is not None else "-" for r in latest]
                advance(0, f"loss {loss or 0:.3f} · {' / '.join(shown)}")
    if jax.process_index() == 0:
        folder = results.step_folder(out / f"dataset-{number}", config.total_steps)
        results.write_results(folder, latest, settings)
    return {
        "dataset": number,
        "examples": examples.count,
        "losses": [float(loss) for loss in losses],
        "curve": curve,
        "tasks": {result.task: result.to_dict() for result in latest},
    }


def _start(
    run: RunModels, step: int, model: LanguageModel, config: FinetuneConfig
) -> tuple[Callable, TrainState]:
    """The compiled step and its first state: the checkpoint's parameters, fresh moments."""
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    abstract = abstract_state(run.config.model, optimizer, run.depth(step), model.mesh)
    shardings = shardings_of(abstract)
    train_step = make_train_step(
        model.graph,
        optimizer,
        learning_rate(config.optimizer, config.total_steps),
        clip_norm=config.optimizer.clip_norm,
        # As it is evaluated, with the loops that were asked for.
        stack=lambda step: model.runs,
        constrain=model.constrain,
    )
    begin = jax.jit(
        lambda params: TrainState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params)
        ),
        out_shardings=shardings,
    )
    step_program = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    return step_program, begin(model.params)


def _batches(
    model: LanguageModel, examples: Examples, config: FinetuneConfig, number: int
) -> Callable[[int], dict[str, jax.Array]]:
    """From the number of the update, counted from 1, to its batch on the devices."""
    count, parts = examples.count, model.parts
    size = min(config.batch_size or count, count)
    rows = -(-size // parts) * parts

    def place(chosen: np.ndarray) -> dict[str, jax.Array]:
        local = examples.batch(chosen, rows, model.local_rows(rows))
        return sharding.place_batch(local, model.mesh)

    if size == count:
        whole = place(np.arange(count))
        return lambda step: whole

    def batch_of(step: int) -> dict[str, jax.Array]:
        places = np.arange((step - 1) * size, step * size)
        orders = {
            epoch: np.random.default_rng([config.seed, number, epoch]).permutation(count)
            for epoch in np.unique(places // count).tolist()
        }
        return place(np.array([orders[place // count][place % count] for place in places.tolist()]))

    return batch_of


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints the result: one JSON object, or a table."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    from stacking_jax.evaluation.finetune_results import result_table
    from stacking_jax.reporting.command import terminal

    print(result_table(result, **terminal()), end="")
