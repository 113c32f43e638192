"""Ways to grow one checkpoint, tried on the same batches and held against each other."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from stacking_jax.console import say
from stacking_jax.errors import UserError
from stacking_jax.paths import local_path, open_path
from stacking_jax.training import agreement, consensus, run_directory
from stacking_jax.training import decisions as decided
from stacking_jax.training import lag as lags
from stacking_jax.training.candidates import Candidate, candidates_of
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.growing import refuse_open_ramp
from stacking_jax.training.programs import Programs, compile_stage
from stacking_jax.training.setup import Setup
from stacking_jax.training.state import TrainState
from stacking_jax.training.telemetry import Clock


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A checkpoint that is to grow, and what it grows into.

    Attributes:
      setup: of the run, with a plan whose next stage begins at the checkpoint.
      state: of the checkpoint; it stays.
      number: the stage to grow into, counted from 0.
      step: of the checkpoint.
      skipped_batches: left out of the data so far.
    """

    setup: Setup
    state: TrainState
    number: int
    step: int
    skipped_batches: int

    @classmethod
    def of(cls, run_dir: str | Path, step: int | None = None) -> Start:
        """Opens a checkpoint of a run.

        The stage after that of the checkpoint begins there; the steps that its own would have
        had left go to the later ones, see `decisions.decided_plan`.

        Args:
          run_dir: of the run, in which nothing is changed.
          step: of the checkpoint; None for the newest.

        Raises:
          UserError: there is no such checkpoint, or nothing is left to grow after it.
        """
        run_dir = open_path(run_dir)
        config = dataclasses.replace(run_directory.read_config(run_dir), evaluate_tasks=None)
        use_compilation_cache(config.compilation_cache)
        if not (run_dir / "checkpoints").is_dir():
            raise UserError(f"{run_dir} holds no checkpoint yet")
        checkpoints = Checkpoints(
            run_dir / "checkpoints", read_only=True, digests=config.checkpoint_digests
        )
        # A run may go on beside this one, and its newest step is not the same for all who ask.
        steps = consensus.from_first(checkpoints.steps())
        if not steps or step not in (None, *steps):
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"{run_dir} holds no checkpoint{'' if step is None else f' of step {step}'}; there "
                f"are: {there}"
            )
        step = steps[-1] if step is None else step
        refuse_open_ramp(config, step, "grow")
        checkpoints.verify(step)
        meta = checkpoints.read_meta(step)
        taken = decided.Decisions.open(run_dir, meta.get("decisions") or ()).taken
        plan = decided.decided_plan(config.plan(), taken)
        before = plan.stage_at(max(step - 1, 0))
        if before + 1 == len(plan.stages) or not plan.stages[before + 1].grows:
            raise UserError(
                f"nothing grows after step {step} of {run_dir}: its plan has no further growth; "
                "take an earlier --step, or grow the run with `stacking-jax grow`"
            )
        depth = int(meta["depth"])
        if depth != plan.stages[before].depth:
            raise UserError(
                f"checkpoint {step} of {run_dir} has {depth} layers, and its plan "
                f"{plan.stages[before].depth}: it has grown already; take an earlier --step"
            )
        # What the run itself decided later is no part of what is decided here.
        taken = [decision for decision in taken if decision["stage"] <= before]
        if decided.decided_plan(config.plan(), taken).stages[before].end != step:
            taken.append(
                {"kind": "boundary", "stage": before + 1, "step": step, "reason": "select"}
            )
        setup = Setup.of(config, run_dir, Clock()).decided(taken)
        agreement.check_agreement(config, setup.data_digest, run_dir)
        recorded = run_directory.check(run_dir, config) or {}
        if recorded.get("data_digest") not in (None, setup.data_digest):
            raise UserError(
                f"{run_dir} began with other data (digest {recorded['data_digest'][:12]}, now "
                f"{setup.data_digest[:12]}): the batches would not be those of the run"
            )
        state = checkpoints.restore(step, setup.shapes(depth))
        return cls(setup, state, before + 1, step, int(meta.get("skipped_batches", 0)))

    def ways(self, entries: Any) -> list[Candidate]:
        """The candidates, each of which is known to lead there.

        Args:
          entries: as `ChoiceConfig.candidates`; None for those of the run.

        Raises:
          UserError: there are none, or one cannot be carried out.
        """
        if entries is None:
            entries = self.setup.config.choice.candidates
            if entries is None:
                raise UserError(
                    "name the candidates, such as --candidates midas,gradstack,interleave: the "
                    "run has no ChoiceConfig.candidates"
                )
        ways = candidates_of(entries, "--candidates")
        for way in ways:
            tried = lags.with_choice(self.setup, way, self.number)
            tried.check_growth(self.number)
        return ways

    def check_lag(self, lag: int) -> None:
        """Raises UserError for a lag that is not positive or longer than the stage."""
        stage = self.setup.plan.stages[self.number]
        if not 1 <= lag <= stage.steps:
            raise UserError(
                f"a lag of {lag} steps {'is no lag' if lag < 1 else 'is longer than the stage'}: "
                f"stage {self.number + 1} trains for {stage.steps} steps from step {self.step} on; "
                "name --lag from 1 to that"
            )


