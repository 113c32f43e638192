"""A training run, from an empty folder to its summary. Read it top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from stacking_jax.console import progress, say
from stacking_jax.data import PackedBatches, PackedCache, open_cache
from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.models import LAYOUT
from stacking_jax.training import run_directory, sharding
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.recorder import Counters, Recorder
from stacking_jax.training.schedules import learning_rate
from stacking_jax.training.state import (
    TrainState,
    abstract_state,
    growth_function,
    model_graph,
    params_digest,
    sharded_initial_state,
)
from stacking_jax.training.step import make_eval_step, make_train_step
from stacking_jax.training.telemetry import Clock, MetricsLog, write_json


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
    eval_step: Callable[[Any, dict], tuple[Any, Any]]


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
      The summary that is also written to `summary.json`.

    Raises:
      Stopped: after SIGTERM, SIGINT or `stop_at`, with a checkpoint saved.
      UserError: for anything that the user can put right.
    """
    clock = Clock()
    run_dir = Path(run_dir).absolute()

    # ---- Devices, plan, data ---------------------------------------------------------
    use_compilation_cache(config.compilation_cache)
    plan = config.plan()
    costs = config.model.costs(config.data.sequence_length)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.microbatches)
    with clock.section("data"):
        cache = open_cache(config.data)
        check_vocabulary(config, cache)
        data = PackedBatches(cache, "train", batch_size=config.batch_size, seed=config.seed)
        held_out = HeldOut.open(cache, config)
    run_directory.prepare(run_dir, config)
    if gin_text is not None and jax.process_index() == 0:
        (run_dir / "config.gin").write_text(gin_text, encoding="utf-8")

    # ---- Model, optimiser, shapes ----------------------------------------------------
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    graph = model_graph(config.model)

    def shapes(depth: int) -> TrainState:
        return abstract_state(config.model, optimizer, depth, mesh)

    def flops_at(step: int) -> float:
        """Cumulative model FLOPs after `step` updates, padding included."""
        done = [min(max(step - stage.start, 0), stage.steps) for stage in plan.stages]
        return config.tokens_per_step * sum(
            steps * costs.flops_per_token(stage.depth)
            for steps, stage in zip(done, plan.stages, strict=True)
        )

    # ---- Go on, or begin -------------------------------------------------------------
    checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
    with clock.section("checkpoint"):
        restored = checkpoints.restore_latest(shapes)
    if restored is not None:
        state, meta = restored
        counters = Counters(**meta["counters"])
        history, depth, first_step = meta["history"], int(meta["depth"]), int(meta["step"])
        clock.go_on_from(meta["seconds"])
        say(f"going on from checkpoint {first_step} of {run_dir} ({depth} layers)")
    else:
        counters, history, depth, first_step = Counters.of(plan), [], plan.stages[0].depth, 0
        state = sharded_initial_state(config.model, optimizer, config.seed, shapes(depth))
    main_process = jax.process_index() == 0
    resume_step = first_step if restored is not None else None
    log = MetricsLog(run_dir, resume_step) if main_process else None
    recorder = Recorder(
        plan, counters, clock, log,
        flops_at=flops_at, log_every=config.log_every, on_nan=config.on_nan,
    )
    recorder.last_good_checkpoint = resume_step
    if restored is not None:
        recorder.event("resume", first_step, depth=depth)

    def save(step: int) -> None:
        if step in checkpoints.steps():
            return
        with clock.section("checkpoint"):
            checkpoints.save(
                state,
                {
                    "step": step, "stage": plan.stage_at(step - 1), "depth": depth,
                    "history": history, "plan": [dataclasses.asdict(s) | {
                        "grow_map": list(s.grow_map.sources) if s.grow_map else None
                    } for s in plan.stages],
                    "config": config.to_dict(), "counters": dataclasses.asdict(counters),
                    "seconds": clock.read(),
                },
            )
        recorder.last_good_checkpoint = step

    def evaluate(step: int, programs: Programs) -> dict[str, float]:
        with clock.section("evaluate"):
            scores = held_out.evaluate(programs.eval_step, state.params, mesh)
        recorder.event("eval", step, stage=plan.stage_at(step - 1) + 1, depth=depth, **scores)
        return scores

    # ---- The loop over stages and steps ----------------------------------------------
    scores: dict[str, float] | None = None
    programs: Programs | None = None
    with (
        progress("training", plan.total_steps, "steps", start=first_step) as advance,
        _stop_signals() as stop_signal,
        contextlib.closing(data.iterate(first_step, sharding.local_rows(config.batch_size))) as batches,
    ):
        for number, stage in enumerate(plan.stages):
            if stage.end <= first_step:
                continue
            if depth != stage.depth:
                with clock.section("grow"):
                    began = clock.wall
                    state = growth_function(stage.grow_map, shapes(stage.depth))(state)
                    jax.block_until_ready(state)
                    grow_seconds = clock.wall - began
                record = {
                    "from_depth": depth, "to_depth": stage.depth, "operator": stage.operator,
                    "map": list(stage.grow_map.sources),
                }
                history.append({"step": stage.start, **record})
                counters.stages[number]["grow_seconds"] += grow_seconds
                depth = stage.depth
            else:
                record = None
            with clock.section("compile"):
                began = clock.wall
                programs = compile_stage(config, plan, graph, optimizer, mesh, shapes(depth))
                compile_seconds = clock.wall - began
            counters.stages[number]["compile_seconds"] += compile_seconds
            if record is not None:
                recorder.event(
                    "grow", stage.start, **record, seconds=grow_seconds,
                    compile_seconds=compile_seconds,
                )
            recorder.restart_speed(max(stage.start, first_step))
            stage_began = clock.read()["step"]

            for step in range(max(stage.start, first_step) + 1, stage.end + 1):
                with clock.section("data"):
                    batch = sharding.place_batch(next(batches)[1], mesh)
                with clock.section("step"):
                    state, metrics = programs.train_step(state, batch)
                    recorder.push(step, metrics)
                advance(1, recorder.status)

                last = step == plan.total_steps
                stopping = stop_signal() is not None or step == stop_at
                saving = last or stopping or _due(step, config.checkpoint_every)
                evaluating = last or _due(step, config.eval_every)
                if saving or evaluating or step == stage.end:
                    with clock.section("step"):
                        recorder.drain()
                        jax.block_until_ready(state)
                    now = clock.read()["step"]
                    counters.stages[number]["seconds"] += now - stage_began
                    stage_began = now
                if evaluating:
                    scores = evaluate(step, programs)
                if saving:
                    save(step)
                if stopping and not last:
                    checkpoints.wait()
                    raise Stopped(step, stop_signal())

    # ---- The end ---------------------------------------------------------------------
    with clock.section("checkpoint"):
        checkpoints.wait()
        checkpoints.close()
    if scores is None:  # Killed after the last checkpoint and before the summary.
        with clock.section("compile"):
            programs = compile_stage(config, plan, graph, optimizer, mesh, shapes(depth))
        scores = evaluate(plan.total_steps, programs)
    summary = summarise(config, run_dir, plan, state, recorder, held_out, cache, scores)
    if log is not None:
        log.close()
        write_json(run_dir / "summary.json", summary)
    return summary


