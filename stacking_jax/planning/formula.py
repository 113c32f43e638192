"""Memory and traffic of a step by formula, for chips whose compiler is not here (NVIDIA).

The state's bytes are exact: they follow from the shardings. The rest follows from what a
layer computes, and is no promise: XLA fuses, reuses and rearranges. Shapes: N layers, D
width, F inner width, H heads of width W, K key heads, V vocabulary, L length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.sharding import AbstractMesh

from stacking_jax.data.records import batch_keys
from stacking_jax.errors import UserError
from stacking_jax.models import LAYOUT
from stacking_jax.models.head_loss import chunk_of
from stacking_jax.planning.compiled import state_bytes
from stacking_jax.planning.topology import Topology
from stacking_jax.training import sharding
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.mesh import LogicalMesh
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.programs import step_arguments
from stacking_jax.training.rules import AXES, Rules
from stacking_jax.training.state import abstract_state

_KNOWN_AXES = ("data", "fsdp", "tensor")
# How much of a layer's activations one pass moves through main memory: what the TPU compiler's
# program of the 8B shape moves (docs/plan.md holds the formula against it).
_MOVED_PER_PASS = 1.25
# Of a forward pass, what the backward pass runs again: layers whole, or a good half of them.
_AGAIN = {"full": 1, "minimal": 0.5, "offload": 0.5}


def stage_by_formula(config: TrainConfig, stage: int, topology: Topology) -> dict[str, Any]:
    """As `compiled.compile_stage`, without a compiler: `compile_seconds` is None.

    Raises:
      UserError: if the mesh does not fit the devices, the batch or a parameter, or has an
        axis that the formulas do not know.
    """
    sizes = mesh_sizes(config, topology.num_chips)
    mesh = _without_devices(config, sizes)
    sharding.check_batch(mesh, config.batch_size, config.microbatches)
    planned = config.plan().stages[stage]
    state = abstract_state(
        config.model, make_optimizer(config.optimizer, LAYOUT), planned.depth, mesh
    )
    beside = step_arguments(config, planned, mesh, batch_keys(config.data.is_ul2))
    step = _Step(
        config, planned.positions, sizes, state_bytes(state), state_bytes(state.params),
        state_bytes(beside),
    )
    peak = step.peak_bytes()
    return {
        "fits": peak <= topology.chip.hbm_bytes, "hbm_peak_bytes": round(peak),
        "hbm_limit_bytes": topology.chip.hbm_bytes, "argument_bytes": round(step.arguments),
        "temporary_bytes": round(peak - step.arguments), "compile_seconds": None,
        "traffic_bytes": round(step.traffic_bytes()), "mesh": sizes, "loops_known": True,
        "collectives": step.collectives(topology), "cached": False,
    }


def _without_devices(config: TrainConfig, sizes: dict[str, int]) -> LogicalMesh:
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return LogicalMesh(abstract, Rules.of(config.mesh.rules))


def mesh_sizes(config: TrainConfig, devices: int) -> dict[str, int]:
    """Axis of the mesh -> its size, with 'the rest' filled in.

    Raises:
      UserError: if the axes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    shown = " × ".join(f"{name}={size}" for name, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices % known:
        raise UserError(f"mesh {shown}: {known} does not divide {devices} devices")
    sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(f"mesh {shown} does not multiply to {devices} devices")
    others = [axis for axis, size in sizes.items() if size > 1 and axis not in _KNOWN_AXES]
    if others:
        raise UserError(
            f"the formulas for GPUs know the mesh axes {', '.join(_KNOWN_AXES)}; set "
            f"MeshConfig.{others[0]} = 1, or plan for a TPU, which is compiled"
        )
    return sizes


@dataclasses.dataclass(frozen=True)
class _Step:
    """One train step on one device; `depth` is of the layers that it runs.

    `batch` counts a teacher's parameters too; what its forward pass holds and moves is left out.
    """

    config: TrainConfig
    depth: int
    sizes: dict[str, int]
    state: float
    params: float
    batch: float

    @property
    def number(self) -> int:
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def rows(self) -> float:
        """Rows of a microbatch on one device."""
        parts = self.sizes["data"] * self.sizes["fsdp"]
        return self.config.batch_size / self.config.microbatches / parts

    @property
    def tokens(self) -> float:
        return self.rows * self.config.data.sequence_length

    @property
    def arguments(self) -> float:
        return self.state + self.batch

    @property
    def layer_weights(self) -> float:
        """Bytes of one layer in the dtype of the computation, gathered over `fsdp`."""
        costs = self.config.model.costs(self.config.data.sequence_length)
        return costs.layer_params * self.number / self.sizes["tensor"]

    @property
    def embedding(self) -> float:
        model = self.config.model
        return model.vocab_size * model.d_model / self.sizes["tensor"]

    def products(self) -> float:
        """Bytes of a layer's matrix products: what remat = 'dots' keeps of it."""
        model = self.config.model
        narrow = 2 * model.d_model
        wide = (model.num_heads + 2 * model.kv_heads) * model.head_width + 2 * model.d_ff
        return self.tokens * self.number * (narrow + wide / self.sizes["tensor"])

    def named(self) -> float:
        """Bytes of what remat = 'minimal' keeps of a layer beside its input."""
        model = self.config.model
        heads = 2 * (model.num_heads + model.kv_heads) * model.head_width
        return self.tokens * self.number * (model.d_model + heads / self.sizes["tensor"])

    def everything(self) -> float:
        """Bytes of all that a layer's backward pass reads: what remat = 'none' keeps."""
        model, length = self.config.model, self.config.data.sequence_length
        # Two norms in float32, rotated queries and keys, what the gate gives, and attention's
        # weights.
        norms = 2 * 4 * self.tokens * model.d_model
        heads = (model.num_heads + model.kv_heads) * model.head_width
        elementwise = self.tokens * self.number * (heads + model.d_ff)
        scores = self.tokens * length * model.num_heads * self.number
        return self.products() + norms + (elementwise + scores) / self.sizes["tensor"]

    def peak_bytes(self) -> float:
        model = self.config.model
        kept_input = self.tokens * model.d_model * self.number
        kept = {
            "full": kept_input, "dots": kept_input + self.products(), "offload": 0.0,
            "minimal": kept_input + self.named(), "none": kept_input + self.everything(),
        }[model.remat]
        cast = self.params * self.number / 4 if self.number < 4 else 0
        words = model.vocab_size // self.sizes["tensor"]
        shape = max(int(self.rows), 1), self.config.data.sequence_length
        chunk = chunk_of(model.loss, model.loss_chunk, shape, words)
        logits = 2 * 4 * (chunk or self.tokens) * words
        if chunk is not None:  # The gradient of the head, summed over the chunks.
            logits += 4 * words * model.d_model
        sharded = self.sizes["fsdp"] > 1
        gathered = (2 * self.layer_weights + self.number * self.embedding) if sharded else 0
        # The logits are gone when the first layer's backward pass begins.
        working = max(logits, self.everything())
        gradients = self.params * (2 if self.config.microbatches > 1 else 1)
        return self.arguments + gradients + cast + self.depth * kept + gathered + working

    def traffic_bytes(self) -> float:
        micro = self.config.microbatches
        again = _AGAIN.get(self.config.model.remat, 0)
        # A backward pass counts as two.
        passes = _MOVED_PER_PASS * (3 + again)
        activations = passes * self.depth * self.everything() * micro
        weights = (2 + again) * 2 * self.depth * self.layer_weights * micro
        logits = 6 * 4 * self.tokens * self.config.model.vocab_size / self.sizes["tensor"]
        # The state is read and written, gradients written and read twice (clipping).
        return activations + weights + logits * micro + 2 * self.state + 3 * self.params

    def collectives(self, topology: Topology) -> list[dict[str, Any]]:
        """What the shardings ask for, if the compiler does just that."""
        micro, depth, model = self.config.microbatches, self.depth, self.config.model
        again = 1 if model.remat == "full" else 0
        weights = depth * self.layer_weights + self.number * self.embedding
        activation = self.tokens * model.d_model * self.number
        rows = []

        def add(kind, axis, calls, payload):
            size = self.sizes[axis]
            if size == 1:
                return
            share = (size - 1) / size * (2 if kind == "all-reduce" else 1)
            rows.append({
                "kind": kind, "axes": [axis], "group_size": size, "calls": calls,
                "bytes": round(payload), "sent_bytes": share * payload,
                "seconds": share * payload / self._rate(axis, topology),
            })

        # Once forward and once backward, where a layer is gathered anew.
        add("all-gather", "fsdp", 2 * micro * depth, 2 * micro * weights)
        add("reduce-scatter", "fsdp", micro * depth, micro * weights)
        add("all-reduce", "data", 1, self.params)
        calls = (4 + 2 * again) * depth * micro
        add("all-reduce", "tensor", calls, calls * activation)
        return rows

    def _rate(self, axis: str, topology: Topology) -> float:
        """Bytes/s along a mesh axis; the last axes lie closest together."""
        names = list(self.sizes)
        inner = math.prod(self.sizes[name] for name in names[names.index(axis) + 1 :])
        within = inner * self.sizes[axis] <= topology.shape[0]
        chip = topology.chip
        return chip.link_bandwidth if within else chip.network_bandwidth
