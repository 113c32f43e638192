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

from stacking_jax.data import open_cache
from stacking_jax.training import Stopped, run_directory, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.distributed import LOST
from stacking_jax.training.record_log import read_records
from stacking_jax.training.watchdog import STUCK

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(run_dir: Path, *, faults=None, extra=(), **environment) -> list[subprocess.Popen]:
    """Two processes with four devices each, which go on with the run of a folder."""
    port = free_port()
    command = [
        sys.executable, "-m", "benchmarks.fault_worker", "train", "--coordinator",
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
            [*command, "--process_id", str(process), "--run_dir", str(folder)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
