"""The examples run as they stand, and need no more than they say."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ALLOWED = {"jax", "flax", "optax", "numpy", "stacking_jax"}

# Run in front of an example: whatever is installed here beside its three libraries and what
# these bring along, our own rooms other than growth included, is not to be had.
BLOCKER = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked} or name.startswith("stacking_jax.") and not name.startswith(
                ("stacking_jax.growth", "stacking_jax.errors")):
            raise ImportError(f"an example may not import {{name}}")
sys.meta_path.insert(0, Refuse())
runpy.run_path({example!r}, run_name="__main__")
"""
BLOCKED = ["gin", "grain", "seqio", "tensorflow", "tensorboardX", "matplotlib", "sentencepiece",
           "array_record"]


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_import_growth_alone(example):
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    imported = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module)
    assert {name.split(".")[0] for name in imported} <= ALLOWED
    ours = [name for name in imported if name.startswith("stacking_jax")]
    assert ours == ["stacking_jax.growth"]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    code = BLOCKER.format(blocked=set(BLOCKED), example=str(example))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind"
