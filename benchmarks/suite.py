"""A suite of measured lines: what each promises, what was found, and the table of it.

Lines are grouped into jobs. A job is a function that yields `(name, Measured)` for its lines
as it finds them, and runs in a process of its own (`benchmarks.run`).
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

NOTES = Path(__file__).with_name("notes.toml")
KEYS = ("name", "ratio", "floor", "goal", "met", "note")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found for a line.

    Attributes:
      ratio: the number that floor and goal speak of; None where it could not be had.
      note: what it is made of, in a sentence.
      low, high: its interval, where it has one.
      details: raw numbers, as plain data.
    """

    ratio: float | None
    note: str
    low: float | None = None
    high: float | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
      name: its number in the table, '4a'.
      what: what is measured, and in what unit.
      floor, goal: to be reached; None where there is none.
      better: 'higher' or 'lower'.
    """

    name: str
    what: str
    floor: float | None = None
    goal: float | None = None
    better: str = "higher"

    def reaches(self, ratio: float | None, wanted: float | None) -> bool | None:
        """Whether `ratio` is as good as `wanted`; None where either is missing."""
        if ratio is None or wanted is None:
            return None
        return ratio >= wanted if self.better == "higher" else ratio <= wanted


@dataclasses.dataclass(frozen=True)
class Job:
    """Lines that are measured together, in one process.

    Attributes:
      name: for the command line.
      lines: that it yields.
      run: the function, `run(tiny)`.
      minutes: that it takes, about, on the machine it is meant for.
      environment: variables of its process.
    """

    name: str
    lines: tuple[Line, ...]
    run: Callable[[bool], Iterator[tuple[str, Measured]]]
    minutes: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


class NotYet(Exception):
    """What a job measures is not in this checkout; the message says what is missing."""


def chosen(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs with a line of these names; '4' stands for '4a' and '4b'.

    Raises:
      KeyError: a name that no line has.
    """
    found = []
    for job in jobs:
        if any(_is_named(line.name, only) for line in job.lines):
            found.append(job)
    names = [line.name for job in jobs for line in job.lines]
    for name in only:
        if not any(_is_named(known, [name]) for known in names):
            raise KeyError(name)
    return found if only else list(jobs)


def _is_named(name: str, only: Sequence[str]) -> bool:
    return any(name == one or name.rstrip("abcdefgh") == one for one in only)


class Results:
    """What is known of a suite's lines, on disk after every change.

    Attributes:
      rows: name of a line -> its row: ratio, interval, floor, goal, note, details and the
        machine it was measured on.
    """

    def __init__(self, suite: str, jobs: Sequence[Job], folder: Path | None):
        """Reads what is there.

        Args:
          suite: 'cpu' or 'gpu'.
          jobs: all of the suite's.
          folder: of the files; None keeps nothing.
        """
        self.suite, self.lines = suite, [line for job in jobs for line in job.lines]
        self.path = None if folder is None else folder / f"suite_{suite}.json"
        self.rows: dict[str, dict] = {}
        if self.path is not None and self.path.exists():
            stored = json.loads(self.path.read_text(encoding="utf-8"))["lines"]
            self.rows = {row["name"]: row for row in stored}

    def has(self, job: Job) -> bool:
        """Whether every line of the job has been measured."""
        return all(self.rows.get(line.name, {}).get("ratio") is not None for line in job.lines)

    def put(self, line: Line, found: Measured, machine: dict | None = None) -> None:
        """Keeps what was found; what was measured before stays where nothing was found now."""
        before = self.rows.get(line.name)
        if found.ratio is None and before is not None and before["ratio"] is not None:
            return
        self.rows[line.name] = {
            "name": line.name, "ratio": found.ratio, "low": found.low, "high": found.high,
            "measured": found.note, "details": found.details, "machine": machine,
        }
        self.write()

    def objects(self) -> list[dict]:
        """Per line: `name, ratio, floor, goal, met, note`."""
        reasons = read_notes().get(self.suite, {})
        return [self._object(line, reasons.get(line.name)) for line in self.lines]

    def _object(self, line: Line, reason: str | None) -> dict:
        row = self.rows.get(line.name, {"ratio": None, "measured": "not measured"})
        note = row["measured"]
        if line.reaches(row["ratio"], line.floor) is False:
            note = f"misses its floor: {reason or 'nobody has said why yet'}. {note}"
        elif reason:
            note = f"{note}. {reason}"
        return {
            "name": line.name, "ratio": row["ratio"], "floor": line.floor, "goal": line.goal,
            "met": line.reaches(row["ratio"], line.goal), "note": note,
        }

    def table(self) -> str:
        """The lines as a Markdown table, with the machines below it."""
        head = ("#", "what", "measured", "floor", "goal", "goal met", "note")
        rows = [head, ("---",) * len(head)]
        machines: dict[str, list[str]] = {}
        for line, found in zip(self.lines, self.objects(), strict=True):
            row = self.rows.get(line.name, {})
            rows.append((
                line.name, line.what, _with_interval(row), _number(line.floor),
                _number(line.goal), self._verdict(line, found), found["note"],
            ))
            if row.get("machine"):
                machines.setdefault(_machine_text(row["machine"]), []).append(line.name)
        text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
        for machine, names in machines.items():
            text += f"\nLines {', '.join(names)}: {machine}\n"
        return text

    def _verdict(self, line: Line, found: dict) -> str:
        if found["met"] is None:
            return "–"
        if found["met"]:
            return "yes"
        above = line.reaches(found["ratio"], line.floor)
        return "no, floor reached" if above else "no, floor missed"

    def write(self) -> None:
        """Writes `suite_NAME.json` and `suite_NAME.md`, unless nothing is kept."""
        if self.path is None:
            return
        objects = {found["name"]: found for found in self.objects()}
        record = {
            "suite": self.suite,
            "lines": [
                self.rows[line.name] | objects[line.name] | {"what": line.what}
                for line in self.lines if line.name in self.rows
            ],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(
            f"# Suite '{self.suite}'\n\nWritten by `python -m benchmarks.run --suite "
            f"{self.suite}`; see [the README](../README.md).\n\n{self.table()}",
            encoding="utf-8",
        )


def read_notes() -> dict[str, dict[str, str]]:
    """Suite -> line -> why it is as it is, and what was tried: `notes.toml`."""
    return tomllib.loads(NOTES.read_text(encoding="utf-8"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _with_interval(row: dict) -> str:
    text = _number(row.get("ratio"))
    if row.get("low") is not None:
        text += f" ({_number(row['low'])} to {_number(row['high'])})"
    return text


def _machine_text(machine: dict) -> str:
    where = machine.get("device") or machine["cpu"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "jax", "torch", "transformers")
        if name in machine
    )
    # The load is each line's own, in the JSON.
    return f"{where}, {machine['cores']} cores; {versions}; {machine['date']}"
