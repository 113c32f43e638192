"""Faults of what lies on disk: damaged checkpoints, copies that lost something, a full disk."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.fault_runs import LIVES, SAVE_EVERY, STEPS, Life, Runs, last_step
from stacking_jax.training.manifest import COMMIT_MARK, STEP_METADATA

Damage = Callable[[Path, random.Random], None]


def cut_file(checkpoint: Path, dice: random.Random) -> None:
    """The largest array file loses its second half."""
    largest = max(_arrays(checkpoint), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def flip_bit(checkpoint: Path, dice: random.Random) -> None:
    """One bit of one array file turns over: most readers never notice."""
    chosen = dice.choice(_arrays(checkpoint))
    content = bytearray(chosen.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    chosen.write_bytes(content)


def drop_marks(checkpoint: Path, dice: random.Random) -> None:
    """A copy by a tool that brings everything but what marks a checkpoint as committed."""
    copy = checkpoint.with_name(f"{checkpoint.name}.copy")
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns(COMMIT_MARK, STEP_METADATA))
    shutil.rmtree(checkpoint)
    copy.rename(checkpoint)


def damaged(damage: Damage, processes: int = 1, moved: bool = True):
    """A scenario: the newest checkpoint is damaged between two lives.

    Args:
      damage: what happens to its folder.
      processes: of both lives.
      moved: whether the run must say that it moved the checkpoint aside; else it must go on
        from this very one.
    """

    def scenario(runs: Runs, dice: random.Random) -> list[dict]:
        runs.reference(processes)
        run_dir = runs.begin(f"{damage.__name__}-{processes}-{os.getpid()}")
        began = time.monotonic()
        # Not before the second checkpoint: there must be one to fall back to. Not so late that
        # several processes, which must first agree, come to the end of the run instead.
        step = dice.randint(2 * SAVE_EVERY + 1, STEPS - 1 if processes == 1 else STEPS - 5)
        life = runs.start(
            run_dir, processes, fault={"process": 0, "step": step, "what": "SIGTERM"}
        )
        life.wait(LIVES)
        reached = last_step(run_dir)
        folder = run_dir / "run/checkpoints"
        newest = max(int(path.name) for path in folder.iterdir())
        damage(folder / str(newest), dice)
        life = runs.start(run_dir, processes)
        why = _ended(life)
        if moved and "moved to" not in life.said():
            why = why or "nothing was said of the damage"
        if not moved and life.resumed_from != newest:
            why = why or f"it went on from {life.resumed_from}, not from {newest}"
        why = why or runs.difference(run_dir, processes)
        return [_one(why, began, reached - life.resumed_from)]

    return scenario


def disk_full(runs: Runs, dice: random.Random) -> list[dict]:
    """From some step on no file can grow beyond a few KiB; then there is room again."""
    runs.reference()
    run_dir = runs.begin(f"full-{os.getpid()}")
    began = time.monotonic()
    fault = {"process": 0, "step": dice.randint(3, STEPS - 1), "what": "full",
             "bytes": dice.choice([1 << 14, 1 << 16])}
    life = runs.start(run_dir, fault=fault)
    codes = life.wait(LIVES)
    why = "" if codes == [2] else f"the full disk ended it with {codes}"
    errors = [line for line in life.said().splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or "Traceback" in life.said():
        why = why or "it did not end with one line"
    reached = last_step(run_dir)
    life = runs.start(run_dir)
    why = why or _ended(life) or runs.difference(run_dir)
    return [_one(why, began, reached - life.resumed_from)]


def _arrays(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and "/d/" in str(path))


def _ended(life: Life) -> str:
    codes = life.wait(LIVES)
    return f"ended with {codes}: {life.last_words}" if any(codes) else ""


def _one(why: str, began: float, lost: int) -> dict:
    one = {"survived": not why, "seconds": time.monotonic() - began, "lost": max(0, lost)}
    return one | ({"why": why} if why else {})
