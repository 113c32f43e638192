"""The paper's models on pods: what each plan takes, by the TPU compiler's word.

    python -m benchmarks.pod_plan --out benchmarks/results/pod_plan.md

Compiled stages are kept, so that an interrupted run goes on where it stopped; with
`--minutes` no plan is begun after that time, and the table holds those that are whole.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path

from benchmarks.measure import machine
from stacking_jax import configurables, gin_config
from stacking_jax.console import say
from stacking_jax.planning import PlanConfig, command
from stacking_jax.planning.cache import versions
from stacking_jax.planning.compiler import is_known
from stacking_jax.planning.estimate import LABEL
from stacking_jax.planning.topology import parse
from stacking_jax.planning.topology_plan import questions
from stacking_jax.reporting.topology_table import bytes_text, gibibytes, seconds_text
from stacking_jax.reporting.units import duration, percent

CHIPS = ("v5p", "v5e", "v6e", "v4")
SIZES = ("8b", "1b", "2b")
SCHEDULES = ("prop2", "prop1")

HEAD = (
    "model", "schedule", "pod", "batch per chip", "remat", "memory of the stages [GiB]",
    "of", "step, first to last stage", "bound by", "MFU", "collectives, last stage", "days",
    "chip-hours", "full depth", "saved",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/pod_plan.md", metavar="F")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M",
                        help="begin no plan that needs compiling after so many minutes")
    parser.add_argument("--only", nargs="*", metavar="NAME",
                        help="experiments of gin/experiments/pods; all by default")
    arguments = parser.parse_args()
    began = time.monotonic()
    names = [
        f"midas_{size}_{schedule}_{chip}"
        for chip in CHIPS for size in SIZES for schedule in SCHEDULES
    ]
    rows, compile_seconds, missing = [], {}, []
    for name in names:
        if arguments.only is not None and name not in arguments.only:
            continue
        file = f"gin/experiments/pods/{name}.gin"
        gin_config.load([file], (), configurables.register)
        config, price = configurables.configured(), configurables.configured(PlanConfig)
        late = time.monotonic() - began > 60 * arguments.minutes
        if late and not _known(config, price):
            missing.append(name)
            continue
        plan, advice = command.make(config, price, "")
        say(f"{name}: {'fits' if advice is None else advice} "
            f"({plan['planning_seconds']:.0f} s, load {os.getloadavg()[0]:.1f})")
        rows.append(_row(name, config, plan))
        for stage in [*plan["stages"], plan["baseline"]]:
            compile_seconds[stage["program"]] = stage["compile_seconds"]
        _write(Path(arguments.out), rows, compile_seconds, missing, names)
    _write(Path(arguments.out), rows, compile_seconds, missing, names)


def _known(config, price) -> bool:
    topology = parse(price.topology)
    return all(is_known(asked, stage, topology) for asked, stage in questions(config))


def _row(name: str, config, plan: dict) -> tuple[str, ...]:
    stages, where = plan["stages"], plan["topology"]
    size, schedule = name.split("_")[1:3]
    memory = " ".join(
        gibibytes(s["hbm_peak_bytes"]) + ("" if s["fits"] else " (NO)") for s in stages
    )
    first, last = stages[0], stages[-1]
    cost, whole, saved = plan["estimate"], plan["baseline"]["estimate"], plan["saving"]
    hours = cost["chip_hours"]
    return (
        size.upper(), schedule.upper().replace("PROP", "PROP-"), where["name"],
        f"{config.batch_size / where['chips']:g}", config.model.remat, memory,
        gibibytes(where["hbm_limit_bytes"]),
        f"{seconds_text(first['step_seconds_estimate'])} to "
        f"{seconds_text(last['step_seconds_estimate'])}",
        last["bound_by"] or "", percent(last["mfu_estimate"]),
        ", ".join(f"{bytes_text(n)} {k}" for k, n in (last["collective_bytes"] or {}).items()),
        "" if hours is None else f"{cost['days']:.1f}",
        "" if hours is None else f"{hours:,.0f}",
        "" if whole["chip_hours"] is None else f"{whole['chip_hours']:,.0f}",
        "" if hours is None else f"{saved['chip_hours']:,.0f} "
        f"({percent(saved['chip_hours'] / whole['chip_hours'])})",
    )


def _write(path: Path, rows, compile_seconds, missing, names) -> None:
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    where = machine()
    lines = [
        "# The paper's models on pods",
        "",
        f"`python -m benchmarks.pod_plan`, {datetime.date.today().isoformat()}; {used}; "
        f"{where['cpu']}, {where['cores']} cores.",
        f"{len(compile_seconds)} programs, compiled in {duration(sum(compile_seconds.values()))} "
        "of wall time in all, on a machine shared with other work.",
        "",
        "Memory: per chip, at the peak of a training step, by the compiler's word, for each of the "
        f"six stages, and of how much. Step, MFU, days, chip-hours: {LABEL} (docs/plan.md says "
        "how). Full depth: chip-hours of as many steps at the final depth. One row is one file "
        "of `gin/experiments/pods`.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    if missing:
        lines += ["", f"Not computed yet: {', '.join(missing)}."]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