def check_vocabulary(config: TrainConfig, cache: PackedCache) -> None:
    """Raises UserError if the data hold ids that the model has no row for."""
    size = cache.manifest.vocab_size
    if size > config.model.vocab_size:
        raise UserError(
            f"the vocabulary {cache.manifest.vocabulary.name} has {size} ids, but the model only "
            f"{config.model.vocab_size}; bind DecoderConfig.vocab_size = {size} or more"
        )


def compile_stage(
    config: TrainConfig, plan: Plan, graph: Any, optimizer: Any, mesh: Mesh, abstract: TrainState
) -> Programs:
    """Compiles the train and evaluation steps for the depth of `abstract`."""
    constrain = sharding.constrainer(mesh)
    train_step = make_train_step(
        graph,
        optimizer,
        learning_rate(config.optimizer, plan.total_steps),
        clip_norm=config.optimizer.clip_norm,
        z_loss=config.z_loss,
        microbatches=config.microbatches,
        skip_nonfinite=config.on_nan == "skip",
        constrain=constrain,
    )
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, config.data.sequence_length), jnp.int32,
        sharding=NamedSharding(mesh, sharding.spec(("batch", "length"))),
    )
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), rows)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return Programs(
        jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None))
        .lower(abstract, batch)
        .compile(),
        jax.jit(make_eval_step(graph, constrain)).lower(abstract.params, batch).compile(),
    )


def summarise(
    config: TrainConfig, run_dir: Path, plan: Plan, state: TrainState, recorder: Recorder,
    held_out: HeldOut, cache: PackedCache, scores: dict[str, float],
) -> dict:
    """Everything that tables and reports need to know of a finished run."""
    described = config.describe_plan()
    seconds = recorder.clock.read()
    vocabulary = cache.manifest.vocabulary
    model = dataclasses.asdict(config.model)
    for how in ("stack", "remat"):
        model.pop(how)
    stages = [
        counted | {"model_flops": planned["flops"]}
        for counted, planned in zip(recorder.counters.stages, described["stages"], strict=True)
    ]
    return {
        "name": config.name or run_dir.name,
        "method": config.growth.operator or "full depth",
        "final_step": int(state.step),
        "total_steps": plan.total_steps,
        "params_digest": params_digest(state.params),
        "train_loss": recorder.counters.train_loss,
        **scores,
        "tokens": recorder.counters.tokens,
        "skipped_steps": recorder.counters.skipped,
        "model_flops": described["model_flops"],
        "wall_seconds": recorder.clock.wall,
        "train_seconds": seconds["step"],
        "compile_seconds": seconds["compile"],
        "seconds": seconds,
        "growths": list(plan.growth_steps),
        "params": described["params"],
        "depth": plan.final_depth,
        "speedup_blocks": described["speedup_blocks"],
        "speedup_model": described["speedup_model"],
        "stages": stages,
        "versions": run_directory.versions(),
        "comparability": {
            "data_digest": cache.manifest.digest,
            "vocabulary": f"{vocabulary.name} ({vocabulary.digest[:12]})",
            "eval_digest": held_out.digest,
            "batch_size": config.batch_size,
            "sequence_length": config.data.sequence_length,
            "optimizer": config.optimizer.name,
            "peak_learning_rate": config.optimizer.peak_learning_rate,
            "model": ", ".join(f"{name}={value}" for name, value in model.items()),
            "seed": config.seed,
        },
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int | None]]:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave in order.

    A second signal of the kind acts as if nobody had listened.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number, frame):
        del frame
        received.append(number)
        signal.signal(number, before[number])
        say(f"{signal.Signals(number).name}: saving, then stopping (again to stop at once)")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
