"""A program for TPUs holds the kernel for TPUs, though it is compiled on a machine of CPUs."""

from __future__ import annotations

import dataclasses
import re

import pytest

from stacking_jax.planning.cache import ResultCache
from stacking_jax.planning.topology import parse
from stacking_jax.training.config import MeshConfig


@pytest.mark.slow
def test_a_tpu_program_holds_the_splash_kernel(tiny, with_model, libtpu, tmp_path):
    """Grouped heads over `tensor`, a row over `sequence`, prompts: and the programs compile."""
    from stacking_jax.planning.compiler import Compiler

    config = dataclasses.replace(
        with_model(tiny, num_heads=4, num_kv_heads=2, bidirectional_prompts=True, d_model=64),
        mesh=MeshConfig(fsdp=1, sequence=2, tensor=2),
        data=dataclasses.replace(tiny.data, sequence_length=256, objective="ul2"), batch_size=2,
    )
    cache, programs = ResultCache(tmp_path), {}
    with Compiler(parse("v5e:2x2"), cache) as compiler:
        for attention in ("auto", "xla"):
            result = compiler.stage(with_model(config, attention=attention), 0)
            programs[attention] = cache.text(result["program"])
    # One layer's program: forward, and backward to queries and to keys; causal, and in prompts.
    kernel = 'custom_call_target="tpu_custom_call"'
    assert {name: text.count(kernel) for name, text in programs.items()} == {"auto": 6, "xla": 0}
    with Compiler(parse("v5e:2x2"), cache) as compiler:
        for remat in ("minimal", "full"):
            result = compiler.stage(with_model(config, remat=remat), 0)
            programs[remat] = cache.text(result["program"])
    # What 'minimal' keeps spares the backward pass both forward kernels.
    assert {remat: programs[remat].count(kernel) for remat in ("minimal", "full")} == {
        "minimal": 6, "full": 8,
    }
    # Each device has half of the queries: their scores over all keys are nowhere but in XLA's.
    scores = {name: re.findall(r"f32\[[\d,]*128,256\]", text) for name, text in programs.items()}
    assert scores["xla"] and not scores["auto"]
