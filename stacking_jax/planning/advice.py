"""What would make a run fit: tried out, fewest changes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.planning.topology_plan import Machine
from stacking_jax.training.config import TrainConfig

STRONGER = ("none", "dots", "minimal", "full")
"""What remat keeps, less and less. Not 'offload': no estimate knows what the way to the host
takes."""

MOST_TRIES = 12
"""How many other settings are tried; each costs up to a compilation of every stage."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Other settings of the same run.

    Attributes:
      config: the run with them.
      flags: what one writes on the command line for them.
    """

    config: TrainConfig
    flags: str


def changes(config: TrainConfig) -> Iterator[Change]:
    """Settings that need less memory: remat alone, a mesh alone, then both.

    More devices per tensor or sequence leave each device less of the activations.
    """
    remat = config.model.remat
    stronger = STRONGER[STRONGER.index(remat) + 1 :] if remat in STRONGER else ()
    meshes = list(_meshes(config))
    for remat in stronger:
        yield _change(config, remat, {})
    for mesh in meshes:
        yield _change(config, None, mesh)
    if stronger:
        for mesh in meshes:
            yield _change(config, stronger[-1], mesh)


def find_fit(
    config: TrainConfig, machine: Machine, deepest: int,
    doing: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The first change with which every stage fits, by the word of the same compiler.

    Args:
      config: of a run that does not fit.
      machine: that it is planned for.
      deepest: number of the stage that needs the most; tried first.
      doing: told what is tried.

    Returns:
      `fits_with`: the flags, None if nothing that was tried fits; `tried`: what did not.
    """
    tried: list[str] = []
    stages = sorted(range(len(config.plan().stages)), key=lambda stage: stage != deepest)
    for change in changes(config):
        if len(tried) == MOST_TRIES:
            break
        doing(change.flags)
        try:
            if all(
                machine.stage(change.config, stage, lambda text: None)["fits"] for stage in stages
            ):
                return {"fits_with": change.flags, "tried": tried}
        except UserError:
            continue  # This mesh cannot divide the batch or a parameter.
        tried.append(change.flags)
    return {"fits_with": None, "tried": tried}


def _meshes(config: TrainConfig) -> Iterator[dict[str, int]]:
    """Other shapes of the mesh over the same devices."""
    mesh = config.mesh
    if mesh.data != 1:
        yield {"data": 1, "fsdp": -1}
    for size in (2, 4, 8):
        for axis in ("tensor", "sequence"):
            if hasattr(mesh, axis) and getattr(mesh, axis) < size:
                yield {"data": 1, "fsdp": -1, axis: size}


def _change(config: TrainConfig, remat: str | None, mesh: dict[str, int]) -> Change:
    flags = []
    if remat is not None:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, remat=remat)
        )
        flags.append(f"--gin.DecoderConfig.remat='\"{remat}\"'")
    different = {name: size for name, size in mesh.items() if getattr(config.mesh, name) != size}
    if different:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **different))
        flags += [f"--gin.MeshConfig.{name}={size}" for name, size in different.items()]
    return Change(config, " ".join(flags))
