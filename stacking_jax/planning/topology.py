"""What `--topology` names: 'v5p:4x4x8', 'v5e:16x16*2' (two slices), 'h100:8x4', 'local'."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.planning.chips import CHIPS, Chip

LOCAL = "local"
_FORM = re.compile(r"([a-z0-9-]+):(\d+(?:x\d+)*)(?:\*(\d+))?")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    Attributes:
      chip: of which kind they all are.
      shape: chips along each axis of a slice's torus; of GPUs (per node, nodes).
      slices: how many slices, connected by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        times = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}{times}"

    def devices(self) -> list[Any]:
        """Descriptions of the devices, one per chip, from the TPU compiler (libtpu).

        Raises:
          UserError: libtpu is missing, or knows no such topology.
        """
        import jax
        from jax.experimental import topologies

        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        options: dict[str, Any] = {}
        if self.chip.name == "v4":
            # Else a chip counts as two devices, one for each core.
            options["chip_config_name"] = "megacore"
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the TPU compiler knows no topology {name}: {reason}") from None
        devices = list(found.devices)
        if len(devices) != self.num_chips:
            raise UserError(
                f"the TPU compiler describes {len(devices)} devices for {self.name}, which has "
                f"{self.num_chips} chips; plan for one device per chip only"
            )
        return devices

    def link_rate(self, devices: Sequence[Any]) -> float:
        """Bytes/s at which each chip of a group can send to the others, all links at work.

        A TPU uses the links of every torus axis along which the group extends: both of an
        axis that closes to a ring, else one. A GPU uses NVLink within a node and the network
        between nodes; a group over several slices or nodes goes at the network's rate.

        Args:
          devices: the group, as `devices` or `jax.devices` describes them.
        """
        return self.rate_of(
            [tuple(device.coords) for device in devices],
            len({getattr(device, "slice_index", None) for device in devices}),
        )

    def rate_of(self, coords: Sequence[tuple[int, ...]], slices: int = 1) -> float:
        """`link_rate` of chips at these places of the torus, in so many slices."""
        if slices > 1:
            return self.chip.network_bandwidth
        links = 0
        for axis, length in enumerate(self.shape):
            extent = len({place[axis] for place in coords})
            if extent > 1:
                closed = extent == length and length % self.chip.wrap == 0
                links += 2 if closed else 1
        return max(links, 1) * self.chip.link_bandwidth


def parse(text: str) -> Topology:
    """The topology of that name.

    Raises:
      UserError: it has another form, or names a chip or a shape that there is not.
    """
    found = _FORM.fullmatch(text.strip().lower())
    if found is None:
        raise UserError(
            f"--topology {text}: write CHIP:AxBxC, such as v5p:4x4x8, v5e:16x16, v5e:16x16*2 (two "
            "slices) or h100:8x4 (GPUs per node x nodes), or local for the devices here"
        )
    name, shape, slices = found[1], tuple(map(int, found[2].split("x"))), int(found[3] or 1)
    if name not in CHIPS:
        raise UserError(f"--topology {text}: no chip {name!r}; there are {', '.join(CHIPS)}")
    chip = CHIPS[name]
    axes = chip.dimensions or 2
    if chip.vendor == "gpu" and len(shape) == 1:
        shape = (*shape, 1)
    if len(shape) != axes or 0 in shape or slices < 1:
        form = "x".join("ABC"[:axes]) if chip.dimensions else "GPUs per node x nodes"
        raise UserError(f"--topology {text}: a shape of {name} is {form}, all at least 1")
    if chip.vendor == "gpu" and slices > 1:
        raise UserError(f"--topology {text}: GPUs have nodes, not slices; write {name}:8x4")
    return Topology(chip, shape, slices)
