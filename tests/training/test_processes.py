"""Real processes on loopback that are one run: 2 × 4 devices against 1 × 8.

The runs share what they can: one is left alone, one is stopped by SIGTERM to one of its
processes, loses a process to SIGKILL and goes on to the same bits, and a copy of it
goes on in one process and then in two again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stacking_jax.analysis.diagnose import diagnose
from stacking_jax.data import open_cache
from stacking_jax.training import Stopped, decisions, run_directory, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.distributed import LOST
from stacking_jax.training.lag_study import lag_study
from stacking_jax.training.record_log import read_records
from stacking_jax.training.select import Start
from stacking_jax.training.watchdog import STUCK

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16

WAYS = [
    # Planted: copies that begin far from their source are worse for a while.
    {"operator": "midas", "init": "noise", "init_options": {"relative": 4.0}, "name": "noisy"},
    "midas", {"operator": "midas", "init": "identity", "name": "silent"},
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    run_dir: Path | list[Path] | None, *, words=("train",), faults=None, extra=(), **environment
) -> list[subprocess.Popen]:
    """Two processes with four devices each, which go on with the run of a folder."""
    port = free_port()
    command = [
        sys.executable, "-m", "benchmarks.fault_worker", *words, "--coordinator",
        f"127.0.0.1:{port}", "--num_processes", "2", "--heartbeat_timeout", "10",
        "--start_timeout", "120", *extra,
    ]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4",
        "FAULT": json.dumps(faults or {}), **environment,
    }
    folders = run_dir if isinstance(run_dir, list) else [run_dir] * 2
    return [
        subprocess.Popen(
            [*command, "--process_id", str(process),
             *(() if folder is None else ("--run_dir", str(folder)))],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process, folder in enumerate(folders)
    ]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, what each printed, what each said."""
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return codes, [out for out, _ in said], [err for _, err in said]


def go_on(run_dir: Path, **options) -> list[str]:
    codes, printed, said = finish(start(run_dir, **options))
    assert codes == [0, 0], said
    # What Gloo prints in C++ comes from all.
    assert "held-out loss" in printed[0] and "held-out loss" not in printed[1]
    return said


@pytest.fixture(scope="module")
def plan(config, change):
    """Grown from one layer to two after step 5 of 16; no signal comes too late for it."""
    return change(
        config, model={"num_layers": 2, "d_model": 16, "d_ff": 32}, total_steps=STEPS,
        eval_every=8, checkpoint_every=3, log_records=True, keep_checkpoints=9, step_timeout=100,
    )


@pytest.fixture(scope="module")
def begin(plan, tmp_path_factory):
    """begin(**settings): a folder that says what is to run, for `start`."""

    def made(**settings) -> Path:
        config = dataclasses.replace(plan, **settings)
        run_dir = tmp_path_factory.mktemp("processes") / "run"
        run_directory.prepare(run_dir, config, open_cache(config.data).manifest.digest)
        return run_dir

    return made


@pytest.fixture(scope="module")
def alone(plan, tmp_path_factory) -> Path:
    """One process with eight devices."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(plan, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def together(begin) -> tuple[Path, list[str]]:
    """Two processes with four devices each, left alone; and what they said."""
    run_dir = begin()
    return run_dir, go_on(run_dir, FAULT_NO_GATHER="1")


@pytest.fixture(scope="module")
def interrupted(begin, tmp_path_factory) -> dict:
    """SIGTERM to process 1, then SIGKILL of it, then to the end; a copy of the beginning."""
    run_dir = begin()
    story = {"run": run_dir}
    story["terminated"] = finish(
        start(run_dir, faults={"process": 1, "step": 2, "what": "SIGTERM", "pause": 0.25})
    )
    story["first"] = Path(shutil.copytree(run_dir, tmp_path_factory.mktemp("first") / "run"))
    step = max(saved(run_dir))
    story["killed"] = finish(
        start(run_dir, faults={"process": 1, "step": step + 2, "what": "SIGKILL"})
    )
    story["end"] = go_on(run_dir)
    return story


def saved(run_dir: Path) -> list[int]:
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal())


def trace(run_dir: Path, read_rows) -> list[tuple]:
    names = ("kind", "step", "loss", "grad_norm", "eval_loss", "tokens")
    return [
        tuple(row.get(name) for name in names)
        for row in read_rows(run_dir) if row["kind"] != "resume"
    ]


def state_of(run_dir: Path, plan, step: int):
    """On this process's eight devices, whoever wrote them."""
    from stacking_jax.models import LAYOUT
    from stacking_jax.training import sharding
    from stacking_jax.training.optimizers import optimizer
    from stacking_jax.training.state import abstract_state

    mesh = sharding.make_mesh(plan.mesh)
    make = optimizer(plan.optimizer, LAYOUT)
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    depth = checkpoints.read_meta(step)["depth"]
    state = checkpoints.restore(step, abstract_state(plan.model, make, depth, mesh))
    checkpoints.close()
    return jax.device_get(state)


