"""Says which runs may be compared, in what, and how long each took.

The rules are those of an honest comparison. Losses of runs that saw other
data, another tokeniser, another evaluation set, another batch, optimiser,
learning-rate schedule or peak are not set side by side without a mark. Two runs share a
budget of FLOPs only if the learning-rate schedule of both ended there: reading
a longer run halfway, while its learning rate is still high, makes whatever
stands next to it look good ("No Train No Gain", arXiv 2307.06440). And one
seed says nothing about significance, so nothing here names a winner.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.paths import identity
from stacking_jax.reporting import units
from stacking_jax.reporting.runs import Run

# What must agree, and how a sentence calls it.
MUST_AGREE = {
    "data_digest": "data digest",
    "vocabulary": "vocabulary",
    "eval_digest": "evaluation set digest",
    "batch_size": "batch size",
    "sequence_length": "sequence length",
    "optimizer": "optimizer",
    "peak_learning_rate": "peak learning rate",
    "schedule": "learning-rate schedule",
    "optimizer_settings": "optimizer settings",
    "model": "model",
}
# A run need not say what its model is, and runs of older versions do not know all that their
# optimiser was; what one of two runs does not say makes no difference. All the rest must be said.
OPTIONAL = ("schedule", "optimizer_settings", "model")
EQUAL_FLOPS = 0.02
# A schedule has ended if its learning rate is low or no longer falls: the drop over the last
# twentieth of the run, as a share of the peak (a cosine to a tenth of it falls by 0.6 % there).
_LOW_RATE, _TAIL, _FALLING = 0.3, 0.05, 0.01


@dataclasses.dataclass(frozen=True)
class Row:
    """One run in the table. Losses in nats per token, times in seconds.

    `measured_speedup` is the training time of `speedup_reference` over the run's own;
    `measured_speedup_wall` the same with compiling, growing, evaluating and saving in it.
    `not_comparable` holds the reasons, empty if there is none; `notes` says what the run may be
    compared with.
    """

    label: str
    path: str
    method: str
    status: str
    depth: int | None
    first_depth: int | None
    num_stages: int | None
    seed: Any
    params: float | None
    steps: int
    tokens: float | None
    model_flops: float | None
    train_seconds: float | None
    compile_seconds: float | None
    wall_seconds: float | None
    train_loss: float | None
    eval_loss: float | None
    eval_step: int | None
    bits_per_byte: float | None
    predicted_speedup_blocks: float | None
    predicted_speedup: float | None
    measured_speedup: float | None
    measured_speedup_wall: float | None
    speedup_reference: str | None
    not_comparable: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
      rows: one per run, in the order given.
      runs: the runs themselves, for curves and configurations.
      notes: sentences that hold for the whole table.
      eligible: per run, whether it may be read in an equal-budget comparison at all (finished,
        schedule ended, nothing that makes it not comparable).
    """

    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    eligible: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """Rows and notes as plain data for JSON; what is not a finite number becomes null."""
        return _plain({"rows": [dataclasses.asdict(r) for r in self.rows], "notes": self.notes})


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Sets runs side by side; see the module's text for the rules.

    Raises:
      UserError: no run, or one run given twice.
    """
    runs = tuple(runs)
    if not runs:
        raise UserError("nothing to compare: give at least one run directory")
    places = collections.Counter(identity(run.path) for run in runs)
    for place, times in places.items():
        if times > 1:
            raise UserError(f"{place} is given {times} times; name each run once")

    labels = _labels(runs)
    agreeing = [
        [j for j in range(len(runs)) if j != i and _agree(run, runs[j])]
        for i, run in enumerate(runs)
    ]
    # The reference is the run that agrees with the most others; the first given decides a tie.
    anchor = max(range(len(runs)), key=lambda i: (len(agreeing[i]), -i))
    open_schedules = [schedule_still_open(run) for run in runs]

    rows = []
    for i, run in enumerate(runs):
        reasons = _reasons(run, runs[anchor], labels[anchor]) if len(runs) > 1 else ()
        peers = agreeing[i]
        reference = _speedup_reference(i, peers, runs)
        rows.append(
            _row(
                run,
                labels[i],
                reasons,
                _notes(i, runs, labels, peers, open_schedules),
                None if reference is None else (runs[reference], labels[reference]),
            )
        )
    eligible = tuple(
        run.finished and not open_ and not row.not_comparable
        for run, open_, row in zip(runs, open_schedules, rows, strict=True)
    )
    comparable = [runs[j] for j in (anchor, *agreeing[anchor])]
    return Comparison(tuple(rows), runs, _general_notes(runs, comparable), eligible)


def schedule_still_open(run: Run) -> str | None:
    """Why the run was not at the end of its learning-rate schedule; None if it was."""
    if not run.finished:
        return f"it is {run.status}"
    if run.total_steps is not None and run.step < run.total_steps:
        return f"it stopped at step {run.step} of {run.total_steps}"
    rates = [
        (row["step"], row["learning_rate"])
        for row in run.train
        if units.known(row.get("learning_rate"))
    ]
    if len(rates) < 3:
        return None
    peak, (last_step, last) = max(rate for _, rate in rates), rates[-1]
    before = [rate for step, rate in rates[:-1] if step <= (1 - _TAIL) * last_step]
    if peak > 0 and before and last > _LOW_RATE * peak:
        if (before[-1] - last) / peak > _FALLING:
            return (
                "its learning rate was still falling at its last step"
                f" ({100 * last / peak:.0f} % of the peak)"
            )
    return None


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: the name, with the directory where names repeat."""
    labels = [run.name for run in runs]
    for naming in (lambda run: identity(run.path).name, lambda run: str(run.path)):
        repeated = {label for label, times in collections.Counter(labels).items() if times > 1}
        labels = [
            f"{run.name} ({naming(run)})" if label in repeated else label
            for run, label in zip(runs, labels, strict=True)
        ]
    return labels


