"""The machines that are not here: TPUs through their compiler, GPUs by formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stacking_jax.planning.cache import ResultCache, versions
from stacking_jax.planning.compiler import Compiler
from stacking_jax.planning.estimate import Rates
from stacking_jax.planning.formula import stage_by_formula
from stacking_jax.planning.topology import Topology
from stacking_jax.training.config import TrainConfig


class _Described:
    def __init__(self, topology: Topology):
        self.topology = topology
        self.name = topology.name
        chip = topology.chip
        self.rates = Rates(chip.peak_flops, chip.hbm_bandwidth, topology.num_chips)

    def describe(self) -> dict[str, Any]:
        chip = self.topology.chip
        return {
            "chip": chip.name, "hbm_limit_bytes": chip.hbm_bytes, "rates": "published",
            "versions": versions() if self.method == "compiler" else None,
        }


class TpuMachine(_Described):
    """A TPU topology: every stage is compiled for it. Use it as a context manager."""

    method = "compiler"

    def __init__(
        self, topology: Topology, cache: ResultCache | None = None, modules: list[str] = ()
    ):
        super().__init__(topology)
        self._compiler = Compiler(topology, cache, modules)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._compiler.close()

    def stage(
        self, config: TrainConfig, stage: int, doing: Callable[[str], None]
    ) -> dict[str, Any]:
        return self._compiler.stage(config, stage, doing)


class GpuMachine(_Described):
    """GPUs, which only their own machine can compile for: by formula."""

    method = "formula"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def stage(
        self, config: TrainConfig, stage: int, doing: Callable[[str], None]
    ) -> dict[str, Any]:
        del doing
        return stage_by_formula(config, stage, self.topology)


def machine_for(topology: Topology, modules: list[str] = ()) -> TpuMachine | GpuMachine:
    """The machine behind a topology's name."""
    if topology.chip.vendor == "gpu":
        return GpuMachine(topology)
    return TpuMachine(topology, modules=modules)
