"""A study as one HTML page: what was declared, what came of it, and what else can be seen."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Sequence

from stacking_jax.reporting import units
from stacking_jax.reporting.boundaries import boundaries_section
from stacking_jax.reporting.comparison import EQUAL_FLOPS, compare_runs
from stacking_jax.reporting.drawn import Drawn
from stacking_jax.reporting.html import figure_cards, meta_line, page
from stacking_jax.reporting.isoplot import isoplot_figures, isoplots
from stacking_jax.reporting.markup import (
    breakable,
    escape,
    header,
    number,
    run_key,
    text_cell,
)
from stacking_jax.reporting.plots import Figure
from stacking_jax.reporting.runs import Run
from stacking_jax.reporting.sections import stages_section
from stacking_jax.reporting.tasks import isoplot_section
from stacking_jax.study.analysis import UNITS, Analysis, Line, TimeToLoss
from stacking_jax.study.results import ArmResult, StudyResult, last_scores
from stacking_jax.study.runner import COMPLETE
from stacking_jax.study.statistics import Difference, mean_of

_HOW_TO_READ = f"""
<h2>How to read this page</h2>
<dl>
<div><dt>Held-out loss and score</dt>
<dd>Loss: cross-entropy alone on held-out data, in nats per token, by the final network. Score: the
mean over the study's tasks, of 100, at the end of each run.</dd></div>
<div><dt>Paired by seed</dt>
<dd>A seed fixes the order of the data and the initial values for all arms. Differences are taken
within each seed; the interval is Student's t over these differences, 95 %.</dd></div>
<div><dt>Lower, higher, not distinguishable</dt>
<dd>A direction is named only where a test at 5 % finds it. 'After the correction': the declared
comparisons share one error rate (Holm), and this one does not pass it.</dd></div>
<div><dt>Noise floor</dt>
<dd>Two halves of the seeds of one arm, as if they were two arms. What they differ by is no effect.
They do not share seeds, as arms do, so this is more than what pairs leave.</dd></div>
<div><dt>Equal FLOPs</dt>
<dd>Model FLOPs within {100 * EQUAL_FLOPS:g} %, each by a schedule that ended there.</dd></div>
<div><dt>Time</dt>
<dd>The median step of each stage, over all steps of all seeds, times the steps, and the median
stall of each boundary; a teacher that the run trained first has its own such time, and candidates
that were tried out their steps. The first compilation, evaluations and checkpoints are left
out.</dd></div>
</dl>
"""


def study_html(
    study: StudyResult, analysis: Analysis, drawn: Sequence[Drawn],
    now: datetime.datetime | None = None,
) -> str:
    """The whole page as text; `drawn` is what `study_figures` gave for the study."""
    arms = list(study.arms.values())
    # The runs of all seeds under the name of their arm, and the arm's place for its colour.
    named = [
        (place, dataclasses.replace(run, name=arm.name, method=arm.name))
        for place, arm in enumerate(arms) for run in arm.runs.values()
    ]
    runs = [run for _, run in named]
    iso = isoplots(runs)
    figures = [
        *(Figure(each.key, each.title, each.caption, each.svg()) for each in drawn),
        *isoplot_figures(runs, iso, [place for place, _ in named]),
    ]
    cards = figure_cards(figures, [arm.name for arm in arms])
    title = f"Study: {study.config.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        meta_line(runs, now or datetime.datetime.now().astimezone()),
        _progress(study),
        "".join(f'<p class="note">{escape(note)}</p>' for note in analysis.notes),
        _declared_section(analysis, study),
        _arms_section(study),
        _lines_section("Equal steps", analysis.equal_steps, study, "As many updates, whatever "
                       "they cost."),
        _lines_section("Equal FLOPs", analysis.equal_flops, study, "Schedules that ended at the "
                       "same model FLOPs."),
        _lines_section("Equal time", analysis.equal_time, study, "The reference as it would have "
                       "ended at the arm's time; between two references, interpolated over the "
                       "logarithm of time, seed by seed."),
        _time_section(analysis.time_to_loss, study),
        _tasks_section(study),
        isoplot_section(iso),
        f'<h2>Figures</h2><div class="figures">{cards}</div>' if cards else "",
        _boundary_costs(arms),
        _first_seed(study),
        _cells_section(study),
        _config_section(study),
        _HOW_TO_READ,
    ]
    return page(title, parts)


def _progress(study: StudyResult) -> str:
    states = [state for arm in study.arms.values() for state in arm.states.values()]
    done = sum(state.kind == COMPLETE for state in states)
    left = [f"{done} of {len(states)} cells complete"]
    for kind in ("failed", "cut", "submitted", "open"):
        count = sum(state.kind == kind for state in states)
        left += [f"{count} {kind}"] if count else []
    left_out = sum(len(arm.left_out) for arm in study.arms.values())
    left += [f"{left_out} complete, but left out"] if left_out else []
    seeds = len(study.config.seeds)
    return f"<p>{len(study.arms)} arms × {seeds} seeds: {', '.join(left)}.</p>"


def _declared_section(analysis: Analysis, study: StudyResult) -> str:
    if not analysis.declared and not analysis.noise:
        return ""
    columns = (
        ("Comparison", ""), ("Endpoint", ""), ("Budget", ""), ("Found", ""), ("Difference", ""),
        ("95 % interval", ""), ("p", "paired t"), ("p", "Holm"),
        ("Smallest effect", "found with power 0.8"), ("Seeds", ""),
    )  # fmt: skip
    numbers = {endpoint: 0 for endpoint in UNITS}
    body = []
    for line in analysis.declared:
        numbers[line.endpoint] += 1
        body.append(_declared_row(line, study, f"{numbers[line.endpoint]}. "))
    body += [_declared_row(line, study, "A/A: ") for line in analysis.noise]
    return (
        "<h2>What was declared beforehand</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=4)}<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="small">Arm − reference, in nats per token or points of 100. Loss: lower is '
        "less; score: higher is more. The smallest effect is that of the strictest of these "
        "tests.</p>"
    )


def _declared_row(line: Line, study: StudyResult, prefix: str) -> str:
    found = line.found
    called = f"{line.arm} − {line.reference}"
    if line.arm == line.reference:
        called = f"{line.arm}, {line.note}"
    return (
        f'<tr><th scope="row" class="name">{_key(line.arm, study)}{escape(prefix + called)}</th>'
        + text_cell(line.endpoint) + _words_cell(escape(line.budget))
        + _words_cell(f"<strong>{escape(line.says)}</strong>")
        + _difference_cells(found, line.endpoint)
        + number(found and found.p, units.p_value(found and found.p))
        + number(line.adjusted, units.p_value(line.adjusted))
        + number(line.detectable, units.difference(line.detectable, line.endpoint, sign=False))
        + number(found and found.pairs, units.integer(found and found.pairs)) + "</tr>"
    )


def _words_cell(html: str) -> str:
    """Words that may take several lines, so that all columns of the table are seen at once."""
    return f'<td class="text" style="white-space:normal;min-width:6.5em">{html}</td>'


def _lines_section(title: str, lines: Sequence[Line], study: StudyResult, text: str) -> str:
    if not lines:
        return ""
    columns = (
        ("Arm", ""), ("Reference", ""), ("Endpoint", ""), ("Found", ""), ("Difference", ""),
        ("95 % interval", ""), ("Seeds", ""),
    )  # fmt: skip
    body = "".join(
        f'<tr><th scope="row" class="name">{_key(line.arm, study)}{escape(line.arm)}</th>'
        f'<td class="text">{escape(line.reference)}'
        + (f'<br><span class="small">{escape(line.note)}</span>' if line.note else "") + "</td>"
        + text_cell(line.endpoint)
        + text_cell(line.says + (" (exploratory)" if line.arm in study.config.exploratory else ""))
        + _difference_cells(line.found, line.endpoint)
        + number(line.found and line.found.pairs, units.integer(line.found and line.found.pairs))
        + "</tr>"
        for line in lines
    )
    return (
        f"<h2>{title}</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=4)}<tbody>{body}</tbody></table></div>"
        f'<p class="small">{escape(text)} Not corrected for the number of comparisons: what is to '
        "be relied on stands in the first table.</p>"
    )


def _time_section(found: Sequence[TimeToLoss], study: StudyResult) -> str:
    if not found:
        return ""
    columns = (
        ("Arm", ""), ("Loss of", ""), ("Says", ""), ("Time of the reference", "÷ time to its loss"),
        ("95 % interval", ""), ("Reached", "of seeds"),
    )  # fmt: skip
    body = "".join(
        f'<tr><th scope="row" class="name">{_key(of.arm, study)}{escape(of.arm)}</th>'
        + text_cell(of.reference) + text_cell(_time_words(of))
        + number(of.ratio, units.ratio(of.ratio))
        + f"<td>{_range(of.low, of.high, units.ratio)}</td>"
        + f"<td>{of.reached} of {of.pairs}</td></tr>"
        for of in found
    )
    return (
        "<h2>Time to equal loss</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=3)}<tbody>{body}</tbody></table></div>"
        '<p class="small">When the arm\'s own run first has the held-out loss with which the '
        "reference ended, seed by seed; above 1×: sooner than the reference. On the way the "
        "learning rate is not yet low, which is on the careful side for the arm.</p>"
    )


def _time_words(of: TimeToLoss) -> str:
    if of.reached < of.pairs:
        return "not reached" if not of.reached else "not reached by every seed"
    if of.low is None:
        return "one pair of seeds: no interval"
    if of.low > 1:
        return "sooner"
    return "later" if of.high < 1 else "not distinguishable"


def _arms_section(study: StudyResult) -> str:
    columns = (
        ("Arm", ""), ("Held-out loss", "mean (95 %)"), ("Score", "mean (95 %)"), ("Steps", ""),
        ("Model FLOPs", ""), ("Time", "steps and boundaries"), ("Step", "last stage"),
        ("Parameters", ""), ("Seeds", "complete"),
    )  # fmt: skip
    body = "".join(_arm_row(arm, study) for arm in study.arms.values())
    return (
        "<h2>Arms</h2>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns)}<tbody>{body}</tbody></table></div>"
        '<p class="small">Intervals are those of each mean over its seeds; whether two arms differ '
        "is told by paired differences.</p>"
    )


def _arm_row(arm: ArmResult, study: StudyResult) -> str:
    marks = ["exploratory"] if arm.name in study.config.exploratory else []
    badges = "".join(f'<br><span class="badge">{mark}</span>' for mark in marks)
    params = next((run.params for run in arm.runs.values()), None)
    total = arm.seconds
    step = next((clock.stages[-1][2] for clock in arm.clocks.values()), None)
    return (
        f'<tr><th scope="row" class="name">{_key(arm.name, study)}{escape(arm.name)}{badges}</th>'
        + _mean_cell(list(arm.values("loss").values()), units.loss)
        + _mean_cell(list(arm.values("score").values()), lambda value: f"{value:.1f}")
        + number(arm.steps, units.integer(arm.steps))
        + number(arm.model_flops, units.flops(arm.model_flops))
        + number(total, units.duration(total))
        + number(step, units.MISSING if step is None else f"{1000 * step:.3g} ms")
        + number(params, units.count(params))
        + f"<td>{len(arm.runs)} of {len(arm.states)}</td></tr>"
    )


def _tasks_section(study: StudyResult) -> str:
    """Tasks down, a heading and a mean for every group of several, arms across."""
    arms = [arm for arm in study.arms.values() if arm.runs]
    groups: dict[str, dict[str, float | None]] = {}
    for arm in arms:
        for run in arm.runs.values():
            for task, row in last_scores(run).items():
                if units.known(row.get("value")):
                    groups.setdefault(str(row.get("group", "")), {})[task] = row.get("chance")
    if not groups:
        return ""
    columns = [("Task", ""), *((arm.name, "mean (95 %)") for arm in arms), ("Chance", "")]
    body = "".join(
        f'<tbody><tr class="group"><th scope="rowgroup" class="text" colspan="{len(columns)}">'
        f"{escape(units.group_title(group))}</th></tr>"
        + (_task_row(f"mean of {len(chances)}", list(chances), arms, None)
           if len(chances) > 1 else "")
        + "".join(_task_row(task, [task], arms, chance) for task, chance in chances.items())
        + "</tbody>"
        for group, chances in groups.items()
    )
    return (
        '<h2>Tasks</h2><div class="card scroll"><table class="results">'
        f"{header(columns)}{body}</table></div>"
        '<p class="small">Scores of 100 at the end of each run: means over seeds with their 95 % '
        "intervals over seeds. The mean of a group is over the seeds that have all its tasks.</p>"
    )


def _task_row(
    name: str, tasks: Sequence[str], arms: Sequence[ArmResult], chance: float | None
) -> str:
    cells = []
    for arm in arms:
        found = [last_scores(run) for run in arm.runs.values()]
        values = [[scores.get(task, {}).get("value") for task in tasks] for scores in found]
        means = [statistics.fmean(of) for of in values if all(map(units.known, of))]
        cells.append(_mean_cell(means, lambda value: f"{value:.1f}"))
    shown = units.MISSING if chance is None else f"{chance:.1f}"
    return (
        f'<tr><th scope="row" class="name">{breakable(name)}</th>{"".join(cells)}'
        f"{number(chance, shown)}</tr>"
    )


def _boundary_costs(arms: Sequence[ArmResult]) -> str:
    rows = "".join(
        _boundary_row(arm, place, which)
        for place, arm in enumerate(arms) if arm.clocks
        for which in range(max(len(clock.boundaries) for clock in arm.clocks.values()))
    )
    if not rows:
        return ""
    columns = (
        ("Arm", ""), ("Boundary", "after step"), ("Stall", "median over seeds"),
        ("Stall", "in steps"), ("Candidates", "tried out"),
    )  # fmt: skip
    return (
        '<h2>Cost of the boundaries</h2><div class="card scroll"><table class="results">'
        f"{header(columns)}<tbody>{rows}</tbody></table></div>"
        '<p class="small">All stages that follow another, whether a stack grows there, a path or '
        "a teacher leaves. Candidates: the training steps of their trials, at the median step of "
        "their stage.</p>"
    )


def _boundary_row(arm: ArmResult, place: int, which: int) -> str:
    """The same boundary of all seeds, each of which may have decided itself where it comes."""
    there = [clock for clock in arm.clocks.values() if which < len(clock.boundaries)]
    found = [clock.boundaries[which] for clock in there]
    starts = [boundary.start for boundary in found]
    where = units.integer(min(starts))
    if max(starts) > min(starts):
        where += f" to {units.integer(max(starts))}"
    stall, step = found[0].stall, there[0].stages[which + 1][2]
    trials = statistics.median(boundary.trials for boundary in found)
    return (
        f'<tr><td class="text">{run_key(place)}{escape(arm.name)}</td>'
        + number(min(starts), where)
        + number(stall, units.MISSING if stall is None else f"{stall:.2f} s")
        + number(stall, units.MISSING if stall is None or not step else f"{stall / step:.1f}")
        + number(trials, f"{trials:.1f} s" if trials else units.MISSING) + "</tr>"
    )


def _first_seed(study: StudyResult) -> str:
    """Stages, and boundaries in detail, of the first seed that every arm has."""
    seeds = [
        seed for seed in study.config.seeds if all(seed in a.runs for a in study.arms.values())
    ]
    if not seeds:
        return ""
    runs: list[Run] = [
        dataclasses.replace(arm.runs[seeds[0]], name=arm.name) for arm in study.arms.values()
    ]
    comparison = compare_runs(runs)
    return (
        f"<details><summary>Boundaries and stages in detail, seed {seeds[0]}</summary>"
        f"{boundaries_section(comparison)}{stages_section(comparison)}</details>"
    )


def _cells_section(study: StudyResult) -> str:
    columns = (("Cell", ""), ("State", ""), ("Held-out loss", ""), ("Wall time", ""))
    body = []
    for arm in study.arms.values():
        for seed, state in arm.states.items():
            run = arm.runs.get(seed)
            said = state.kind + (f": {state.line}" if state.line else "")
            said = f"left out: {arm.left_out[seed]}" if seed in arm.left_out else said
            body.append(
                f'<tr><th scope="row" class="name">{escape(arm.name)}, seed {seed}</th>'
                f'<td class="text" style="white-space:normal">{escape(said)}</td>'
                + number(run and run.eval_loss, units.loss(run and run.eval_loss))
                + number(run and run.wall_seconds, units.duration(run and run.wall_seconds))
                + "</tr>"
            )
    return (
        "<details><summary>Every cell</summary>"
        '<div class="card scroll"><table class="results">'
        f"{header(columns, text_columns=2)}<tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _config_section(study: StudyResult) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        f"<td><code>{escape(value)}</code></td></tr>"
        for name, value in study.config.to_dict().items()
    )
    return (
        "<details><summary>The study's settings</summary>"
        f'<div class="card scroll"><table class="config"><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


def _key(arm: str, study: StudyResult) -> str:
    return run_key(list(study.arms).index(arm))


def _mean_cell(values: Sequence[float], text) -> str:
    found = mean_of(list(values))
    if found is None:
        return f"<td>{units.MISSING}</td>"
    shown = text(found.mean)
    if found.low is not None:
        shown += f" ({text(found.low)} to {text(found.high)})"
    return number(found.mean, shown)


def _difference_cells(found: Difference | None, endpoint: str) -> str:
    if found is None:
        return f"<td>{units.MISSING}</td>" * 2
    return number(found.mean, units.difference(found.mean, endpoint)) + (
        f"<td>{_range(found.low, found.high, lambda value: units.difference(value, endpoint))}</td>"
    )


def _range(low: float | None, high: float | None, text) -> str:
    return units.MISSING if low is None else f"{text(low)} to {text(high)}"
