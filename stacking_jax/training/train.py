"""A training run, from an empty folder to its summary. Read it top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from stacking_jax.console import progress, say
from stacking_jax.errors import UserError
from stacking_jax.growth import Stage
from stacking_jax.models.kernels import check_documents
from stacking_jax.paths import open_path
from stacking_jax.training import (
    agreement,
    boundaries,
    consensus,
    distributed,
    lag,
    run_directory,
    sharding,
    spikes,
    teacher,
)
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.compile_ahead import (
    FIRST_STEPS,
    CompileAhead,
    find_compiler_threads,
    niceness,
)
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import ramp_of
from stacking_jax.training.profiling import Profile
from stacking_jax.training.programs import (
    Programs,
    compile_growth,
    compile_in_turn,
    compile_stage,
)
from stacking_jax.training.run import Run, open_run
from stacking_jax.training.setup import Setup
from stacking_jax.training.stopping import stop_signals
from stacking_jax.training.summary import summarise
from stacking_jax.training.telemetry import Clock, write_json
from stacking_jax.training.watchdog import watched
from stacking_jax.training.within_run import FOLDER, config_of_teacher


class Stopped(Exception):
    """The run was asked to stop before its end; a checkpoint of `step` is on disk."""

    def __init__(self, step: int, signal_number: int | None):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.step = step
        self.signal_number = signal_number


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    gin_text: str | None = None,
    stop_at: int | None = None,
    profile: tuple[int, int] | None = None,
) -> dict:
    """Trains, or goes on where the run in `run_dir` stopped.

    Args:
      config: everything that defines the run.
      run_dir: an empty or new folder, or one that holds this same run.
      gin_text: the operative gin configuration, kept beside the run for people.
      stop_at: leave off after this many updates in all, as an interruption would.
      profile: the first and the last step of a trace, see `profiling.Profile`.

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
            return _train(config, run_dir, gin_text, stop_at, profile, rewind)
        except spikes.Rewind as found:
            rewind = found


