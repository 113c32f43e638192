"""When to grow, seen from the run itself: a loss that stands still, or a budget that is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stacking_jax.growth import ModelCosts, Plan
from stacking_jax.training.choice_config import ChoiceConfig


def plateau(values: Sequence[float], threshold: float) -> float | None:
    """By what part the mean of the newer half lies below that of the older one, if by too little.

    Args:
      values: losses, oldest first; of an odd number the middle one counts as older.
      threshold: the part from which on there is progress.

    Returns:
      The improvement, negative where the loss rises, if it is below the threshold; else None.
      None too where there are fewer than two values, or one that is not finite.
    """
    half = len(values) // 2
    if not half or not all(math.isfinite(value) for value in values):
        return None
    older = math.fsum(values[: len(values) - half]) / (len(values) - half)
    newer = math.fsum(values[len(values) - half :]) / half
    improvement = (older - newer) / abs(older) if older else 0.0
    return improvement if improvement < threshold else None


def budgets(choice: ChoiceConfig, plan: Plan, costs: ModelCosts, tokens: int) -> list[float]:
    """What is spent when each stage after the first is to begin.

    Args:
      choice: with a budget for its trigger.
      plan: of the run as configured.
      costs: of the model.
      tokens: positions per step.
    """
    by_tokens = choice.trigger == "tokens"
    spent = [
        stage.steps * tokens * (1.0 if by_tokens else stage.flops_per_token(costs))
        for stage in plan.stages
    ]
    whole = math.fsum(spent)
    shares = choice.budget_shares or [
        math.fsum(spent[: number + 1]) / whole for number in range(len(spent) - 1)
    ]
    budget = whole if choice.budget is None else choice.budget
    return [share * budget for share in shares]


class Watch:
    """Looks at a run every few steps, and says when its stage is to end.

    What it has seen stands in checkpoints: a run that goes on sees the same.
    """

    def __init__(
        self, choice: ChoiceConfig, plan: Plan, costs: ModelCosts, tokens: int,
        seen: dict[str, Any] | None = None,
    ):
        """Begins to watch, or goes on.

        Args:
          choice: with a trigger.
          plan: of the run as configured, without what was decided since.
          costs, tokens: see `budgets`.
          seen: of an earlier process, as it was in `seen`.
        """
        self._choice = choice
        self._window = choice.window_steps(plan)
        self._budgets = (
            [] if choice.trigger == "plateau" else budgets(choice, plan, costs, tokens)
        )
        seen = seen or {"sum": 0.0, "count": 0, "losses": []}
        self._sum, self._count = float(seen["sum"]), int(seen["count"])
        self._losses: list[list[float]] = [list(entry) for entry in seen["losses"]]

    @property
    def seen(self) -> dict[str, Any]:
        """Plain data: losses of the window, and of the steps since the last look."""
        return {"sum": self._sum, "count": self._count, "losses": [list(e) for e in self._losses]}

    def begin_stage(self) -> None:
        """Forgets the losses of the stage before: a plateau is one of a stage's own."""
        self._sum, self._count, self._losses = 0.0, 0, []

    def see(self, loss: float) -> None:
        """Takes the training loss of a step."""
        self._sum, self._count = self._sum + loss, self._count + 1

    def due(self, step: int) -> bool:
        """Whether it looks after this step."""
        return step % self._choice.check_every == 0

    @property
    def needs_evaluation(self) -> bool:
        return self._choice.trigger == "plateau" and self._choice.plateau_on == "held_out"

    def look(
        self, step: int, begin: int, number: int, spent: dict[str, float],
        held_out: float | None = None,
    ) -> dict[str, Any] | None:
        """Why stage `number` is to begin now, or None.

        Args:
          step: updates done, all of them seen.
          begin: updates done when the stage that trains began.
          number: of the stage to come, counted from 0.
          spent: `tokens`, `flops` and `seconds` since the run began.
          held_out: the loss there, where the plateau is one of it.
        """
        choice = self._choice
        if choice.trigger != "plateau":
            budget, used = self._budgets[number - 1], spent[choice.trigger]
            if used < budget:
                return None
            return {"reason": choice.trigger, "spent": used, "budget": budget}
        loss = held_out if self.needs_evaluation else self._sum / max(self._count, 1)
        if held_out is not None or self._count:
            self._losses.append([step, loss])
        self._sum, self._count = 0.0, 0
        self._losses = [entry for entry in self._losses if entry[0] > step - self._window]
        if step - begin < self._window:
            return None
        improvement = plateau([value for _, value in self._losses], choice.threshold)
        if improvement is None:
            return None
        return {
            "reason": "plateau", "improvement": improvement, "threshold": choice.threshold,
            "window": self._window,
        }
