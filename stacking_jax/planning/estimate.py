"""How long a step and a run would take: a roofline, unverified.

The largest of three times, as if the other two hid behind it: arithmetic at the chip's
peak, main memory at its bandwidth, links at theirs. No step is faster; real ones are slower.
"""

from __future__ import annotations

import dataclasses

from stacking_jax.growth import ModelCosts, Stage
from stacking_jax.planning.config import PlanConfig

LABEL = "roofline, unverified"
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the chips of a plan can do.

    Attributes:
      peak_flops: FLOP/s of one chip.
      hbm_bandwidth: bytes/s of one chip.
      chips: how many there are.
    """

    peak_flops: float
    hbm_bandwidth: float
    chips: int


def executed_flops_per_token(
    stage: Stage, costs: ModelCosts, remat: str, mlp_flops: float
) -> float:
    """FLOPs per token that a step of a stage carries out: the model's, and what is computed again.

    'full' runs the layers forward a second time, 'dots' the attention alone (its scores and
    weighted values are products with a batch dimension, which that policy does not keep),
    'minimal' and 'offload' the attention and two of the three products of a layer's MLP, whose
    forward pass takes `mlp_flops`. Of a teacher, where there is one, nothing is computed again.
    """
    some = costs.attention_flops + mlp_flops * 2 / 3
    again = {
        "none": 0.0, "dots": costs.attention_flops, "minimal": some, "offload": some,
        "full": costs.layer_flops + costs.attention_flops,
    }[remat]
    return stage.flops_per_token(costs) + stage.positions * again


def step_estimate(
    model_flops: float, executed_flops: float, traffic_bytes: float, link_seconds: float,
    rates: Rates,
) -> dict:
    """The time of one step.

    Args:
      model_flops: of one step over all chips, as MFU counts them.
      executed_flops: of one step over all chips.
      traffic_bytes: of main memory, one chip.
      link_seconds: of all collectives, one after the other.
      rates: of the chips.

    Returns:
      `step_seconds_estimate`, its three parts, `bound_by` and `mfu_estimate`.
    """
    parts = {
        "compute": executed_flops / (rates.chips * rates.peak_flops),
        "memory": traffic_bytes / rates.hbm_bandwidth,
        "links": link_seconds,
    }
    seconds = max(parts.values())
    return {
        "step_seconds_estimate": seconds,
        "mfu_estimate": model_flops / (seconds * rates.chips * rates.peak_flops),
        "bound_by": max(parts, key=parts.get),
        "compute_seconds": parts["compute"],
        "memory_seconds": parts["memory"],
        "link_seconds": parts["links"],
    }


def run_cost(steps_and_seconds: list[tuple[int, float | None]], chips: int, price: PlanConfig):
    """Days, chip-hours and money of a run's steps; None where a stage has no estimate.

    Compiling, growing, evaluating and saving are not in it.
    """
    if any(seconds is None for _, seconds in steps_and_seconds):
        return {"days": None, "chip_hours": None, "price": None, "currency": price.currency}
    total = sum(steps * seconds for steps, seconds in steps_and_seconds)
    hours = chips * total / 3600
    rate = price.chip_hour_price
    return {
        "days": total / SECONDS_PER_DAY, "chip_hours": hours,
        "price": None if rate is None else hours * rate, "currency": price.currency,
    }
