"""A tiny run to plan for, and the TPU compiler where it is installed.

Nothing that imports JAX is imported before tests/conftest.py has set up its devices.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import pytest


@pytest.fixture(scope="session")
def tiny():
    """Two stages, of 2 and 4 layers."""
    from stacking_jax.data import DataConfig
    from stacking_jax.models import DecoderConfig
    from stacking_jax.training.config import GrowthConfig, MeshConfig, OptimizerConfig, TrainConfig

    return TrainConfig(
        model=DecoderConfig(
            vocab_size=64, num_layers=4, d_model=32, d_ff=64, num_heads=2, dtype="bfloat16"
        ),
        data=DataConfig(sequence_length=32),
        growth=GrowthConfig(operator="midas", num_stages=2, alpha=1.0),
        optimizer=OptimizerConfig(name="adafactor"),
        mesh=MeshConfig(fsdp=-1),
        total_steps=30,
        batch_size=16,
    )


@pytest.fixture(scope="session")
def with_model():
    """with_model(config, remat="full"): the same run with another model."""

    def change(config, **settings):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))

    return change


@pytest.fixture(scope="session")
def libtpu() -> None:
    """Skips where the TPU compiler is not installed."""
    from stacking_jax.errors import UserError
    from stacking_jax.planning.compiler import use_libtpu

    try:
        use_libtpu()
    except UserError:
        pytest.skip("the TPU compiler is not installed: bash launch/tpu_compiler.sh")


@pytest.fixture
def run_apart():
    """run_apart(code): what a fresh process prints, with the compiler's environment."""
    from stacking_jax.planning.compiler import compiling_environment

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env=compiling_environment(), text=True,
            capture_output=True, timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
