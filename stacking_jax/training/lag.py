"""LAG: of several ways to grow, the one with the lowest loss after a lag (arXiv 2406.02469).

The loss right after a growth says little about the end: what preserves the function is not what
trains best. So each candidate grows a copy of the state and trains on the batches that follow,
and they are compared on held-out batches then. The paper leaves the pool, the lag and
the algorithm of its adaptive stacking open; here the choice is made anew at every growth.

The chosen one's lag is computed a second time, as the first steps of its stage: to the bit the
same, by the way that a run goes which takes the decision from its record. So there lie at most
the old state and one grown one in memory, and no copy is moved to the host and back;
docs/choices.md has what that costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stacking_jax.console import progress, say
from stacking_jax.errors import UserError
from stacking_jax.training.candidates import Candidate
from stacking_jax.training.charges import steps_of_trials
from stacking_jax.training.decisions import Decision, alike, choice_of
from stacking_jax.training.paired import BatchLoss, mean_loss, ranking, verdict
from stacking_jax.training.programs import Programs
from stacking_jax.training.setup import Setup
from stacking_jax.training.state import TrainState
from stacking_jax.training.trials import try_out

if TYPE_CHECKING:
    from stacking_jax.training.run import Run

Scores = dict[str, dict[int, list[BatchLoss]]]


class Interrupted(Exception):
    """The run is to stop; nothing has been decided.

    Attributes:
      signal: its number.
    """

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


def is_due(run: Run, number: int) -> bool:
    """Whether it has yet to be chosen how to grow into stage `number`."""
    if run.setup.config.choice.candidates is None or not run.grows_into(number):
        return False
    return run.decisions.chosen(number) is None


def choose(
    run: Run, number: int, programs: Programs, stop: Callable[[], int | None] = lambda: None
) -> None:
    """Tries the candidates out, and records the choice; `run.setup` then has it in its plan.

    Args:
      run: at the end of the stage before; its state stays.
      number: the stage to grow into, counted from 0.
      programs: of that stage, without a growth.
      stop: the number of the signal to stop for, or None; asked after each step.

    Raises:
      Interrupted: if it says so.
      UserError: if no candidate's loss is finite.
    """
    choice, stage = run.setup.config.choice, run.setup.plan.stages[number]
    lag = choice.lag_steps(stage)
    groups = alike(choice.ways, run.setup.plan, number, run.setup.config.growth)
    if len(groups) == 1:
        names = ", ".join(groups[0])
        run.take(
            choice_of(choice.ways[0], run.setup.plan, number, run.setup.config.growth)
            | {"verdict": f"{names}: the same growth here, so there is nothing to try"}
        )
        return
    began = time.monotonic()
    with run.clock.section("choose"):
        scores = lags(
            run.setup, number, run.state, choice.ways, lag=lag, batches=choice.lag_batches,
            skipped_batches=run.skipped_batches, programs=programs, stop=stop,
            tick=lambda: run.clock.touch(),
        )
    decision = decide(run.setup, number, choice.ways, scores, lag)
    decision["cost"]["seconds"] = time.monotonic() - began
    decision = run.take(decision)
    say(f"step {stage.start}: {decision['verdict']}")


def lags(
    setup: Setup, number: int, state: TrainState, ways: list[Candidate], *, lag: int,
    batches: int | None, skipped_batches: int = 0, programs: Programs | None = None,
    stop: Callable[[], int | None] = lambda: None, tick: Callable[[], None] = lambda: None,
) -> Scores:
    """The held-out losses of each candidate right after it has grown and after the lag.

    Candidates that are the same growth are tried once.
    """
    stage = setup.plan.stages[number]
    groups = alike(ways, setup.plan, number, setup.config.growth)
    scores: Scores = {}
    with progress("trying candidates", len(groups) * lag, "steps") as advance:
        for way in ways:
            first = next(group[0] for group in groups if way.name in group)
            if first in scores:
                scores[way.name] = scores[first]
                continue
            advance(0, way.name)

            def after_step(step, metrics, name=way.name):
                advance(1, name)
                tick()
                signal = stop()
                if signal is not None:
                    raise Interrupted(signal)

            tried = with_choice(setup, way, number)
            # Gates that let copies in know which layers are copies: another program.
            shared = None if setup.config.growth.ramp_steps else programs
            scores[way.name] = try_out(
                tried, number, state, until=stage.start + lag,
                score_at=(stage.start, stage.start + lag), batches=batches,
                skipped_batches=skipped_batches, programs=shared, after_step=after_step,
            )
    return scores


def with_choice(setup: Setup, way: Candidate, number: int) -> Setup:
    """The run as it would be with this candidate chosen."""
    choice = choice_of(way, setup.plan, number, setup.config.growth)
    return setup.decided([*setup.decisions, choice])


def decide(
    setup: Setup, number: int, ways: list[Candidate], scores: Scores, lag: int
) -> Decision:
    """The decision for the candidate with the lowest loss after the lag.

    Raises:
      UserError: if there is none that is finite.
    """
    start = setup.plan.stages[number].start
    rows = ranking({name: found[start + lag] for name, found in scores.items()})
    if rows[0]["loss"] is None:
        raise UserError(
            f"all candidates at step {start} diverged within {lag} steps; lower the learning rate, "
            "or set GrowthConfig.rewarm_steps"
        )
    groups = alike(ways, setup.plan, number, setup.config.growth)
    firsts: dict[int, str] = {}
    for row in rows:
        place = next(at for at, group in enumerate(groups) if row["name"] in group)
        if place in firsts:
            row["same_as"] = firsts[place]
        firsts.setdefault(place, row["name"])
        loss = mean_loss(scores[row["name"]][start])
        row["loss_at_growth"] = loss if abs(loss) < float("inf") else None
    best = next(way for way in ways if way.name == rows[0]["name"])
    count = len(next(iter(scores.values()))[start])
    return choice_of(best, setup.plan, number, setup.config.growth) | {
        "lag": lag, "ranking": rows, "verdict": verdict(rows),
        "cost": cost(setup, number, len(groups), lag, count),
    }


def cost(setup: Setup, number: int, candidates: int, lag: int, batches: int) -> dict[str, Any]:
    """What the trials cost: in training steps of the stage, and in model FLOPs."""
    steps = steps_of_trials(candidates, lag, batches)
    per_token = setup.plan.stages[number].flops_per_token(setup.config.costs())
    return {"steps": steps, "flops": steps * setup.config.tokens_per_step * per_token}