def select(
    start: Start, ways: Sequence[Candidate], lag: int, batches: int | None = None
) -> dict[str, Any]:
    """Tries every candidate for a lag on the batches that follow.

    Args:
      start: the checkpoint.
      ways: the candidates.
      lag: steps.
      batches: held-out batches of each source; None for those of an evaluation of the run.

    Returns:
      The decision (see `decisions.Decision`) with `from_depth` and `to_depth`: its `ranking`
      holds each candidate's `loss_at_growth` and `loss` after the lag, in nats per token, and
      how sure the differences to the first are.

    Raises:
      UserError: the lag is longer than the stage, or all candidates diverged.
    """
    start.check_lag(lag)
    began = time.monotonic()
    setup, number = start.setup, start.number
    scores = lags.lags(
        setup, number, start.state, list(ways), lag=lag, batches=batches,
        skipped_batches=start.skipped_batches, programs=first_programs(setup, number),
    )
    decision = lags.decide(setup, number, list(ways), scores, lag)
    decision["cost"]["seconds"] = time.monotonic() - began
    stages, decision = setup.plan.stages, consensus.from_first(decision)
    return decision | {"from_depth": stages[number - 1].depth, "to_depth": stages[number].depth}


def first_programs(setup: Setup, number: int) -> Programs | None:
    """What all candidates run in the stage that they grow into; None where each has its own."""
    if setup.config.growth.ramp_steps:  # Gates know which layers are copies.
        return None
    return compile_stage(*setup.to_compile(number, None))


def branch(start: Start, decision: decided.Decision, out: str | Path) -> Path:
    """A new run that goes on from the checkpoint by this decision; `train` takes it up.

    It holds the checkpoint, the metrics until then, and the decisions: the lag that the chosen
    one has trained comes out again, to the bit, as the first steps of its stage. Of several
    processes the first makes it, and all wait for it.

    Args:
      start: the checkpoint.
      decision: how it grows.
      out: the new run directory.

    Raises:
      UserError: if something is there, or it cannot be written.
    """
    source, out = local_path(start.setup.run_dir), local_path(out)
    problem = None
    if jax.process_index() == 0:
        try:
            _make_branch(start, decision, source, out)
        except UserError as error:
            problem = str(error)
    problem = consensus.from_first(problem)
    if problem is not None:
        raise UserError(problem)
    say(f"{out} goes on from step {start.step} with {decision['candidate']}")
    return out


def _make_branch(start: Start, decision: decided.Decision, source: Path, out: Path) -> None:
    """The folder of `branch`, whole or not at all."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists already and is not written over; name another --out")
    config = run_directory.read_config(source)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        about = start.setup.about | {"name": config.name or out.name}
        run_directory.prepare_alone(temporary, config, start.setup.data_digest, None, about)
        folder = f"checkpoints/{start.step}"
        shutil.copytree(source / folder, temporary / folder)
        if (source / "metrics.jsonl").exists():
            shutil.copyfile(source / "metrics.jsonl", temporary / "metrics.jsonl")
        taken = [*start.setup.decisions, decision]
        decided.write(temporary / decided.FILE, taken)
        os.rename(temporary, out)
    except OSError as error:
        raise UserError(f"{out} was not made: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
