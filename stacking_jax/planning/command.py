"""`stacking-jax plan --topology`: the table, the JSON, and whether the run fits."""

from __future__ import annotations

import json
import sys

from stacking_jax.console import progress
from stacking_jax.errors import UserError
from stacking_jax.planning import topology as topologies
from stacking_jax.planning.advice import find_fit
from stacking_jax.planning.config import PlanConfig
from stacking_jax.planning.topology_plan import plan_on, questions
from stacking_jax.training.config import TrainConfig

GIB = 2**30


def run(
    config: TrainConfig, price: PlanConfig, topology: str, *, as_json: bool = False,
    modules: list[str] = (),
) -> int:
    """Prints the plan of a run on a topology.

    Args:
      config: of the run.
      price: and default topology.
      topology: its name; '' for the one that gin binds.
      as_json: print one JSON object instead of tables.
      modules: the user's own that were imported.

    Raises:
      UserError: if a stage does not fit (after the plan is printed), with what would; or if
        the run cannot be planned there at all.
    """
    plan, advice = make(config, price, topology, modules=modules)
    if as_json:
        print(json.dumps(plan))
    else:
        from stacking_jax.reporting import plan_table
        from stacking_jax.reporting.topology_table import topology_table

        color = sys.stdout.isatty()
        print(plan_table(plan, color=color))
        print(topology_table(plan, color=color))
    if advice is not None:
        raise UserError(advice)
    return 0


def make(
    config: TrainConfig, price: PlanConfig, topology: str, *, modules: list[str] = ()
) -> tuple[dict, str | None]:
    """The plan, and what to say if it does not fit (None if it does). Raises as `run`."""
    name = topology or price.topology
    if name is None:
        raise UserError(
            "--topology needs a value, such as v5p:4x4x8, where no PlanConfig.topology is bound"
        )
    with _machine(name, config, modules) as machine:
        stages = len(config.plan().stages)
        asked = len(questions(config))
        with progress(f"planning for {machine.name}", asked, "stages") as advance:
            plan = plan_on(config, machine, price, advance)
        if plan["fits"]:
            return plan, None
        too_large = [s for s in range(stages) if not plan["stages"][s]["fits"]]
        worst = max(too_large, key=lambda s: plan["stages"][s]["hbm_peak_bytes"])
        with progress("looking for what fits", None, "tried") as advance:
            advice = find_fit(
                config, machine, worst, lambda text: advance(1, text)
            )
        plan["advice"] = advice
        return plan, _refusal(plan, worst, advice)


def _machine(name: str, config: TrainConfig, modules: list[str]):
    if name == topologies.LOCAL:
        from stacking_jax.planning.local import LocalMachine

        return LocalMachine(config.model.dtype)
    from stacking_jax.planning.machines import machine_for

    return machine_for(topologies.parse(name), list(modules))


def _refusal(plan: dict, worst: int, advice: dict) -> str:
    stage = plan["stages"][worst]
    said = {"compiler": "compiled", "formula": "by formula", "local": "compiled"}
    needs, has = stage["hbm_peak_bytes"] / GIB, stage["hbm_limit_bytes"] / GIB
    layers = f"{stage['depth']} layers"
    if stage["run_depth"] != stage["depth"]:
        layers += f", of which {stage['run_depth']} run"
    text = (
        f"stage {worst + 1} ({layers}) needs {needs:.2f} GiB per device of "
        f"{plan['topology']['name']}, which has {has:.2f} GiB; "
    )
    if advice["fits_with"]:
        return text + (
            f"every stage fits with {advice['fits_with']} ({said[plan['topology']['method']]})"
        )
    tried = "; ".join(advice["tried"]) or "nothing, as no other mesh divides this run"
    return text + f"no remat policy or mesh that was tried fits ({tried}): take more chips"
