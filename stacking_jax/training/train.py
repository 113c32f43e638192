"""A training run, from an empty folder to its summary. Read it top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.console import progress, say, warn
from stacking_jax.data import MixedCache, PackedBatches, PackedCache, open_cache
from stacking_jax.data.records import BATCH_KEYS
from stacking_jax.errors import UserError
from stacking_jax.growth import Plan, Stage
from stacking_jax.models import LAYOUT
from stacking_jax.models.kernels import check_documents
from stacking_jax.paths import open_path
from stacking_jax.training import agreement, run_directory, sharding, spikes
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.goodput import Goodput
from stacking_jax.training.growing import check_growths, growth_program, ramp_of
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.record_log import RecordLog
from stacking_jax.training.recorder import Counters, Recorder
from stacking_jax.training.schedules import learning_rate
from stacking_jax.training.state import (
    TrainState,
    abstract_state,
    model_graph,
    sharded_initial_state,
)
from stacking_jax.training.step import all_finite, make_eval_step, make_train_step
from stacking_jax.training.stopping import stop_signals
from stacking_jax.training.summary import describe, summarise
from stacking_jax.training.telemetry import Clock, MetricsLog, write_json
from stacking_jax.training.watchdog import watched


class Stopped(Exception):
    """The run was asked to stop before its end; a checkpoint of `step` is on disk."""

    def __init__(self, step: int, signal_number: int | None):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.step = step
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a stage runs, compiled."""

    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    eval_step: Callable[[Any, dict, Any], tuple[Any, Any]]


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    gin_text: str | None = None,
    stop_at: int | None = None,
) -> dict:
    """Trains, or goes on where the run in `run_dir` stopped.

    Args:
      config: everything that defines the run.
      run_dir: an empty or new folder, or one that holds this same run.
      gin_text: the operative gin configuration, kept beside the run for people.
      stop_at: leave off after this many updates in all, as an interruption would.

    Returns:
      The summary that is also written to `summary.json`. Of a run that has one
      already, that one; nothing runs then.

    Raises:
      Stopped: after SIGTERM, SIGINT or `stop_at`, with a checkpoint saved.
      UserError: for anything that the user can put right.
    """
    rewind = None
    while True:  # Once, but for loss spikes.
        try:
            return _train(config, run_dir, gin_text, stop_at, rewind)
        except spikes.Rewind as found:
            rewind = found


