"""Reads the metrics of a step after the next one is dispatched, and keeps count."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import Any

import jax

from stacking_jax.console import warn
from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.training.spikes import SpikeWatch
from stacking_jax.training.telemetry import Clock, MetricsLog, human
from stacking_jax.training.triggers import Watch

_SKIPS_IN_A_ROW = 20
_OF_METHODS = ("similarity",)
"""Metrics that some methods add to a step's, as they stand in metrics.jsonl."""
_AT_A_BOUNDARY = 10
"""Steps on either side of a boundary whose training losses are averaged; one is too noisy."""


@dataclasses.dataclass
class Counters:
    """What a run has done so far, over all its restarts.

    Attributes:
      tokens: real tokens that carried loss.
      skipped: steps left out because loss or gradient was not finite.
      train_loss: of the last step that was not skipped, in nats per token.
      stages: per stage: steps, tokens, seconds of training, compiling, growing; and of
        compiling in the background, beside the steps of the stage before; `first_loss` and
        `last_loss`, means of the training losses of its first and last steps, and of how many
        (ten at the most, half of its steps at the most); `eval_loss` where it was evaluated at
        its end.
    """

    tokens: int = 0
    skipped: int = 0
    train_loss: float | None = None
    stages: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan) -> Counters:
        zero: dict[str, float] = {"steps": 0, "tokens": 0}
        zero |= {"seconds": 0.0, "compile_seconds": 0.0, "grow_seconds": 0.0}
        zero |= {"compile_ahead_seconds": 0.0}
        return cls(stages=[{"depth": stage.depth, **zero} for stage in plan.stages])


