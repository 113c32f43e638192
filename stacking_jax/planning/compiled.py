"""Compiles the train step of a stage for a mesh and reads off what the program needs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stacking_jax.data.records import batch_keys
from stacking_jax.models import LAYOUT
from stacking_jax.planning.collectives import Collective, collectives
from stacking_jax.planning.hlo import Module
from stacking_jax.planning.traffic import hbm_bytes
from stacking_jax.training import sharding, spikes
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.programs import lower_train_step, step_arguments
from stacking_jax.training.state import TrainState, abstract_state, model_graph

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu's words. The first counts the temporaries alone, without parameters and moments.
_TOO_LARGE = (
    re.compile(
        r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds available "
        r"HBM \(([\d.]+)([KMGT]?)i?B?\)"
    ),
    re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? (?:of )?hbm"),
)


@dataclasses.dataclass(frozen=True)
class LoweredStage:
    """The train step of a stage for one mesh, traced and not compiled.

    Attributes:
      program: the step.
      abstract: the state it takes.
      beside: what it takes behind the state, see `programs.step_arguments`.
      argument_bytes: of all of that on one device.
      seconds: that tracing took.
    """

    program: jax.stages.Lowered
    abstract: TrainState
    beside: tuple[Any, ...]
    argument_bytes: int
    seconds: float


def for_accelerator(config: TrainConfig) -> TrainConfig:
    """The configuration as it is on an accelerator, where 'auto' means a scanned stack."""
    stack = "scan" if config.model.stack == "auto" else config.model.stack
    return dataclasses.replace(config, model=dataclasses.replace(config.model, stack=stack))


def lower_stage(config: TrainConfig, stage: int, mesh: sharding.LogicalMesh) -> LoweredStage:
    """Traces the step that `train` would compile for this stage.

    Raises:
      UserError: if the mesh cannot divide the batch or a parameter.
    """
    began = time.monotonic()
    sharding.check_batch(
        mesh, config.batch_size, config.microbatches, config.data.sequence_length
    )
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    plan = config.plan()
    abstract = abstract_state(config.model, optimizer, plan.stages[stage].depth, mesh)
    abstract = spikes.with_window(abstract, config.spikes, mesh)
    # Tasks registered elsewhere may have prompts too; only their caches know.
    keys = batch_keys(config.data.is_ul2)
    program = lower_train_step(
        config, plan, plan.stages[stage], model_graph(config.model), optimizer, mesh, abstract,
        keys,
    )
    beside = step_arguments(config, plan.stages[stage], mesh, keys)
    arguments = state_bytes(abstract) + state_bytes(beside)
    return LoweredStage(program, abstract, beside, arguments, time.monotonic() - began)


def state_bytes(abstract: Any) -> int:
    """Bytes of a sharded abstract tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def compile_stage(
    lowered: LoweredStage, mesh: sharding.LogicalMesh, link_rate: Callable[[list[Any]], float]
) -> tuple[dict, str | None, Any]:
    """Compiles a step and reads what it needs.

    Args:
      lowered: the traced step.
      mesh: that it was traced for.
      link_rate: from the devices of a group to the bytes/s at which each can send.

    Returns:
      The result as plain data (see below), the optimised program's text (None if it does
      not fit), and the compiled step (likewise).

      `fits`; `hbm_peak_bytes` (what the compiler says that it needs at its peak; if it does
      not fit, what the error says); `hbm_limit_bytes` (from the error, else None);
      `argument_bytes`, `temporary_bytes`, `output_bytes`, `program_bytes`;
      `compile_seconds`; and of the program `traffic_bytes`, `collectives`, `loops_known`.
    """
    began, busy = time.monotonic(), time.process_time()
    result: dict[str, Any] = {
        "fits": True, "hbm_limit_bytes": None, "argument_bytes": lowered.argument_bytes,
        "lower_seconds": lowered.seconds,
    }
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_error(str(error))
        if needed is None:
            raise
        result |= {
            "fits": False, "hbm_peak_bytes": needed[0], "hbm_limit_bytes": needed[1],
            "compile_seconds": time.monotonic() - began, "error": str(error).splitlines()[0],
        }
        return result, None, None
    result["compile_seconds"] = time.monotonic() - began
    result["compile_cpu_seconds"] = time.process_time() - busy
    memory = compiled.memory_analysis()
    result |= {
        "hbm_peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
    }
    text = compiled.as_text()
    return result | read_program(text, mesh, link_rate), text, compiled


def read_program(text: str, mesh: sharding.LogicalMesh, link_rate: Callable[[list[Any]], float]) -> dict:
    """What one run of an optimised program moves: main memory, and between devices."""
    module = Module(text)
    rows, known = collectives(module, mesh.size)
    return {
        "traffic_bytes": hbm_bytes(module),
        "collectives": [_as_data(row, mesh, link_rate) for row in rows],
        "loops_known": known,
    }


def memory_error(text: str) -> tuple[int, int] | None:
    """(required, available) bytes from the compiler's error, None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    for form in _TOO_LARGE:
        found = form.search(text)
        if found:
            need, need_unit, have, have_unit = found.groups()
            return (
                round(float(need) * _UNITS[need_unit]), round(float(have) * _UNITS[have_unit])
            )
    return None


def _as_data(row: Collective, mesh: sharding.LogicalMesh, link_rate) -> dict[str, Any]:
    devices = mesh.devices.reshape(-1)
    group = [devices[place] for place in row.group if place < devices.size]
    return {
        "kind": row.kind, "axes": _axes_of(row.group, mesh), "group_size": row.group_size,
        "calls": row.calls, "bytes": row.bytes, "sent_bytes": row.sent_bytes,
        "seconds": row.sent_bytes / link_rate(group),
    }


def _axes_of(group: tuple[int, ...], mesh: sharding.LogicalMesh) -> list[str]:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(list(group), mesh.devices.shape))
    return [
        name for name, along in zip(mesh.axis_names, places, strict=True)
        if len(set(along.tolist())) > 1
    ]