def test_two_processes_train_to_the_same_parameters_as_one(alone, together, plan):
    one, two = state_of(alone, plan, STEPS), state_of(together[0], plan, STEPS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, two)


def test_each_host_reads_its_rows_alone_and_all_read_everything_once(alone, together):
    run_dir = together[0]
    for process in (0, 1):
        lines = (run_dir / f"records-{process}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        mine = list(range(4 * process, 4 * process + 4))
        assert all(row["rows"] == mine and len(row["ids"]) == 4 for row in rows)
    assert read_records(run_dir) == read_records(alone)


def test_a_growth_gathers_nothing(together):
    """The worker refuses `process_allgather` and any collective in the growth's program."""
    assert all("growth without a gather" in said for said in together[1])


def test_all_hosts_write_the_checkpoints(together):
    """Each array's chunks lie in folders of the processes that hold them."""
    state = together[0] / f"checkpoints/{STEPS}/state"
    assert {path.name for path in state.glob("ocdbt.process_*")} == {
        "ocdbt.process_0", "ocdbt.process_1"
    }


def test_sigterm_to_one_process_saves_the_same_step_in_all(interrupted):
    codes, _, said = interrupted["terminated"]
    assert codes == [128 + signal.SIGTERM] * 2, said
    steps = {re.search(r"stopped at step (\d+)", text)[1] for text in said}
    assert steps == {str(saved(interrupted["first"])[-1])}
    assert int(steps.pop()) < STEPS


def test_a_survivor_of_a_lost_process_is_ended_by_jax(interrupted):
    codes, _, said = interrupted["killed"]
    # JAX aborts it, or its collective fails first: 134 to a shell in both cases.
    assert codes[0] in (-signal.SIGABRT, LOST) and codes[1] == -signal.SIGKILL, said


def test_what_was_interrupted_ends_with_the_same_bits(interrupted, together, read_rows):
    run_dir = interrupted["run"]
    assert trace(run_dir, read_rows) == trace(together[0], read_rows)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (run_dir, together[0])]
    assert summaries[0]["params_digest"] == summaries[1]["params_digest"]
    assert read_records(run_dir) == read_records(together[0])
    assert len(read_rows(run_dir, "resume")) == 2


def test_a_run_moves_from_two_processes_to_one_and_back(
    interrupted, alone, plan, tmp_path, read_rows
):
    """The second time at the very step of a growth: what lies there is the state before it."""
    run_dir = Path(shutil.copytree(interrupted["first"], tmp_path / "run"))
    growth = plan.plan().stages[1].start
    for step in [step for step in saved(run_dir) if step > growth - 1]:
        shutil.rmtree(run_dir / f"checkpoints/{step}")
    before = saved(run_dir)[-1]
    there = state_of(run_dir, plan, before)
    with pytest.raises(Stopped):
        train(plan, run_dir, stop_at=growth)
    jax.tree.map(np.testing.assert_array_equal, there, state_of(run_dir, plan, before))
    go_on(run_dir)
    assert [row["step"] for row in read_rows(run_dir, "resume")] == [before, growth]
    assert read_records(run_dir) == read_records(alone)
    one, two = state_of(alone, plan, STEPS), state_of(run_dir, plan, STEPS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, two)


@pytest.mark.slow
def test_two_processes_decide_what_one_decides_and_record_it_once(
    plan, begin, tmp_path, read_rows
):
    """When to grow by a plateau, which comes as soon as a window is full; how by LAG."""
    choice = ChoiceConfig(
        candidates=WAYS[:2], lag=2, lag_batches=2, trigger="plateau", check_every=1, window=2,
        threshold=0.99,
    )
    decided = dataclasses.replace(
        plan, total_steps=10, eval_every=0, checkpoint_every=0, log_records=False, choice=choice
    )
    alone, run_dir = tmp_path / "alone", tmp_path / "together"
    train(decided, alone)
    run_directory.prepare(run_dir, decided, open_cache(plan.data).manifest.digest)
    said = go_on(run_dir)
    ours, theirs = decisions.read(run_dir), decisions.read(alone)
    assert [(d["kind"], d["stage"], d["step"]) for d in ours] == [
        ("boundary", 1, 2), ("choice", 1, 2)
    ]
    for name in ("candidate", "map", "growth", "lag"):
        assert ours[1][name] == theirs[1][name]
    assert ours[1]["cost"]["flops"] == theirs[1]["cost"]["flops"]
    # But for the order in which hosts and devices add up gradients.
    for mine, other in zip(ours[1]["ranking"], theirs[1]["ranking"], strict=True):
        assert mine["name"] == other["name"]
        for name in ("loss", "loss_at_growth"):
            assert mine[name] == pytest.approx(other[name], rel=2e-4)
    one, two = state_of(alone, decided, 10), state_of(run_dir, decided, 10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, two)
    # Both say it in the words of process 0.
    assert all(ours[1]["verdict"] in text for text in said)
    assert [row["step"] for row in read_rows(run_dir, "grow")] == [2]
    assert len(read_rows(run_dir, "decision")) == 2


# ---- Ways to grow a checkpoint, held against each other; looking into one ---------------


