"""What trying out candidates costs: in training steps of their stage, and in every FLOP count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stacking_jax.growth import Plan
from stacking_jax.growth.plan import full_depth_steps
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.decisions import alike
from stacking_jax.training.growth_config import GrowthConfig

_FORWARD = 1 / 3
"""A forward pass, in steps of forward and backward."""


def steps_of_trials(candidates: int, lag: int, batches: int) -> float:
    """What trying out costs, in training steps.

    Args:
      candidates: how many that differ, each of which trains for the lag. The chosen one does so
        again as the run goes on, and those steps are the run's own.
      lag: steps.
      batches: held-out ones that each is scored on, before the lag and after it.
    """
    return candidates * (lag + 2 * batches * _FORWARD)


def forecast(
    choice: ChoiceConfig, growth: GrowthConfig, plan: Plan, sources: int
) -> dict[int, float]:
    """Stage -> what choosing will cost, in training steps of it.

    Args:
      choice: what is to be chosen from; where it leaves the number of held-out batches
        open, they are not counted.
      growth: of the run.
      plan: of the run.
      sources: of the held-out data.
    """
    if choice.candidates is None:
        return {}
    batches = (choice.lag_batches or 0) * sources
    costs = {}
    for number, stage in enumerate(plan.stages):
        if stage.grows:
            count = len(alike(choice.ways, plan, number, growth))
            if count > 1:
                costs[number] = steps_of_trials(count, choice.lag_steps(stage), batches)
    return costs


def spent(taken: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Stage -> what trying out its candidates cost, by the decisions, in training steps of it."""
    costs: dict[int, float] = {}
    for decision in taken:
        if "cost" in decision:
            number = int(decision["stage"])
            costs[number] = costs.get(number, 0.0) + float(decision["cost"]["steps"])
    return costs


def charged(
    described: dict[str, Any], tokens_per_step: int, steps: Mapping[int, float]
) -> dict[str, Any]:
    """A described plan with what choosing costs, which makes the run as much dearer.

    Args:
      described: by `Plan.describe`.
      tokens_per_step: as it was given.
      steps: stage -> training steps of it, on top of its own.

    Returns:
      The same with `choice_flops` in all and in each stage that has some; it is also part of
      every other number of FLOPs.
    """
    if not steps:
        return described
    stages = [dict(stage) for stage in described["stages"]]
    extra = {
        f"model_flops{part}": tokens_per_step * sum(
            count * stages[number][f"flops_per_token{part}"] for number, count in steps.items()
        )
        for part in ("", "_without_head", "_without_attention")
    }
    for number, count in steps.items():
        flops = tokens_per_step * count * stages[number]["flops_per_token"]
        stages[number] |= {"choice_flops": flops, "flops": stages[number]["flops"] + flops}
    totals = {name: described[name] + more for name, more in extra.items()}
    for stage in stages:
        stage["cost_share"] = stage["flops"] / totals["model_flops"]

    def slower(name, flops):
        return described[name] * described[flops] / totals[flops]

    speedup = slower("speedup_model", "model_flops")
    return described | totals | {
        "stages": stages,
        "choice_flops": extra["model_flops"],
        "full_depth_steps": full_depth_steps(described["total_steps"], speedup),
        "speedup_blocks": slower("speedup_blocks", "model_flops_without_head"),
        "speedup_model": speedup,
    }
