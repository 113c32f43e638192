"""The files of a run that does not begin at its beginning: grown, or imported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacking_jax.console import say
from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Plan
from stacking_jax.interop.runs import FOREIGN, RunCheckpoint
from stacking_jax.interop.tensor_files import write_json
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.config import GrowthConfig, TrainConfig
from stacking_jax.training.decisions import decided_plan
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.recorder import Counters
from stacking_jax.training.run_directory import versions
from stacking_jax.training.telemetry import Clock


def write_run_files(run_dir: Path, config: TrainConfig, data_digest: str | None) -> None:
    """config.json and plan.json, as training writes them."""
    plain = json.loads(json.dumps(config.to_dict()))
    write_json(
        run_dir / "config.json",
        {"config": plain, "data_digest": data_digest, "versions": versions()},
    )
    write_json(run_dir / "plan.json", config.describe_plan())


def first_meta(config: TrainConfig) -> dict[str, Any]:
    """What stands beside the state before the first step."""
    plan = config.plan()
    return {
        "step": 0, "stage": 0, "depth": plan.stages[0].depth, "history": [],
        "plan": _plan_as_json(plan), "config": config.to_dict(),
        "counters": dataclasses.asdict(Counters.of(plan)), "scores": None,
        "seconds": dict.fromkeys(Clock.CATEGORIES, 0.0),
    }


def grown_config(
    found: RunCheckpoint,
    depth_map: DepthMap,
    *,
    operator: str | None = None,
    options: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
) -> TrainConfig:
    """The configuration of the grown run, whose final depth is the grown one.

    Its plan holds the stages so far and the one to come, so that model FLOPs are
    counted as they were spent: by the operator where one made all growths, else as
    `GrowthConfig.stages`. After the last step there is no stage to come; the plan is then
    of the grown depth throughout, and what happened stands in the checkpoint's history.

    Args:
      found: the checkpoint that grows.
      depth_map: how it grows.
      operator, options: where the map comes from.
      total_steps: None keeps the number that the run had.
    """
    old, depth = found.config, len(depth_map)
    total = old.total_steps if total_steps is None else total_steps
    if total < found.step:
        raise UserError(
            f"checkpoint {found.step} of {found.run_dir} has made more steps than the {total} "
            "that the grown run would have in all"
        )
    taught = old.distill.steps(old.total_steps)
    if found.step < taught:
        raise UserError(
            f"checkpoint {found.step} of {found.run_dir} still has its teacher; grow one of step "
            f"{taught} or later"
        )
    if taught:
        say(
            f"the grown run has no teacher; its plan does not count that of the first {taught} "
            "steps"
        )
    growth = _growth_so_far(found, depth_map, operator, options, total)
    if growth is None:
        growth = GrowthConfig()
        say(
            f"the plan of the grown run is {depth} layers throughout: its model FLOPs will count "
            f"the first {found.step} steps as if they had been made at that depth"
        )
    if total == found.step:
        say(f"all {total} steps are done; to train the grown model on, grow with more total_steps")
    return dataclasses.replace(
        old,
        model=dataclasses.replace(old.model, num_layers=depth),
        growth=growth,
        distill=DistillConfig(),
        choice=ChoiceConfig(),
        name=None,
        total_steps=total,
    )


def _growth_so_far(
    found: RunCheckpoint, depth_map: DepthMap, operator: str | None,
    options: Mapping[str, Any] | None, total: int,
) -> GrowthConfig | None:
    """Settings whose plan is what happened and then `depth_map`; None if no step is left."""
    plan = decided_plan(found.config.plan(), found.meta.get("decisions") or ())
    done = [stage for stage in plan.stages if stage.start < found.step]
    steps = [min(stage.end, found.step) - stage.start for stage in done]
    wanted = [
        *((stage.depth, count, stage.grow_map) for stage, count in zip(done, steps, strict=True)),
        (len(depth_map), total - found.step, depth_map),
    ]
    if total == found.step or not done or done[-1].depth != found.depth:
        return None
    old = found.config.growth
    if len(done) > 1:
        settings = {"keep_first": old.keep_first, "keep_last": old.keep_last}
        options = old.options
        operator = operator if operator == old.operator else None
    else:
        options = dict(options or {})
        settings = {name: options.pop(name, 0) for name in ("keep_first", "keep_last")}
    growth = dataclasses.replace(
        old, operator=operator, options=dict(options) if options else None, **settings,
        stage_depths=[stage_depth for stage_depth, _, _ in wanted],
        stage_fractions=[count / total for _, count, _ in wanted],
        stages=None, align_data=False,
    )
    if operator is not None and _makes(growth, wanted):
        return growth
    by_hand = [
        (stage_depth, count) if grow_map is None
        else (stage_depth, count, list(grow_map.sources))
        for stage_depth, count, grow_map in wanted
    ]
    return dataclasses.replace(old, operator=None, stages=by_hand, align_data=False)


def _makes(growth: GrowthConfig, wanted: list) -> bool:
    depth, total = wanted[-1][0], sum(count for _, count, _ in wanted)
    try:
        plan = growth.plan(depth, total)
    except UserError:
        return False
    return [(stage.depth, stage.steps, stage.grow_map) for stage in plan.stages] == wanted


def grown_meta(
    found: RunCheckpoint, config: TrainConfig, depth_map: DepthMap, *, operator: str | None,
    init: str, moments: str,
) -> dict[str, Any]:
    """What stands beside the grown state: history, and counters by stage."""
    plan = config.plan()
    event = {
        "step": found.step, "from_depth": found.depth, "to_depth": len(depth_map),
        "operator": operator, "map": list(depth_map.sources), "init": init, "moments": moments,
    }
    counters = dict(found.meta["counters"])
    if len(plan.stages) == 1:
        counters["stages"] = [_as_one(counters["stages"], plan) | {"depth": len(depth_map)}]
    else:
        empty = dataclasses.asdict(Counters.of(plan))["stages"]
        counters["stages"] = counters["stages"][: len(empty) - 1] + empty[-1:]
    return found.meta | {
        "stage": plan.stage_at(max(found.step - 1, 0)), "depth": len(depth_map),
        "history": [*found.meta["history"], event],
        "plan": _plan_as_json(plan), "config": config.to_dict(), "counters": counters,
        # Those of the small model: the grown one has not been evaluated.
        "scores": None,
        # They are in the plan now, which has them in its own words.
        "decisions": [], "watch": None,
    }


def _as_one(stages: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The counters of all stages so far as those of `plan`'s only one.

    Steps, tokens and seconds add up. Losses are of the first stage's first and the last one's
    last steps; a held-out loss is none of the grown model.
    """
    [names] = Counters.of(plan).stages
    one = {name: sum(stage[name] for stage in stages) for name in names}
    for end, stage in (("first", stages[0]), ("last", stages[-1])):
        one |= {name: value for name, value in stage.items() if name.startswith(f"{end}_loss")}
    return one


def copy_foreign(source: Path, target: Path) -> None:
    """Takes along what an imported run has from Hugging Face."""
    if (source / FOREIGN).is_dir():
        shutil.copytree(source / FOREIGN, target / FOREIGN)


def _plan_as_json(plan: Plan) -> list[dict[str, Any]]:
    return [stage.to_dict() for stage in plan.stages]
