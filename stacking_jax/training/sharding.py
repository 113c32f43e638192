"""Where parameters, activations and batches lie, and what a mesh cannot divide."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stacking_jax.errors import UserError
from stacking_jax.models.asked import Asked
from stacking_jax.models.config import DecoderConfig
from stacking_jax.models.kernels import choose
from stacking_jax.models.placement import Placement
from stacking_jax.training.mesh import LogicalMesh, make_decoding_mesh, make_mesh

__all__ = [
    "LogicalMesh", "OnMesh", "check_attention", "check_batch", "constrainer", "local_rows",
    "make_decoding_mesh", "make_mesh", "named_sharding", "place", "place_batch", "rows_of",
]

BATCH = ("batch", "length")


def named_sharding(
    mesh: LogicalMesh, names: Sequence[str | None], shape: Sequence[int], what: str
) -> NamedSharding:
    """The sharding of one array.

    Args:
      mesh: the devices and the rules.
      names: of the array's axes.
      shape: of the array.
      what: the array's name, for messages.

    Raises:
      UserError: if the mesh does not divide an axis, naming both and sizes that work.
    """
    for axis, (name, size) in enumerate(zip(names, shape, strict=True)):
        parts = mesh.parts(name)
        if size % parts:
            raise UserError(
                f"{what} {tuple(shape)}: axis {axis} ({name}, {size}) cannot be divided over "
                f"{parts} devices ({_mesh_axes(mesh, name)}); {_what_works(mesh, name, size)}"
            )
    return mesh.sharding(names, what)


@dataclasses.dataclass(frozen=True)
class OnMesh(Placement):
    """Places activations on a mesh.

    An axis that the mesh does not divide (fewer key heads than `tensor`, say) is left to the
    compiler: that changes where numbers lie and not what they are.

    Attributes:
      mesh: the devices and the rules.
    """

    mesh: LogicalMesh

    @property
    def device(self) -> jax.Device:
        return self.mesh.devices.flat[0]

    def __call__(self, x, names):
        if self.mesh.size == 1:
            return x
        spec = self.mesh.spec(names, "activations")
        free = PartitionSpec.UNCONSTRAINED
        fitting = (
            entry if size % self.mesh.parts(name) == 0 else free
            for entry, name, size in zip(spec, names, x.shape, strict=True)
        )
        where = NamedSharding(self.mesh.physical, PartitionSpec(*fitting))
        return jax.lax.with_sharding_constraint(x, where)

    def parts(self, name):
        return self.mesh.parts(name)

    def spec(self, names):
        return self.mesh.spec(names, "activations")

    def sharding(self, names):
        return None if self.mesh.size == 1 else self.mesh.sharding(names, "activations")

    def on_each_device(self, function, takes, gives):
        if self.mesh.size == 1:
            return function
        # What varies over which axis is not tracked: kernels do not say it of their results.
        return jax.shard_map(
            function, mesh=self.mesh.physical, in_specs=takes, out_specs=gives, check_vma=False
        )


@functools.lru_cache(maxsize=8)
def constrainer(mesh: LogicalMesh) -> Placement:
    """What places a model's activations on this mesh.

    The same mesh gets the same object, so that programs which it is part of are compiled
    once.
    """
    return OnMesh(mesh)


def check_batch(
    mesh: LogicalMesh, batch_size: int, microbatches: int = 1, length: int | None = None
) -> None:
    """Raises UserError unless the mesh divides every microbatch, and the length of its rows."""
    parts = mesh.parts("batch")
    if (batch_size // microbatches) % parts:
        step = parts * microbatches
        raise UserError(
            f"a batch of {batch_size} in {microbatches} microbatch(es) cannot be divided over "
            f"{parts} devices ({_mesh_axes(mesh, 'batch')}); use a multiple of {step}, "
            f"such as {_nearest(batch_size, step)}"
        )
    parts = mesh.parts("length")
    if length is not None and length % parts:
        raise UserError(
            f"a sequence_length of {length} cannot be divided over {parts} devices "
            f"({_mesh_axes(mesh, 'length')}); {_what_works(mesh, 'length', length)}"
        )


def check_attention(
    mesh: LogicalMesh, model: DecoderConfig, batch_size: int, length: int, prompts: bool
) -> None:
    """Raises UserError if the attention kernel that is named cannot run on this mesh.

    Args:
      mesh: the devices.
      model: names the kernel.
      batch_size: rows that are computed at once.
      length: of a row.
      prompts: whether the data have prompts.
    """
    asked = Asked.of(
        model, (batch_size, length), True, prompts and model.bidirectional_prompts,
        constrainer(mesh),
    )
    choose(model.attention, asked)


# ---- Batches --------------------------------------------------------------------------------


def local_rows(batch_size: int, mesh: LogicalMesh) -> tuple[int, ...]:
    """The rows of the global batch that this host reads: those of which its devices hold a part.

    Hosts whose devices hold parts of the same rows (where `tensor` or `sequence` goes from
    one host to another) read the same rows.

    Returns:
      Numbers of rows, rising.
    """
    devices = mesh.sharding(("batch",)).addressable_devices
    return rows_of(devices, mesh, batch_size)


def rows_of(
    devices: Iterable[jax.Device], mesh: LogicalMesh, batch_size: int
) -> tuple[int, ...]:
    """The rows of a batch of which some devices hold a part, rising."""
    held = mesh.sharding(("batch",)).devices_indices_map((batch_size,))
    rows: set[int] = set()
    for device in devices:
        rows.update(range(batch_size)[held[device][0]])
    return tuple(sorted(rows))


def place_batch(batch: dict[str, np.ndarray], mesh: LogicalMesh) -> dict[str, jax.Array]:
    """Puts this host's rows where the mesh wants them, as one global array.

    Args:
      batch: `[rows, L]` or `[rows, L, K]`, the rows `local_rows` in their order, whole: which
        of their columns lie on which device is decided here.
      mesh: the devices.

    Raises:
      UserError: if the rows are not those of a batch that the mesh divides.
    """
    return {name: _place_rows(rows, mesh) for name, rows in batch.items()}


def place(array: np.ndarray, mesh: LogicalMesh, names: Sequence[str | None]) -> jax.Array:
    """Puts an array that every host has whole where the mesh wants it, by its axes' names."""
    where = mesh.sharding(names)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def _place_rows(rows: np.ndarray, mesh: LogicalMesh) -> jax.Array:
    parts = mesh.parts("batch")
    # Of the equal shares into which a batch is cut, those that this host holds.
    shares = _shares(mesh)
    size, rest = divmod(len(rows), len(shares))
    if rest:
        raise UserError(
            f"{len(rows)} rows on this host cannot be divided over the {len(shares)} of {parts} "
            "shares of a batch that its devices hold"
        )
    begins = {share * size: place * size for place, share in enumerate(shares)}

    def part(index):
        begin = begins[index[0].start or 0]
        return rows[begin : begin + size, index[1]]

    shape = (size * parts, *rows.shape[1:])
    where = mesh.sharding((*BATCH, *[None] * (rows.ndim - 2)))
    return jax.make_array_from_callback(shape, where, part)


@functools.lru_cache(maxsize=8)
def _shares(mesh: LogicalMesh) -> tuple[int, ...]:
    return local_rows(mesh.parts("batch"), mesh)


# ---- Words for messages -----------------------------------------------------------------------


def _mesh_axes(mesh: LogicalMesh, name: str | None) -> str:
    """Those axes that cut it, without the ones of a single device."""
    return " × ".join(axis for axis in mesh.rules.axes(name) if mesh.shape[axis] > 1)


def _what_works(mesh: LogicalMesh, name: str | None, size: int) -> str:
    """Sizes near this one that the mesh divides, and sizes of the mesh that divide this one."""
    parts = mesh.parts(name)
    sizes = [str(n) for n in (size // parts * parts, _nearest(size, parts)) if n]
    fitting = [str(n) for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % n == 0]
    return (
        f"use {' or '.join(sizes)}, or a mesh with {_mesh_axes(mesh, name)} = "
        f"{' or '.join(fitting)}"
    )


def _nearest(size: int, parts: int) -> int:
    """The least multiple of `parts` that is not smaller."""
    return -(-size // parts) * parts
