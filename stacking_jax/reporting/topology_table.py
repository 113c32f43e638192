"""A plan on a topology as text: memory, time and money, a line per stage."""

from __future__ import annotations

from typing import Any

from stacking_jax.reporting import units
from stacking_jax.reporting.tables import Table, printable, render

GIB = 2**30


def topology_table(plan: dict[str, Any], width: int | None = None, color: bool = False) -> str:
    """The table of `planning.topology_plan.plan_on`; `width` and `color` as `plan_table`."""
    return render(topology_cells(plan), width, color)


def topology_cells(plan: dict[str, Any]) -> Table:
    """The table as text cells: every stage, then full depth throughout."""
    where = plan["topology"]
    measured = any("step_seconds_measured" in stage for stage in plan["stages"])
    header = (
        "stage", "depth", "memory [GiB]", "of", "fits", "arguments", "compile", "collectives",
        "step", "bound by", "MFU", "days", "chip-hours",
    )  # fmt: skip
    lefts = {"fits", "bound by"}
    if measured:
        header = (*header[:9], "measured", "measured/predicted", *header[9:])
    rows = [
        _row(str(number), stage, where["chips"], measured)
        for number, stage in enumerate(plan["stages"], start=1)
    ]
    grown = len(plan["stages"]) > 1
    if grown:
        rows.append(_row("full", plan["baseline"], where["chips"], measured))
    return Table(
        title=printable(f"On {where['name']}: {where['chips']} chips, mesh {_mesh(where)}"),
        header=header,
        rows=tuple(rows),
        left=tuple(name in lefts for name in header),
        lines=tuple(printable(line) for line in _lines(plan, grown, measured)),
        marked=tuple("NO" in row for row in rows),
    )


def gibibytes(value: float | None) -> str:
    """'3.38', '0.019': GiB to three digits."""
    if not units.known(value):
        return units.MISSING
    size = value / GIB
    return f"{size:.2f}" if size >= 0.1 else f"{size:.3g}"


def bytes_text(value: float | None) -> str:
    """'9.27 GB': bytes in powers of a thousand, as link rates are given."""
    if not units.known(value):
        return units.MISSING
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P")):
        if value < 999.5 * 1000**power or prefix == "P":
            number = value / 1000**power
            return f"{number:.3g} {prefix}B" if number < 999.5 else f"{number:,.0f} {prefix}B"
    raise AssertionError


def seconds_text(value: float | None) -> str:
    """'413 ms', '1.39 s'."""
    if not units.known(value):
        return units.MISSING
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def money(value: float | None, currency: str) -> str:
    """'12,300 USD'."""
    return units.MISSING if not units.known(value) else f"{value:,.0f} {currency}"


def _row(name: str, stage: dict[str, Any], chips: int, measured: bool) -> tuple[str, ...]:
    step = stage["step_seconds_estimate"]
    spent = None if step is None else step * stage["steps"]
    moved = stage["collective_bytes"]
    clock = stage.get("step_seconds_measured")
    beside = (
        (seconds_text(clock), units.ratio(clock / step if clock and step else None))
        if measured else ()
    )
    return (
        name, str(stage["depth"]), gibibytes(stage["hbm_peak_bytes"]),
        gibibytes(stage["hbm_limit_bytes"]), "yes" if stage["fits"] else "NO",
        gibibytes(stage["argument_bytes"]), units.duration(stage["compile_seconds"]),
        bytes_text(None if moved is None else sum(moved.values())), seconds_text(step),
        *beside, stage["bound_by"] or units.MISSING, units.percent(stage["mfu_estimate"]),
        units.MISSING if spent is None else f"{spent / 86_400:.3g}",
        units.MISSING if spent is None else _hours(chips * spent / 3600),
    )


def _lines(plan: dict[str, Any], grown: bool, measured: bool):
    where, cost = plan["topology"], plan["estimate"]
    source = {
        "compiler": "memory per device by the TPU compiler's word",
        "formula": "memory and collectives per device by formula, not compiled",
        "local": "memory per device by the compiler's word",
    }[where["method"]]
    yield (
        f"{source}; step, MFU, days and chip-hours: {where['label']}, from rates "
        f"{where['rates']}"
    )
    last = plan["stages"][-1]
    if last["collective_bytes"]:
        kinds = ", ".join(f"{bytes_text(n)} {kind}" for kind, n in last["collective_bytes"].items())
        yield f"collectives of the last stage, per device and step: {kinds}"
    if not all(stage.get("loops_known", True) for stage in plan["stages"]):
        yield "a loop's length could not be read: collectives and step are too low"
    if not all(stage["fits"] for stage in plan["stages"]):
        yield (
            "memory of a stage that does not fit: as the compiler's error says, which may count "
            "temporaries alone"
        )
    if measured:
        yield (
            "measured: median step on the devices here, random tokens; measured/predicted above "
            "1: slower than the roofline"
        )
    yield f"the run's steps: {_cost(cost)}"
    if grown:
        yield f"full depth throughout: {_cost(plan['baseline']['estimate'])}"
        saved, whole = plan["saving"], plan["baseline"]["estimate"]
        if units.known(saved["chip_hours"]):
            yield (
                f"growing saves {_cost(saved | {'currency': cost['currency']})}: "
                f"{units.percent(saved['chip_hours'] / whole['chip_hours'])} of it"
            )
    if cost["price"] is None:
        yield "for a price: --gin.PlanConfig.chip_hour_price=..."


def _cost(cost: dict[str, Any]) -> str:
    if not units.known(cost["days"]):
        return "not known, as a stage does not fit"
    text = f"{cost['days']:.3g} days, {_hours(cost['chip_hours'])} chip-hours"
    priced = units.known(cost["price"])
    return text + (f", {money(cost['price'], cost['currency'])}" if priced else "")


def _mesh(where: dict[str, Any]) -> str:
    return " × ".join(f"{name}={size}" for name, size in where["mesh"].items() if size > 1) or "1"