def _canonical(value: Any) -> str:
    """One text per value, so that 16 and 16.0 agree and dicts compare without order."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def _agree(a: Run, b: Run) -> bool:
    """Whether two runs may be compared: nothing differs, and both say all that they must."""
    return not _reasons(a, b, "") and not _reasons(b, a, "")


def _reasons(run: Run, anchor: Run, anchor_label: str) -> tuple[str, ...]:
    reasons = []
    for key, called in MUST_AGREE.items():
        own, other = run.comparability.get(key), anchor.comparability.get(key)
        if own is None and key not in OPTIONAL:
            reasons.append(f"{called} is not recorded")
        elif other is not None and own is not None and _canonical(own) != _canonical(other):
            a, b = _shortened(key, own, other)
            reasons.append(f"{called} {a}, but {b} in {anchor_label}")
    return tuple(reasons)


def _shortened(key: str, own: Any, other: Any) -> tuple[str, str]:
    """Both values for a sentence; digests as short as still tells them apart."""
    a, b = (v if isinstance(v, str) else _canonical(v) for v in (own, other))
    limit = 8 if key.endswith("digest") else 60
    while a[:limit] == b[:limit] and limit < max(len(a), len(b)):
        limit += 4
    cut = "" if key.endswith("digest") else "…"
    return tuple(v if len(v) <= limit else v[:limit] + cut for v in (a, b))


def _speedup_reference(i: int, peers: list[int], runs: Sequence[Run]) -> int | None:
    """The run at full depth from the start for as many steps, of the same seed if there is one."""
    run = runs[i]
    if not run.finished or run.num_stages == 1:
        return None
    fits = [
        j
        for j in peers
        if runs[j].finished
        and runs[j].num_stages == 1
        and runs[j].depth == run.depth
        and runs[j].step == run.step
        and runs[j].total_steps == run.total_steps
    ]
    return min(fits, key=lambda j: (runs[j].seed != run.seed, j), default=None)


def _row(
    run: Run,
    label: str,
    reasons: tuple[str, ...],
    notes: tuple[str, ...],
    reference: tuple[Run, str] | None,
) -> Row:
    return Row(
        label=label,
        path=str(run.path),
        method=run.method,
        status=run.status,
        depth=run.depth,
        first_depth=run.first_depth,
        num_stages=run.num_stages,
        seed=run.seed,
        params=run.params,
        steps=run.step,
        tokens=run.tokens,
        model_flops=run.model_flops,
        train_seconds=run.train_seconds,
        compile_seconds=run.compile_seconds,
        wall_seconds=run.wall_seconds,
        train_loss=run.train_loss,
        eval_loss=run.eval_loss,
        eval_step=run.eval_step,
        bits_per_byte=run.bits_per_byte,
        predicted_speedup_blocks=run.speedup_blocks,
        predicted_speedup=run.speedup_model,
        measured_speedup=_quotient(reference, run, "train_seconds"),
        measured_speedup_wall=_quotient(reference, run, "wall_seconds"),
        speedup_reference=reference[1] if reference else None,
        not_comparable=reasons,
        notes=notes,
    )


def _quotient(reference: tuple[Run, str] | None, run: Run, key: str) -> float | None:
    if reference is None or not getattr(run, key):
        return None
    return getattr(reference[0], key) / getattr(run, key)


def _notes(
    i: int,
    runs: Sequence[Run],
    labels: Sequence[str],
    peers: list[int],
    open_schedules: Sequence[str | None],
) -> tuple[str, ...]:
    """What the run may be compared with, and what the reader overlooked."""
    run, notes = runs[i], []
    why = open_schedules[i]
    if why:
        notes.append(
            f"left out of equal-steps and equal-FLOPs comparisons: {why}; an equal-budget cell is"
            " a run of its own whose schedule ends at that budget"
        )
    else:
        closed = [j for j in peers if not open_schedules[j]]
        steps = [labels[j] for j in closed if runs[j].step == run.step]
        if steps:
            notes.append(f"same number of steps as {_listed(steps)}")
        flops = []
        for j in closed:
            a, b = run.model_flops, runs[j].model_flops
            if a and b and abs(a - b) <= EQUAL_FLOPS * max(a, b):
                flops.append(f"{labels[j]} ({100 * (a / b - 1):+.1f} %)")
        if flops:
            notes.append(f"same model FLOPs (within {100 * EQUAL_FLOPS:g} %) as {_listed(flops)}")
        if closed and not steps and not flops:
            notes.append("shares neither its steps nor its FLOPs with a comparable run")
    if not run.finished and run.eval_step is not None:
        notes.append(f"held-out loss is that of step {run.eval_step}")
    if run.restarts:
        notes.append(f"stopped and went on from step {_listed(map(str, run.restarts))}")
    notes.extend(run.notes)
    return tuple(notes)


def _general_notes(runs: Sequence[Run], comparable: Sequence[Run]) -> tuple[str, ...]:
    """What holds for all rows: which seeds there are, and what that allows to be said."""
    if len(runs) == 1:
        return ()
    notes = []
    seeds = {"not recorded" if run.seed is None else str(run.seed) for run in runs}
    if len(seeds) > 1:
        notes.append(
            f"Seeds differ: {_listed(sorted(seeds), most=12)}. A seed fixes the order of the"
            " data and the initial values; only runs of one seed form a pair."
        )
    seeds_of_arm = collections.defaultdict(set)
    for run in comparable:
        arm = (run.method, run.first_depth, run.num_stages, run.depth, run.total_steps)
        seeds_of_arm[arm].add(_canonical(run.seed))
    if max(len(found) for found in seeds_of_arm.values()) == 1:
        notes.append(
            "One seed per arm: this says nothing about significance. The spread needs the same"
            " arms with more seeds (three or more), and an interval over the differences paired by"
            " seed."
        )
    else:
        notes.append(
            "Several seeds in an arm: read differences paired by seed, with an interval over the"
            " pairs; single rows say nothing about significance."
        )
    return tuple(notes)


def _listed(names: Iterable[str], most: int = 4) -> str:
    """'a, b and c'; with very many names only the first of them and how many more there are."""
    names = list(names)
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
