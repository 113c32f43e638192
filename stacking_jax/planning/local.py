"""The devices that are here: the same plan, and beside it the step as the clock has it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.models import LAYOUT
from stacking_jax.planning.chips import chip_of_kind
from stacking_jax.planning.compiled import compile_stage, lower_stage
from stacking_jax.planning.estimate import Rates
from stacking_jax.planning.topology import Topology
from stacking_jax.training import sharding, spikes
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.state import sharded_initial_state

_SECONDS_PER_STAGE = 5.0
_MOST_STEPS, _LEAST_STEPS = 20, 3


class LocalMachine:
    """The devices of this process. Use it as a context manager, like the others.

    A chip of the table has its published rates. Anything else, such as a CPU, has the rates
    of one matrix product and one copy, measured when the machine is made.
    """

    method = "local"

    def __init__(self, dtype: str = "float32"):
        """Looks at the devices.

        Args:
          dtype: of the computation, for rates that are measured.
        """
        self.devices = jax.devices()
        first, count = self.devices[0], len(self.devices)
        self.chip = chip_of_kind(first.device_kind)
        self.name = f"local ({count} × {first.device_kind})"
        if self.chip is not None:
            self.rates = Rates(self.chip.peak_flops, self.chip.hbm_bandwidth, count)
        else:
            # Simulated devices share one machine.
            flops, bandwidth = measured_rates(dtype)
            self.rates = Rates(flops / count, bandwidth / count, count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "chip": self.devices[0].device_kind, "hbm_limit_bytes": self.memory(),
            "rates": "measured here, by a matrix product and a copy" if self.chip is None
            else "published",
            "versions": {"jax": jax.__version__},
        }

    def memory(self) -> int:
        """Bytes that a program may use on one device."""
        stats = self.devices[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"])
        if self.chip is not None:
            return self.chip.hbm_bytes
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole // len(self.devices)

    def stage(
        self, config: TrainConfig, stage: int, doing: Callable[[str], None]
    ) -> dict[str, Any]:
        """What the step needs here, and `step_seconds_measured` if it fits."""
        mesh = sharding.make_mesh(config.mesh, self.devices)
        doing("compiling")
        lowered = lower_stage(config, stage, mesh)
        result, _, program = compile_stage(lowered, mesh, self._link_rate)
        limit = result["hbm_limit_bytes"] or self.memory()
        fits = result["fits"] and result["hbm_peak_bytes"] <= limit
        result |= {
            "hbm_limit_bytes": limit, "fits": fits, "cached": False,
            "mesh": dict(zip(mesh.axis_names, mesh.devices.shape, strict=True)),
            "step_seconds_measured": None, "measured_steps": 0,
        }
        if fits:
            doing("running")
            seconds = _time_steps(config, lowered, program, mesh)
            result |= {
                "step_seconds_measured": statistics.median(seconds),
                "measured_steps": len(seconds),
            }
        return result

    def _link_rate(self, group: list[Any]) -> float:
        if self.chip is None:
            return self.rates.hbm_bandwidth
        if self.chip.vendor == "gpu":
            nodes = {device.process_index for device in group}
            return self.chip.network_bandwidth if len(nodes) > 1 else self.chip.link_bandwidth
        extents = np.array([device.coords for device in self.devices]).max(axis=0) + 1
        shape = tuple(int(extent) for extent in extents[: self.chip.dimensions])
        return Topology(self.chip, shape).link_rate(group)


def measured_rates(dtype: str = "float32", size: int = 2048) -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s of a copy) of the default device, best of five."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    flops = 2.0 * size**3 / _best_seconds(product, matrix)
    numbers = jnp.ones((2**25,), jnp.float32)  # 128 MiB, more than caches hold.
    bandwidth = 2.0 * numbers.nbytes / _best_seconds(jax.jit(lambda a: a + 1.0), numbers)
    return flops, bandwidth


def _best_seconds(run: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    run(argument).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        run(argument).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _placed(whole: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def _time_steps(config: TrainConfig, lowered, program, mesh) -> list[float]:
    """Seconds of each of some training steps, on tokens drawn at random."""
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    bare = spikes.without_window(lowered.abstract)
    state = sharded_initial_state(config.model, optimizer, config.seed, bare)
    state = spikes.empty_window(state, lowered.abstract)
    rows, length = config.batch_size, config.data.sequence_length
    drawn = np.random.default_rng(config.seed).integers(
        1, config.model.vocab_size, (rows, length), dtype=np.int32
    )
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    content = {"tokens": drawn, "segment_ids": np.ones_like(drawn), "positions": positions}
    batch, *teacher = lowered.beside
    # Of labels and of a teacher's parameters zeros do: the time does not depend on them.
    batch = {
        name: _placed(content.get(name, np.zeros(leaf.shape, leaf.dtype)), leaf.sharding)
        for name, leaf in batch.items()
    }
    teacher = jax.tree.map(
        lambda leaf: _placed(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), teacher
    )
    state, metrics = program(state, batch, *teacher)
    jax.block_until_ready((state, metrics))
    seconds: list[float] = []
    while len(seconds) < _LEAST_STEPS or (
        sum(seconds) < _SECONDS_PER_STAGE and len(seconds) < _MOST_STEPS
    ):
        began = time.perf_counter()
        state, metrics = program(state, batch, *teacher)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return seconds
