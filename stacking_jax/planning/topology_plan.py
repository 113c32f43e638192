"""The plan of a run on a topology: every stage compiled, estimated, and set beside full depth."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

from stacking_jax.growth import Plan
from stacking_jax.planning.cache import compiled_settings
from stacking_jax.planning.collectives import KINDS
from stacking_jax.planning.config import PlanConfig
from stacking_jax.planning.estimate import (
    LABEL,
    Rates,
    executed_flops_per_token,
    run_cost,
    step_estimate,
)
from stacking_jax.training.config import TrainConfig


class Machine(Protocol):
    """What stages are planned for: a TPU topology, GPUs by formula, the devices here.

    Attributes:
      name: for people.
      method: 'compiler', 'formula' or 'local'.
      rates: of its chips.
    """

    name: str
    method: str
    rates: Rates

    def stage(
        self, config: TrainConfig, stage: int, doing: Callable[[str], None]
    ) -> dict[str, Any]:
        """What the step of a stage needs; see `compiled.compile_stage`."""

    def describe(self) -> dict[str, Any]:
        """What else the plan says of it."""


def plan_on(
    config: TrainConfig, machine: Machine, price: PlanConfig,
    advance: Callable[..., None] = lambda amount, status="": None,
) -> dict[str, Any]:
    """`TrainConfig.describe_plan` with what each stage needs of a machine.

    Args:
      config: of the run.
      machine: that it is planned for.
      price: of a chip, if the user has bound one.
      advance: told of each stage that is done, `advance(1)`, and of what goes on meanwhile.

    Returns:
      The plan; each stage has `hbm_peak_bytes`, `hbm_limit_bytes`, `fits`, `compile_seconds`,
      `collective_bytes` by kind, `step_seconds_estimate`, `mfu_estimate` and their parts. Beside
      the stages: `topology`, `estimate` (days, chip-hours, price), `baseline` (the same at
      full depth throughout), `saving`, `planning_seconds`.

    Raises:
      UserError: if the mesh cannot carry the run, or the compiler fails.
    """
    began = time.monotonic()
    plan = config.plan()
    described = config.describe_plan()
    answers = []
    for number, (asked, stage) in enumerate(questions(config), start=1):
        label = f"{asked.plan().stages[stage].positions} layers"
        if number > len(plan.stages):
            label += " throughout"

        def doing(text, label=label):
            advance(0, f"{label} · {text}")

        advance(0, label)
        answers.append(stage_on(asked, stage, machine, doing))
        advance(1)
    answers, baseline = answers[: len(plan.stages)], answers[-1]
    for stage, answer in zip(described["stages"], answers, strict=True):
        stage |= answer
    estimate = _cost(plan, answers, machine, price)
    full = Plan.constant(plan.final_run_depth, plan.total_steps)
    full_cost = _cost(full, [baseline], machine, price)
    described |= {
        "topology": {
            "name": machine.name, "method": machine.method, "chips": machine.rates.chips,
            "mesh": answers[-1]["mesh"], "peak_flops": machine.rates.peak_flops,
            "hbm_bandwidth": machine.rates.hbm_bandwidth, "label": LABEL, **machine.describe(),
        },
        "fits": all(answer["fits"] for answer in answers),
        "estimate": estimate,
        "baseline": {
            "depth": plan.final_run_depth, "run_depth": plan.final_run_depth,
            "steps": plan.total_steps, **baseline,
            "estimate": full_cost,
        },
        "saving": {
            name: None if full_cost[name] is None or estimate[name] is None
            else full_cost[name] - estimate[name]
            for name in ("days", "chip_hours", "price")
        },
        "planning_seconds": time.monotonic() - began,
    }
    return described


def questions(config: TrainConfig) -> list[tuple[TrainConfig, int]]:
    """The stages that a plan asks for, as (run, number of its stage): full depth comes last.

    The last stage's program is full depth's, and not asked for twice, unless copies are let
    in by gates or rates climb back.
    """
    last = len(config.plan().stages) - 1
    asked = [(config, stage) for stage in range(last + 1)]
    whole = full_depth(config)
    if compiled_settings(config, last) != compiled_settings(whole, 0):
        asked.append((whole, 0))
    return asked


def full_depth(config: TrainConfig) -> TrainConfig:
    """The same run by no method at all: what it is held against."""
    return dataclasses.replace(
        config.without_methods(),
        growth=dataclasses.replace(
            config.growth, operator=None, stages=None, stage_depths=None, stage_fractions=None,
            ramp_steps=0, rewarm_steps=0,
        ),
    )


def stage_on(
    config: TrainConfig, stage: int, machine: Machine, doing: Callable[[str], None]
) -> dict[str, Any]:
    """What one stage needs of a machine, with its estimated step."""
    result = dict(machine.stage(config, stage, doing))
    planned, costs = config.plan().stages[stage], config.costs()
    empty = dict.fromkeys((
        "step_seconds_estimate", "mfu_estimate", "bound_by", "compute_seconds",
        "memory_seconds", "link_seconds",
    ))
    if not result["fits"]:
        return result | empty | {"collective_bytes": None}
    rows = result["collectives"]
    tokens, model = config.tokens_per_step, config.model
    mlp = 6.0 * model.d_model * model.d_ff
    return result | {
        "collective_bytes": {
            kind: sum(row["bytes"] for row in rows if row["kind"] == kind)
            for kind in KINDS if any(row["kind"] == kind for row in rows)
        },
        **step_estimate(
            tokens * planned.flops_per_token(costs),
            tokens * executed_flops_per_token(planned, costs, model.remat, mlp),
            result["traffic_bytes"], sum(row["seconds"] for row in rows), machine.rates,
        ),
    }


def _cost(plan: Plan, answers: list[dict], machine: Machine, price: PlanConfig) -> dict:
    return run_cost(
        [
            (stage.steps, answer["step_seconds_estimate"])
            for stage, answer in zip(plan.stages, answers, strict=True)
        ],
        machine.rates.chips, price,
    )
