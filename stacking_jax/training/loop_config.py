"""Looped models: a block of stored layers that runs several times, as plain settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Loop, Plan, Stage
from stacking_jax.growth.loops import INJECTIONS
from stacking_jax.growth.plan import divide_steps
from stacking_jax.training.growth_config import GrowthConfig
from stacking_jax.training.settings import check_layers, check_whole, is_number, layers_of

TIES = ("first", "average")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Looped models, k ⊗ L and middle looping (Saunshi et al. 2025); off by default.

    The model's `num_layers` is the depth that *runs*: first + block · loops + last, of which
    first + block + last layers are stored.

    Attributes:
      loops: L, how often the block runs; None: no looping.
      block: k, the layers of the block; None: what first, last and loops leave.
      first, last: layers before and after the block that run once: a number of them, or a
        share of `num_layers` (below 1, rounded up).
      curriculum: the loops of successive stages, the last of them `loops`; None: the same
        throughout.
      curriculum_fractions: the shares of the looped steps that its stages have; None: equal.
      inject: what is added at the start of every loop but the first: 'input' (the
        embeddings), 'stream' (what the layers before the block give), or None.
      loss_loops: T, the loss is the mean of those after each of the last T loops, each through
        the last layers, the norm and the head (Yang et al. 2024).
      backprop_loops: gradients go through the last so many loops; None: through all.
      tie_at: the share of the run at which a plain stack, grown or not, becomes a looped one;
        None: looped from the start.
      tie: what the block then is: 'first', the first of the parts that it stands for, or
        'average', their mean.
      untie_at: the share of the run at which the loops become layers of their own, of the same
        function to the bit; None: never.

    Raises:
      UserError: for settings outside their range, or that exclude each other.
    """

    loops: int | None = None
    block: int | None = None
    first: int | float = 0
    last: int | float = 0
    curriculum: list[int] | None = None
    curriculum_fractions: list[float] | None = None
    inject: str | None = None
    loss_loops: int = 1
    backprop_loops: int | None = None
    tie_at: float | None = None
    tie: str = "first"
    untie_at: float | None = None

    def __post_init__(self):
        for name in ("loops", "block", "backprop_loops"):
            if getattr(self, name) is not None:
                check_whole(f"LoopConfig.{name}", getattr(self, name), least=1)
        check_whole("LoopConfig.loss_loops", self.loss_loops, least=1)
        for name in ("first", "last"):
            check_layers(f"LoopConfig.{name}", getattr(self, name), least=0)
        if self.inject not in (None, *INJECTIONS):
            raise UserError(
                f"LoopConfig.inject is {', '.join(map(repr, INJECTIONS))} or None; got "
                f"{self.inject!r}"
            )
        if self.tie not in TIES:
            raise UserError(f"LoopConfig.tie is {' or '.join(map(repr, TIES))}; got {self.tie!r}")
        for name in ("tie_at", "untie_at"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value < 1):
                raise UserError(
                    f"LoopConfig.{name} is a share of the run, between 0 and 1; got {value!r}"
                )
        if self.loops is None:
            self._check_off()
        else:
            self._check_loops()

    def _check_off(self):
        # Settings of a loop without a loop are a mistake, not a wish.
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                raise UserError(
                    f"LoopConfig.{field.name} is set, but nothing loops: bind LoopConfig.loops"
                )

    def _check_loops(self):
        stages = self._curriculum()
        if not stages or stages[-1] != self.loops:
            raise UserError(
                f"LoopConfig.curriculum lists the loops of its stages and ends at LoopConfig.loops "
                f"= {self.loops}; got {self.curriculum!r}"
            )
        for loops in stages:
            check_whole("every entry of LoopConfig.curriculum", loops, least=1)
        shares = self.curriculum_fractions
        if shares is not None and not (
            isinstance(shares, list | tuple) and len(shares) == len(stages)
            and all(is_number(share) and share > 0 for share in shares)
            and math.isclose(math.fsum(shares), 1, abs_tol=1e-3)
        ):
            raise UserError(
                f"LoopConfig.curriculum_fractions are {len(stages)} positive shares that add up to "
                f"1; got {shares!r}"
            )
        through = self.backprop_loops or self.loops
        if self.loss_loops > through or through > self.loops:
            raise UserError(
                f"of {self.loops} loops the last {through} have gradients "
                f"(LoopConfig.backprop_loops) and the last {self.loss_loops} a loss "
                "(LoopConfig.loss_loops); the second must not exceed the first, nor that the loops"
            )
        wanted = "stream" if self.first else "input' or 'stream"
        fed = self.inject == "stream" or (self.inject == "input" and not self.first)
        if through < self.loops and not fed:
            raise UserError(
                f"with LoopConfig.backprop_loops = {through} of {self.loops} the layers before "
                f"those loops have no gradient: bind LoopConfig.inject = '{wanted}'"
            )
        if self.untie_at is not None and self.inject is not None:
            raise UserError(
                f"LoopConfig.untie_at makes a plain stack, which injects nothing; set it or "
                f"LoopConfig.inject = {self.inject!r} to None"
            )
        if None not in (self.tie_at, self.untie_at) and self.tie_at >= self.untie_at:
            raise UserError(
                f"LoopConfig.tie_at = {self.tie_at} comes before LoopConfig.untie_at; got "
                f"{self.untie_at}"
            )

    def _curriculum(self) -> list[Any]:
        if self.curriculum is None:
            return [self.loops]
        return list(self.curriculum) if isinstance(self.curriculum, list | tuple) else []

    @property
    def method(self) -> str | None:
        """What tables call this; None where nothing loops."""
        if self.loops is None:
            return None
        name = "middle looped" if self.first or self.last else "looped"
        name = name if self.tie_at is None else f"tied, {name}"
        return name if self.untie_at is None else f"{name}, untied"

    def shape(self, depth: int) -> tuple[int, int, int]:
        """(first, block, last) of a network that runs `depth` layers.

        Raises:
          UserError: if they do not add up to it.
        """
        first, last = (layers_of(layers, depth) for layers in (self.first, self.last))
        block = self.block
        if block is None:
            block = (depth - first - last) // self.loops
        if block < 1 or first + block * self.loops + last != depth:
            within = depth - first - last
            wanted = f"{self.loops} loops" if self.block is None else f"{self.loops} × {block}"
            raise UserError(
                f"the loops do not match the depth: of DecoderConfig.num_layers = {depth}, which "
                f"counts the layers that run, {first} first and {last} last leave {within}, which "
                f"is not {wanted}" + (" of whole layers" if self.block is None else " layers")
            )
        return first, block, last

    def check_growth(self, growth: GrowthConfig) -> None:
        """Raises UserError for settings of growth that looping excludes."""
        if self.loops is None:
            return
        if growth.ramp_steps:
            raise UserError(
                "GrowthConfig.ramp_steps lets copies in by gates, which a looped stack does not "
                "have: set it or LoopConfig.loops off"
            )
        if self.untie_at is not None and growth.init != "copy":
            raise UserError(
                "LoopConfig.untie_at keeps the function, for which copies equal their source: "
                f"bind GrowthConfig.init = 'copy'; got {growth.init!r}"
            )

    def apply(self, plan: Plan) -> Plan:
        """The plan with its loops; the plan as it is where nothing loops.

        Args:
          plan: of a plain stack, whose final depth is the depth that is to run.

        Raises:
          UserError: if the loops do not match the depth, the plan grows and is not tied, or a
            stage would have no step.
        """
        if self.loops is None:
            return plan
        first, block, last = self.shape(plan.final_depth)
        total = plan.total_steps
        begin = 0 if self.tie_at is None else round(self.tie_at * total)
        end = total if self.untie_at is None else round(self.untie_at * total)
        stages = self._before(plan, begin)
        shares = self.curriculum_fractions or [1.0] * len(self._curriculum())
        lengths = divide_steps(end - begin, [math.log(share) for share in shares])
        stored = first + block + last
        for loops, steps in zip(self._curriculum(), lengths, strict=True):
            loop = Loop(
                first, block, loops, self.inject,
                None if self.backprop_loops is None else min(self.backprop_loops, loops),
                min(self.loss_loops, loops),
            )
            born: dict[str, Any] = {}
            if stages and stages[-1].loop is None:
                born = self._tying(first, block, last)
            elif stages:
                born = {"grow_map": DepthMap.identity(stored), "operator": "more loops"}
            at = stages[-1].end if stages else 0
            stages.append(
                Stage(stored, steps, at, run_map=loop.depth_map(stored), loop=loop, **born)
            )
        if end < total:
            whole = Loop(first, block, self.loops).depth_map(stored)
            stages.append(Stage(plan.final_depth, total - end, end, whole, "untie"))
        return Plan(tuple(stages))

    def _before(self, plan: Plan, begin: int) -> list[Stage]:
        """The stages of the plain stack that is tied at step `begin`."""
        if self.tie_at is None:
            if len(plan.stages) > 1:
                raise UserError(
                    "a looped model does not grow as it trains: bind GrowthConfig.operator = None "
                    "and GrowthConfig.stages = None, or LoopConfig.tie_at to tie the grown stack"
                )
            return []
        stages = [
            dataclasses.replace(stage, steps=min(stage.end, begin) - stage.start)
            for stage in plan.stages if stage.start < begin
        ]
        if not stages or stages[-1].depth != plan.final_depth:
            reached = stages[-1].depth if stages else 0
            raise UserError(
                f"at LoopConfig.tie_at = {self.tie_at} (step {begin}) the stack has {reached} of "
                f"{plan.final_depth} layers: tie it later, or grow it earlier"
            )
        return stages

    def _tying(self, first: int, block: int, last: int) -> dict[str, Any]:
        """How the stored layers of the loop come from the plain stack."""
        depth = first + block * self.loops + last
        ends = range(depth - last, depth)
        born: dict[str, Any] = {
            "grow_map": DepthMap([*range(first + block), *ends], stored=depth),
            "operator": f"tie ({self.tie})",
        }
        if self.tie == "average" and self.loops > 1:
            sources = [[layer] for layer in range(first)]
            sources += [
                [first + turn * block + layer for turn in range(self.loops)]
                for layer in range(block)
            ]
            sources += [[layer] for layer in ends]
            born["mix"] = tuple(
                tuple(1 / len(row) if layer in row else 0.0 for layer in range(depth))
                for row in sources
            )
        return born
