"""Training on a part of the layers, drawn anew each step, as plain settings."""

from __future__ import annotations

import dataclasses
import math

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Plan, Stage
from stacking_jax.growth.plan import divide_steps
from stacking_jax.training.settings import check_not_negative, check_whole, is_number

METHODS = {"raptr": "RaPTr", "layer_drop": "progressive layer drop"}
SCALINGS = ("none", "root", "inverse")
UNDRAWN = ("dense", "skip")
_BERT = (1 / 2, 2 / 3, 5 / 6, 1.0)


@dataclasses.dataclass(frozen=True)
class PathConfig:
    """Which positions of the stack a training step runs; all of them by default.

    The whole network is stored from the first step to the last, and is what is evaluated. A
    step computes a *path*: so many of its positions, drawn anew from the seed and the step.

    `raptr` (Panigrahi et al. 2024, "Efficient Stagewise Pretraining via Progressive
    Subnetworks", arXiv 2402.05913): paths get longer from stage to stage, and every position
    but those at the ends is as likely to be drawn as any other. `layer_drop` (Zhang & He 2020,
    "Accelerating Training of Transformer-Based Language Models with Progressive Layer
    Dropping", arXiv 2010.13369): paths get shorter, and a position is drawn the more seldom
    the deeper it lies. There every layer is kept or dropped by a draw of its own; here a path
    has a fixed length, and every layer is drawn as often as there (`paths.probabilities`).

    Attributes:
      method: None, 'raptr' or 'layer_drop'.
      fractions: of 'raptr', the length of the paths of each stage over the depth, rounded;
        None for 1/2, 2/3, 5/6 and 1, the paper's 6, 8, 10 and 12 layers of BERT-Base.
      lengths: the same in layers, in place of `fractions`.
      stage_fractions: the stages' shares of the steps after the warm-up; None: equal.
      warmup_fraction: of 'raptr', the share of all steps that run the whole network first.
      keep_first, keep_last: positions at the ends that are in every path.
      scaling: what a drawn layer's branch is multiplied by, q being the probability with
        which it is drawn: 'none' by 1; 'inverse' by 1/q, so that the stream is the whole
        network's on average; 'root' by 1/√q, so that its variance is.
      undrawn: what an update does to layers that were not drawn: 'dense' gives them the
        update of a gradient of zero, so that moments fade and weights decay; 'skip' leaves
        their parameters and moments as they were.
      final_keep: of 'layer_drop', the θ̄ to which the last layer's probability falls.
      decay: of 'layer_drop', how fast, over the whole run: after a share s of the steps it
        is θ̄ + (1 − θ̄) exp(−decay · s).
      num_lengths: of 'layer_drop', how many lengths of paths the fall is divided into at the
        most; each is a stage with a program of its own.
    """

    method: str | None = None
    fractions: list[float] | None = None
    lengths: list[int] | None = None
    stage_fractions: list[float] | None = None
    warmup_fraction: float = 0.0
    keep_first: int = 1
    keep_last: int = 1
    scaling: str = "none"
    undrawn: str = "dense"
    final_keep: float = 0.5
    decay: float = 100.0
    num_lengths: int = 4

    def __post_init__(self):
        for name, known in (
            ("method", (None, *METHODS)), ("scaling", SCALINGS), ("undrawn", UNDRAWN)
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"PathConfig.{name} is one of {', '.join(map(str, known))}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.fractions is not None:
            parts = _list("fractions", self.fractions)
            if not all(is_number(part) and 0 < part <= 1 for part in parts):
                raise UserError(
                    "PathConfig.fractions are lengths of paths over the depth, above 0 and at "
                    f"most 1; got {parts!r}"
                )
        if self.lengths is not None:
            for length in _list("lengths", self.lengths):
                check_whole("a length of PathConfig.lengths", length, least=1)
        if self.stage_fractions is not None:
            shares = _list("stage_fractions", self.stage_fractions)
            positive = all(is_number(share) and share > 0 for share in shares)
            if not positive or not math.isclose(math.fsum(shares), 1, abs_tol=1e-3):
                raise UserError(
                    "PathConfig.stage_fractions are positive shares of the steps that add up to "
                    f"1; got {shares!r}"
                )
        for name in ("warmup_fraction", "final_keep"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                raise UserError(f"PathConfig.{name} is a share from 0 to 1; got {value!r}")
        check_not_negative("PathConfig.decay", self.decay)
        for name in ("keep_first", "keep_last"):
            check_whole(f"PathConfig.{name}", getattr(self, name), least=0)
        check_whole("PathConfig.num_lengths", self.num_lengths, least=2)

    def apply(self, plan: Plan) -> Plan:
        """The plan with its paths: stages of the same stored depth, each with a length.

        Args:
          plan: of one stage, as `GrowthConfig.plan` gives it where nothing grows.

        Raises:
          UserError: if a path is longer than the depth or shorter than what is always kept,
            if the plan has other stages, or one would get no steps.
        """
        if self.method is None:
            return plan
        if len(plan.stages) > 1 or plan.stages[0].run_map is not None:
            raise UserError(
                f"{METHODS[self.method]} draws paths through one plain stack of one depth, but "
                f"the plan has {len(plan.stages)} stages of its own; set GrowthConfig.operator "
                "and GrowthConfig.stages to None"
            )
        depth, total = plan.final_depth, plan.total_steps
        kept = self.keep_first + self.keep_last
        if kept > depth:
            raise UserError(
                f"PathConfig.keep_first + keep_last = {kept} layers, but the model has {depth}"
            )
        spans = self._raptr(depth, total) if self.method == "raptr" else self._drop(depth, total)
        stages: list[Stage] = []
        for length, steps in spans:
            if not max(kept, 1) <= length <= depth:
                raise UserError(
                    f"a path of {length} layers must hold the {kept} that PathConfig.keep_first "
                    f"and keep_last always keep, and fit into a depth of {depth}"
                )
            grow_map = DepthMap.identity(depth) if stages else None
            start = stages[-1].end if stages else 0
            path = None if length == depth else length
            if path is not None:
                self.probabilities(depth, length)
            if stages and stages[-1].path == path:
                stages[-1] = dataclasses.replace(stages[-1], steps=stages[-1].steps + steps)
            else:
                stages.append(Stage(depth, steps, start, grow_map, path=path))
        return Plan(tuple(stages))

    def probabilities(self, depth: int, length: int) -> list[float]:
        """With which probability each position is in a path of `length`; they sum to it.

        Those at the ends that are always kept have 1. Of RaPTr the others share what is left
        evenly. Of layer drop position i, counted from 1, has 1 − c · i, the law of the paper
        (1 − (1 − θ) i / depth), with the one c that gives paths of this length.

        Raises:
          UserError: if a probability would be negative.
        """
        first, last = self.keep_first, depth - self.keep_last
        inner = range(first, last)
        left = length - (depth - len(inner))
        if self.method == "raptr":
            return [left / len(inner) if i in inner else 1.0 for i in range(depth)]
        slope = (depth - length) / max(sum(i + 1 for i in inner), 1)
        found = [1 - slope * (i + 1) if i in inner else 1.0 for i in range(depth)]
        if min(found) < 0:
            raise UserError(
                f"paths of {length} of {depth} layers are too short for layer drop, whose "
                "probabilities fall evenly with depth and must not be negative; set "
                "PathConfig.final_keep higher"
            )
        return found

    def _raptr(self, depth: int, total: int) -> list[tuple[int, int]]:
        """(length, steps) of each stage."""
        lengths = self.lengths
        if lengths is None:
            lengths = [max(round(part * depth), 1) for part in self.fractions or _BERT]
        shares = self.stage_fractions or [1 / len(lengths)] * len(lengths)
        if len(shares) != len(lengths):
            raise UserError(
                f"PathConfig.stage_fractions has {len(shares)} entries for {len(lengths)} stages"
            )
        warm = round(self.warmup_fraction * total)
        steps = divide_steps(total - warm, [math.log(share) for share in shares])
        return [*([(depth, warm)] if warm else []), *zip(lengths, steps, strict=True)]

    def _drop(self, depth: int, total: int) -> list[tuple[int, int]]:
        """(length, steps) of each stage: at each step the length next to what is expected."""
        for name in ("fractions", "lengths", "stage_fractions", "warmup_fraction"):
            if getattr(self, name):
                raise UserError(
                    f"PathConfig.{name} is RaPTr's; layer drop has its lengths from "
                    "PathConfig.final_keep and decay"
                )
        inner = range(self.keep_first, depth - self.keep_last)
        # What the paper's draws leave out on average, where the last layer is dropped for sure.
        most = sum((i + 1) / depth for i in inner)
        shortest = depth - (1 - self.final_keep) * most
        levels = sorted(
            {
                round(depth + (shortest - depth) * i / (self.num_lengths - 1))
                for i in range(self.num_lengths)
            },
            reverse=True,
        )
        spans: list[tuple[int, int]] = []
        for step in range(total):
            dropped = (1 - self.final_keep) * (1 - math.exp(-self.decay * step / total)) * most
            length = min(levels, key=lambda level: abs(depth - dropped - level))
            if spans and spans[-1][0] == length:
                spans[-1] = (length, spans[-1][1] + 1)
            else:
                spans.append((length, 1))
        return spans


def _list(name: str, value: object) -> list:
    if not (isinstance(value, list | tuple) and value):
        raise UserError(f"PathConfig.{name} is a list, one entry per stage; got {value!r}")
    return list(value)
