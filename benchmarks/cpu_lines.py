"""The lines of `--suite cpu`: two cores, float32.

Numbers as in the suite of a GPU; '0' and '5c' have no counterpart there. A line without floor
and goal is measured and shown: nothing was promised of it here. With `tiny`, every job runs in
small.
"""

from __future__ import annotations

import dataclasses
import os

from benchmarks import compile_depth, floors, growth_time, jobs, stage_clock
from benchmarks.contenders import Shape
from benchmarks.jobs import Found, against_plain, against_torch, of_interval, shape_text
from benchmarks.suite import Job, Line, Measured

STEP = Shape(320, 8, 256, 672, 4, 4, 256, "float32", documents=2)
SMALL = Shape(320, 2, 64, 160, 2, rows=2, length=64, dtype="float32", documents=2)


def step(tiny: bool) -> Found:
    """Line 1."""
    count, steps = (5, 1) if tiny else (15, 4)
    yield "1", against_plain(
        SMALL if tiny else STEP, count, steps, kernel=None, stacked=True, lower_end=False
    )[0]


def eager(tiny: bool) -> Found:
    """Line 2."""
    shape = dataclasses.replace(SMALL if tiny else STEP, documents=1)
    count, steps = (5, 1) if tiny else (15, 4)
    yield "2", against_torch(
        shape, count, steps, kind="gpt", compiled=False, device="cpu",
        threads=(None,) if tiny else (1, os.cpu_count()),
    )


def compiling(tiny: bool) -> Found:
    """Line 5c."""
    if tiny:
        found = compile_depth.measure(2, 4, 5, SMALL)
    else:
        found = compile_depth.measure(8, 48, 5)
    seconds = found["median_seconds"]
    yield "5c", of_interval(
        found["deep_over_shallow"],
        f"{seconds['deep']:.2f} against {seconds['shallow']:.2f} s, train step alone, traced and "
        "compiled", **found,
    )


def growth(tiny: bool) -> Found:
    """Line 8."""
    found = growth_time.measure(*((2, 2, 64, 320, 5) if tiny else (18, 6, 512, 8192, 9)))
    yield "8", of_interval(
        found["times_a_copy"],
        f"{found['from_depth']} to {found['to_depth']} layers, {found['grown_megabytes']} MB",
        **found,
    )


def boundary(tiny: bool) -> Found:
    """Lines 9 and 10."""
    return jobs.boundary(*(jobs.TINY_BOUNDARY if tiny else ()))


def clock(tiny: bool) -> Found:
    """Lines 11a and 11b."""
    if tiny:
        found = stage_clock.measure(
            dataclasses.replace(SMALL, documents=1), 2, short=6, steps=2, first_stage=20,
            add_loop=False,
        )
    else:
        found = stage_clock.measure(stage_clock.DEMO, 4, short=20, count=9, add_loop=False)
    for name, alpha in (("11a", 1), ("11b", 2)):
        of = found[f"prop{alpha}"]
        ratio = of["measured_over_predicted"]
        yield name, Measured(
            ratio["median"],
            f"{of['measured']['median']:.3f} on the clock, {of['predicted']:.3f} predicted; "
            f"{found['num_stages']} stages, the first of {of['steps'][0]} steps, put together "
            f"from measured parts; {found['windows']} windows", ratio["low"], ratio["high"], found,
        )


def save(tiny: bool) -> Found:
    """Line 12."""
    return jobs.save(*(jobs.TINY_SAVE if tiny else ()))


def explained(tiny: bool) -> Found:
    """Line 0."""
    shape = SMALL if tiny else dataclasses.replace(STEP, documents=1)
    found = floors.machine_floors("float32", *((256, 8) if tiny else (2048, 256)))
    parts = floors.step_floors(shape, found, 5, 1 if tiny else 2)
    share = parts["share_of_the_step"]
    yield "0", Measured(
        share["matrix products in their own shapes"],
        f"the machine: {found['matrix_rate'] / 1e9:.0f} GFLOP/s, {found['bandwidth'] / 1e9:.1f} "
        f"GB/s; the step runs at {parts['flops_per_second'] / 1e9:.0f} GFLOP/s; the optimiser's "
        f"bytes explain {share[floors.BYTES_OF_OPTIMIZER]:.0%} of it; {shape_text(shape)}",
        details={"machine_floors": found} | parts,
    )


JOBS = (
    Job("floors", (
        Line("0", "matrix products, each timed alone in its shape, over the whole step"),
    ), explained, 2),
    Job("step", (
        Line("1", "speed against a plain JAX step on the same stacked parameters", 0.97, 0.97),
    ), step, 2),
    Job("eager", (
        Line("2", "speed against torch eager, float32, of the same shape", 1.0, 1.0),
    ), eager, 3),
    Job("compile", (
        Line("5c", "compiling 48 scanned layers over compiling 8", 1.3, 1.3, "lower"),
    ), compiling, 2),
    Job("growth", jobs.GROWTH_LINES, growth, 2),
    Job("boundary", (
        Line("9", "stall at a stage boundary, in steps of the new stage", 2.0, 2.0, "lower"),
        Line("10", "slowdown of training while the next stage compiles", better="lower"),
    ), boundary, 8),
    Job("clock", jobs.CLOCK_LINES, clock, 6),
    Job("save", (
        Line("12", "blocking of a save over the device-to-host copy", better="lower"),
    ), save, 2),
)
