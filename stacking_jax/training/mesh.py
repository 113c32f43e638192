"""The devices of a run, laid out along the axes of the mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stacking_jax.errors import UserError
from stacking_jax.training.config import MeshConfig
from stacking_jax.training.rules import AXES, Rules


@dataclasses.dataclass(frozen=True)
class LogicalMesh:
    """Devices, and where arrays lie on them by the names of their axes.

    Attributes:
      physical: the devices along the axes `AXES`.
      rules: which of these split which axis of an array.
    """

    physical: Mesh
    rules: Rules = Rules()

    @property
    def devices(self) -> np.ndarray:
        """The devices, an axis for each of the mesh."""
        return self.physical.devices

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.physical.size

    @property
    def shape(self) -> Mapping[str, int]:
        """Mesh axis -> its devices."""
        return self.physical.shape

    @property
    def axis_names(self) -> tuple[str, ...]:
        return self.physical.axis_names

    def parts(self, name: str | None) -> int:
        """Into how many parts an array's axis of this name is cut."""
        return math.prod(self.shape[axis] for axis in self.rules.axes(name))

    def spec(self, names: Sequence[str | None], what: str = "an array") -> PartitionSpec:
        """The partition of an array whose axes have these names.

        Raises:
          UserError: if the rules would split it twice over one axis of the mesh.
        """
        split = self.rules.split(names, what)
        return PartitionSpec(
            *(axes[0] if len(axes) == 1 else axes or None for axes in split)
        )

    def sharding(self, names: Sequence[str | None], what: str = "an array") -> NamedSharding:
        """`spec` on these devices; whether they divide an array is not looked at."""
        return NamedSharding(self.physical, self.spec(names, what))

    def for_decoding(self) -> LogicalMesh:
        """The same devices with all of them, but for `tensor`, dealing out rows."""
        return LogicalMesh(self.physical, self.rules.for_decoding())


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> LogicalMesh:
    """Lays the devices out as slice × data × fsdp × sequence × tensor.

    Devices of several slices (TPU pods joined by the data-centre network, DCN) are laid
    out so that only the axis `slice` goes from one to another. Where the devices know of
    no slices, `slice` is the outermost axis all the same.

    Args:
      config: sizes and rules.
      devices: None for all that are at hand.

    Raises:
      UserError: if the axes do not multiply to the number of devices, or `slice` is not the
        number of TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in AXES}
    shown = " × ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "of 1"
    known = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            if len(devices) % known:
                raise UserError(
                    f"mesh {shown}: {known} does not divide the {len(devices)} devices at hand"
                )
            sizes[name] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {shown} needs {math.prod(sizes.values())} devices, but {len(devices)} are at "
            "hand"
        )
    return LogicalMesh(_lay_out(sizes, devices), Rules.of(config.rules))


def make_decoding_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> LogicalMesh:
    """The mesh that scores and continues text with the model of a run.

    That of the run where the devices at hand allow it, else all of them as one `fsdp` axis;
    rows are dealt out over the axis that splits the length in training as well.
    """
    try:
        return make_mesh(config, devices).for_decoding()
    except UserError:
        return make_mesh(MeshConfig(rules=config.rules), devices).for_decoding()


def _lay_out(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    axis_types = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if sizes["slice"] == slices:
        within, across = (1, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        laid_out = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    elif devices[0].platform == "tpu":
        raise UserError(
            f"the {len(devices)} devices lie in {slices} slices, and the mesh has "
            f"slice={sizes['slice']}; bind MeshConfig.slice = {slices}"
        )
    else:  # GPUs of several hosts, whose network every axis may use; neighbours stay together.
        laid_out = np.asarray(devices).reshape(shape)
    return Mesh(laid_out, AXES, axis_types=axis_types)