class Recorder:
    """The host's side of the loop.

    Reading a metric waits for its step. So the metrics of step n − 1 are read
    after step n has been dispatched, and the device never waits for the host.

    Attributes:
      status: a line for people.
      last_good_checkpoint: its step, or None.
      done: the last steps, oldest first, and when they were seen to be done, in seconds by
        `time.monotonic`.
    """

    def __init__(
        self, plan: Plan, counters: Counters, clock: Clock, log: MetricsLog | None, *,
        flops_at: Any, log_every: int, on_nan: str, spikes: SpikeWatch | None = None,
        train_seconds_before: float = 0.0,
        watch: Watch | None = None,
    ):
        self.plan, self.counters, self.clock, self._log = plan, counters, clock, log
        self._flops_at, self._log_every, self._on_nan = flops_at, log_every, on_nan
        self._spikes, self._watch = spikes, watch
        self._before = train_seconds_before
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._skipped_in_a_row = 0
        self.last_good_checkpoint: int | None = None
        self._speed_from = (0.0, 0, 0.0)
        self.status = ""
        self.done: collections.deque[tuple[int, float]] = collections.deque(maxlen=64)

    def follow(self, plan: Plan, flops_at: Any) -> None:
        """Goes on by what has just been decided."""
        self.plan, self._flops_at = plan, flops_at

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of update `step`, just dispatched; reads the one before."""
        self.drain()
        self._pending = (step, metrics)

    def drain(self) -> None:
        """Reads what is pending, which waits for that step to be done."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.done.append((step, time.monotonic()))
        self._check(step, values)
        number = self.plan.stage_at(step - 1)
        stage = self.counters.stages[number]
        stage["steps"] += 1
        stage["tokens"] += int(values["tokens"])
        self.counters.tokens += int(values["tokens"])
        if values.get("spike"):
            norm, median = values["grad_norm"], values["median_grad_norm"]
            self.event("spike", step, loss=values["loss"], **self._spikes.seen(step, norm, median))
        elif not values["skipped"]:
            self.counters.train_loss = values["loss"]
            self._average(step, number, values["loss"])
            if self._watch is not None:
                self._watch.see(values["loss"])
        self._tell_jump(step, number)
        if step % self._log_every == 0 or step == self.plan.total_steps:
            self._write_row(step, number, values)

    def _average(self, step, number, loss):
        """Takes the loss into the mean of its stage's first or last steps, if it is one of them."""
        planned, counted = self.plan.stages[number], self.counters.stages[number]
        ends = _ends_of(planned.steps)
        for name, inside in (
            ("first", step - planned.start <= ends), ("last", planned.end - step < ends)
        ):
            if inside:
                count = counted.get(f"{name}_loss_steps", 0) + 1
                mean = counted.get(f"{name}_loss", 0.0)
                counted[f"{name}_loss_steps"] = count
                counted[f"{name}_loss"] = mean + (loss - mean) / count

    def _tell_jump(self, step, number):
        """Writes how training loss went on where steps began to run more or fewer layers."""
        stage, before = self.plan.stages[number], self.plan.stages[number - 1]
        if not number or stage.positions == before.positions or stage.grows:
            return
        old, new = self.counters.stages[number - 1], self.counters.stages[number]
        known = "last_loss" in old and "first_loss" in new
        if known and step == stage.start + _ends_of(stage.steps):
            self.event(
                "run_depth", step, stage=number + 1, depth=stage.depth, start=stage.start,
                from_run_depth=before.positions, to_run_depth=stage.positions,
                loss_before=old["last_loss"], loss_after=new["first_loss"],
                loss_jump=new["first_loss"] - old["last_loss"], eval_loss=old.get("eval_loss"),
            )

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Writes a line of another kind, with the cumulative counters."""
        if self._log is not None:
            self._log.write(kind, step, **values, **self._cumulative(step))

    def _write_row(self, step, number, values):
        depth = self.plan.stages[number].depth
        seconds = self.clock.read()["step"]
        since, tokens, flops = self._speed_from
        elapsed = max(seconds - since, 1e-9)
        token_rate = (self.counters.tokens - tokens) / elapsed
        flop_rate = (self._flops_at(step) - flops) / elapsed
        self._speed_from = (seconds, self.counters.tokens, self._flops_at(step))
        self.status = (
            f"stage {number + 1}/{len(self.plan.stages)} · {depth} layers · "
            f"loss {values['loss']:.3f} · {human(token_rate)} tokens/s · "
            f"{human(flop_rate, 'FLOP/s')}"
        )
        self.event(
            "train", step, stage=number + 1, depth=depth, loss=values["loss"],
            learning_rate=values["learning_rate"], grad_norm=values["grad_norm"],
            **{name: values[name] for name in _OF_METHODS if name in values},
            tokens_per_second=token_rate, flops_per_second=flop_rate,
            **({"soft_loss": values["soft_loss"]} if "soft_loss" in values else {}),
        )

    def _cumulative(self, step):
        return {
            "tokens": self.counters.tokens,
            "model_flops": self._flops_at(step),
            "wall_seconds": self.clock.wall,
            "train_seconds": self._before + self.clock.read()["step"],
        }

    def restart_speed(self, step: int) -> None:
        """Forgets the past when measuring speed: after a restart or a growth."""
        self._speed_from = (
            self.clock.read()["step"], self.counters.tokens, self._flops_at(step)
        )

    def diverged(self, what: str) -> UserError:
        """The error that ends a run which has left the finite numbers."""
        last = self.last_good_checkpoint
        where = (
            f"the last good checkpoint is {last}" if last is not None
            else "there is no checkpoint yet"
        )
        skip = (
            ", or bind TrainConfig.on_nan = 'skip' to leave such steps out"
            if self._on_nan == "stop" else ""
        )
        return UserError(f"training diverged: {what}; {where}; lower the learning rate{skip}")

    def _check(self, step, values):
        if not values["skipped"]:
            self._skipped_in_a_row = 0
            return
        what = f"loss {values['loss']} and gradient norm {values['grad_norm']} at step {step}"
        if self._on_nan == "stop":
            raise self.diverged(what)
        self.counters.skipped += 1
        self._skipped_in_a_row += 1
        warn(f"skipped a step: {what}")
        if self._skipped_in_a_row >= _SKIPS_IN_A_ROW:
            raise self.diverged(
                f"{_SKIPS_IN_A_ROW} steps in a row were not finite, the last {what}"
            )


def _ends_of(steps: int) -> int:
    """How many steps count as a stage's first, and as many as its last."""
    return max(min(_AT_A_BOUNDARY, steps // 2), 1)
