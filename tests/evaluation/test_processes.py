"""evaluate, finetune and generate in two processes on loopback, against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_jax.cli import main
from stacking_jax.evaluation.results import rows_path, step_folder

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GENERATED = "variable_assignment/code/depth_0/0_shot"
RANKED = "variable_assignment/code/depth_0/rank/0_shot"


def together(*words) -> str:
    """Runs a command in two processes of two devices each; what the first printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "stacking_jax", *map(str, words), "--coordinator",
        f"127.0.0.1:{port}", "--num_processes", "2", "--heartbeat_timeout", "10",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [*command, "--process_id", str(number)], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    # What Gloo itself prints in C++ comes from both.
    assert not any(line.startswith(("{", "---")) for line in said[1][0].splitlines())
    return "\n".join(line for line in said[0][0].splitlines() if not line.startswith("[Gloo]"))


def alone(capsys, *words) -> str:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_evaluate(run_dir, tmp_path, capsys):
    words = ["evaluate", "--run_dir", run_dir, "--tasks", f"{GENERATED},{RANKED}", "--limit", "12",
             "--json", "--out"]
    found = json.loads(together(*words, tmp_path / "two"))
    assert found == json.loads(alone(capsys, *words, tmp_path / "one"))
    for task in (GENERATED, RANKED):
        two, one = (
            [
                json.loads(line)
                for line in rows_path(step_folder(tmp_path / folder, 4), task).open()
            ]
            for folder in ("two", "one")
        )
        for mine, theirs in zip(two, one, strict=True):
            likely = mine.pop("log_probabilities", []), theirs.pop("log_probabilities", [])
            assert mine == theirs and likely[0] == pytest.approx(likely[1], abs=1e-3)


def test_finetune_goes_on_with_what_is_there(run_dir, tmp_path, capsys):
    words = ["finetune", "--run_dir", run_dir, "--task", GENERATED, "--json",
             "--gin.FinetuneConfig.total_steps=3", "--gin.FinetuneConfig.evaluate_from=3",
             "--gin.FinetuneConfig.examples_per_task=8", "--gin.FinetuneConfig.eval_examples=12",
             "--gin.FinetuneConfig.num_datasets=2", "--out"]
    one = json.loads(alone(capsys, *words, tmp_path / "one"))
    # The first of the two datasets is there already.
    (tmp_path / "two").mkdir()
    for name in ("settings.json", "dataset-0.json"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    two = json.loads(together(*words, tmp_path / "two"))
    assert two["tasks"] == one["tasks"]
    losses = [
        json.loads((tmp_path / folder / "dataset-1.json").read_text())["losses"]
        for folder in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def test_generate(run_dir, capsys):
    words = ["generate", "--run_dir", run_dir, "--prompt", "abc", "--temperature", "0",
             "--max_new_tokens", "12", "--num_samples", "3"]
    assert together(*words).strip() == alone(capsys, *words).strip()
