"""A process that gets nowhere ends, by code 75, whatever it hangs in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stacking_jax.training.telemetry import Clock
from stacking_jax.training.watchdog import STUCK, Watchdog, watched

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import ctypes, sys, time, types
from pathlib import Path
from stacking_jax.training.telemetry import Clock
from stacking_jax.training.watchdog import watched

clock = Clock()
config = types.SimpleNamespace(step_timeout=1.0, other_timeout=4.0)
with watched(clock, config, Path(sys.argv[2])):
    for step in range(2):
        with clock.section("step"):
            pass
    if sys.argv[1] == "compile":
        with clock.section("compile"):
            time.sleep(2.5)
        print("compiled", flush=True)
    elif sys.argv[1] == "step":
        with clock.section("step"):
            time.sleep(60)
    elif sys.argv[1] == "lock":
        with clock.section("step"):
            ctypes.PyDLL(None).sleep(60)  # Keeps Python's lock while it waits.
"""


def run(what: str, run_dir: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(run_dir)], capture_output=True, text=True,
        timeout=100, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_stuck_step_ends_with_the_stacks_of_every_thread(tmp_path):
    done = run("step", tmp_path)
    assert done.returncode == STUCK == 75
    seconds = float(re.search(r"at 'step' for ([\d.]+) s \(limit 1 s\)", done.stderr)[1])
    assert 1 <= seconds <= 2
    for text in (done.stderr, (tmp_path / "stuck-process-0.txt").read_text()):
        assert text.count("hread 0x") >= 2 and 'File "<string>", line' in text


def test_what_rightly_takes_longer_is_not_stuck(tmp_path):
    done = run("compile", tmp_path)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_thread_that_keeps_pythons_lock_is_ended_too(tmp_path):
    done = run("lock", tmp_path)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and 'File "<string>", line' in done.stderr


def test_the_limit_depends_on_what_the_run_does(tmp_path):
    watchdog = Watchdog(10.0, 100.0, tmp_path)
    limits = []
    for category in ("init", "compile", "data", "step", "data", "step", "data", "step", "grow",
                     "data", "checkpoint", "evaluate", "compile", "data", "step"):
        watchdog.enter(category)
        limits.append(watchdog.limit)
    # The first two steps of a program have the longer one.
    assert limits == [100] * 6 + [10, 10, 100, 10, 100, 100, 100, 100, 100]


@pytest.mark.parametrize("limit", [None, 0])
def test_one_process_is_not_watched_unless_asked(limit, config, change, tmp_path):
    clock = Clock()
    with watched(clock, change(config, step_timeout=limit), tmp_path):
        assert clock.on_change is None
    with watched(clock, change(config, step_timeout=5), tmp_path):
        assert clock.on_change is not None
    assert clock.on_change is None


def test_it_does_not_care_for_the_wall_clock(config, change, tmp_path, monkeypatch):
    """A leap of years is not mistaken for being stuck: the test would end here."""
    clock = Clock()
    with watched(clock, change(config, step_timeout=2.0, other_timeout=2.0), tmp_path):
        monkeypatch.setattr(time, "time", lambda: 4e9)
        time.sleep(0.6)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        time.sleep(0.6)
    assert sum(clock.read().values()) < 100
