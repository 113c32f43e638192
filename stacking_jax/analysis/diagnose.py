"""Diagnoses a checkpoint of a run: finds what is to be looked at, looks, keeps what was seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stacking_jax.analysis.depth_use import losses_of_maps
from stacking_jax.analysis.inside import Injection, Network, effects, look
from stacking_jax.analysis.interventions import interventions
from stacking_jax.analysis.sample import Sample
from stacking_jax.analysis.similarity import check_block, similarity
from stacking_jax.analysis.walk import Walk
from stacking_jax.console import progress, say
from stacking_jax.errors import UserError
from stacking_jax.evaluation.model import RunModels
from stacking_jax.training.state import model_graph

PARTS = ("similarity", "maps", "layers", "effects")
"""What can be asked for: weights alone; depth maps; early exits, contributions, linearity and
neurons; what skipping a layer changes behind it."""

FORMAT = 1


def diagnose(
    run_dir: str | Path, *, step: int | None = None, block: int | None = None,
    batches: int = 8, rows: int | None = None, parts: Sequence[str] = PARTS, top: int = 5,
) -> dict[str, Any]:
    """Looks into one checkpoint.

    Args:
      run_dir: of the run.
      step: of the checkpoint; None for the newest.
      block: layers of a block; None for `default_block`'s choice.
      batches: held-out batches of each source.
      rows: of a batch; None for `Sample.open`'s choice.
      parts: of `PARTS`.
      top: tokens of a prediction that are compared at early exits.

    Returns:
      Plain data; docs/diagnostics.md says what stands where.

    Raises:
      UserError: for what the user can put right.
    """
    check_numbers(batches=batches, rows=rows, top=top, block=block)
    unknown = [name for name in parts if name not in PARTS]
    if unknown or not parts:
        raise UserError(
            f"there is no part {', '.join(unknown) or 'asked for'}; the parts are "
            f"{', '.join(PARTS)}"
        )
    run = RunModels(run_dir)
    step = run.choose(step)
    meta = run.meta(step)
    sources = sources_of(meta)
    if not sources:
        raise UserError(
            f"checkpoint {step} of {run_dir} is of a stage without layers, so there is nothing to "
            "look into: choose one from after the growth with --step"
        )
    injection = injection_of(meta)
    if injection is not None and "maps" in parts:
        why = (
            f"the loop of checkpoint {step} has its input injected: its layers cannot be skipped, "
            "swapped or repeated as those of a depth map"
        )
        parts = [name for name in parts if name != "maps"]
        if not parts:
            raise UserError(f"{why}; ask for other --parts")
        say(f"{why}; 'maps' is left out")
    if block is None:
        block = default_block(meta, len(sources))
    check_block(len(sources), block)
    if top > run.config.model.vocab_size:
        raise UserError(f"{top} tokens are compared, of a vocabulary of fewer")
    with_data = any(name != "similarity" for name in parts)
    if with_data:
        sample = Sample.open(run.config, run.mesh, batches, rows)
    params = run.load(step).params
    found = {
        "format": FORMAT, "step": step, "depth": int(meta["depth"]), "positions": list(sources),
        "block": block,
    }
    if "similarity" in parts:
        found["similarity"] = similarity(params["stack"]["layers"], sources, block)
    if not with_data:
        return found
    found |= {"batches": sample.count, "rows": sample.rows, "data_digest": sample.digest}
    # A scan is compiled as fast for 72 layers as for 8. The kernel is that of the devices here,
    # which need not be those of the training, and nothing is kept for a backward pass.
    shape = dataclasses.replace(
        run.config.model, stack="scan", attention="auto", remat="none"
    )
    graph = model_graph(shape)
    network = Network(
        Walk(graph, run.mesh, top), params, sources, run.config.model.d_model, injection
    )
    asked = [name for name in parts if name != "similarity"]
    for name in asked:
        with progress(f"{name}, step {step}", sample.count, "batches") as advance:
            if name == "maps":
                changed = interventions(sources, block)
                found["maps"] = losses_of_maps(
                    graph, params, sources, changed, sample, advance
                )
            elif name == "layers":
                found |= look(network, sample, advance=advance)
            else:
                found["effects"] = effects(network, sample, advance)
    return found


def sources_of(meta: Mapping[str, Any]) -> tuple[int, ...]:
    """The stored layer of each position of a checkpoint's network.

    Args:
      meta: what stands beside its state.
    """
    return tuple(_stage_of(meta).get("run_map") or range(int(meta["depth"])))


def injection_of(meta: Mapping[str, Any]) -> Injection | None:
    """Where the loop of a checkpoint has its input injected; None where nothing is injected."""
    loop = _stage_of(meta).get("loop") or {}
    if not loop.get("inject") or loop["turns"] < 2:
        return None
    starts = [loop["start"] + turn * loop["block"] for turn in range(1, loop["turns"])]
    source = loop["start"] if loop["inject"] == "stream" else 0
    return Injection(source, frozenset(starts))


def _stage_of(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """{} for a checkpoint that was grown on disk since, whose layers each run once."""
    plan = meta.get("plan") or []
    stage = plan[int(meta["stage"])] if plan else {}
    return stage if stage.get("depth") == int(meta["depth"]) else {}


def default_block(meta: Mapping[str, Any], positions: int) -> int:
    """The layers that a growth added at a time, where they fill the stack.

    Else the largest block that is no longer than the number of blocks; 1 for a prime depth.
    """
    plan = meta.get("plan") or []
    first = int(plan[0]["depth"]) if plan else positions
    if 1 < first < positions and positions % first == 0:
        return first
    return max(n for n in range(1, math.isqrt(positions) + 1) if positions % n == 0)


def check_numbers(**numbers: int | None) -> None:
    """Raises UserError unless all of them are at least 1, or None."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"--{name} is at least 1; got {number}")
