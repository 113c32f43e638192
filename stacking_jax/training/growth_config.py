"""How the depth of a run grows, as plain settings."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from stacking_jax.console import warn
from stacking_jax.errors import UserError
from stacking_jax.growth import POLICIES, STARTS, Plan, g_stack_tokens, stage_depths
from stacking_jax.growth.plan import divide_steps, exponential_log_weights, prop_log_weights
from stacking_jax.growth.starts import Start
from stacking_jax.training.settings import check_whole, is_number

G_STACK_LAW = "g_stack_law"
_LATEST = 0.5  # Share of the run; later, too little of it would be left for the grown model.


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """How the depth grows. The final depth is the model's.

    Attributes:
      operator: name of a growth operator; None trains at full depth throughout,
        whatever else is set here (but `stages`).
      num_stages: k. Operators that copy blocks give stage i L · i / k layers; those
        that copy the whole stack multiply (`growth.stage_depths`).
      schedule: 'prop' (T_i ∝ i^alpha) or 'exp' (T_i ∝ exp(i)).
      alpha: of PROP-α.
      options: the operator's other arguments, such as {'reading': 'literal'} or
        {'block': 4}.
      keep_first, keep_last: layers at the ends that are never repeated; they stand in
        every stage.
      stage_depths: the depths of all stages, the model's last, in place of num_stages; a float
        up to 1.0 is a share of the model's depth, rounded, and at least one layer. 0 stands for
        no layers at all: embeddings, norm and head alone, from which 'inherit_first' grows.
      stage_fractions: their shares of the steps, in place of schedule and alpha; of two stages
        also 'g_stack_law', see `growth.g_stack_tokens`, at most half of the steps.
      law_flops: the law's C; None for 6 · parameters · tokens of the run.
      stages: the whole plan by hand, in place of all of the above: (depth, steps) for the
        first stage, (depth, steps, growth) for the others, where growth is an operator's
        name or a list of source layers, -1 for a new one (`growth.Plan.custom`).
      init: how copies start: a name of `growth.STARTS`, or a list of them, applied in turn.
        Layers without a source are drawn by the model's own initialiser.
      init_options: the numbers of a single start, such as {'relative': 0.05} of 'noise'.
      moments: what becomes of the copies' optimiser state: one of `growth.POLICIES`.
      ramp_steps: updates over which the copies are let in, by gates from 0 to 1 (MSG, Yao et
        al. 2023); 0 lets them in at once.
      rewarm_steps: updates over which the learning rate climbs back after a growth; 0
        leaves the schedule alone.
      rewarm_initial: the part of the rate with which that climb begins.
      align_data: whether the last boundaries come where the data stages begin
        (`DataConfig.stages`), as many as there are of these: a growth that meets a
        cool-down, say. The stages in between keep their proportions.
    """

    operator: str | None = None
    num_stages: int = 1
    schedule: str = "prop"
    alpha: float = 1.0
    options: dict[str, Any] | None = None
    keep_first: int = 0
    keep_last: int = 0
    stage_depths: list[int | float] | None = None
    stage_fractions: list[float] | str | None = None
    law_flops: float | None = None
    stages: list[Sequence[Any]] | None = None
    init: str | list[str] = "copy"
    init_options: dict[str, Any] | None = None
    moments: str = "copy"
    ramp_steps: int = 0
    rewarm_steps: int = 0
    rewarm_initial: float = 0.1
    align_data: bool = False

    def __post_init__(self):
        if self.options is not None and not (
            isinstance(self.options, dict) and all(isinstance(key, str) for key in self.options)
        ):
            raise UserError(
                "GrowthConfig.options is a dict of the operator's arguments, such as "
                f"{{'block': 4}}; got {self.options!r}"
            )
        guards = {"keep_first", "keep_last"} & set(self.options or ())
        if guards:
            name = min(guards)
            raise UserError(f"{name} is no option: set GrowthConfig.{name} itself")
        for name in ("stage_depths", "stage_fractions", "stages"):
            value = getattr(self, name)
            if name == "stage_fractions" and value == G_STACK_LAW:
                continue
            if value is not None and not (isinstance(value, list | tuple) and value):
                raise UserError(
                    f"GrowthConfig.{name} is a list, one entry per stage; got {value!r}"
                )
        if self.stages is not None and self.operator is not None:
            raise UserError(
                "GrowthConfig.stages is a plan by hand; GrowthConfig.operator makes one: set one "
                "of the two to None"
            )
        if self.law_flops is not None and not (is_number(self.law_flops) and self.law_flops > 1):
            raise UserError(
                f"GrowthConfig.law_flops is a number of FLOPs, or None; got {self.law_flops!r}"
            )
        if self.moments not in POLICIES:
            raise UserError(
                f"GrowthConfig.moments is one of {', '.join(POLICIES)}; got {self.moments!r}"
            )
        check_whole("GrowthConfig.ramp_steps", self.ramp_steps, least=0)
        check_whole("GrowthConfig.rewarm_steps", self.rewarm_steps, least=0)
        if not (is_number(self.rewarm_initial) and 0 <= self.rewarm_initial <= 1):
            raise UserError(
                "GrowthConfig.rewarm_initial is a part of the rate, from 0 to 1; got "
                f"{self.rewarm_initial!r}"
            )
        if not isinstance(self.align_data, bool):
            raise UserError(
                f"GrowthConfig.align_data is True or False; got {self.align_data!r}"
            )
        self.starts()

    @property
    def grows(self) -> bool:
        """Whether there is more than one stage to it."""
        if self.stages is not None:
            return len(self.stages) > 1
        return self.operator is not None

    @property
    def method(self) -> str:
        """What tables call this: the operator, or what stands in its place."""
        if self.stages is not None and len(self.stages) > 1:
            return "stages by hand"
        return self.operator or "full depth"

    def starts(self) -> list[Start]:
        """How copies start, ready for `growth.grow_state`.

        Raises:
          UserError: if there is no such start, or it has no such number.
        """
        names = [self.init] if isinstance(self.init, str) else self.init
        if not (isinstance(names, list | tuple) and names) or any(
            name not in STARTS for name in names
        ):
            raise UserError(
                f"GrowthConfig.init is one or a list of {', '.join(STARTS)}; got {self.init!r}"
            )
        options = self.init_options or {}
        if options and len(names) != 1:
            raise UserError(
                "GrowthConfig.init_options are the numbers of a single start, but "
                f"GrowthConfig.init names {len(names)}"
            )
        kind = STARTS[names[0]]
        known = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(options, dict) or not set(options) <= known:
            raise UserError(
                f"GrowthConfig.init_options of {names[0]!r} are a dict of "
                f"{', '.join(sorted(known)) or 'nothing'}; got {options!r}"
            )
        return [kind(**options)] if options else [STARTS[name]() for name in names]

    def timed(self, params: int, total_tokens: int) -> GrowthConfig:
        """The same with numbers in place of a law, which it takes a run to work out.

        Args:
          params: of the grown model.
          total_tokens: of the run.
        """
        if self.stage_fractions != G_STACK_LAW:
            return self
        flops = self.law_flops or 6.0 * params * total_tokens
        share = g_stack_tokens(params, flops) / total_tokens
        if share > _LATEST:
            _warn_once(
                f"the law of G_stack would grow after {share:.3g} times the run's "
                f"{total_tokens:,} tokens, since it was fitted to far larger runs; growing after "
                f"{_LATEST:.0%} of them"
            )
        share = min(share, _LATEST)
        return dataclasses.replace(self, stage_fractions=[share, 1 - share])

    def plan(self, depth: int, total_steps: int) -> Plan:
        """The stages of a run.

        Raises:
          UserError: if the stages do not divide the depth or leave a stage empty, the
            operator does not lead from one depth to the next, or copies would still be
            being let in when a stage ends.
        """
        if self.stages is not None:
            plan = Plan.custom(self.stages)
            if (plan.final_depth, plan.total_steps) != (depth, total_steps):
                raise UserError(
                    f"GrowthConfig.stages end at {plan.final_depth} layers after "
                    f"{plan.total_steps} steps, but the run is to have {depth} layers and "
                    f"{total_steps} steps"
                )
        elif self.operator is None:
            return Plan.constant(depth, total_steps)
        else:
            options = {
                "keep_first": self.keep_first, "keep_last": self.keep_last, **(self.options or {})
            }
            depths = self._depths(depth, options)
            plan = Plan.growing(
                depths, self._log_weights(len(depths)), total_steps, self.operator, **options
            )
        self.check_ramp(plan)
        return plan

    def check_ramp(self, plan: Plan) -> None:
        """Raises UserError if copies would still be being let in when a stage ends."""
        for number, stage in enumerate(plan.stages[1:], start=2):
            if stage.steps < self.ramp_steps:
                raise UserError(
                    f"stage {number} trains for {stage.steps} steps, fewer than "
                    f"GrowthConfig.ramp_steps = {self.ramp_steps}: its copies would never be let "
                    "in whole"
                )

    def _depths(self, depth: int, options: dict[str, Any]) -> list[int]:
        if self.stage_depths is None:
            return stage_depths(self.operator, depth, self.num_stages, **options)
        depths = [
            max(round(part * depth), 1) if isinstance(part, float) and 0 < part <= 1 else part
            for part in self.stage_depths
        ]
        if depths[-1] != depth:
            raise UserError(
                f"GrowthConfig.stage_depths ends at {depths[-1]}, but the model has {depth} layers"
            )
        return depths

    def _log_weights(self, count: int) -> list[float]:
        if self.stage_fractions is None:
            if self.schedule == "prop":
                return prop_log_weights(count, self.alpha)
            if self.schedule == "exp":
                return exponential_log_weights(count)
            raise UserError(f"GrowthConfig.schedule is 'prop' or 'exp'; got {self.schedule!r}")
        fractions = self.stage_fractions
        if fractions == G_STACK_LAW:
            raise UserError(
                "GrowthConfig.stage_fractions = 'g_stack_law' needs the run's tokens and "
                "parameters: ask TrainConfig.plan"
            )
        if not all(is_number(share) and share > 0 for share in fractions) or not math.isclose(
            math.fsum(fractions), 1, abs_tol=1e-3
        ):
            raise UserError(
                "GrowthConfig.stage_fractions are positive shares of the steps that add up to 1; "
                f"got {fractions!r}"
            )
        if len(fractions) != count:
            raise UserError(
                f"GrowthConfig.stage_fractions has {len(fractions)} entries for {count} stages"
            )
        return [math.log(share) for share in fractions]


@functools.cache
def _warn_once(message: str) -> None:
    """A plan is asked for many times in a run."""
    warn(message)


def aligned(plan: Plan, steps: Sequence[int]) -> Plan:
    """The plan whose last boundaries are at these steps, its other ones in proportion.

    Raises:
      UserError: there are fewer boundaries, or a stage would get no step.
    """
    boundaries = len(plan.stages) - 1
    if not 1 <= len(steps) <= boundaries:
        raise UserError(
            f"GrowthConfig.align_data puts {len(steps)} of {boundaries} stage boundaries where "
            "data stages begin: set DataConfig.stages to 1 or more, and to no more than that"
        )
    free = len(plan.stages) - len(steps)
    first = divide_steps(steps[0], [math.log(stage.steps) for stage in plan.stages[:free]])
    ends = [*steps[1:], plan.total_steps]
    lengths = [*first, *(end - start for start, end in zip(steps, ends, strict=True))]
    stages, start = [], 0
    for stage, length in zip(plan.stages, lengths, strict=True):
        stages.append(dataclasses.replace(stage, start=start, steps=length))
        start += length
    return Plan(tuple(stages))
