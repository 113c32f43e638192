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
    # Only where a step runs another number of layers than are stored.
    runs = any(_runs(stage) != stage["depth"] for stage in plan["stages"])
    header = (
        "stage", "depth", *(["runs"] if runs else []), "memory [GiB]", "of", "fits", "arguments",
        "compile", "collectives", "step", "bound by", "MFU", "days", "chip-hours",
    )  # fmt: skip
    lefts = {"fits", "bound by"}
    if measured:
        at = header.index("bound by")
        header = (*header[:at], "measured", "measured/predicted", *header[at:])
    rows = [
        _row(str(number), stage, where["chips"], measured, runs)
        for number, stage in enumerate(plan["stages"], start=1)
    ]
    compared = runs or len(plan["stages"]) > 1
    if compared:
        rows.append(_row("full", plan["baseline"], where["chips"], measured, runs))
    return Table(
        title=printable(
            f"On {where['name']}: {where['chips']} chip{'s' * (where['chips'] != 1)}, "
            f"mesh {_mesh(where)}"
        ),
        header=header,
        rows=tuple(rows),
        left=tuple(name in lefts for name in header),
        lines=tuple(printable(line) for line in _lines(plan, compared, measured)),
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


def _runs(stage: dict[str, Any]) -> int:
    return stage.get("run_depth", stage["depth"])


def _row(
    name: str, stage: dict[str, Any], chips: int, measured: bool, runs: bool
) -> tuple[str, ...]:
    step = stage["step_seconds_estimate"]
    spent = None if step is None else step * stage["steps"]
    moved = stage["collective_bytes"]
    clock = stage.get("step_seconds_measured")
    beside = (
        (seconds_text(clock), units.ratio(clock / step if clock and step else None))
        if measured else ()
    )
    return (
        name, str(stage["depth"]), *([str(_runs(stage))] if runs else []),
        gibibytes(stage["hbm_peak_bytes"]), gibibytes(stage["hbm_limit_bytes"]),
        "yes" if stage["fits"] else "NO", gibibytes(stage["argument_bytes"]),
        units.duration(stage["compile_seconds"]),
        bytes_text(None if moved is None else sum(moved.values())), seconds_text(step),
        *beside, stage["bound_by"] or units.MISSING, units.percent(stage["mfu_estimate"]),
        units.MISSING if spent is None else f"{spent / 86_400:.3g}",
        units.MISSING if spent is None else _hours(chips * spent / 3600),
    )


def _lines(plan: dict[str, Any], compared: bool, measured: bool):
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
    if where["method"] != "formula" and not all(stage["fits"] for stage in plan["stages"]):
        yield (
            "memory of a stage that does not fit: as the compiler's error says, which may count "
            "temporaries alone"
        )
    if measured:
        yield (
            "measured: median step on the devices here, random tokens; measured/predicted above "
            "1: slower than the roofline"
        )
    yield f"the run's steps{_left_out(plan)}: {_cost(cost)}"
    if compared:
        yield f"full depth throughout: {_cost(plan['baseline']['estimate'])}"
        saved, whole = plan["saving"], plan["baseline"]["estimate"]
        if units.known(saved["chip_hours"]):
            yield _saved(plan, saved | {"currency": cost["currency"]}, whole["chip_hours"])
    if cost["price"] is None:
        yield "for a price: --gin.PlanConfig.chip_hour_price=..."


def _left_out(plan: dict[str, Any]) -> str:
    """', without ...': what a run trains beside its steps."""
    parts = []
    if (plan.get("teacher") or {}).get("trained_within_the_run"):
        parts.append("the training of its teacher")
    if plan.get("choice_flops"):
        parts.append("what trying candidates takes")
    return f", without {' and '.join(parts)}" if parts else ""


def _saved(plan: dict[str, Any], saved: dict[str, Any], whole: float) -> str:
    grows = len({stage["depth"] for stage in plan["stages"]}) > 1
    what = "growing" if grows else "this method"
    share = units.percent(abs(saved["chip_hours"]) / whole)
    if saved["chip_hours"] >= 0:
        return f"{what} saves {_cost(saved)}: {share} of it"
    numbers = ("days", "chip_hours", "price")
    more = saved | {name: -saved[name] for name in numbers if saved[name] is not None}
    return f"{what} costs {_cost(more)} more: {share} of it"


def _cost(cost: dict[str, Any]) -> str:
    if not units.known(cost["days"]):
        return "not known, as a stage does not fit"
    text = f"{cost['days']:.3g} days, {_hours(cost['chip_hours'])} chip-hours"
    priced = units.known(cost["price"])
    return text + (f", {money(cost['price'], cost['currency'])}" if priced else "")


def _mesh(where: dict[str, Any]) -> str:
    return " × ".join(f"{name}={size}" for name, size in where["mesh"].items() if size > 1) or "1"
