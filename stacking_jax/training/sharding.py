"""The mesh, and one table from the names of axes to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stacking_jax.errors import UserError
from stacking_jax.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "length": None,
    "stream": None,
    # Parameters.
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}
"""Which mesh axes split an axis of that name; None keeps it whole."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as data × fsdp × tensor.

    Raises:
      UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    shown = " × ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        if len(devices) % known:
            raise UserError(
                f"mesh {shown}: {known} does not divide the {len(devices)} devices at hand"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    if np.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {shown} needs {int(np.prod(sizes))} devices, but {len(devices)} are at hand"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose axes have these names."""
    return PartitionSpec(*(RULES[name] if name is not None else None for name in names))


def named_sharding(
    mesh: Mesh, names: Sequence[str | None], shape: Sequence[int], what: str
) -> NamedSharding:
    """The sharding of one array.

    Raises:
      UserError: if a mesh axis does not divide the array's, naming both.
    """
    for axis, (name, size) in enumerate(zip(names, shape, strict=True)):
        parts = _parts(mesh, name)
        if size % parts:
            raise UserError(
                f"{what} {tuple(shape)}: axis {axis} ({name}, {size}) cannot be divided over "
                f"{parts} devices ({_mesh_axes(name)}); use a multiple of {parts} or another mesh"
            )
    return NamedSharding(mesh, spec(names))


def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The function with which a model places its activations on this mesh."""
    if mesh.size == 1:
        return lambda x, names: x

    def constrain(x, names):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names)))

    return constrain


def check_batch(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Raises UserError unless data × fsdp divides every microbatch."""
    parts = _parts(mesh, "batch")
    if (batch_size // microbatches) % parts:
        near = -(-batch_size // (parts * microbatches)) * parts * microbatches
        raise UserError(
            f"a batch of {batch_size} in {microbatches} microbatch(es) cannot be divided over "
            f"{parts} devices (data × fsdp); use a multiple of {parts * microbatches}, "
            f"such as {near}"
        )


def local_rows(batch_size: int) -> slice:
    """The rows of the global batch that this host reads."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this host's rows `[rows, L]` where the mesh wants them, as one global array."""
    sharding = NamedSharding(mesh, spec(("batch", "length")))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in batch.items()
    }


def _parts(mesh: Mesh, name: str | None) -> int:
    return int(np.prod([mesh.shape[axis] for axis in _axes_of(name)], dtype=int))


def _axes_of(name: str | None) -> tuple[str, ...]:
    rule: Any = RULES[name] if name is not None else None
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


def _mesh_axes(name: str | None) -> str:
    return " × ".join(_axes_of(name)) or "no axis"