def _train(
    config: TrainConfig, run_dir: str | Path, gin_text: str | None, stop_at: int | None,
    rewind: spikes.Rewind | None,
) -> dict:
    """`train`, or the part of it until a loss spike; `rewind` is the one before."""
    clock = Clock()
    run_dir = open_path(run_dir)
    if stop_at is not None and stop_at < 1:
        raise UserError(f"stop_at counts steps from 1; got {stop_at}")
    run_directory.check(run_dir, config)
    finished = run_directory.read_summary(run_dir)
    if finished is not None:
        say(f"{run_dir} is already complete; nothing is left to do")
        return finished

    # ---- Devices, plan, data ---------------------------------------------------------
    use_compilation_cache(config.compilation_cache)
    plan = config.plan()
    costs = config.model.costs(config.data.sequence_length)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(
        mesh, config.batch_size, config.microbatches, config.data.sequence_length
    )
    with clock.section("data"):
        cache = open_cache(config.data)
        check_vocabulary(config, cache)
        data = PackedBatches(cache, "train", batch_size=config.batch_size, seed=config.seed)
        sharding.check_attention(
            mesh, config.model, config.batch_size // config.microbatches,
            config.data.sequence_length, "prefix" in data.keys,
        )
        passes = data.passes(config.total_steps)
        held_out = HeldOut.open(cache, config)
        tasks = _task_evaluation(config, run_dir, mesh)

    # ---- Model, optimiser, shapes ----------------------------------------------------
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    graph = model_graph(config.model)

    @functools.cache  # Every depth is asked for several times, and traced once.
    def shapes(depth: int) -> TrainState:
        abstract = abstract_state(config.model, optimizer, depth, mesh)
        return spikes.with_window(abstract, config.spikes, mesh)

    def flops_at(step: int) -> float:
        """Cumulative model FLOPs after `step` updates, padding included."""
        done = [min(max(step - stage.start, 0), stage.steps) for stage in plan.stages]
        return config.tokens_per_step * sum(
            steps * costs.flops_per_token(stage.depth)
            for steps, stage in zip(done, plan.stages, strict=True)
        )

    # ---- The run directory, once everything has been found to fit ----------------------
    shapes(plan.final_depth)
    check_growths(config, optimizer, plan, shapes)
    if config.growth.moments == "copy_first":
        warn(
            "GrowthConfig.moments = 'copy_first': copies keep their source's first moment and "
            "forget the second; 'copy' or 'reset_copies' is the safer choice"
        )
    about = describe(config, run_dir, cache, held_out, passes)
    agreement.check_agreement(config, cache.manifest.digest, run_dir, stop_at)
    run_directory.prepare(run_dir, config, cache.manifest.digest, gin_text, about)

    # ---- Go on, or begin -------------------------------------------------------------
    checkpoints = Checkpoints(
        run_dir / "checkpoints", config.keep_checkpoints, digests=config.checkpoint_digests
    )
    with clock.section("restore"), watched(clock, config, run_dir):
        if rewind is not None:
            checkpoints.drop_after(
                spikes.rewind_target(rewind.step, config.checkpoint_every, checkpoints.steps())
            )
        restored = checkpoints.restore_latest(shapes)
    resumed = restored is not None
    if resumed:
        state, meta = restored
        # Else its old arrays would outlive a growth, beside the old and the new state.
        del restored
        counters = Counters(**meta["counters"])
        history, depth, first_step = meta["history"], int(meta["depth"]), int(meta["step"])
        scores = meta["scores"]
        clock.go_on_from(meta["seconds"])
        if scores is None and first_step >= plan.total_steps:
            raise UserError(
                f"{run_dir} was grown after its last step, {first_step}: there is nothing left to "
                "train; grow the run again with --total_steps, to more than that"
            )
        say(f"going on from checkpoint {first_step} of {run_dir} ({depth} layers)")
    else:
        counters, history, depth, first_step = Counters.of(plan), [], plan.stages[0].depth, 0
        scores, meta = None, {}
        abstract = spikes.without_window(shapes(depth))
        state = sharded_initial_state(config.model, optimizer, config.seed, abstract)
    if not resumed or spikes.grown_on_disk(history, first_step):
        state = spikes.empty_window(state, shapes(depth))
    history, skipped_batches = spikes.taken_up(
        rewind, first_step, history, meta.get("skipped_batches", 0)
    )
    main_process = jax.process_index() == 0
    resume_step = first_step if resumed else None
    goodput = Goodput(run_dir, clock, writes=main_process)
    lost = goodput.begin(first_step, meta.get("seconds", {}))
    goodput.write(first_step, counters.stages)
    log = MetricsLog(run_dir, resume_step) if main_process else None
    records = RecordLog(run_dir, first_step) if config.log_records else None
    recorder = Recorder(
        plan, counters, clock, log,
        flops_at=flops_at, log_every=config.log_every, on_nan=config.on_nan,
        spikes=spikes.SpikeWatch(config.spikes, history, skipped_batches),
    )
    recorder.last_good_checkpoint = resume_step
    if resumed:
        recorder.event("resume", first_step, depth=depth, **lost)
    if rewind is not None:
        recorder.event(
            "rewind", first_step, from_step=rewind.step, skipped_batches=skipped_batches
        )

    def save(step: int) -> None:
        with clock.section("checkpoint"):
            if not all_finite(state):
                raise recorder.diverged(f"parameters or moments are not finite at step {step}")
            if log is not None:
                log.flush()
            checkpoints.save(
                state,
                {
                    "step": step, "stage": plan.stage_at(step - 1), "depth": depth,
                    "history": list(history), "plan": [dataclasses.asdict(s) | {
                        "grow_map": list(s.grow_map.sources) if s.grow_map else None
                    } for s in plan.stages],
                    "config": config.to_dict(), "counters": dataclasses.asdict(counters),
                    "scores": scores, "seconds": clock.read(),
                    "skipped_batches": skipped_batches,
                },
            )
        recorder.last_good_checkpoint = step
        goodput.write(step, counters.stages)

    # ---- The loop over stages and steps ----------------------------------------------
    rows = sharding.local_rows(config.batch_size, mesh)
    limit = config.model.max_documents
    with (
        watched(clock, config, run_dir),
        contextlib.closing(log) if log is not None else contextlib.nullcontext(),
        contextlib.closing(goodput),
        contextlib.closing(records) if records is not None else contextlib.nullcontext(),
        contextlib.closing(checkpoints),
        progress("training", plan.total_steps, "steps", start=first_step) as advance,
        stop_signals(first_step) as stop_signal,
        contextlib.closing(data.iterate(first_step + skipped_batches, rows)) as batches,
    ):
        if stop_at is not None and stop_at <= first_step < plan.total_steps:
            raise Stopped(first_step, None)
        for number, stage in enumerate(plan.stages):
            if stage.end <= first_step:
                continue
            advance(0, f"stage {number + 1}/{len(plan.stages)} · {stage.depth} layers · compiling")
            if depth != stage.depth:
                with clock.section("grow"):
                    began = clock.wall
                    grow = growth_program(
                        config.model, config.growth, optimizer, stage, shapes(stage.depth),
                        seed=config.seed,
                    )
                    state = spikes.empty_window(grow(state), shapes(stage.depth))
                    jax.block_until_ready(state)
                    grow_seconds = clock.wall - began
                record = {
                    "from_depth": depth, "to_depth": stage.depth, "operator": stage.operator,
                    "map": list(stage.grow_map.sources), "init": config.growth.init,
                    "moments": config.growth.moments,
                }
                history.append({"step": stage.start, **record})
                counters.stages[number]["grow_seconds"] += grow_seconds
                depth = stage.depth
            else:
                record = None
            with clock.section("compile"):
                began = clock.wall
                programs = compile_stage(
                    config, plan, stage, graph, optimizer, mesh, shapes(depth), data.keys
                )
                compile_seconds = clock.wall - began
            counters.stages[number]["compile_seconds"] += compile_seconds
            goodput.write(max(stage.start, first_step), counters.stages)
            if record is not None:
                recorder.event(
                    "grow", stage.start, **record, seconds=grow_seconds,
                    compile_seconds=compile_seconds,
                )
            ramp = ramp_of(config, stage)
            recorder.restart_speed(max(stage.start, first_step))
            stage_began = clock.read()["step"]

            for step in range(max(stage.start, first_step) + 1, stage.end + 1):
                with clock.section("data"):
                    here = next(batches)[1]
                    check_documents(here["segment_ids"], limit, f"the batch of step {step}")
                    if records is not None:
                        records.write(step, rows, here)
                    batch = sharding.place_batch(here, mesh)
                with clock.section("step"):
                    state, metrics = programs.train_step(state, batch)
                    recorder.push(step, metrics)
                advance(1, recorder.status)

                last = step == plan.total_steps
                stopped_by = stop_signal(step)
                stopping = stopped_by is not None or step == stop_at
                saving = last or stopping or _due(step, config.checkpoint_every)
                scoring = tasks is not None and tasks.due(step, stage.end)
                if scoring and ramp is not None and step < stage.start + config.growth.ramp_steps:
                    say(f"step {step}: no tasks yet, the copies are not let in whole")
                    scoring = False
                # Scores on tasks are read beside the held-out loss of the same step.
                evaluating = last or scoring or _due(step, config.eval_every)
                if saving or evaluating or step == stage.end:
                    with clock.section("step"):
                        recorder.drain()
                        jax.block_until_ready(state)
                    now = clock.read()["step"]
                    counters.stages[number]["seconds"] += now - stage_began
                    stage_began = now
                if evaluating:
                    with clock.section("evaluate"):
                        gates = None if ramp is None else ramp(step)
                        score = lambda *args: programs.eval_step(*args, gates)  # noqa: B023, E731
                        scores = held_out.evaluate(score, state.params, mesh)
                    recorder.event("eval", step, stage=number + 1, depth=depth, **scores)
                    if not math.isfinite(scores["eval_loss"]):
                        raise recorder.diverged(
                            f"held-out loss {scores['eval_loss']} at step {step}"
                        )
                if scoring:
                    with clock.section("evaluate"):
                        for row in tasks.evaluate(state.params, step):
                            recorder.event("task_eval", step, stage=number + 1, depth=depth, **row)
                if saving:
                    save(step)
                if stopping and not last:
                    raise Stopped(step, stopped_by)
        with clock.section("checkpoint"):
            checkpoints.wait()

        # ---- The end: `scores` are those of the last step, in its checkpoint too -------
        summary = about | summarise(config, state, recorder, scores)
    summary["goodput"] = goodput.write(plan.total_steps, counters.stages)
    if main_process:
        write_json(run_dir / "summary.json", summary)
    return summary


