"""What a compiled step says of itself, and what the compiler's refusal says."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from stacking_jax.planning.compiled import compile_stage, lower_stage, memory_error
from stacking_jax.training import sharding
from stacking_jax.training.config import MeshConfig, OptimizerConfig

# Word for word from libtpu 0.0.42.
RECORDED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(39.33G) exceeds available HBM (15.75G)."
)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (RECORDED, (round(39.33 * 2**30), round(15.75 * 2**30))),
        ("RESOURCE_EXHAUSTED: ... Used 900.5M of 1.2T hbm. Exceeded ...",
         (round(900.5 * 2**20), round(1.2 * 2**40))),
        ("RESOURCE_EXHAUSTED: scoped vmem limit exceeded", None),
        ("INTERNAL: (39.33G) exceeds available HBM (15.75G)", None),
    ],
)  # fmt: skip
def test_a_refusal_says_how_much_is_needed(text, needed):
    assert memory_error(text) == needed


def test_the_program_is_the_one_that_trains(tiny):
    """Bytes of arguments are the state's and the batch's; the gathers are the parameters'."""
    # AdamW, since jit leaves out the placeholders that Adafactor never reads.
    config = dataclasses.replace(tiny, mesh=MeshConfig(fsdp=8), optimizer=OptimizerConfig())
    mesh = sharding.make_mesh(config.mesh)
    lowered = lower_stage(config, 1, mesh)
    result, text, program = compile_stage(lowered, mesh, lambda group: 1e9)
    assert result["fits"] and "all-" in text
    assert result["argument_bytes"] == lowered.argument_bytes
    state = [
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(lowered.abstract)
    ]
    batch = 3 * 4 * config.tokens_per_step // 8
    assert result["argument_bytes"] == sum(state) + batch
    assert result["hbm_peak_bytes"] >= result["argument_bytes"]
    assert {axis for row in result["collectives"] for axis in row["axes"]} == {"fsdp"}
    for row in result["collectives"]:
        assert row["seconds"] == pytest.approx(row["sent_bytes"] / 1e9)
    # Every matrix is needed whole at least once a step, on every device.
    costs = config.model.costs(config.data.sequence_length)
    moved = sum(row["bytes"] for row in result["collectives"])
    assert moved > 2 * 4 * (costs.layer_params - 2 * config.model.d_model)
    assert result["traffic_bytes"] > result["argument_bytes"]
    assert program.in_tree.num_leaves == len(state) + 3
