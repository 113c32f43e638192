"""What the lines of both suites share: jobs made of the benchmarks' own `measure` functions."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.contenders import Shape, Torch, agree, initial_params, ours
from benchmarks.measure import interval, speed, windows
from benchmarks.step_time import measure as measure_step
from benchmarks.suite import Line, Measured, NotYet

Found = Iterator[tuple[str, Measured]]

TINY_BOUNDARY = (
    "--rounds", "1", "--stages", "3", "--steps", "60", "--depth", "2", "--width", "64",
    "--batch_size", "2", "--length", "64",
)
GROWTH_LINES = (
    Line("8", "growth of the whole state over a copy of the grown one", 2.0, 1.2, "lower"),
)
CLOCK_LINES = (
    Line("11a", "clock of full depth over MIDAS PROP-1, over theory", 0.95, 0.99),
    Line("11b", "clock of full depth over MIDAS PROP-2, over theory", 0.95, 0.99),
)
"""What is promised alike of a GPU and of two cores."""

TINY_SAVE = ("--layers", "2", "--width", "64", "--rounds", "5")


def shape_text(shape: Shape) -> str:
    return (
        f"{shape.layers} layers of {shape.width}, MLP {shape.inner}, vocabulary {shape.vocab}, "
        f"{shape.rows} × {shape.length} tokens, {shape.dtype}"
    )


def of_interval(found: dict, note: str, *, lower_end: bool = False, **details: Any) -> Measured:
    """A line whose number is a median of windows, or the lower end of its interval."""
    ratio = found["low"] if lower_end else found["median"]
    if lower_end:
        note = f"lower end of the 95 % interval; median {found['median']:.3f}; {note}"
    return Measured(
        ratio, f"{note}; {found['windows']} windows", found["low"], found["high"],
        details | {"ratio": found},
    )


def against_plain(
    shape: Shape, count: int, steps: int, *, kernel: str | None, stacked: bool, lower_end: bool,
    **settings: Any,
) -> tuple[Measured, dict]:
    """Our step against the one by hand, with all that was found."""
    found = measure_step(shape, count, steps, kernel=kernel, stacked=(stacked,), **settings)
    name = "plain_stacked" if stacked else "plain_list"
    rate = shape.tokens / found["median_seconds"]["ours"]
    kernel_text = f"{kernel} attention" if kernel else "masked attention"
    note = f"{rate:,.0f} tokens/s; the plain step with {kernel_text}; {shape_text(shape)}"
    line = of_interval(found[f"speed_against_{name}"], note, lower_end=lower_end, **found)
    return line, found


def utilisation(shape: Shape, seconds: float, peak: float) -> float:
    """Model FLOPs of a step, attention in full, over its time and the chip's peak."""
    return shape.flops_per_step() / seconds / peak


def against_torch(
    shape: Shape, count: int, steps: int, *, kind: str, compiled: bool, device: str,
    threads: tuple[int | None, ...] = (None,), params: Any = None, **settings: Any,
) -> Measured:
    """Our step against torch's, in turn, torch in a process of its own.

    Args:
      shape: of model and batch, a document per row.
      count: windows.
      steps: in a window.
      kind, compiled, device: of torch's; see `contenders.Torch`.
      threads: of torch, a process for each; the fastest of them is the opponent.
      params: that all begin with; None for fresh ones.
      **settings: of our decoder.
    """
    params = initial_params(shape) if params is None else params
    mine = ours(shape, params, **settings)
    theirs: dict[str, Torch] = {}
    try:
        for number in threads:
            name = "torch" if number is None else f"torch, {number} threads"
            theirs[name] = Torch(
                shape, params, kind=kind, compiled=compiled, device=device, threads=number
            )
        del params
        first = mine.first()
        agreement = {name: agree(shape, first, one.first()) for name, one in theirs.items()}
        seconds = windows({"ours": mine} | theirs, count, steps)
    finally:
        for one in theirs.values():
            one.close()
    fastest = min(theirs, key=lambda name: statistics.median(seconds[name]))
    what = {"gpt": "in nanoGPT's manner", "llama": "transformers' Llama"}[kind]
    how = "torch.compile" if compiled else "eager"
    rate = {name: shape.tokens / statistics.median(times) for name, times in seconds.items()}
    return of_interval(
        speed(seconds[fastest], seconds["ours"]),
        f"{rate['ours']:,.0f} against {rate[fastest]:,.0f} tokens/s of {fastest}, {what}, {how}; "
        f"{shape_text(shape)}",
        seconds=seconds, settings=settings, largest_relative_differences=agreement,
        versions=theirs[fastest].versions,
    )


def reported(module: str, *arguments: str) -> dict:
    """What another benchmark writes with `--out`, run as a command of its own.

    Raises:
      NotYet: this checkout has no such benchmark.
      RuntimeError: it failed, with its last line.
    """
    if importlib.util.find_spec(f"benchmarks.{module}") is None:
        raise NotYet(f"benchmarks/{module}.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(out)],
            capture_output=True, text=True, check=False,
        )
        if not out.exists():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"benchmarks.{module} ended with {done.returncode}: {last}")
        return json.loads(out.read_text(encoding="utf-8"))


def boundary(*arguments: str) -> Found:
    """Lines 9 and 10: whole runs that compile the next stage ahead, by turns with runs that
    do not."""
    found = reported("boundary", *arguments)
    ahead, in_turn = (found["windows"][name] for name in ("ahead", "in_turn"))
    size = found["shape"]
    deepest = size["depth"] + (size["stages"] - 1) * size["block"]
    text = (
        f"{len(ahead)} boundaries of {size['rounds']} runs of {size['depth']} to {deepest} layers "
        f"of {size['width']}, {size['batch_size']} × {size['length']} tokens"
    )
    yield "9", of_interval(
        interval([run["stall_steps"] for run in ahead]),
        f"compiled ahead; {found['stall_steps']['in_turn']:.2f} steps where it is compiled in "
        f"turn; {text}", **found,
    )
    slower = found["slowdown_while_compiling"]
    pairs = [
        run["slowdown"] / control["slowdown"] - 1
        for run, control in zip(ahead, in_turn, strict=True)
        if run["slowdown"] is not None and control["slowdown"] is not None
    ]
    if not pairs:
        raise RuntimeError("compiling took no step's time, or the whole stage's: no slowdown")
    yield "10", of_interval(
        interval(pairs),
        f"median step while compiling over that after it, over the same of runs that compile "
        f"nothing then; alone {slower['ahead']:.3f} and {slower['control']:.3f}; {text}",
    )


def save(*arguments: str) -> Found:
    """Line 12."""
    found = reported("async_save", *arguments)
    seconds = found["seconds"]
    yield "12", of_interval(
        speed(found["all"]["save"], found["all"]["copy"]),
        f"{seconds['save']:.3f} against {seconds['copy']:.3f} s for {found['megabytes']} MB",
        **found,
    )


def device_peak() -> float:
    """The chip's bfloat16 FLOP/s, by `planning.chips`.

    Raises:
      NotYet: a chip that the table does not know.
    """
    from stacking_jax.planning.chips import chip_of_kind

    kind = jax.devices()[0].device_kind
    chip = chip_of_kind(kind)
    if chip is None:
        raise NotYet(f"the peak of {kind!r} in stacking_jax/planning/chips.py")
    return chip.peak_flops
