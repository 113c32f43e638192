"""The lines of `--suite gpu`: one card, bfloat16, the whole step with its optimiser.

With `tiny`, every job runs in small on the CPU: XLA attention, and rates over a peak that is
measured there and means nothing.
"""

from __future__ import annotations

import dataclasses

from benchmarks import floors, growth_time, head_memory, jobs, stage_clock
from benchmarks.contenders import Shape, initial_params, ours
from benchmarks.jobs import (
    Found,
    against_plain,
    against_torch,
    device_peak,
    of_interval,
    shape_text,
    utilisation,
)
from benchmarks.measure import interval, speed, windows
from benchmarks.suite import Job, Line, Measured

GPT2 = Shape(50304, 12, 768, 2048, 12, rows=32, length=1024)
ONE_B = Shape(32128, 24, 2048, 5120, 32, rows=8, length=1280)
SMALL = Shape(320, 2, 64, 160, 2, rows=2, length=64)
TWO_PROCESSES = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
"""Half of the memory, where torch or a run holds the other half."""


def _shape(wanted: Shape, tiny: bool) -> Shape:
    return SMALL if tiny else wanted


def _windows(tiny: bool) -> tuple[int, int]:
    """How many, and steps in each."""
    return (5, 2) if tiny else (15, 20)


def _unpacked(tiny: bool) -> dict:
    """Our settings where each row is one document."""
    return {"attention": "xla" if tiny else "cudnn", "max_documents": 1}


def _peak(tiny: bool) -> float:
    if not tiny:
        return device_peak()
    return floors.machine_floors("bfloat16", 256, 8)["matrix_rate"]


def rates(tiny: bool) -> Found:
    """What the card can do; everything else is held against it."""
    found = floors.machine_floors("bfloat16", *((256, 8) if tiny else (8192, 4096)))
    share = floors.of_peak(found) or {"matrix_rate": None, "bandwidth": None}
    yield "0a", Measured(
        share["matrix_rate"], f"{found['matrix_rate'] / 1e12:.3g} TFLOP/s, random bfloat16",
        details=found,
    )
    yield "0b", Measured(
        share["bandwidth"], f"{found['bandwidth'] / 1e12:.3g} TB/s, read and written",
        details=found,
    )
    parts = floors.step_floors(_shape(GPT2, tiny), found, 5, 2 if tiny else 5, **_unpacked(tiny))
    seconds, floor = parts["seconds"], parts["floors"]
    yield "0c", Measured(
        parts["of_the_matrix_rate"],
        f"step {1e3 * seconds['step']:.1f} ms: forward {1e3 * seconds['forward']:.1f}, with "
        f"backward {1e3 * seconds['forward_and_backward']:.1f}, optimizer "
        f"{1e3 * seconds['optimizer']:.1f}; floors "
        + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in floor.items()),
        details=parts,
    )


def step(tiny: bool) -> Found:
    """Lines 1 and 3, from the same windows."""
    shape, (count, steps) = _shape(GPT2, tiny), _windows(tiny)
    line, found = against_plain(
        shape, count, steps, kernel="xla" if tiny else "cudnn", stacked=False, lower_end=True,
        **_unpacked(tiny),
    )
    yield "1", line
    peak = _peak(tiny)
    used = [utilisation(shape, seconds, peak) for seconds in found["seconds"]["ours"]]
    yield "3", of_interval(interval(used), shape_text(shape), peak=peak)


def torch_step(tiny: bool) -> Found:
    """Line 2."""
    count, steps = _windows(tiny)
    yield "2", against_torch(
        _shape(GPT2, tiny), count, steps, kind="gpt", compiled=True,
        device="cpu" if tiny else "cuda", **_unpacked(tiny),
    )


def one_b(tiny: bool) -> Found:
    """Lines 4a and 4b; no recomputation, neither ours nor theirs."""
    import jax

    shape, (count, steps) = _shape(ONE_B, tiny), (5, 2) if tiny else (7, 5)
    if not tiny and jax.devices()[0].memory_stats()["bytes_limit"] < 50e9:
        # An 80 GB card, shared with torch.
        shape = dataclasses.replace(shape, rows=4)
    settings = _unpacked(tiny) | {"remat": "none"}
    # Kept by the host: the card has room for two states, not for more.
    params = jax.device_get(initial_params(shape))
    mine = ours(shape, params, **settings)
    seconds = windows({"ours": mine}, count, steps)["ours"]
    peak = _peak(tiny)
    used = [utilisation(shape, value, peak) for value in seconds]
    yield "4a", of_interval(interval(used), shape_text(shape), seconds=seconds, peak=peak)
    del mine
    yield "4b", against_torch(
        shape, count, steps, kind="llama", compiled=True, device="cpu" if tiny else "cuda",
        params=params, **settings,
    )


def scanned(tiny: bool) -> Found:
    """Line 5."""
    shape, (count, steps) = _shape(GPT2, tiny), _windows(tiny)
    params = initial_params(shape)
    seconds = windows(
        {name: ours(shape, params, stack=name, **_unpacked(tiny)) for name in ("scan", "unroll")},
        count, steps,
    )
    yield "5", of_interval(
        speed(seconds["unroll"], seconds["scan"]), shape_text(shape), seconds=seconds
    )


