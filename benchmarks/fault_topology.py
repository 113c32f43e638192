"""Runs that go on with another number of processes or devices than they began with."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

from benchmarks.fault_runs import GROWTH, LIVES, SAVE_EVERY, STEPS, Life, Runs, losses


def processes_in_turn(runs: Runs, dice: random.Random) -> list[dict[str, object]]:
    """2 -> 1 -> 2 processes with two devices in all; one change is at the growth's step."""
    first = dice.choice([GROWTH - SAVE_EVERY, GROWTH])
    second = GROWTH if first < GROWTH else dice.choice([6, 8, 10])
    lives = [(2, 1, first), (1, 2, second), (2, 1, None)]
    return _in_turn(runs, "processes", lives, (1, 2))


def devices_in_turn(runs: Runs, dice: random.Random) -> list[dict[str, object]]:
    """8 -> 4 -> 2 -> 1 devices of one process; one change is at the growth's step."""
    stops = sorted([GROWTH, *dice.sample([2, 6, 8, 10], 2)])
    lives = [(1, devices, stop) for devices, stop in zip((8, 4, 2), stops, strict=True)]
    return _in_turn(runs, "devices", [*lives, (1, 1, None)], (1, 8))


def _in_turn(runs: Runs, name: str, lives, reference: tuple[int, int]) -> list[dict[str, object]]:
    alone = runs.reference(*reference)[0]
    run_dir = runs.begin(f"{name}-{os.getpid()}")
    began = time.monotonic()
    why, saved = "", {}
    for processes, devices, stop in lives:
        life = runs.start(
            run_dir, processes, devices, environment={"FAULT_DIGESTS": "1"},
            stop_at=stop,
        )
        codes = life.wait(LIVES)
        if any(codes):
            return [{"survived": False, "why": f"ended with {codes}", "seconds": 0.0}]
        for step, digest in _said(life, "restored").items():
            if saved.get(step) != digest:
                why = why or f"the state of step {step} is another on {processes}x{devices}"
        if not _said(life, "restored") and saved:
            why = why or "nothing was restored"
        saved |= _said(life, "saved")
    why = why or runs.lost_or_repeated(run_dir, alone) or _far_apart(run_dir, alone)
    one: dict[str, object] = {"survived": not why, "seconds": time.monotonic() - began, "lost": 0}
    return [one | ({"why": why} if why else {})]


def _said(life: Life, word: str) -> dict[int, str]:
    return {int(step): digest for step, digest in
            re.findall(rf"^{word} (\d+) (\w+)$", life.said(), re.MULTILINE)}


def _far_apart(run_dir: Path, alone: Path) -> str:
    ours, theirs = losses(run_dir), losses(alone)
    if set(ours) != set(theirs) or len(ours) != STEPS:
        return "not every step has its loss"
    worst = max(abs(ours[step] - theirs[step]) / theirs[step] for step in ours)
    return f"losses differ by {worst:.1e}" if worst > 1e-4 else ""
