"""The cells of a study, carried out by a small script in the place of a launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stacking_jax import cli
from stacking_jax.errors import UserError
from stacking_jax.study.config import StudyConfig
from stacking_jax.study.grid import Budget, Grid, _cell
from stacking_jax.study.runner import run_cells, state_of

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = """
cell=$1; shift
for word; do dir=$word; done
echo "$cell $*" >> begun
mkdir -p "$dir" && echo '{}' > "$dir/config.json"
case "$*" in
  *$FAIL*) echo "some words"; echo "error: no such thing"; exit 2 ;;
  *$CUT*) exit 143 ;;
  *$QUEUE*) exit 0 ;;
esac
echo '{}' > "$dir/summary.json"
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(FAIL="seed 1", ...) -> counts of states, in a folder with the launcher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launcher.sh").write_text(LAUNCHER)
    config = StudyConfig(arms={"a": {}, "b": {}}, seeds=[0, 1])
    arms = config.all_arms()
    budgets = {arm.name: Budget(10, 1.0, 0.1) for arm in arms}
    cells = tuple(_cell(config, arm, 10, seed) for seed in (0, 1) for arm in arms)
    grid = Grid(config, budgets, cells)

    def run(jobs=1, retry=False, **of):
        for name in ("FAIL", "CUT", "QUEUE"):
            monkeypatch.setenv(name, of.get(name, "never"))
        return run_cells(
            tmp_path, grid, jobs=jobs, launch="bash launcher.sh {cell}", retry=retry
        )

    run.grid, run.folder = grid, tmp_path
    return run


def begun(study) -> list[str]:
    path = study.folder / "begun"
    return [line[:3] for line in path.read_text().splitlines()] if path.exists() else []


def test_each_cell_is_run_once_in_the_order_of_the_grid(study):
    assert study() == {"complete": 4}
    assert begun(study) == ["000", "001", "002", "003"]
    assert study() == {"complete": 4}
    assert len(begun(study)) == 4
    first = (study.folder / "begun").read_text().splitlines()[0]
    assert first.startswith("000 train --gin_file gin/experiments/demo.gin") and first.endswith(
        f"--run_dir {study.folder}/cells/a/seed-0"
    )


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(study, capsys):
    assert study(FAIL="b, seed 0") == {"complete": 3, "failed": 1}
    cell = study.grid.cells[1]
    assert state_of(study.folder, cell).line == "error: no such thing"
    assert "b, seed 0: failed: error: no such thing" in capsys.readouterr().err
    assert study() == {"complete": 3, "failed": 1}, "it is left alone"
    assert study(retry=True) == {"complete": 4}
    assert begun(study) == ["000", "001", "002", "003", "001"]


def test_a_cell_that_was_cut_goes_on(study):
    assert study(CUT="a, seed 1")["cut"] == 1
    assert study() == {"complete": 4}
    assert begun(study).count("002") == 2


def test_a_cell_in_a_queue_is_not_submitted_twice(study):
    assert study(QUEUE="a, seed 0")["submitted"] == 1
    assert study()["submitted"] == 1
    (study.folder / study.grid.cells[0].folder / "summary.json").write_text("{}")
    assert study() == {"complete": 4}


def test_several_at_a_time_are_each_run_once(study):
    assert study(jobs=3) == {"complete": 4}
    assert sorted(begun(study)) == ["000", "001", "002", "003"]


def test_two_do_not_run_one_study(study):
    import fcntl

    with open(study.folder / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being run by another process"):
            study()


def test_bad_words_are_one_line(study):
    with pytest.raises(UserError, match="--jobs"):
        study(jobs=0)
    with pytest.raises(UserError, match="--launch: nothing-of-this-name cannot be run"):
        run_cells(study.folder, study.grid, launch="nothing-of-this-name")


TINY = """
include 'gin/experiments/demo.gin'
DecoderConfig.num_layers = 2
DecoderConfig.d_model = 16
DecoderConfig.d_ff = 32
DecoderConfig.num_heads = 2
NUM_STAGES = 2
TRAIN_STEPS = 6
BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
TEXT_DIR = 'texts.txt'
TrainConfig.log_every = 1
TrainConfig.eval_batches = 1
"""
STUDY = """
StudyConfig.experiment = ['tiny.gin']
StudyConfig.arms = {'full': {'gin': ['gin/growth/baseline.gin']}, 'midas': {}}
StudyConfig.seeds = [0]
StudyConfig.comparisons = [['midas', 'full']]
"""


@pytest.fixture
def real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gin").write_text(TINY)
    (tmp_path / "study.gin").write_text(STUDY)
    lines = (f"{i} bottles of beer, {i * i} more of wine\n" for i in range(400))
    (tmp_path / "texts.txt").write_text("".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return ["study", "--gin_file", "study.gin", "--run_dir", "study"]


@pytest.mark.slow
def test_a_study_through_the_launcher_of_several_processes(real, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", str(Path(sys.executable).parents[1]))
    launch = f"bash {ROOT}/launch/processes.sh --processes 2 --devices 2 --port 12{{cell}} --"
    # The script works in the root of the checkout; the study's files are named from anywhere.
    study = (tmp_path / "study.gin").read_text().replace("tiny.gin", f"{tmp_path}/tiny.gin")
    (tmp_path / "study.gin").write_text(study)
    tiny = (tmp_path / "tiny.gin").read_text().replace("texts.txt", f"{tmp_path}/texts.txt")
    (tmp_path / "tiny.gin").write_text(tiny)
    assert cli.main([*real, "--launch", launch]) == 0
    found = json.loads((tmp_path / "study/results.json").read_text())
    assert all(of["loss"] for of in found["arms"].values())
    assert (tmp_path / "study/report.html").exists()


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on(real, tmp_path):
    """Ended in its first cell by SIGTERM; the same command completes it."""
    (tmp_path / "tiny.gin").write_text(TINY.replace("TRAIN_STEPS = 6", "TRAIN_STEPS = 600"))
    command = [sys.executable, "-m", "stacking_jax", *real]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "study/cells/full/seed-0/metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size < 2000:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143 and "the same command goes on" in said
    reached = max(int(p.name) for p in (metrics.parent / "checkpoints").iterdir()
                  if p.name.isdigit())
    assert 0 < reached < 600
    assert cli.main(real) == 0
    found = json.loads((tmp_path / "study/results.json").read_text())
    assert all(of["loss"] for of in found["arms"].values())
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "resume"] == [reached]
