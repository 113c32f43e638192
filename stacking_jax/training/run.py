"""A run under way: begun or taken up, its state and its books, and how they are saved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from stacking_jax.console import say
from stacking_jax.errors import UserError
from stacking_jax.training import spikes
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compile_ahead import CompileAhead
from stacking_jax.training.decisions import Decision, Decisions
from stacking_jax.training.goodput import Goodput
from stacking_jax.training.programs import Programs
from stacking_jax.training.record_log import RecordLog
from stacking_jax.training.recorder import Counters, Recorder
from stacking_jax.training.setup import Setup
from stacking_jax.training.state import TrainState, sharded_initial_state
from stacking_jax.training.telemetry import Clock, MetricsLog, write_json
from stacking_jax.training.triggers import Watch
from stacking_jax.training.watchdog import watched


@dataclasses.dataclass
class Run:
    """What the steps of a run change.

    Attributes:
      setup: what they do not.
      clock: of this process and the ones before it.
      checkpoints: of the run directory.
      state: on the devices.
      depth: stored layers of the state.
      first_step: updates done when this process began with its steps.
      history: growths and spikes so far.
      scores: of the last held-out evaluation, or None.
      skipped_batches: left out by rewinding so far.
      recorder: of metrics, with the counters.
      goodput: the account of the wall time.
      log: metrics.jsonl; of process 0 alone.
      decisions: taken so far; `setup.plan` has them.
      watch: of the trigger that brings boundaries forward; None without one.
      records: which records each step was given, where that is asked for.
      programs: what the present stage runs; None before the first.
      ahead: what the next stage runs, under way; None where nothing is.
      compile_seconds: the longest that compiling a stage in its turn took.
      teacher: what a train step takes beside state and batch: a teacher's parameters, in the
        stages in which it runs.
    """

    setup: Setup
    clock: Clock
    checkpoints: Checkpoints
    state: TrainState
    depth: int
    first_step: int
    history: list[dict[str, Any]]
    scores: dict[str, float] | None
    skipped_batches: int
    recorder: Recorder
    goodput: Goodput
    log: MetricsLog | None
    records: RecordLog | None
    decisions: Decisions
    watch: Watch | None = None
    programs: Programs | None = None
    ahead: CompileAhead[Programs] | None = None
    compile_seconds: float = 0.0
    teacher: tuple[Any, ...] = ()

    @property
    def counters(self) -> Counters:
        return self.recorder.counters

    def grows_into(self, number: int) -> bool:
        """Whether the state has yet to grow into stage `number`."""
        stage = self.setup.plan.stages[number]
        done = any(
            entry["step"] == stage.start and "to_depth" in entry for entry in self.history
        )
        return stage.grows and stage.start >= self.first_step and not done

    def take(self, decision: Decision) -> Decision:
        """Records a decision, that of process 0, and goes on by it; returns it."""
        decision = self.decisions.record(decision)
        self.setup = self.setup.decided(self.decisions.taken)
        self.recorder.follow(self.setup.plan, self.setup.flops_at)
        write_decided_plan(self.setup)
        return decision

    def write_goodput(self, step: int) -> dict[str, Any]:
        """The account of the wall time until now; see `Goodput.write`."""
        return self.goodput.write(step, self.counters.stages)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes what was opened, however the run ends."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._give_up_ahead)  # Last, when all is on disk: it may have to wait.
            for opened in (self.log, self.goodput, self.records, self.checkpoints):
                if opened is not None:
                    stack.enter_context(contextlib.closing(opened))
            yield

    def _give_up_ahead(self) -> None:
        if self.ahead is not None:
            with self.clock.section("compile"):
                self.ahead.close()

    def forget_ahead(self) -> None:
        """Gives up what was compiled for a boundary that comes elsewhere."""
        self._give_up_ahead()
        self.ahead = None

    def save(self, step: int) -> None:
        """Starts to save the checkpoint of `step`, within a stage or at its end.

        Raises:
          UserError: if the state is not finite, or a checkpoint cannot be written.
        """
        plan, config = self.setup.plan, self.setup.config
        with self.clock.section("checkpoint"):
            if not self.programs.finite(self.state):
                raise self.recorder.diverged(
                    f"parameters or moments are not finite at step {step}"
                )
            if self.log is not None:
                self.log.flush()
            self.checkpoints.save(
                self.state,
                {
                    "step": step, "stage": plan.stage_at(step - 1), "depth": self.depth,
                    "history": list(self.history),
                    "plan": [stage.to_dict() for stage in plan.stages],
                    "config": config.to_dict(), "counters": dataclasses.asdict(self.counters),
                    "scores": self.scores, "seconds": self.clock.read(),
                    "skipped_batches": self.skipped_batches,
                    "decisions": list(self.decisions.taken),
                    "watch": None if self.watch is None else self.watch.seen,
                },
            )
        self.recorder.last_good_checkpoint = step
        self.write_goodput(step)


def open_run(
    setup: Setup, clock: Clock, rewind: spikes.Rewind | None,
    own_teacher: dict[str, Any] | None = None,
) -> Run:
    """Begins a run, or takes it up from its newest checkpoint.

    Args:
      setup: what it is made of; its run directory is there.
      clock: of this process.
      rewind: the loss spike before which it goes back, or None.
      own_teacher: the summary of the teacher that the run has trained, whose time it is charged.

    Raises:
      UserError: if there is nothing left to do.
    """
    config, plan, run_dir = setup.config, setup.plan, setup.run_dir
    checkpoints = Checkpoints(
        run_dir / "checkpoints", config.keep_checkpoints, digests=config.checkpoint_digests
    )
    with clock.section("restore"), watched(clock, config, run_dir):
        if rewind is not None:
            checkpoints.drop_after(
                spikes.rewind_target(rewind.step, config.checkpoint_every, checkpoints.steps())
            )
        restored = checkpoints.restore_latest(setup.shapes)
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
        abstract = spikes.without_window(setup.shapes(depth))
        state = sharded_initial_state(config.model, setup.optimizer, config.seed, abstract)
    if not resumed or spikes.grown_on_disk(history, first_step):
        state = spikes.empty_window(state, setup.shapes(depth))
    history, skipped_batches = spikes.taken_up(
        rewind, first_step, history, meta.get("skipped_batches", 0)
    )

    decisions = Decisions.open(run_dir, meta.get("decisions") or ())
    setup = setup.decided(decisions.taken)
    write_decided_plan(setup)
    # Of trials after the checkpoint the outcome is kept, and so their time was not lost.
    known = meta.get("decisions") or ()
    tried = sum(d["cost"]["seconds"] for d in decisions.taken if "cost" in d and d not in known)
    clock.go_on_from({"choose": tried} if tried else {})
    watch = None
    if config.choice.trigger is not None:
        watch = Watch(
            config.choice, config.plan(), config.costs(), config.tokens_per_step,
            meta.get("watch"),
        )
    if own_teacher is not None:
        # Of all its restarts, however many processes this run has had since.
        clock.seconds["teacher"] = own_teacher["wall_seconds"]

    main_process = jax.process_index() == 0
    resume_step = first_step if resumed else None
    goodput = Goodput(run_dir, clock, writes=main_process)
    began = own_teacher["goodput"]["began_unix_time"] if own_teacher else None
    lost = goodput.begin(first_step, {**meta.get("seconds", {}), "tried": tried}, began)
    goodput.write(first_step, counters.stages)
    log = MetricsLog(run_dir, resume_step) if main_process else None
    records = RecordLog(run_dir, first_step) if config.log_records else None
    recorder = Recorder(
        setup.plan, counters, clock, log,
        flops_at=setup.flops_at, log_every=config.log_every, on_nan=config.on_nan,
        spikes=spikes.SpikeWatch(config.spikes, history, skipped_batches),
        train_seconds_before=own_teacher["train_seconds"] if own_teacher else 0.0,
        watch=watch,
    )
    recorder.last_good_checkpoint = resume_step
    if resumed:
        recorder.event("resume", first_step, depth=depth, **lost)
    if rewind is not None:
        recorder.event(
            "rewind", first_step, from_step=rewind.step, skipped_batches=skipped_batches
        )
    return Run(
        setup, clock, checkpoints, state, depth, first_step, history, scores, skipped_batches,
        recorder, goodput, log, records, decisions, watch,
    )


def write_decided_plan(setup: Setup) -> None:
    """plan.json as it has become, where something has been decided."""
    if setup.decisions and jax.process_index() == 0:
        write_json(setup.run_dir / "plan.json", setup.described_plan())
