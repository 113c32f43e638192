"""Learning from a small teacher's soft labels at the beginning of a run (SALT)."""

from __future__ import annotations

import dataclasses

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.training.settings import check_whole, is_number

TAILS = ("drop", "renormalise", "uniform")
SELECTIONS = ("score", "random")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """SALT: small language models teach large ones (Rawat et al. 2024, arXiv 2410.18779).

    For the first n_KD steps the loss of a token is (1 − ω) · cross-entropy + ω · cross-entropy
    towards the teacher; then training is plain. The end of it is a stage boundary, so that
    nothing of the teacher is left behind it. Off while `fraction` is 0.

    Attributes:
      fraction: n_KD over all steps (the paper: 36 of 208 thousand).
      teacher: a run directory of ours, or a Hugging Face folder of the Llama family, with the
        student's vocabulary. None: the labels of `cache`; without a cache a small teacher is
        trained first, within the run, on the run's own data.
      teacher_step: which checkpoint of that run; None for the newest.
      cache: a folder that `stacking-jax distill-cache` made: the teacher's most probable tokens
        are read from it, and no teacher runs.
      weight: ω.
      temperature: ρ, of the teacher's distribution alone.
      top_k: tokens that the teacher's distribution is cut to; None: whole, or as many as the
        cache has.
      tail: what becomes of the rest of a cut distribution: 'drop' (the tokens keep their
        probabilities, which then add up to less than 1), 'renormalise', or 'uniform' (spread
        evenly over all other tokens).
      anneal: whether ω falls linearly, from `weight` at the first step to 0 after the last.
      select: SALT_DS: the share of the training records that the first n_KD steps read, those
        of the highest score (`data.teacher_scores`); needs `cache`. None for all.
      select_by: 'score', or 'random': as many records drawn at random, the control.
      select_k: a token counts towards the score if it is among so many of the teacher's most
        probable ones; of use when a cache is made.
      teacher_depth, teacher_width: of a teacher trained within the run, over the student's.
      teacher_steps: steps that it trains for, over all steps of the run.
    """

    fraction: float = 0.0
    teacher: str | None = None
    teacher_step: int | None = None
    cache: str | None = None
    weight: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    tail: str = "drop"
    anneal: bool = False
    select: float | None = None
    select_by: str = "score"
    select_k: int = 10
    teacher_depth: float = 0.5
    teacher_width: float = 0.5
    teacher_steps: float = 0.5

    def __post_init__(self):
        for name in ("fraction", "weight"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                raise UserError(f"DistillConfig.{name} is a share from 0 to 1; got {value!r}")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise UserError(
                f"DistillConfig.temperature must be a positive number; got {self.temperature!r}"
            )
        for name in ("teacher", "cache"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise UserError(f"DistillConfig.{name} is a path or None; got {value!r}")
        if self.teacher_step is not None:
            check_whole("DistillConfig.teacher_step", self.teacher_step, least=0)
        if self.top_k is not None:
            check_whole("DistillConfig.top_k", self.top_k, least=1)
        check_whole("DistillConfig.select_k", self.select_k, least=1)
        for name, known in (("tail", TAILS), ("select_by", SELECTIONS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"DistillConfig.{name} is one of {', '.join(known)}; "
                    f"got {getattr(self, name)!r}"
                )
        if not isinstance(self.anneal, bool):
            raise UserError(f"DistillConfig.anneal is True or False; got {self.anneal!r}")
        for name in ("select", "teacher_depth", "teacher_width", "teacher_steps"):
            value = getattr(self, name)
            if value is None and name == "select":
                continue
            if not (is_number(value) and 0 < value <= 1):
                raise UserError(
                    f"DistillConfig.{name} is a share above 0 and up to 1; got {value!r}"
                )
        if self.select is not None and self.cache is None:
            raise UserError(
                "DistillConfig.select needs the scores of a teacher: make them with `stacking-jax "
                "distill-cache` and bind DistillConfig.cache to its folder"
            )
        if self.teacher is not None and self.cache is not None:
            raise UserError(
                "DistillConfig.teacher runs beside the student and DistillConfig.cache takes its "
                "place: set one of the two to None"
            )
        if self.teacher is None and self.teacher_step is not None:
            raise UserError(
                "DistillConfig.teacher_step names a checkpoint of DistillConfig.teacher, which is "
                "not set"
            )

    @property
    def on(self) -> bool:
        """Whether a run has a teacher at all."""
        return self.fraction > 0

    @property
    def method(self) -> str | None:
        """What tables call this; None without a teacher."""
        if not self.on:
            return None
        return "salt" if self.select is None else f"salt_ds ({self.select_by})"

    @property
    def trains_teacher(self) -> bool:
        """Whether the run has to train its teacher first."""
        return self.on and self.teacher is None and self.cache is None

    def steps(self, total_steps: int) -> int:
        """n_KD.

        Raises:
          UserError: if it comes to no step.
        """
        steps = round(self.fraction * total_steps)
        if self.on and not steps:
            raise UserError(
                f"DistillConfig.fraction = {self.fraction} of {total_steps} steps is none; give "
                "more steps or a larger share"
            )
        return steps

    def apply(self, plan: Plan, ramp_steps: int = 0) -> Plan:
        """The plan whose first n_KD steps are taught, with a stage boundary at their end.

        Args:
          plan: without a teacher.
          ramp_steps: updates over which copies are let in, `GrowthConfig.ramp_steps`.

        Raises:
          UserError: if the teacher would leave while copies are being let in.
        """
        if not self.on:
            return plan
        end = self.steps(plan.total_steps)
        for stage in plan.stages:
            if stage.grows and stage.start < end < min(stage.start + ramp_steps, stage.end):
                raise UserError(
                    f"the teacher leaves at step {end}, while the copies of the growth at step "
                    f"{stage.start} are let in until step {stage.start + ramp_steps}; choose "
                    "another DistillConfig.fraction or GrowthConfig.ramp_steps"
                )
        stages = plan.split(end).stages
        return Plan(
            tuple(dataclasses.replace(stage, taught=stage.end <= end) for stage in stages)
        )
