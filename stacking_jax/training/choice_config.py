"""What a run decides while it goes on: how it grows, and when."""

from __future__ import annotations

import dataclasses
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan, Stage
from stacking_jax.training.candidates import Candidate, candidates_of
from stacking_jax.training.growth_config import GrowthConfig
from stacking_jax.training.settings import check_not_negative, check_whole, is_number

TRIGGERS = (None, "plateau", "tokens", "flops", "seconds")


@dataclasses.dataclass(frozen=True)
class ChoiceConfig:
    """Decisions that are taken in the run, recorded and replayed; off by default.

    How to grow: LAG (arXiv 2406.02469). At each growth every candidate grows a copy of the
    state and trains on the batches to come; the one with the lowest held-out loss after the lag
    is chosen. When to grow: a trigger brings a boundary of the plan forward; the plan's own step
    is the latest.

    Attributes:
      candidates: ways to grow, see `candidates.Candidate.of`; None leaves the plan's.
      lag: steps that each candidate trains before they are compared: a share of the
        stage (below 1), or a number of steps.
      lag_batches: held-out batches, of each source, by which they are compared; None for those
        of an evaluation.
      trigger: None; 'plateau', when the loss stands still; 'tokens', 'flops' or 'seconds', when
        that much has been spent since the run began.
      check_every: steps between looks at the trigger.
      plateau_on: 'train', the loss of the batches; 'held_out', evaluated at each look.
      window: the last steps of the stage by which a plateau is judged: a share of the run
        (below 1), or a number of steps.
      threshold: it is one if the mean loss of the window's newer half is below that of the older
        one by less than this part of it.
      budget: real tokens, model FLOPs or seconds of wall time, of which `budget_shares` are
        parts; None for the plan's own tokens or FLOPs.
      budget_shares: what part is spent when each boundary comes, rising; None for the plan's
        own share of FLOPs (of tokens with 'tokens') at each.
    """

    candidates: list[Any] | None = None
    lag: float = 0.05
    lag_batches: int | None = None
    trigger: str | None = None
    check_every: int = 10
    plateau_on: str = "train"
    window: float = 0.1
    threshold: float = 0.005
    budget: float | None = None
    budget_shares: list[float] | None = None

    def __post_init__(self):
        if self.candidates is not None:
            candidates_of(self.candidates, "ChoiceConfig.candidates")
        for name in ("lag", "window"):
            steps_of(getattr(self, name), 1000, f"ChoiceConfig.{name}")
        if self.lag_batches is not None:
            check_whole("ChoiceConfig.lag_batches", self.lag_batches, least=1)
        if self.trigger not in TRIGGERS:
            raise UserError(
                "ChoiceConfig.trigger is None or one of "
                f"{', '.join(str(name) for name in TRIGGERS[1:])}; got {self.trigger!r}"
            )
        check_whole("ChoiceConfig.check_every", self.check_every, least=1)
        if self.plateau_on not in ("train", "held_out"):
            raise UserError(
                f"ChoiceConfig.plateau_on is 'train' or 'held_out'; got {self.plateau_on!r}"
            )
        check_not_negative("ChoiceConfig.threshold", self.threshold)
        if self.budget is not None and not (is_number(self.budget) and self.budget > 0):
            raise UserError(f"ChoiceConfig.budget is a positive number; got {self.budget!r}")
        if self.trigger == "seconds" and self.budget is None:
            raise UserError(
                "ChoiceConfig.trigger = 'seconds' needs ChoiceConfig.budget, the seconds of wall "
                "time that the run is to take"
            )
        shares = self.budget_shares
        if shares is not None and not (
            isinstance(shares, list | tuple) and shares
            and all(is_number(share) and 0 < share < 1 for share in shares)
            and list(shares) == sorted(set(shares))
        ):
            raise UserError(
                "ChoiceConfig.budget_shares are rising numbers between 0 and 1, one per stage "
                f"boundary; got {shares!r}"
            )

    @property
    def ways(self) -> list[Candidate]:
        """The candidates; [] where the plan's growths are carried out as they are."""
        return [Candidate.of(entry) for entry in self.candidates or ()]

    @property
    def method(self) -> str:
        """What tables call it; '' where nothing is decided."""
        parts = []
        if self.candidates is not None:
            parts.append(f"lag({', '.join(way.name for way in self.ways)})")
        if self.trigger is not None:
            parts.append(f"{self.trigger}-triggered")
        return ", ".join(parts)

    def lag_steps(self, stage: Stage) -> int:
        """Steps that each candidate trains for at the beginning of a stage."""
        return steps_of(self.lag, stage.steps, "ChoiceConfig.lag")

    def window_steps(self, plan: Plan) -> int:
        """Steps by which a plateau is judged."""
        return steps_of(self.window, plan.total_steps, "ChoiceConfig.window")

    def check(self, plan: Plan, growth: GrowthConfig) -> None:
        """Holds the settings against a plan.

        Raises:
          UserError: for the first thing that does not fit.
        """
        if self.candidates is None and self.trigger is None:
            return
        if len(plan.stages) == 1:
            raise UserError(
                "ChoiceConfig decides how and when a run grows, but this one has a single stage; "
                "set GrowthConfig.operator and GrowthConfig.num_stages, or "
                "ChoiceConfig.candidates = None and ChoiceConfig.trigger = None"
            )
        if self.candidates is not None:
            if not any(stage.grows for stage in plan.stages):
                raise UserError(
                    "ChoiceConfig.candidates are ways to grow, but no stage of this run grows: set "
                    "them to None, or choose a method that grows"
                )
            for number, stage in enumerate(plan.stages):
                if not stage.grows:
                    continue
                for way in self.ways:
                    way.growth_config(growth)
                    way.growth_into(
                        plan.stages[number - 1].depth, stage.depth, growth.keep_first,
                        growth.keep_last,
                    )
                if self.lag_steps(stage) > stage.steps:
                    raise UserError(
                        f"a lag of {self.lag_steps(stage)} steps is longer than stage "
                        f"{number + 1}, which trains for {stage.steps}; set ChoiceConfig.lag to a "
                        "share of the stage, such as 0.1, or to fewer steps"
                    )
        if self.trigger is None:
            return
        if growth.ramp_steps:
            raise UserError(
                f"ChoiceConfig.trigger = {self.trigger!r} moves the growths, and "
                "GrowthConfig.ramp_steps lets copies in at steps that are known beforehand: set "
                "one of the two to None or 0"
            )
        if growth.align_data:
            raise UserError(
                f"ChoiceConfig.trigger = {self.trigger!r} moves the growths away from where "
                "GrowthConfig.align_data puts them: set one of the two to None or False"
            )
        boundaries = len(plan.stages) - 1
        shares = self.budget_shares
        if shares is not None and len(shares) != boundaries:
            raise UserError(
                f"ChoiceConfig.budget_shares has {len(shares)} entries for {boundaries} stage "
                "boundaries"
            )
        looks = self.window_steps(plan) // self.check_every
        if self.trigger == "plateau" and looks < 2:
            raise UserError(
                f"ChoiceConfig.window = {self.window!r} of {plan.total_steps} steps holds {looks} "
                f"looks of every {self.check_every} steps, and a plateau takes two: set "
                "ChoiceConfig.window higher or ChoiceConfig.check_every lower"
            )


def steps_of(value: Any, whole: int, name: str) -> int:
    """Steps that a setting means: a share of `whole` below 1, at least one step; or a number.

    Raises:
      UserError: if it is neither.
    """
    if is_number(value):
        if 0 < value < 1:
            return max(round(value * whole), 1)
        if value >= 1 and value == int(value):
            return int(value)
    raise UserError(
        f"{name} is a share of the steps, between 0 and 1, or a whole number of steps; got "
        f"{value!r}"
    )