def check_vocabulary(config: TrainConfig, cache: PackedCache | MixedCache) -> None:
    """Raises UserError if the data hold ids that the model has no row for."""
    size = cache.manifest.vocab_size
    if size > config.model.vocab_size:
        raise UserError(
            f"the vocabulary {cache.manifest.vocabulary.name} has {size} ids, but the model only "
            f"{config.model.vocab_size}; bind DecoderConfig.vocab_size = {size} or more"
        )


def compile_stage(
    config: TrainConfig, plan: Plan, stage: Stage, graph: Any, optimizer: Any,
    mesh: sharding.LogicalMesh, abstract: TrainState, keys: Sequence[str] = BATCH_KEYS,
) -> Programs:
    """Compiles the train and evaluation steps of a stage, whose state is like `abstract`.

    `keys` are the arrays of a batch, `PackedBatches.keys`.
    """
    ramp = ramp_of(config, stage)
    return Programs(
        lower_train_step(config, plan, stage, graph, optimizer, mesh, abstract, keys).compile(),
        jax.jit(make_eval_step(graph, sharding.constrainer(mesh)))
        .lower(
            abstract.params, abstract_batch(config, mesh, keys),
            None if ramp is None else jax.eval_shape(ramp, 0),
        )
        .compile(),
    )


