"""The plan: which depth trains for how many steps, and what that costs."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

from stacking_jax.errors import UserError
from stacking_jax.growth.costs import ModelCosts
from stacking_jax.growth.depth_map import DepthMap
from stacking_jax.growth.operators import operator as operator_by_name


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training at one depth.

    Attributes:
      depth: stored layers while the stage trains.
      steps: training steps.
      start: the global step at which it begins.
      grow_map: how the stage's layers come from the ones before; None in the
        first stage.
      operator: the name of the growth operator, for people.
    """

    depth: int
    steps: int
    start: int
    grow_map: DepthMap | None = None
    operator: str | None = None

    @property
    def end(self) -> int:
        """The global step after the stage's last one."""
        return self.start + self.steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sequence of stages whose steps sum exactly to the total.

    Raises:
      UserError: if a stage has no steps, or a map does not lead from one depth
        to the next.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        if not self.stages:
            raise UserError("a plan needs at least one stage")
        start = 0
        before: Stage | None = None
        for number, stage in enumerate(self.stages, start=1):
            if stage.steps < 1:
                raise UserError(
                    f"stage {number} of {len(self.stages)} (depth {stage.depth}) would train for "
                    f"{stage.steps} steps; give more steps in all or fewer stages"
                )
            if stage.start != start:
                raise UserError(f"stage {number} starts at step {stage.start}, expected {start}")
            if before is not None:
                _check_growth(number, before, stage)
            elif stage.grow_map is not None:
                raise UserError("the first stage of a plan has nothing to grow from")
            start, before = stage.end, stage

    # ---- making plans ----------------------------------------------------------------

    @classmethod
    def constant(cls, depth: int, total_steps: int) -> Plan:
        """Training at full depth from the start: the baseline."""
        _check_total(total_steps)
        return cls((Stage(depth=_positive("depth", depth), steps=total_steps, start=0),))

    @classmethod
    def prop(
        cls, depth: int, num_stages: int, total_steps: int, alpha: float = 1.0,
        operator: str = "midas",
    ) -> Plan:
        """PROP-α (MIDAS, Def. 3.1): stage i of k trains for T · i^α / Σ_j j^α steps.

        Args:
          depth: the final depth L; stage i has L · i / k layers.
          num_stages: k.
          total_steps: T.
          alpha: 0 gives equal stages; the paper uses 1, 2 and 3.
          operator: name of a growth operator.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(
            alpha
        ):
            raise UserError(f"PROP-α needs a finite number for α; got {alpha!r}")
        return cls._growing(
            depth, num_stages, total_steps, lambda i: alpha * math.log(i), operator
        )

    @classmethod
    def exponential(
        cls, depth: int, num_stages: int, total_steps: int, operator: str = "midas"
    ) -> Plan:
        """Stage i of k trains for a share ∝ exp(i) of the steps (MIDAS, §3.2)."""
        return cls._growing(depth, num_stages, total_steps, float, operator)

    @classmethod
    def _growing(
        cls, depth: int, num_stages: int, total_steps: int,
        log_weight: Callable[[int], float], operator: str,
    ) -> Plan:
        _check_total(total_steps)
        _positive("depth", depth)
        _positive("num_stages", num_stages)
        if depth % num_stages:
            fits = [k for k in range(1, depth + 1) if depth % k == 0]
            raise UserError(
                f"a depth of {depth} cannot be reached in {num_stages} equal stages; "
                f"numbers of stages that divide it: {', '.join(map(str, fits))}"
            )
        block = depth // num_stages
        stage_steps = divide_steps(
            total_steps, [log_weight(i) for i in range(1, num_stages + 1)]
        )
        stages, start = [], 0
        for i, steps in enumerate(stage_steps):
            grow_map = operator_by_name(operator)(i * block, block) if i else None
            stages.append(
                Stage((i + 1) * block, steps, start, grow_map, operator if i else None)
            )
            start += steps
        return cls(tuple(stages))

    # ---- reading plans ---------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    @property
    def final_depth(self) -> int:
        return self.stages[-1].depth

    @property
    def growth_steps(self) -> tuple[int, ...]:
        """The global steps at which the stack grows: after that many updates."""
        return tuple(stage.start for stage in self.stages[1:])

    def stage_at(self, step: int) -> int:
        """Index of the stage that trains global step `step` (counted from 0).

        The step at a boundary belongs to the later stage; the step after the
        last one belongs to the last stage.
        """
        if not 0 <= step <= self.total_steps:
            raise UserError(f"step {step} is outside the plan's {self.total_steps} steps")
        starts = [stage.start for stage in self.stages]
        return bisect.bisect_right(starts, step) - 1

    # ---- what it costs ---------------------------------------------------------------

    def flops(
        self, costs: ModelCosts, tokens_per_step: int, *, head: bool = True, attention: bool = True
    ) -> float:
        """Forward and backward FLOPs of the whole run."""
        return tokens_per_step * sum(
            stage.steps * costs.flops_per_token(stage.depth, head=head, attention=attention)
            for stage in self.stages
        )

    def speedup(self, costs: ModelCosts, *, head: bool = True, attention: bool = True) -> float:
        """FLOPs of as many steps at the final depth, over the FLOPs of this plan.

        With `head=False` this is 1 / Σ_i (T_i / T)(d_i / L), the figure that the
        papers quote. The head does not shrink with depth, so the honest figure
        includes it.
        """
        full = Plan.constant(self.final_depth, self.total_steps)
        return full.flops(costs, 1, head=head, attention=attention) / self.flops(
            costs, 1, head=head, attention=attention
        )

    def describe(self, costs: ModelCosts, tokens_per_step: int) -> dict:
        """The plan and its cost as plain data, ready for JSON.

        FLOPs are forward and backward, attention in full. `params` counts
        everything, `speedup_blocks` the layers alone, `speedup_model` the head too.
        """
        total = self.flops(costs, tokens_per_step)
        stages = []
        for stage in self.stages:
            per_token = costs.flops_per_token(stage.depth)
            flops = per_token * tokens_per_step * stage.steps
            stages.append(
                {
                    "depth": stage.depth,
                    "start": stage.start,
                    "steps": stage.steps,
                    "tokens": stage.steps * tokens_per_step,
                    "operator": stage.operator,
                    "map": list(stage.grow_map.sources) if stage.grow_map else None,
                    "map_text": str(stage.grow_map or DepthMap.identity(stage.depth)),
                    "params": costs.params(stage.depth),
                    "flops_per_token": per_token,
                    "flops_per_token_without_head": costs.flops_per_token(stage.depth, head=False),
                    "flops_per_token_without_attention": costs.flops_per_token(
                        stage.depth, attention=False
                    ),
                    "flops": flops,
                    "cost_share": flops / total,
                }
            )
        return {
            "stages": stages,
            "total_steps": self.total_steps,
            "total_tokens": self.total_steps * tokens_per_step,
            "params": costs.params(self.final_depth),
            "model_flops": total,
            "model_flops_without_head": self.flops(costs, tokens_per_step, head=False),
            "model_flops_without_attention": self.flops(costs, tokens_per_step, attention=False),
            "speedup_blocks": self.speedup(costs, head=False),
            "speedup_model": self.speedup(costs),
        }


def divide_steps(total_steps: int, log_weights: Sequence[float]) -> list[int]:
    """Divides steps in proportion to exp(log_weights), summing exactly to the total.

    Boundaries are rounded, not stages, so no rounding error piles up in one stage.

    Raises:
      UserError: if a stage would get no step.
    """
    top = max(log_weights)
    weights = [math.exp(weight - top) for weight in log_weights]
    scale = total_steps / math.fsum(weights)
    ends = [round(scale * math.fsum(weights[: i + 1])) for i in range(len(weights))]
    ends[-1] = total_steps
    steps = [end - start for start, end in zip([0, *ends], ends)]
    if min(steps) < 1:
        number = steps.index(min(steps)) + 1
        raise UserError(
            f"{total_steps} steps leave none for stage {number} of {len(steps)}; "
            "give more steps or fewer stages"
        )
    return steps


def _check_growth(number: int, before: Stage, stage: Stage) -> None:
    if stage.grow_map is None:
        raise UserError(f"stage {number} has no map to grow from stage {number - 1}")
    if stage.grow_map.stored != before.depth or len(stage.grow_map) != stage.depth:
        raise UserError(
            f"stage {number} has {stage.depth} layers and follows {before.depth}, but its map "
            f"leads from {stage.grow_map.stored} to {len(stage.grow_map)}"
        )


def _check_total(total_steps: int) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise UserError(
            f"the number of training steps must be a positive whole number; got {total_steps!r}"
        )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a positive whole number; got {value!r}")
    return value
