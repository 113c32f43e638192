"""The fault table: what happens to runs on the way, and whether they end with the same bits.

    python -m benchmarks.faults --out benchmarks/results/faults.json \\
        --table benchmarks/results/faults.md

Every try ends with the run going on to its last step. It has survived if every number of
every step, the last parameters and the log of records are, bit for bit, those of the run
that nothing disturbed. What has been tried already is read from --out (and --work, where
it is kept after every try), so the same command goes on where it was left off.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.fault_runs import (
    GROWTH,
    LIVES,
    SAVE_EVERY,
    STEPS,
    Runs,
    is_saving,
    last_step,
    saved,
)
from benchmarks.fault_storage import cut_file, damaged, disk_full, drop_marks, flip_bit
from benchmarks.fault_topology import devices_in_turn, processes_in_turn
from benchmarks.measure import machine
from stacking_jax.training.telemetry import write_json

_COMMAND = (
    "python -m benchmarks.faults --out benchmarks/results/faults.json "
    "--table benchmarks/results/faults.md"
)

Try = dict[str, object]
"""What one try tells: `survived`, `seconds` until the run had ended, and what fits among
`lost` (steps that were computed again), `phase`, `saving`, `found` (seconds), `why`."""


def killed_at_random(runs: Runs, dice: random.Random, processes: int = 1) -> list[Try]:
    """One run that is killed again and again, and goes on each time.

    Half of the kills come at any instant of a life, the others while it does something
    chosen: makes its cache, compiles, grows, saves, or starts. Of several processes one is
    killed, whichever, or all; the others must end by themselves. One run in twelve compiles
    everything anew, into a folder of its own.
    """
    usual = runs.reference(processes)[1]
    run_dir = runs.begin(f"killed-{processes}-{dice.randrange(10**9)}")
    cold = dice.random() < 1 / 12
    tries: list[Try] = []
    began = time.monotonic()
    why, again = "", 0
    while not why:
        life = runs.start(run_dir, processes, cold=cold and not tries)
        spare = len(tries) == 12
        killed = None if spare else _kill_once(life, run_dir, dice, processes, usual)
        codes = life.wait(LIVES)
        if killed is None:
            if again < 3 and set(codes) <= {-signal.SIGABRT, 134}:
                again += 1  # Held up for longer than a heartbeat may take, on a busy machine.
                continue
            if any(codes):
                why = f"went on and ended with {codes}: {life.last_words}"
            break
        tries.append({**killed, "survivors": [code for code in codes if code != -9]})
        if any(code in (None, 2) for code in tries[-1]["survivors"]):
            why = f"the survivors ended with {codes}"
    why = why or runs.difference(run_dir, processes)
    for one in tries:
        one |= {"survived": not why, "seconds": (time.monotonic() - began) / len(tries)}
        if why:
            one["why"] = why
    if tries:
        tries[-1]["again"] = again
    if not why:
        shutil.rmtree(run_dir)
    return tries


def _kill_once(life, run_dir: Path, dice, processes: int, usual: float) -> Try | None:
    """Kills at an instant drawn at random; None if the run had ended before."""
    victims = list(range(processes))
    if dice.random() < 0.5:
        victims = [dice.randrange(processes)]
    aims = ["compile", "checkpoint", "init"]
    # What is still to come in this life.
    aims += [] if (run_dir / "cache").exists() else ["cache"]
    aims += ["grow"] if saved(run_dir) <= GROWTH else []
    aim = dice.choice(["any"] * len(aims) + aims)
    at = dice.uniform(0, usual) if aim == "any" else dice.uniform(0, 0.3)
    # A phase counts from when it begins; one that comes several times is aimed at any time.
    skip = dice.randrange(3) if aim == "checkpoint" else 0
    since, inside = None, False
    while life.running():
        now = life.phase(victims[0])
        if aim == "any":
            since = life.began
        elif now == aim and not inside:
            skip, since = skip - 1, time.monotonic() if skip <= 0 else since
        inside = now == aim
        if since is not None and time.monotonic() - since >= at:
            life.kill(victims)
            return {
                "phase": life.phase(victims[0]), "saving": is_saving(run_dir),
                "lost": max(0, last_step(run_dir, life) - saved(run_dir)),
                "killed": len(victims),
            }
        time.sleep(0.005)
    return None


def terminated(runs: Runs, dice: random.Random) -> list[Try]:
    """SIGTERM to one of two processes, before a step drawn at random."""
    process = dice.randrange(2)
    fault = {"process": process, "step": dice.randint(1, 8), "what": "SIGTERM", "pause": 0.5}
    return _interrupted(runs, "terminated", fault, [143, 143], dice)


def interrupted(runs: Runs, dice: random.Random) -> list[Try]:
    """SIGINT, as of Ctrl-C, to one of two processes."""
    process = dice.randrange(2)
    fault = {"process": process, "step": dice.randint(1, 8), "what": "SIGINT", "pause": 0.5}
    return _interrupted(runs, "interrupted", fault, [143, 143], dice)


def coordinator_lost(runs: Runs, dice: random.Random) -> list[Try]:
    """SIGKILL of process 0, which runs the coordinator, while both train."""
    fault = {"process": 0, "step": dice.randint(1, STEPS), "what": "SIGKILL"}
    return _interrupted(runs, "coordinator", fault, [-9, -signal.SIGABRT], dice)


def stuck(runs: Runs, dice: random.Random) -> list[Try]:
    """One of two processes sleeps for ever before a step; the limit is 5 s."""
    process, limit = dice.randrange(2), 5.0
    fault = {"process": process, "step": dice.choice([3, 4, 7, 8, 9, 10, 11, 12]), "what": "hang"}
    return _interrupted(
        runs, "stuck", fault, None, dice,
        [f"TrainConfig.step_timeout={limit}", "TrainConfig.other_timeout=60.0"],
    )


def _interrupted(
    runs: Runs, name: str, fault: dict, expected: list[int] | None, dice: random.Random,
    bindings: list[str] | None = None,
) -> list[Try]:
    """Two processes with a fault in one, then two without: do they end as they should?

    Without `expected` codes one must be 75 after at most twice the limit, and none 0.
    """
    runs.reference(2)
    run_dir = runs.begin(f"{name}-{dice.randrange(10**9)}")
    began = time.monotonic()
    life = runs.start(run_dir, 2, fault=fault, bindings=bindings or [])
    codes = life.wait(LIVES)
    one: Try = {}
    if expected is not None:
        why = "" if codes == expected else f"ended with {codes}: {life.last_words}"
    else:
        said = life.said(0) + life.said(1)
        waits = re.findall(r"has been at '\w+' for ([\d.]+) s \(limit ([\d.]+) s\)", said)
        late = [float(seconds) for seconds, limit in waits if float(seconds) > 2 * float(limit)]
        good = 75 in codes and None not in codes and 0 not in codes and waits and not late
        why = "" if good else f"ended with {codes}: {life.last_words}"
        if waits:
            one["found"] = max(float(seconds) for seconds, _ in waits)
    reached = last_step(run_dir)
    life = runs.start(run_dir, 2)
    codes = life.wait(LIVES)
    if any(codes):
        why = why or f"went on and ended with {codes}: {life.last_words}"
    one["lost"] = max(0, reached - life.resumed_from)
    why = why or runs.difference(run_dir, 2)
    one |= {"survived": not why, "seconds": time.monotonic() - began}
    if not why:
        shutil.rmtree(run_dir)
    return [one | ({"why": why} if why else {})]


def clock_jumps(runs: Runs, dice: random.Random) -> list[Try]:
    """The wall clock leaps five hours back and forth at every look; one kill on the way."""
    processes = dice.choice([1, 2])
    runs.reference(processes)
    run_dir = runs.begin(f"clock-{os.getpid()}")
    began = time.monotonic()
    jumping = {"what": "clock"}
    life = runs.start(run_dir, processes, fault=jumping, bindings=["TrainConfig.step_timeout=60.0"])
    deadline = time.monotonic() + LIVES
    while last_step(run_dir) < 5 and life.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    life.kill(range(processes))
    life.wait(LIVES)
    reached = last_step(run_dir)
    life = runs.start(run_dir, processes, fault=jumping, bindings=["TrainConfig.step_timeout=60.0"])
    codes = life.wait(LIVES)
    why = f"ended with {codes}: {life.last_words}" if any(codes) else ""
    why = why or runs.difference(run_dir, processes)
    one: Try = {"survived": not why, "seconds": time.monotonic() - began}
    one["lost"] = max(0, reached - life.resumed_from)
    return [one | ({"why": why} if why else {})]


FAULTS: dict[str, tuple[str, int, Callable[[Runs, random.Random], list[Try]]]] = {
    "kill_one_process": (
        "SIGKILL of a run of one process, at random instants", 300, killed_at_random),
    "kill_two_processes": (
        "SIGKILL of one process of two, or of both, at random instants", 50,
        lambda runs, dice: killed_at_random(runs, dice, 2)),
    "sigterm": ("SIGTERM to one process of two", 5, terminated),
    "sigint": ("SIGINT (Ctrl-C) to one process of two", 3, interrupted),
    "coordinator": ("the coordinator lost: SIGKILL of process 0 of two", 5, coordinator_lost),
    "stuck": ("a process alive but stuck, limit 5 s", 5, stuck),
    "clock": ("the wall clock leaps hours back and forth, and a kill", 4, clock_jumps),
    "unreadable": ("an array file of the newest checkpoint cut in half", 5, damaged(cut_file)),
    "unreadable_two": (
        "the same, read by two processes", 3, damaged(cut_file, processes=2)),
    "flipped": ("one bit of the newest checkpoint turned over", 5, damaged(flip_bit)),
    "marks": (
        "a checkpoint copied without its marks of a commit: it is used", 5,
        damaged(drop_marks, moved=False)),
    "full": ("the disk full from some step on", 5, disk_full),
    "processes": ("2 processes, then 1, then 2, also at a growth", 3, processes_in_turn),
    "devices": ("8 devices, then 4, 2 and 1, also at a growth", 3, devices_in_turn),
}
"""Name -> what it is called in the table, how many tries, and what does one or more."""


def run_all(names: list[str], counts: dict[str, int], work: Path, kept: dict) -> None:
    """Tries until each fault has been tried often enough; keeps everything after each try."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        runs = Runs(Path(folder))
        for name in names:
            known = _read(work / f"{name}.json") or kept.get(name, [])
            while len(known) < counts[name]:
                found = FAULTS[name][2](runs, random.Random(f"{name} {len(known)} {os.getpid()}"))
                # Another run of this command may be at the same fault.
                with open(work / "lock", "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    known = (_read(work / f"{name}.json") or known) + found
                    write_json(work / f"{name}.json", known)
                bad = [one["why"] for one in found if not one["survived"]]
                print(f"{name}: {len(known)} tries", *bad, file=sys.stderr, flush=True)


def table(results: dict[str, list[Try]], about: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# What runs survive",
        "",
        f"Made by `{about['command']}` on {about['date']}: {about['cores']} CPU cores "
        f"({about['cpu']}), shared with other work; JAX {about['jax']}, Python "
        f"{about['python']}.",
        "",
        f"A run of {STEPS} steps that grows once and saves every {SAVE_EVERY} steps. "
        "Survived: it went on and ended with every metric of every step, the last parameters and "
        "the records read bit for bit those of the undisturbed run (for other numbers of "
        "processes or devices: the restored state is bit for bit the saved one, the same records "
        "are read, and losses agree to 1e-4).",
        "",
        "| fault | tries | survived | lost: steps computed again, mean (most) | seconds per try |",
        "|---|---|---|---|---|",
    ]
    for name, (text, _, _) in FAULTS.items():
        tries = results.get(name)
        if not tries:
            continue
        lost = [int(one["lost"]) for one in tries if "lost" in one]
        shown = f"{statistics.mean(lost):.1f} ({max(lost)})" if lost else "0"
        found = [float(one["found"]) for one in tries if "found" in one]
        if found:
            text += f"; found after {min(found):.1f} to {max(found):.1f} s"
        lines.append(
            f"| {text} | {len(tries)} | {sum(bool(one['survived']) for one in tries)} | {shown} | "
            f"{statistics.median(float(one['seconds']) for one in tries):.1f} |"
        )
    kills = [one for name in ("kill_one_process", "kill_two_processes")
             for one in results.get(name, [])]
    if kills:
        phases = Counter(str(one["phase"]) for one in kills)
        saving = sum(bool(one["saving"]) for one in kills)
        lines += [
            "",
            f"What the {len(kills)} killed processes were doing: "
            + ", ".join(f"{name} {count}" for name, count in phases.most_common())
            + f"; a checkpoint was begun and not whole in {saving}.",
        ]
        both = sum(one["killed"] == 2 for one in kills)
        codes = Counter(code for one in kills for code in one["survivors"])
        lines.append(
            f"In {both} both processes were killed; survivors ended with "
            + (", ".join(f"{code} ({count})" for code, count in codes.most_common()) or "none")
            + " (-6 is SIGABRT, which a shell calls 134)."
        )
        again = sum(one.get("again", 0) for one in kills)
        if again:
            lines.append(
                f"{again} starts were ended by JAX without a kill, the machine was too busy for "
                "heartbeats of 20 s; they were started again."
            )
    return "\n".join(lines) + "\n"


def _read(path: Path) -> list[Try]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="F.json")
    parser.add_argument("--table", metavar="F.md")
    parser.add_argument("--work", metavar="DIR", help="what is kept after each try (OUT.work)")
    parser.add_argument("--only", metavar="A,B", help=f"among {', '.join(FAULTS)}")
    parser.add_argument("--tries", metavar="A=N,..", default="", help="instead of the usual number")
    parser.add_argument("--show", action="store_true", help="try nothing more, write what is known")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    work = Path(arguments.work or out.with_suffix(".work"))
    work.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text(encoding="utf-8"))["tries"] if out.exists() else {}
    counts = {name: count for name, (_, count, _) in FAULTS.items()}
    counts |= {
        name: int(count) for name, count in
        (part.split("=") for part in arguments.tries.split(",") if part)
    }
    names = arguments.only.split(",") if arguments.only else list(FAULTS)
    if not arguments.show:
        run_all(names, counts, work, kept)
    results = kept | {name: found for name in FAULTS if (found := _read(work / f"{name}.json"))}
    about = machine() | {"command": _COMMAND}
    out.write_text(
        json.dumps({"benchmark": "faults", "machine": about, "tries": results}, indent=1) + "\n",
        encoding="utf-8",
    )
    if arguments.table:
        Path(arguments.table).write_text(table(results, about), encoding="utf-8")


if __name__ == "__main__":
    main()
