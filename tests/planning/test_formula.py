"""Steps by formula: what is exact is exact, and the rest moves the right way."""

from __future__ import annotations

import dataclasses

import pytest

from stacking_jax.errors import UserError
from stacking_jax.planning.compiled import lower_stage, state_bytes
from stacking_jax.planning.formula import stage_by_formula
from stacking_jax.planning.topology import parse
from stacking_jax.training import sharding
from stacking_jax.training.config import MeshConfig
from stacking_jax.training.rules import AXES

NODE = parse("h100:8")


def on(config, topology=NODE, **mesh):
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh)) if mesh else config
    return stage_by_formula(config, 1, topology)


def moved(result):
    return {row["kind"]: row["bytes"] for row in result["collectives"]}


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 8, "fsdp": 1}])
def test_the_arguments_are_those_of_the_real_state(tiny, mesh):
    config = dataclasses.replace(tiny, mesh=MeshConfig(**mesh))
    real = lower_stage(config, 1, sharding.make_mesh(config.mesh))
    assert on(config)["argument_bytes"] == real.argument_bytes
    assert state_bytes(real.abstract) < real.argument_bytes


def test_keeping_less_needs_less(tiny, with_model):
    peaks = [
        on(with_model(tiny, remat=remat))["hbm_peak_bytes"]
        for remat in ("none", "dots", "minimal", "full", "offload")
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 5
    halves = dataclasses.replace(tiny, batch_size=32, microbatches=2)
    whole = dataclasses.replace(tiny, batch_size=32)
    assert on(halves)["hbm_peak_bytes"] < on(whole)["hbm_peak_bytes"]


def test_what_each_axis_asks_for(tiny):
    costs = tiny.model.costs(tiny.data.sequence_length)
    weights = 2 * (4 * costs.layer_params + 64 * 32)
    sharded = moved(on(tiny, fsdp=8))
    assert sharded == {"all-gather": 2 * weights, "reduce-scatter": weights}
    replicated = moved(on(tiny, data=8, fsdp=1))
    assert replicated == {"all-reduce": 4 * costs.params(4)}
    # Two all-reduces of the stream in each direction of each of four layers.
    stream = 16 * 32 // 4 * 32 * 2
    assert moved(on(tiny, fsdp=4, tensor=2))["all-reduce"] == 4 * 4 * stream


def test_between_nodes_goes_over_the_network(tiny):
    within, across = on(tiny, parse("h100:8x1")), on(tiny, parse("h100:4x2"))
    seconds = [sum(row["seconds"] for row in result["collectives"]) for result in (within, across)]
    chip = NODE.chip
    ratio = chip.link_bandwidth / chip.network_bandwidth
    assert seconds[1] / seconds[0] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("mesh", "part"),
    [({"fsdp": 3}, "3 does not divide 8"), ({"fsdp": 4}, "does not multiply to 8"),
     ({"fsdp": 4, "tensor": 2, "data": 1}, None)],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_the_chips(tiny, mesh, part):
    if part is None:
        assert on(tiny, **mesh)["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2} | {
            axis: 1 for axis in AXES if axis not in ("data", "fsdp", "tensor")
        }
        return
    with pytest.raises(UserError, match=part):
        on(tiny, **mesh)
