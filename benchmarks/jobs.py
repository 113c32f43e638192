"""What the lines of both suites share: jobs made of the benchmarks' own `measure` functions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.contenders import Shape, Torch, agree, initial_params, ours
from benchmarks.measure import speed, windows
from benchmarks.step_time import measure as measure_step
from benchmarks.suite import Measured, NotYet

Found = Iterator[tuple[str, Measured]]


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
    contender: Any = None, params: Any = None, **settings: Any,
) -> Measured:
    """Our step against torch's, in turn, torch in a process of its own.

    Args:
      shape: of model and batch, a document per row.
      count: windows.
      steps: in a window.
      kind, compiled, device: of torch's; see `contenders.Torch`.
      contender, params: our step and the parameters that it began with, if it is there already
        and has run nothing yet.
      **settings: of our decoder.
    """
    params = initial_params(shape) if params is None else params
    mine = ours(shape, params, **settings) if contender is None else contender
    theirs = Torch(shape, params, kind=kind, compiled=compiled, device=device)
    try:
        del params
        agreement = agree(shape, mine.first(), theirs.first())
        seconds = windows({"ours": mine, "torch": theirs}, count, steps)
    finally:
        theirs.close()
    what = {"gpt": "in nanoGPT's manner", "llama": "transformers' Llama"}[kind]
    how = "torch.compile" if compiled else "eager"
    rates = {name: shape.tokens / min(times) for name, times in seconds.items()}
    return of_interval(
        speed(seconds["torch"], seconds["ours"]),
        f"{what}, {how}; best window {rates['ours']:,.0f} against {rates['torch']:,.0f} tokens/s; "
        f"{shape_text(shape)}",
        seconds=seconds, settings=settings, largest_relative_differences=agreement,
        versions=theirs.versions,
    )


def wired(module: str, name: str, *arguments: Any, **options: Any) -> Measured:
    """A line that another benchmark measures: `module.measure(...) -> {ratio, note, ...}`.

    Raises:
      NotYet: this checkout has no such benchmark.
    """
    try:
        found = importlib.import_module(module).measure(*arguments, **options)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise NotYet(f"{module}, which measures {name}") from error
    known = ("ratio", "note", "low", "high")
    details = {key: value for key, value in found.items() if key not in known}
    return Measured(**{key: found.get(key) for key in known}, details=details)


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