def _train(
    config: TrainConfig, run_dir: str | Path, gin_text: str | None, stop_at: int | None,
    profile: tuple[int, int] | None, rewind: spikes.Rewind | None,
) -> dict:
    """`train`, or the part of it until a loss spike; `rewind` is the one before."""
    clock = Clock()
    run_dir = open_path(run_dir)
    if stop_at is not None and stop_at < 1:
        raise UserError(f"stop_at counts steps from 1; got {stop_at}")
    trace = Profile(run_dir, profile)
    run_directory.check(run_dir, config)
    finished = run_directory.read_summary(run_dir)
    if finished is not None:
        say(f"{run_dir} is already complete; nothing is left to do")
        return finished

    # ---- Devices, data, shapes; the run directory once everything has been found to fit ----
    config = teacher.settle(config, run_dir)
    if config.compile_ahead and len(config.plan().stages) > 1:
        find_compiler_threads()
    use_compilation_cache(config.compilation_cache)
    setup = Setup.of(config, run_dir, clock)
    agreement.check_agreement(config, setup.data_digest, run_dir, stop_at)
    run_directory.prepare(run_dir, config, setup.data_digest, gin_text, setup.about)
    teacher.record(config, run_dir)

    # ---- A teacher of its own, if it has to train one; it is charged for it ----------
    own = None
    if config.distill.trains_teacher:
        with clock.section("teacher"):
            say(f"training the teacher first, in {run_dir / FOLDER}")
            own = train(config_of_teacher(config), run_dir / FOLDER)

    # ---- Go on, or begin -------------------------------------------------------------
    run = open_run(setup, clock, rewind, own)

    # ---- The loop over stages and steps ----------------------------------------------
    total_steps, first_step = setup.plan.total_steps, run.first_step
    rows = sharding.local_rows(config.batch_size, setup.mesh)
    limit = config.model.max_documents
    with (
        watched(clock, config, run_dir),
        run.closing(),
        progress("training", total_steps, "steps", start=first_step) as advance,
        stop_signals(first_step) as stop_signal,
        contextlib.closing(
            setup.iterate(
                first_step, run.skipped_batches, rows,
                place=functools.partial(sharding.place_batch, mesh=setup.mesh),
                placed=config.device_batches,
            )
        ) as batches,
        contextlib.closing(trace),
    ):
        if stop_at is not None and stop_at <= first_step < total_steps:
            raise Stopped(first_step, None)
        for number in range(len(setup.plan.stages)):
            stage = run.setup.plan.stages[number]
            if stage.end <= first_step:
                continue
            advance(
                0, f"stage {number + 1}/{len(setup.plan.stages)} · {stage.depth} layers · compiling"
            )
            _enter_stage(run, number, lambda start=stage.start: _asked_to_stop(stop_signal, start))
            counted = clock.read()["step"]
            begins = max(stage.start, first_step)
            first_steps = begins + max(min(FIRST_STEPS, stage.steps // 4), 2)

            for step in range(begins + 1, stage.end + 1):
                trace.before(step)
                with clock.section("data"):
                    _, here, batch = next(batches)
                    check_documents(here["segment_ids"], limit, f"the batch of step {step}")
                    if run.records is not None:
                        run.records.write(step, rows, here)
                with clock.section("step"), trace.annotate(step):
                    run.state, metrics = run.programs.train_step(
                        run.state, batch, *run.teacher
                    )
                    run.recorder.push(step, metrics)
                trace.after(step, run.state)
                if step == first_steps + 1:  # Now these have been seen to be done.
                    _account_for_boundary(run, number, first_steps)
                    if stop_at is None or stop_at > stage.end:
                        _compile_ahead(run, number + 1, stage.end - step)
                if run.ahead is not None and step == stage.end - stage.steps // 2:
                    run.ahead.hurry()
                advance(1, run.recorder.status)

                stage = _watch(run, number, step)
                last = step == total_steps
                stopped_by = stop_signal(step)
                stopping = stopped_by is not None or step == stop_at
                saving = last or stopping or _due(step, config.checkpoint_every)
                scoring = _scores_tasks(setup, stage, step)
                # Scores on tasks are read beside the held-out loss of the same step.
                evaluating = (
                    last or scoring or _due(step, config.eval_every)
                    or step == stage.end and run.setup.plan.draws_paths
                )
                if saving or evaluating or step == stage.end:
                    with clock.section("step"):
                        run.recorder.drain()
                        jax.block_until_ready(run.state)
                    now = clock.read()["step"]
                    run.counters.stages[number]["seconds"] += now - counted
                    counted = now
                if evaluating:
                    _evaluate(run, number, step)
                if scoring:
                    _score_tasks(run, number, step)
                if saving:
                    run.save(step)
                if stopping and not last:
                    raise Stopped(step, stopped_by)
                if step == stage.end:  # Which may have come to be here.
                    break
        with clock.section("checkpoint"):
            run.checkpoints.wait()

        # ---- The end: `scores` are those of the last step, in its checkpoint too -------
        summary = setup.about | summarise(
            run.state, run.recorder, run.scores, run.setup.described_plan(), run.decisions.taken,
            own,
        )
    summary["goodput"] = run.write_goodput(total_steps)
    if jax.process_index() == 0:
        write_json(run_dir / "summary.json", summary)
    return summary


def _enter_stage(run: Run, number: int, stop: Callable[[], int | None]) -> None:
    """Has ready what the stage runs, and grows the state if it is not as deep as it yet.

    Raises:
      Stopped: if `stop` says so while it is being chosen how to grow.
    """
    clock, counted = run.clock, run.counters.stages[number]
    programs, ahead_seconds = None, 0.0
    with clock.section("compile"):
        began = clock.wall
        ahead, run.ahead = run.ahead, None
        if ahead is not None:
            programs, ahead_seconds = ahead.take()
            ahead_seconds -= clock.wall - began
        if programs is None:
            in_turn = clock.wall
            programs = compile_stage(*_to_compile(run, number))
            run.compile_seconds = max(run.compile_seconds, clock.wall - in_turn)
        compile_seconds = clock.wall - began
    if lag.is_due(run, number):
        programs = _choose(run, number, programs, stop)
    with clock.section("compile"):
        distributed.meet("stage")
    run.programs = programs
    setup, stage = run.setup, run.setup.plan.stages[number]
    begins = max(stage.start, run.first_step)
    if run.first_step <= stage.start:
        if run.watch is not None:
            run.watch.begin_stage()
        for decision in run.decisions.of_stage(number):
            about = {"decision" if name == "kind" else name: decision[name] for name in decision}
            run.recorder.event("decision", about.pop("step"), **about)
    counted["compile_seconds"] += compile_seconds
    counted["compile_ahead_seconds"] = counted.get("compile_ahead_seconds", 0.0) + max(
        ahead_seconds, 0.0
    )
    if run.grows_into(number):
        with clock.section("grow"):
            began = clock.wall
            run.state = programs.grow(run.state)
            # Else the time of the growth would count as that of the first step.
            jax.block_until_ready(run.state)
            grow_seconds = clock.wall - began
        growth = setup.growth_of(number)
        record = {
            "from_depth": run.depth, "to_depth": stage.depth, "operator": stage.operator,
            "map": list(stage.grow_map.sources), "init": growth.init, "moments": growth.moments,
        }
        run.history.append({"step": stage.start, **record})
        counted["grow_seconds"] += grow_seconds
        run.depth = stage.depth
        run.recorder.event(
            "grow", stage.start, **record, seconds=grow_seconds, compile_seconds=compile_seconds,
            compile_ahead_seconds=max(ahead_seconds, 0.0),
        )
    if not (stage.taught and setup.teacher is not None):
        run.teacher = ()
    elif not run.teacher:
        with clock.section("restore"):
            run.teacher = (setup.teacher.load(setup.mesh),)
    run.write_goodput(begins)
    run.recorder.restart_speed(begins)


def _choose(
    run: Run, number: int, programs: Programs, stop: Callable[[], int | None]
) -> Programs:
    """Chooses how to grow into a stage; returns what it then runs."""
    start = run.setup.plan.stages[number].start
    try:
        lag.choose(run, number, programs, stop)
    except lag.Interrupted as interrupted:
        if start not in run.checkpoints.steps():
            run.save(start)
        raise Stopped(start, interrupted.signal) from None
    with run.clock.section("compile"):
        if run.setup.config.growth.ramp_steps:
            return compile_stage(*_to_compile(run, number))
        return dataclasses.replace(programs, grow=compile_growth(*_to_compile(run, number)))


def _watch(run: Run, number: int, step: int) -> Stage:
    """The stage that trains, which ends with this step if its trigger says so.

    Where it is on record already when it ends, what the trigger says now counts for nothing: a
    clock would say something else than it did.
    """
    stages = run.setup.plan.stages
    stage, watch = stages[number], run.watch
    if watch is None or not watch.due(step) or number + 1 == len(stages) or step >= stage.end:
        return stage
    with run.clock.section("step"):
        run.recorder.drain()
    held_out = None
    if watch.needs_evaluation:
        _evaluate(run, number, step)
        held_out = run.scores["eval_loss"]
    seen = watch.look(
        step, stage.start, number + 1,
        {
            "tokens": run.counters.tokens, "flops": run.setup.flops_at(step),
            "seconds": run.clock.wall,
        },
        held_out,
    )
    known = any(d["kind"] == "boundary" for d in run.decisions.of_stage(number + 1))
    seen = None if known else consensus.from_first(seen)
    if seen is not None:
        run.take({"kind": "boundary", "stage": number + 1, "step": step, **seen})
        run.forget_ahead()
        say(f"step {step}: stage {number + 2} begins, by its trigger ({seen['reason']})")
    return run.setup.plan.stages[number]


def _asked_to_stop(signal_of: Callable[[int], int | None], step: int) -> int | None:
    """The signal to stop for between steps; of several processes, none is asked there."""
    return signal_of(step) if jax.process_count() == 1 else None


def _compile_ahead(run: Run, number: int, steps_left: int) -> None:
    """Begins to compile what stage `number` runs, in the background, if there is such a stage."""
    if run.setup.config.compile_ahead and number < len(run.setup.plan.stages):
        arguments = _to_compile(run, number)
        (_, before), (_, now) = list(run.recorder.done)[-2:]
        seconds_left = steps_left * (now - before)
        run.ahead = CompileAhead(
            number, lambda: compile_in_turn(*arguments, try_out=True),
            niceness(seconds_left, run.compile_seconds),
        )


def _to_compile(run: Run, number: int) -> tuple:
    """The arguments of `compile_stage` for stage `number`, to be entered from where the run is."""
    # As long as it is not known how it grows, the rest is compiled.
    grows = run.grows_into(number) and not lag.is_due(run, number)
    return run.setup.to_compile(number, run.depth if grows else None)


def _account_for_boundary(run: Run, number: int, last: int) -> None:
    """Writes what the boundary before stage `number` cost, once step `last` of it is done."""
    start = run.setup.plan.stages[number].start
    found = boundaries.account(run.clock.spans, run.recorder.done, start, last)
    if number and found is not None:
        run.recorder.event(
            "boundary", last, stage=number + 1, depth=run.depth, start=start, **found
        )


def _evaluate(run: Run, number: int, step: int) -> None:
    """Held-out loss after `step` updates, by the network as it is trained.

    Raises:
      UserError: if it is not finite.
    """
    setup = run.setup
    with run.clock.section("evaluate"):
        run.scores = setup.held_out.evaluate(
            lambda params, batch: run.programs.eval_step(params, batch, np.int32(step)),
            run.state.params, setup.mesh,
        )
    if step == setup.plan.stages[number].end:
        run.counters.stages[number]["eval_loss"] = run.scores["eval_loss"]
    run.recorder.event("eval", step, stage=number + 1, depth=run.depth, **run.scores)
    if not math.isfinite(run.scores["eval_loss"]):
        raise run.recorder.diverged(f"held-out loss {run.scores['eval_loss']} at step {step}")


def _scores_tasks(setup: Setup, stage: Stage, step: int) -> bool:
    """Whether tasks are to be scored after `step`; says so where they are put off."""
    if setup.tasks is None or not setup.tasks.due(step, stage.end):
        return False
    config = setup.config
    if ramp_of(config, stage) is not None and step < stage.start + config.growth.ramp_steps:
        say(f"step {step}: no tasks yet, the copies are not let in whole")
        return False
    return True


def _score_tasks(run: Run, number: int, step: int) -> None:
    stage = run.setup.plan.stages[number]
    with run.clock.section("evaluate"):
        for row in run.setup.tasks.evaluate(run.state.params, step, stage):
            run.recorder.event("task_eval", step, stage=number + 1, depth=run.depth, **row)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
