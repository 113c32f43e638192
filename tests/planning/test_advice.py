"""What would fit: fewest changes first, and only what the machine itself agreed to."""

from __future__ import annotations

import dataclasses

import pytest

from stacking_jax.errors import UserError
from stacking_jax.planning.advice import MOST_TRIES, changes, find_fit
from stacking_jax.planning.machines import GpuMachine
from stacking_jax.planning.topology import parse
from stacking_jax.training.config import MeshConfig


def small_gpu(gibibytes: float, text: str = "h100:8") -> GpuMachine:
    """GPUs of less memory, for which the formulas say what fits."""
    topology = parse(text)
    chip = dataclasses.replace(topology.chip, hbm_bytes=int(gibibytes * 2**30))
    return GpuMachine(dataclasses.replace(topology, chip=chip))


def needs(machine, config):
    return machine.stage(config, 1, print)["hbm_peak_bytes"] / 2**30


def test_the_order_of_what_is_tried(tiny, with_model):
    flags = [change.flags for change in changes(tiny)]
    assert flags[:3] == [
        f"--gin.DecoderConfig.remat='\"{remat}\"'" for remat in ("dots", "minimal", "full")
    ]
    assert flags[3] == "--gin.MeshConfig.tensor=2"
    assert "--gin.DecoderConfig.remat='\"full\"' --gin.MeshConfig.tensor=2" in flags[4:]
    assert len(set(flags)) == len(flags)
    assert not any("remat" in change.flags for change in changes(with_model(tiny, remat="full")))
    replicated = dataclasses.replace(tiny, mesh=MeshConfig(data=-1, fsdp=1))
    assert "--gin.MeshConfig.data=1 --gin.MeshConfig.fsdp=-1" in [
        change.flags for change in changes(replicated)
    ]


def test_the_least_change_with_which_every_stage_fits(tiny, with_model):
    config = dataclasses.replace(with_model(tiny, num_layers=64), batch_size=64)
    roomy = small_gpu(80)
    plain, dots, minimal, full = (
        needs(roomy, with_model(config, remat=remat))
        for remat in ("none", "dots", "minimal", "full")
    )
    assert plain > dots > minimal > full
    for limit, fits_with in (
        ((plain + dots) / 2, "dots"), ((dots + minimal) / 2, "minimal"),
        ((minimal + full) / 2, "full"),
    ):
        found = find_fit(config, small_gpu(limit), 1)
        assert found["fits_with"] == f"--gin.DecoderConfig.remat='\"{fits_with}\"'"


def test_every_stage_is_asked_and_no_guess_is_named(tiny):
    class Picky:
        """Fits only the deep stage, except on a tensor mesh."""

        asked = []

        def stage(self, config, stage, doing):
            self.asked.append((config.mesh.tensor, config.model.remat, stage))
            return {"fits": stage == 1 or config.mesh.tensor == 4}

    found = find_fit(tiny, Picky(), 1)
    assert found["fits_with"] == "--gin.MeshConfig.tensor=4"
    assert "--gin.MeshConfig.tensor=2" in found["tried"] and len(found["tried"]) >= 3
    assert Picky.asked[-2:] == [(4, "none", 1), (4, "none", 0)]


def test_nothing_fits_and_meshes_that_cannot_be_are_no_tries(tiny):
    class Never:
        tries = 0

        def stage(self, config, stage, doing):
            if config.mesh.tensor == 2:
                raise UserError("2 does not divide it")
            Never.tries += 1
            return {"fits": False}

    found = find_fit(tiny, Never(), 1)
    assert found["fits_with"] is None
    assert len(found["tried"]) == Never.tries <= MOST_TRIES
    assert not any("tensor=2" in flags for flags in found["tried"])


def test_the_formula_machine_says_what_it_is():
    machine = small_gpu(80)
    assert machine.describe()["hbm_limit_bytes"] == 80 * 2**30
    assert machine.rates.chips == 8 and machine.method == "formula"
