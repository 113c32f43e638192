"""A disk that fills up, wherever it does: one line, nothing lost, and the run goes on later."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest

from stacking_jax.errors import UserError
from stacking_jax.training import train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.state import TrainState

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The system refuses to write more into any file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        train(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_end(config, run_dir, reference, read_summary, read_rows):
    assert train(config, run_dir)["params_digest"] == read_summary(reference)["params_digest"]
    losses = [
        [(row["step"], row["loss"]) for row in read_rows(folder, "train")]
        for folder in (run_dir, reference)
    ]
    assert losses[0] == losses[1]


def test_while_the_cache_is_written(
    config, change, tmp_path, reference, read_summary, read_rows
):
    fresh = change(config, data={"cache_dir": str(tmp_path / "cache")})
    with files_of_at_most(8192):
        message = refusal(fresh, tmp_path / "run")
    assert "File too large" in message
    assert not (tmp_path / "run").exists()
    assert_same_end(fresh, tmp_path / "run", reference, read_summary, read_rows)


def test_while_metrics_are_written(
    config, stopped, tmp_path, reference, read_summary, read_rows
):
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    metrics = run_dir / "metrics.jsonl"
    row = {"kind": "note", "step": 0, "text": ""}
    room = (1 << 20) - metrics.stat().st_size - len(json.dumps(row)) - 1
    with open(metrics, "a") as file:
        file.write(json.dumps(row | {"text": "x" * room}) + "\n")
    assert metrics.stat().st_size == 1 << 20
    with files_of_at_most(1 << 20):
        message = refusal(config, run_dir)
    assert "metrics.jsonl cannot be written: File too large" in message
    assert_same_end(config, run_dir, reference, read_summary, read_rows)


def test_while_a_manifest_is_written(tmp_path):
    """The state is so small that no file of Orbax's is larger than the manifest."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = TrainState(jnp.int32(3), {}, {})
    with files_of_at_most(1000):
        checkpoints.save(state, {"step": 3, "depth": 1})
        with pytest.raises(UserError, match="checkpoint 3 is whole, but its manifest") as caught:
            checkpoints.wait()
    assert "could not be written to " in str(caught.value)
    assert str(caught.value).endswith(
        ": File too large; make room and run the same command again"
    )
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert int(again.restore_latest(lambda depth: state)[0].step) == 3
    again.close()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): a disk of its own with so much room, or more room on it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def make(kilobytes: int) -> Path:
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode:
            pytest.skip("this machine lets nobody mount a disk")
        mounted.append(place)
        return place

    yield make
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


# Room for the first files; for metrics and one checkpoint; for two, but not for a third.
@pytest.mark.parametrize("kilobytes", [4, 1200, 2900])
def test_on_a_disk_that_is_really_full(
    kilobytes, small_disk, config, change, reference, read_summary, read_rows
):
    run_dir = small_disk(kilobytes) / "run"
    # Two are kept: there must be room for a third before the oldest goes.
    config = change(config, keep_checkpoints=2)
    message = refusal(config, run_dir)
    assert "No space left on device" in message
    small_disk(65536)
    assert_same_end(config, run_dir, reference, read_summary, read_rows)
