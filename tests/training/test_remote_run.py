"""A run directory in an object store holds what a local one does, and is read by the same code.

The store is in memory, and TensorStore knows nothing of it: checkpoints lie on the local disk here.
"""

from __future__ import annotations

import json
import sys

import pytest

from stacking_jax.errors import UserError
from stacking_jax.paths import open_path
from stacking_jax.reporting import compare
from stacking_jax.reporting.runs import read_run
from stacking_jax.training import Stopped, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.run_directory import read_config
from stacking_jax.training.spool import Spool

TIMES = {"unix_time", "wall_seconds", "train_seconds", "seconds", "compile_seconds",
         "compile_ahead_seconds", "tokens_per_second", "flops_per_second", "step_seconds",
         "old_step_seconds", "stall_seconds", "stall_steps", "spans", "steps"}  # fmt: skip


def rows(text: str) -> list[dict]:
    """What metrics.jsonl says, but for when and how fast."""
    found = map(json.loads, text.splitlines())
    return [{name: row[name] for name in row if name not in TIMES} for row in found]


@pytest.fixture
def local_checkpoints(tmp_path, monkeypatch):
    """Makes `train` keep its checkpoints here, whatever its run directory."""
    program = sys.modules["stacking_jax.training.run"]

    def kept_here(directory, *arguments, **options):
        return Checkpoints(tmp_path / "kept", *arguments, **options)

    monkeypatch.setattr(program, "Checkpoints", kept_here)


@pytest.mark.slow
def test_a_run_in_a_store_is_the_run_on_the_disk(
    bucket, local_checkpoints, config, reference, tmp_path, capsys
):
    run_dir = "gs://bucket/runs/reference"
    with pytest.raises(Stopped):
        train(config, run_dir, stop_at=6, gin_text="# gin")
    # What a checkpoint goes on from is there although nothing was closed in time.
    assert rows(bucket["/bucket/runs/reference/metrics.jsonl"].getvalue().decode())[-1]["step"] == 6
    summary = train(config, run_dir)
    names = {name.rpartition("/")[2] for name in bucket}
    assert {"config.json", "config.gin", "plan.json", "metrics.jsonl", "summary.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.startswith(".")]

    before = json.loads((reference / "summary.json").read_text())
    assert summary["params_digest"] == before["params_digest"]
    written = rows(bucket["/bucket/runs/reference/metrics.jsonl"].getvalue().decode())
    expected = rows((reference / "metrics.jsonl").read_text())
    assert [row for row in written if row["kind"] != "resume"] == expected

    assert read_config(run_dir) == config
    there, here = read_run(run_dir), read_run(reference)
    assert there.eval_loss == here.eval_loss and there.finished and str(there.path) == run_dir
    compare([run_dir, reference], tmp_path / "report.html")
    assert "held-out loss" in capsys.readouterr().out
    assert train(config, run_dir) == summary


def test_another_run_in_the_same_place_is_refused(bucket, config):
    (open_path("gs://bucket/other") / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="gs://bucket/other is not empty and holds no run"):
        train(config, "gs://bucket/other")
    assert list(bucket) == ["/bucket/other/notes.txt"]


def test_a_spool_copies_what_has_grown(bucket):
    remote = open_path("gs://bucket/run")
    (remote / "log").write_text("one\n")
    spool = Spool(remote, every=1e9)
    spool.fetch("log")
    spool.fetch("nothing")
    with open(spool.folder / "log", "a") as file:
        file.write("two\n")
    spool.upload_if_due()
    assert (remote / "log").read_text() == "one\n"
    spool.upload()
    assert (remote / "log").read_text() == "one\ntwo\n"
    (remote / "log").write_text("theirs")
    spool.upload()  # It has not changed: it is not copied again.
    assert (remote / "log").read_text() == "theirs"
    spool.close()
    assert not spool.folder.exists()


def test_a_spool_tries_again(bucket, monkeypatch, capsys):
    import fsspec

    spool = Spool(open_path("gs://bucket/run"), every=0.0)
    (spool.folder / "log").write_text("one")
    store = fsspec.get_filesystem_class("gcs")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_open", lambda *args, **options: 1 / 0)
        spool.upload_if_due()
    assert "gs://bucket/run could not be written" in capsys.readouterr().err
    spool.upload_if_due()
    assert bucket["/bucket/run/log"].getvalue() == b"one"
    spool.close()