def attention(tiny: bool) -> Found:
    """Lines 6a and 6b."""
    found = jobs.reported("gpu_attention", *(
        ("--rounds", "5", "--calls", "1") if tiny
        else ("--shapes", "gpt2_124m", "1b_width_64", "--rounds", "9")
    ))
    checks = {name: one for name, one in found["checks"].items() if "refused" not in one}
    seconds = {
        name: of["median_seconds"] for name, of in found["times"].items() if not of["prompts"]
    }
    ratios = {}
    for shape, of in seconds.items():
        one = of.get("cudnn_one_document", of.get("triton_one_document"))
        # What training would take, and no other blocks of it.
        packed = {name: of[name] for name in ("cudnn_packed", "triton_packed") if name in of}
        kernel = min(packed, key=packed.get)
        ratios[f"{shape}, {kernel}"] = one / packed[kernel]
    worst = min(ratios, key=ratios.get)
    yield "6a", Measured(
        ratios[worst], "forward and backward; the fastest kernel of each shape, the worst of "
        + "; ".join(f"{name} {value:.3f}" for name, value in ratios.items()), details=found,
    )
    leaks = [one[kind] for one in checks.values() for kind in ("leak", "leak_of_gradients")]
    yield "6b", Measured(
        max(leaks), f"largest change by another first document, and largest gradient that reaches "
        f"it, of {len(checks)} checks; all agree with float32: {found['all_right']}",
    )


def head(tiny: bool) -> Found:
    """Lines 7a and 7b."""
    size = (1024, 64, 2, 256, "bfloat16") if tiny else (131072, 768, 16, 1024, "bfloat16")
    found = head_memory.measure(*size, 5, 2 if tiny else 5)
    of = found["temporary_bytes"]
    yield "7a", Measured(
        found["memory"],
        f"{of['chunked'] / 2**20:.0f} of {of['whole'] / 2**20:.0f} MiB, the compiler's word; "
        f"vocabulary {size[0]}, width {size[1]}, {size[2]} × {size[3]} tokens", details=found,
    )
    yield "7b", of_interval(found["speed"], "value and gradient, the head alone")


def growth(tiny: bool) -> Found:
    """Line 8."""
    size = (2, 2, 64, 320, 5) if tiny else (10, 2, 768, 50304, 15)
    found = growth_time.measure(*size)
    yield "8", of_interval(
        found["times_a_copy"],
        f"{found['from_depth']} to {found['to_depth']} layers, {found['grown_megabytes']} MB",
        **found,
    )


def boundary(tiny: bool) -> Found:
    """Lines 9 and 10."""
    return jobs.boundary(*(jobs.TINY_BOUNDARY if tiny else (
        "--rounds", "3", "--before", "800", "--depth", "10", "--width", "768",
        "--batch_size", "16", "--length", "1024",
    )))


def clock(tiny: bool) -> Found:
    """Lines 11a and 11b."""
    if tiny:
        shape = dataclasses.replace(SMALL, layers=2)
        found = stage_clock.measure(shape, 2, short=6, steps=2, first_stage=20)
    else:
        # Its text is packed: attention is what the decoder itself chooses then.
        found = stage_clock.measure(GPT2, 6, steps=20)
    for name, alpha in (("11a", 1), ("11b", 2)):
        of = found[f"prop{alpha}"]
        beside = {arm: run["beside_steps"] for arm, run in found["short_runs"].items()}
        yield name, Measured(
            of["measured_over_predicted"]["median"],
            f"{of['measured']['median']:.3f} on the clock, {of['predicted']:.3f} predicted; "
            f"{found['num_stages']} stages, the first of {of['steps'][0]} steps; put together "
            "from the steps of each depth and of what whole short runs take beside their steps, "
            f"{beside['midas']:.0f} s grown and {beside['full']:.0f} s at full depth",
            of["measured_over_predicted"]["low"], of["measured_over_predicted"]["high"], found,
        )


def save(tiny: bool) -> Found:
    """Line 12."""
    return jobs.save(*(jobs.TINY_SAVE if tiny else ()))


JOBS = (
    Job("rates", (
        Line("0a", "bf16 matrix product over the data sheet's rate"),
        Line("0b", "copy over the data sheet's bandwidth"),
        Line("0c", "GPT-2 124M step: model FLOP/s over the card's own matrix rate"),
    ), rates, 2),
    Job("step", (
        Line("1", "GPT-2 124M: speed against a plain JAX step with cuDNN attention", 0.97, 0.99),
        Line("3", "GPT-2 124M: MFU, attention in full, over the data sheet's rate", 0.42, 0.52),
    ), step, 2.5),
    Job("torch", (
        Line("2", "GPT-2 124M: speed against a compiled torch step", 1.0, 1.2),
    ), torch_step, 3, TWO_PROCESSES),
    Job("1b", (
        Line("4a", "1B: MFU, attention in full, over the data sheet's rate", 0.50, 0.62),
        Line("4b", "1B: speed against transformers' Llama, compiled", 1.15, 1.4),
    ), one_b, 4, TWO_PROCESSES),
    Job("scan", (Line("5", "GPT-2 124M: speed of scanned against unrolled", 0.96, 1.0),),
        scanned, 2),
    Job("attention", (
        Line("6a", "packed attention against unpacked causal: speed", 0.85, 0.97),
        Line("6b", "packed attention: leak across documents", 0.0, 0.0, "lower"),
    ), attention, 3),
    Job("head", (
        Line("7a", "loss at vocabulary 128k: memory over materialised", 1 / 4, 1 / 6, "lower"),
        Line("7b", "loss at vocabulary 128k: speed against materialised", 0.95, 1.05),
    ), head, 1),
    Job("growth", jobs.GROWTH_LINES, growth, 1),
    Job("boundary", (
        Line("9", "stall at a stage boundary, in steps of the new stage", 2.0, 1.0, "lower"),
        Line("10", "slowdown of training while the next stage compiles", 0.10, 0.02, "lower"),
    ), boundary, 5),
    Job("clock", jobs.CLOCK_LINES, clock, 6, TWO_PROCESSES),
    Job("save", (
        Line("12", "blocking of a save over the device-to-host copy", 2.0, 1.1, "lower"),
    ), save, 1),
)
