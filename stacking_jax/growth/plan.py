"""The plan: which depth trains for how many steps, and what that costs."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth.costs import ModelCosts
from stacking_jax.growth.depth_map import DepthMap
from stacking_jax.growth.loops import Loop
from stacking_jax.growth.operators import custom as custom_map
from stacking_jax.growth.operators import growth_map, stage_depths


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training: what is stored, and what of it runs.

    Attributes:
      depth: stored layers while the stage trains; 0 for embeddings, norm and head alone.
      steps: training steps.
      start: the global step at which it begins.
      grow_map: how the stage's layers come from the ones before; None in the
        first stage, the identity where nothing grows.
      operator: the name of the growth operator, for people.
      run_map: which stored layer runs at each position, of a looped model; None for every
        layer once.
      path: positions that a step runs, drawn anew each step; None for all of them.
      loop: where the map that runs has its loop, and what happens between the turns.
      mix: `[new, old]`, where parameters begin as weighted sums of those before and not as
        copies; the map then says whose optimiser state a layer has.
      taught: whether a step learns from a teacher's soft labels as well.

    Raises:
      UserError: if the map to run reads from another number of layers or is not the loop's, the
        path is no part of it, or the sums are of other layers than the map's.
    """

    depth: int
    steps: int
    start: int
    grow_map: DepthMap | None = None
    operator: str | None = None
    run_map: DepthMap | None = None
    path: int | None = None
    loop: Loop | None = None
    mix: tuple[tuple[float, ...], ...] | None = None
    taught: bool = False

    def __post_init__(self):
        if self.run_map is not None and self.run_map.stored != self.depth:
            raise UserError(
                f"a stage of {self.depth} stored layers cannot run the map {self.run_map}, which "
                f"reads from {self.run_map.stored}"
            )
        if self.path is not None and not 1 <= self.path <= self.run_depth:
            raise UserError(
                f"a path of {self.path} layers does not fit into a depth of {self.run_depth}"
            )
        if self.loop is not None and (
            self.path is not None or self.run_map != self.loop.depth_map(self.depth)
        ):
            raise UserError(
                f"a stage with {self.loop} runs all of the map {self.loop.depth_map(self.depth)}"
            )
        if self.mix is not None and (
            self.grow_map is None or len(self.mix) != self.depth
            or any(len(row) != self.grow_map.stored for row in self.mix)
        ):
            raise UserError("the sums that a stage begins with are not of its map's layers")

    @property
    def end(self) -> int:
        """The global step after the stage's last one."""
        return self.start + self.steps

    @property
    def run_depth(self) -> int:
        """Positions of the network: how deep it is when it is evaluated."""
        return self.depth if self.run_map is None else len(self.run_map)

    @property
    def positions(self) -> int:
        """Positions that one training step computes."""
        if self.path is not None:
            return self.path
        return self.run_depth + (0 if self.loop is None else self.loop.exit_positions(self.depth))

    def flops_per_token(
        self, costs: ModelCosts, *, head: bool = True, attention: bool = True
    ) -> float:
        """Forward and backward FLOPs per token of a training step, every exit of a loop counted.

        Turns that gradients do not go through count their forward pass alone, and so does the
        teacher of a stage that has one.
        """
        flops = costs.flops_per_token(
            self.positions, head=head, attention=attention, taught=self.taught
        )
        if self.loop is None:
            return flops
        layer = costs.layer_flops + (costs.attention_flops if attention else 0.0)
        exits = 3.0 * (self.loop.exits - 1) * costs.head_flops if head else 0.0
        return flops + exits - 2.0 * self.loop.forward_only * layer

    @property
    def grows(self) -> bool:
        """Whether the state changes where the stage begins."""
        return self.grow_map is not None and not self.grow_map.is_identity

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with maps as lists."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        maps = ("grow_map", "run_map")
        plain["loop"] = None if self.loop is None else dataclasses.asdict(self.loop)
        plain["mix"] = None if self.mix is None else [list(row) for row in self.mix]
        return plain | {
            name: None if plain[name] is None else list(plain[name].sources) for name in maps
        }


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
        operator: str = "midas", **options: Any,
    ) -> Plan:
        """PROP-α (MIDAS, Def. 3.1): stage i of k trains for T · i^α / Σ_j j^α steps.

        Args:
          depth: the final depth L. Operators that copy blocks give stage i L · i / k
            layers; those that copy the whole stack multiply (see `stage_depths`).
          num_stages: k.
          total_steps: T.
          alpha: 0 gives equal stages; the paper uses 1, 2 and 3.
          operator: name of a growth operator.
          **options: of the operator, as `growth_map` takes them: `block`,
            `keep_first`, `keep_last`, `reading`, ...
        """
        weights = prop_log_weights(num_stages, alpha)
        depths = stage_depths(operator, _positive("depth", depth), num_stages, **options)
        return cls.growing(depths, weights, total_steps, operator, **options)

    @classmethod
    def exponential(
        cls, depth: int, num_stages: int, total_steps: int, operator: str = "midas",
        **options: Any,
    ) -> Plan:
        """Stage i of k trains for a share ∝ exp(i) of the steps (MIDAS, §3.2)."""
        weights = exponential_log_weights(num_stages)
        depths = stage_depths(operator, _positive("depth", depth), num_stages, **options)
        return cls.growing(depths, weights, total_steps, operator, **options)

    @classmethod
    def growing(
        cls, depths: Sequence[int], log_weights: Sequence[float], total_steps: int,
        operator: str = "midas", **options: Any,
    ) -> Plan:
        """Stages of any depths, grown into each other by one operator.

        Args:
          depths: of the stages; 0, but for the last, is a stage without layers.
          log_weights: of the stages' steps; stage i trains for a share ∝ exp(w_i).
            `prop_log_weights` makes those of PROP-α.
          total_steps: T.
          operator: name of a growth operator that leads from each depth to the next.
          **options: of the operator, as `growth_map` takes them.

        Raises:
          UserError: if the operator does not lead there, or a stage gets no steps.
        """
        _check_total(total_steps)
        if len(depths) != len(log_weights):
            raise UserError(
                f"{len(depths)} depths and {len(log_weights)} shares of the steps: a plan needs "
                "one of each per stage"
            )
        depths = [_stage_depth(depth, i == len(depths)) for i, depth in enumerate(depths, start=1)]
        stages, start = [], 0
        for i, steps in enumerate(divide_steps(total_steps, log_weights)):
            grow_map = growth_map(operator, depths[i - 1], depths[i], **options) if i else None
            stages.append(Stage(depths[i], steps, start, grow_map, operator if i else None))
            start += steps
        return cls(tuple(stages))

    @classmethod
    def custom(cls, stages: Sequence[Sequence[Any]]) -> Plan:
        """A plan by hand.

        `Plan.custom([(4, 1000), (8, 1000, "midas"), (6, 500, [0, 1, 2, 5, 6, 7])])`

        Args:
          stages: `(depth, steps)` for the first one, `(depth, steps, growth)` for the
            others, where growth is the name of an operator; a dict of `growth_map`'s
            arguments with the name under 'operator', such as
            `{"operator": "lidas", "block": 4}`; or a map, as `DepthMap` or list.

        Raises:
          UserError: if a stage has another form, or its growth does not lead there.
        """
        built: list[Stage] = []
        start = 0
        for number, entry in enumerate(stages, start=1):
            form = "(depth, steps)" if number == 1 else "(depth, steps, growth)"
            if not isinstance(entry, Sequence) or len(entry) != form.count(",") + 1:
                raise UserError(f"stage {number} of a plan by hand is {form}; got {entry!r}")
            depth = _stage_depth(entry[0], number == len(stages))
            steps = _positive("the steps of a stage", entry[1])
            grow_map, name = None, None
            if number > 1:
                grow_map, name = _growth_of(entry[2], built[-1].depth, depth)
            built.append(Stage(depth, steps, start, grow_map, name))
            start += steps
        return cls(tuple(built))

    def split(self, step: int) -> Plan:
        """The same plan with a stage boundary after `step` updates, where nothing grows.

        Raises:
          UserError: if the plan has no such step.
        """
        stages: list[Stage] = []
        for stage in self.stages[: self.stage_at(step) + 1]:
            if not stage.start < step < stage.end:
                stages.append(stage)
                continue
            stages.append(dataclasses.replace(stage, steps=step - stage.start))
            stages.append(
                dataclasses.replace(
                    stage, steps=stage.end - step, start=step, operator=None,
                    grow_map=DepthMap.identity(stage.depth),
                )
            )
        return Plan((*stages, *self.stages[self.stage_at(step) + 1 :]))

    # ---- reading plans ---------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    @property
    def final_depth(self) -> int:
        """Stored layers at the end."""
        return self.stages[-1].depth

    @property
    def final_run_depth(self) -> int:
        """Positions of the network at the end."""
        return self.stages[-1].run_depth

    @property
    def draws_paths(self) -> bool:
        """Whether there is a stage whose steps run a part of the positions."""
        return any(stage.path is not None for stage in self.stages)

    @property
    def growth_steps(self) -> tuple[int, ...]:
        """The global steps at which the stack grows: after that many updates."""
        return tuple(stage.start for stage in self.stages if stage.grows)

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
            stage.steps * stage.flops_per_token(costs, head=head, attention=attention)
            for stage in self.stages
        )

    def flops_until(self, step: int, costs: ModelCosts, tokens_per_step: int) -> float:
        """Forward and backward FLOPs of the first `step` updates."""
        return tokens_per_step * sum(
            min(max(step - stage.start, 0), stage.steps) * stage.flops_per_token(costs)
            for stage in self.stages
        )

    def speedup(self, costs: ModelCosts, *, head: bool = True, attention: bool = True) -> float:
        """FLOPs of as many steps at the final depth that runs, over the FLOPs of this plan.

        With `head=False` this is 1 / Σ_i (T_i / T)(d_i / L), the figure that the
        papers quote. The head does not shrink with depth, so the honest figure
        includes it.
        """
        full = Plan.constant(self.final_run_depth, self.total_steps)
        return full.flops(costs, 1, head=head, attention=attention) / self.flops(
            costs, 1, head=head, attention=attention
        )

    def describe(self, costs: ModelCosts, tokens_per_step: int) -> dict:
        """The plan and its cost as plain data, ready for JSON.

        FLOPs are forward and backward, attention in full, of the layers that run (`run_depth`
        in a training step); parameters are of those that are stored (`depth`). `params` counts
        everything, `speedup_blocks` the layers alone, `speedup_model` the head too. A teacher's
        forward pass counts in every one of them where there is a teacher.
        `full_depth_steps` is how many steps at the final depth cost as many FLOPs, rounded: the
        length of the run that a saving has to beat (Kaddour et al. 2023, "No Train No Gain").
        """
        total = self.flops(costs, tokens_per_step)
        stages = []
        for stage in self.stages:
            per_token = stage.flops_per_token(costs)
            flops = per_token * tokens_per_step * stage.steps
            born = stage.grow_map
            stages.append(
                {
                    "depth": stage.depth,
                    "run_depth": stage.positions,
                    "path": stage.path,
                    "start": stage.start,
                    "steps": stage.steps,
                    "tokens": stage.steps * tokens_per_step,
                    "operator": stage.operator,
                    "map": None if born is None else list(born.sources),
                    "map_text": str(DepthMap.identity(stage.depth) if born is None else born),
                    "run_map_text": None if stage.run_map is None else str(stage.run_map),
                    "taught": stage.taught,
                    "teacher_flops_per_token": costs.teacher_flops if stage.taught else 0.0,
                    "params": costs.params(stage.depth),
                    "flops_per_token": per_token,
                    "flops_per_token_without_head": stage.flops_per_token(costs, head=False),
                    "flops_per_token_without_attention": stage.flops_per_token(
                        costs, attention=False
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
            "full_depth_steps": full_depth_steps(self.total_steps, self.speedup(costs)),
            "speedup_blocks": self.speedup(costs, head=False),
            "speedup_model": self.speedup(costs),
        }


def full_depth_steps(total_steps: int, speedup: float) -> int:
    """Steps at full depth that cost what so many steps of a plan do, rounded; one at least.

    Args:
      total_steps: of the plan.
      speedup: as many steps at full depth over them, in FLOPs of the whole model.
    """
    return max(round(total_steps / speedup), 1)


def prop_log_weights(num_stages: int, alpha: float) -> list[float]:
    """What `divide_steps` takes for PROP-α: log i^α of the stages i = 1 to k."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"PROP-α needs a finite number for α; got {alpha!r}")
    count = _positive("num_stages", num_stages)
    return [alpha * math.log(i) for i in range(1, count + 1)]


def exponential_log_weights(num_stages: int) -> list[float]:
    """What `divide_steps` takes for shares ∝ exp(i)."""
    return [float(i) for i in range(1, _positive("num_stages", num_stages) + 1)]


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


def _growth_of(growth: Any, depth: int, to: int) -> tuple[DepthMap, str]:
    """The map of one growth of a plan by hand, and a name for it."""
    if isinstance(growth, str):
        return growth_map(growth, depth, to), growth
    if isinstance(growth, Mapping):
        if not isinstance(growth.get("operator"), str):
            raise UserError(f"a growth as a dict needs the name of an 'operator'; got {growth!r}")
        options = {key: value for key, value in growth.items() if key != "operator"}
        return growth_map(growth["operator"], depth, to, **options), growth["operator"]
    return growth_map("custom", depth, to, sources=custom_map(growth, depth)), "custom"


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


def _stage_depth(depth: Any, last: bool) -> int:
    if type(depth) is int and depth == 0:
        if last:
            raise UserError("a plan ends with one layer at least; only stages before may have 0")
        return depth
    return _positive("the depth of a stage", depth)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a positive whole number; got {value!r}")
    return value
