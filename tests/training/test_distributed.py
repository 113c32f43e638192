"""Joining: what is refused, and that those who wait in vain are told so."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_jax.cli import main
from stacking_jax.errors import UserError
from stacking_jax.training import distributed
from stacking_jax.training.distributed import Processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"coordinator": "a:1"}, "--num_processes and --process_id missing"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT; got 'a'"),
        ({"coordinator": "a:x", "num_processes": 2, "process_id": 0}, "HOST:PORT; got 'a:x'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "got 2 of 2"),
        ({"heartbeat_timeout": 0}, "--heartbeat_timeout is in whole seconds"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, part):
    with pytest.raises(UserError) as caught:
        Processes(**arguments)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_process_alone_has_nobody_to_ask(tmp_path):
    assert distributed.gather("x", "said") == ["said"]
    distributed.meet("x")
    with distributed.main_process_first("x"):
        pass
    assert not distributed.stops_together()


def test_the_cluster_and_an_address_are_not_asked_for_together(capsys):
    code = main(["train", "--run_dir", "x", "--distributed", "auto", "--process_id", "0"])
    assert code == 2
    assert "--distributed auto asks the cluster: leave out" in capsys.readouterr().err


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stacking_jax", "train", "--run_dir", "nowhere", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )


def test_waiting_in_vain_ends_with_one_clear_line():
    """For a coordinator that is not there, for processes that do not come, for a cluster."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    several = ["--num_processes", "2", "--start_timeout", "2", "--coordinator"]
    alone = [
        start(*several, "127.0.0.1:1", "--process_id", "1"),
        start(*several, f"127.0.0.1:{free}", "--process_id", "0"),
        start("--distributed", "auto"),
    ]
    said = [process.communicate(timeout=100)[1] for process in alone]
    assert [process.returncode for process in alone] == [75, 75, 2], said
    lines = [[line for line in text.splitlines() if line.startswith("error:")] for text in said]
    assert [len(found) for found in lines] == [1, 1, 1], said
    host = socket.gethostname()
    assert lines[0][0].startswith(
        "error: the coordinator 127.0.0.1:1 cannot be reached from process 1 on "
        f"{host} (Connection refused, 2 s long)"
    )
    assert f"error: process 0 on {host} waited 2 s for 1 other process(es)" in lines[1][0]
    assert "--distributed auto found no cluster to join" in lines[2][0]
