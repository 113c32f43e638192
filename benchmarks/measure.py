"""Side-by-side timing: the contenders take turns, so that a machine's drift hits all."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stacking_jax.evaluation.bootstrap import bootstrap_value


def interleaved(
    contenders: dict[str, Callable[..., object]], rounds: int, per_round: int = 1,
    prepare: Callable[[], tuple] = tuple,
) -> dict[str, list[float]]:
    """Times every contender `rounds` times, in turn; each call must wait for its result.

    Args:
      contenders: what is timed, by name.
      rounds: how often each one's turn comes.
      per_round: calls per turn.
      prepare: makes the arguments of a turn, outside of the time: what calls use up.

    Returns:
      Name -> seconds per call, one value for every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(*prepare())
    names = list(contenders)
    for turn in range(rounds):
        # The order turns too: whoever comes first would always find the same cache.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            arguments = prepare()
            began = time.perf_counter()
            for _ in range(per_round):
                contenders[name](*arguments)
            seconds[name].append((time.perf_counter() - began) / per_round)
    return seconds


def ratio(reference: list[float], ours: list[float]) -> dict[str, float]:
    """Speed of `ours` relative to `reference`, pair by pair: above 1 is faster."""
    pairs = sorted(a / b for a, b in zip(reference, ours, strict=True))
    return {
        "median": statistics.median(pairs),
        "low": pairs[len(pairs) // 10],
        "high": pairs[-1 - len(pairs) // 10],
    }


def windows(
    contenders: dict[str, Callable[[int], float]], count: int, steps: int
) -> dict[str, list[float]]:
    """Times contenders that count their own seconds, `count` windows each, in turn.

    Args:
      contenders: name -> runs that many steps, waits for them and returns the seconds.
      count: windows of each.
      steps: in a window.

    Returns:
      Name -> seconds per step, one value for every window.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(min(steps, 2))
    names = list(contenders)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(contenders[name](steps) / steps)
    return seconds


def speed(reference: list[float], ours: list[float]) -> dict[str, float]:
    """Speed of `ours` relative to `reference`: below 1 is slower. See `interval`."""
    return interval([a / b for a, b in zip(reference, ours, strict=True)])


def interval(values: list[float]) -> dict[str, float]:
    """The median of one value per window, with its 95 % percentile bootstrap interval."""
    low, high = bootstrap_value(
        lambda chosen: statistics.median(values[i] for i in chosen), len(values)
    )
    return {"median": statistics.median(values), "low": low, "high": high, "windows": len(values)}


def report(name: str, result: dict, path: str | None) -> None:
    """Prints a result and, where a path is given, keeps it with machine and date."""
    record = {"benchmark": name, **result, "machine": machine()}
    print(json.dumps(record, indent=1))
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    from importlib.metadata import version

    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        ),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