def lower_train_step(
    config: TrainConfig, plan: Plan, stage: Stage, graph: Any, optimizer: Any,
    mesh: sharding.LogicalMesh, abstract: TrainState, keys: Sequence[str] = BATCH_KEYS,
) -> jax.stages.Lowered:
    """The train step of a stage, traced for `mesh` and not compiled; see `compile_stage`.

    The mesh may be one of devices that are described only, as `planning` has them.
    """
    train_step = make_train_step(
        graph,
        optimizer,
        learning_rate(config.optimizer, plan.total_steps, config.growth, plan.growth_steps),
        clip_norm=config.optimizer.clip_norm,
        z_loss=config.z_loss,
        microbatches=config.microbatches,
        skip_nonfinite=config.on_nan == "skip",
        spikes=config.spikes,
        gates=ramp_of(config, stage),
        constrain=sharding.constrainer(mesh),
    )
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None)).lower(
        abstract, abstract_batch(config, mesh, keys)
    )


def abstract_batch(
    config: TrainConfig, mesh: sharding.LogicalMesh, keys: Sequence[str] = BATCH_KEYS
) -> dict:
    """Shapes, dtypes and shardings of a batch: int32 `[B, L]` for each of `keys`."""
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, config.data.sequence_length), jnp.int32,
        sharding=mesh.sharding(sharding.BATCH),
    )
    return dict.fromkeys(keys, rows)


def _task_evaluation(config: TrainConfig, run_dir: Path, mesh: sharding.LogicalMesh):
    """The evaluation tasks of a run, or None; loaded only where there are some."""
    if not config.evaluate_tasks:
        return None
    from stacking_jax.evaluation.during_training import TaskEvaluation

    return TaskEvaluation(config, run_dir, mesh)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