def by_both(run_dir: Path | None, *words) -> tuple[dict, list[str]]:
    """The JSON object that process 0 of two prints, and process 1 does not; what each said."""
    words = [*map(str, words), "--json"]
    codes, printed, said = finish(start(run_dir, words=words, JAX_NUM_CPU_DEVICES="1"))
    assert codes == [0, 0], said
    # Gloo prints too, in C++.
    objects = [text[text.index('{"') :] if '{"' in text else None for text in printed]
    assert objects[1] is None
    return json.JSONDecoder().raw_decode(objects[0])[0], said


@pytest.fixture(scope="module")
def studied(alone, tmp_path_factory) -> tuple[Path, dict]:
    """A lag study by two processes: its folder, and what was printed."""
    out = tmp_path_factory.mktemp("lag") / "study"
    found, _ = by_both(
        alone, "lag-study", "--candidates", json.dumps(WAYS), "--step", 3, "--lag", 2,
        "--batches", 2, "--points", 3, "--out", out,
    )
    return out, found


@pytest.mark.slow
def test_a_lag_study_of_two_processes_is_complete_for_one(alone, studied):
    """It was written once, and nothing is trained again."""
    out, found = studied

    def kept():
        return {path.name: path.stat().st_mtime_ns for path in (out / "trials").iterdir()}

    before = kept()
    assert len(before) == 3 and (out / "lag.png").exists() and (out / "lag.html").exists()
    start_of = Start.of(alone, 3)
    again = lag_study(start_of, start_of.ways(WAYS), 2, out, batches=2, points=3)
    assert json.loads(json.dumps(again)) == found
    assert kept() == before


@pytest.mark.slow
def test_select_makes_one_run_and_both_go_on_in_it(alone, studied, tmp_path):
    """With the best by the very losses that a lag study gives."""
    out = tmp_path / "new"
    found, said = by_both(
        alone, "select", "--candidates", json.dumps(WAYS[:2]), "--step", 3, "--lag", 2,
        "--batches", 2, "--out", out, "--stop_at", 4,
    )
    losses = {one["name"]: one["losses"] for one in studied[1]["candidates"]}
    for row in found["ranking"]:
        assert [row["loss_at_growth"], row["loss"]] == losses[row["name"]][::2]
    boundary, choice = decisions.read(out)
    assert (boundary["kind"], boundary["step"]) == ("boundary", 3)
    assert choice == {name: found[name] for name in choice}
    assert saved(out) == [3, 4]
    assert all(f"{out} goes on from step 3" in text for text in said)


@pytest.mark.slow
def test_a_checkpoint_looks_alike_inside_to_two_processes_and_to_one(alone, tmp_path):
    parts = ["maps", "layers"]
    found, _ = by_both(
        alone, "diagnose", "--batches", 2, "--parts", ",".join(parts), "--out", tmp_path
    )
    assert found == json.loads((tmp_path / f"{STEPS}.json").read_text())
    assert found["linearity"]["r2"] is not None
    ours, theirs = (
        jax.tree_util.tree_flatten_with_path(of)
        for of in (found, diagnose(alone, batches=2, parts=parts))
    )
    for (path, mine), (_, other) in zip(ours[0], theirs[0], strict=True):
        about = other if isinstance(other, str) else pytest.approx(other, rel=1e-3, abs=1e-4)
        assert mine == about, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_labels_are_made_by_one_process(tmp_path):
    words = ["distill-cache", "--gin_file", "gin/experiments/demo.gin", "--out",
             str(tmp_path / "labels")]
    codes, _, said = finish(start(None, words=words))
    assert codes == [2, 2], said
    for text in said:
        [line] = [line for line in text.splitlines() if line.startswith("error:")]
        assert line.startswith("error: distill-cache runs in one process, not in 2")
    assert not any(tmp_path.iterdir())


def test_a_stuck_process_and_those_that_wait_for_it_end(begin):
    run_dir = begin(step_timeout=3.0)
    codes, _, said = finish(
        start(run_dir, faults={"process": 1, "step": 4, "what": "hang"})
    )
    assert STUCK in codes and set(codes) <= {STUCK, LOST, -signal.SIGABRT}, said
    stuck = [text for text, code in zip(said, codes, strict=True) if code == STUCK]
    for text in stuck:
        seconds = float(re.search(r"has been at '\w+' for ([\d.]+) s \(limit 3 s\)", text)[1])
        assert 3 <= seconds <= 6
        assert 'train.py", line' in text
    assert any((run_dir / f"stuck-process-{process}.txt").exists() for process in (0, 1))


def test_hosts_that_differ_are_named_before_the_first_step(begin, change, plan):
    folders = [begin(), begin(z_loss=0.1)]
    codes, _, said = finish(start(folders))
    assert codes == [2, 2], said
    errors = [line for text in said for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert re.match(
        r"error: process 1 on \S+ differs from the others: configuration: z_loss is 0.1, not 0.0; ",
        errors[0],
    )
    assert not any((folder / "metrics.jsonl").exists() for folder in folders)
