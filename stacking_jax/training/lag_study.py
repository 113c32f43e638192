"""LAG's claim, measured: does the loss after a lag order the candidates as the end does?

All candidates are trained to the end of the run, and the loss at each lag is held against the
final one by rank correlation.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.console import progress, say
from stacking_jax.errors import UserError
from stacking_jax.training import consensus
from stacking_jax.training.candidates import Candidate
from stacking_jax.training.decisions import alike
from stacking_jax.training.lag import with_choice
from stacking_jax.training.paired import CONFIDENCE, BatchLoss, mean_loss, weights_of
from stacking_jax.training.select import Start, first_programs
from stacking_jax.training.telemetry import write_json
from stacking_jax.training.trials import try_out

RESAMPLES = 1000
_ENUMERATED = 8


def lag_study(
    start: Start, ways: Sequence[Candidate], lag: int, out: Path, *, batches: int | None = None,
    points: int = 12,
) -> dict[str, Any]:
    """Trains every candidate to the end, scoring at lags from 0 to `lag`.

    A candidate that is done lies in `out/trials`, and is not trained again when the same
    study goes on. Of several processes the first one's files count, and it alone writes.

    Args:
      start: the checkpoint from which all grow.
      ways: the candidates; of those that are the same growth, the first.
      lag: the longest lag.
      out: folder of the study.
      batches: held-out batches of each source; None for those of an evaluation of the run.
      points: how many lags are looked at, evenly spaced in their logarithm, 0 among them.

    Returns:
      Plain data, also in `out/lag.json`: `candidates` with `losses` by lag and the
      `final_loss`, `curve` as `correlations` gives it, and where all of it comes from.

    Raises:
      UserError: fewer than three candidates differ, or the lag does not fit.
    """
    start.check_lag(lag)
    setup, number = start.setup, start.number
    groups = alike(ways, setup.plan, number, setup.config.growth)
    if len(groups) < 3:
        raise UserError(
            f"{len(groups)} of the candidates differ at this growth, and a rank correlation takes "
            "three or more; name others with --candidates, or a later growth with --step"
        )
    for group in groups:
        if len(group) > 1:
            say(f"{', '.join(group)} are the same growth here; {group[0]} is trained for all")
    lags = spaced(lag, points)
    end = setup.plan.total_steps
    main_process = jax.process_index() == 0
    if main_process:
        (out / "trials").mkdir(parents=True, exist_ok=True)
    losses: dict[str, dict[int, list[BatchLoss]]] = {}
    shared = first_programs(setup, number)
    distinct = [way for way in ways if way.name in {group[0] for group in groups}]
    steps = len(distinct) * (end - start.step)
    with progress("training to the end", steps, "steps") as advance:
        for way in distinct:
            key = _key(start, way, lags, batches)
            path = out / "trials" / f"{key[:16]}.json"
            known = consensus.from_first(_read(path, key) if main_process else None)
            if known is None:
                advance(0, way.name)
                tried = with_choice(setup, way, number)
                found = try_out(
                    tried, number, start.state, until=end,
                    score_at={start.step + at for at in lags} | {end}, batches=batches,
                    skipped_batches=start.skipped_batches, programs=shared,
                    after_step=lambda step, metrics, name=way.name: advance(1, name),
                )
                if main_process:
                    write_json(
                        path,
                        {"key": key, "name": way.name, "steps": [
                            [step, [list(batch) for batch in of]] for step, of in found.items()
                        ]},
                    )
            else:
                found = {step: [BatchLoss(*batch) for batch in of] for step, of in known}
                advance(end - start.step, f"{way.name} is done")
            losses[way.name] = found
    result = {
        "run": str(setup.run_dir), "step": start.step, "stage": number,
        "from_depth": setup.plan.stages[number - 1].depth,
        "to_depth": setup.plan.stages[number].depth, "total_steps": end, "lags": lags,
        "seed": setup.config.seed, "eval_digest": setup.held_out.digest,
        "same": [group for group in groups if len(group) > 1],
        "candidates": [
            {
                "name": name,
                "losses": [_finite(mean_loss(of[start.step + at])) for at in lags],
                "final_loss": _finite(mean_loss(of[end])),
            }
            for name, of in losses.items()
        ],
        **correlations(
            [[of[start.step + at] for at in lags] for of in losses.values()],
            [of[end] for of in losses.values()], lags, seed=setup.config.seed,
        ),
    }
    if main_process:
        write_json(out / "lag.json", result)
    return result


def correlations(
    at_lags: Sequence[Sequence[Sequence[BatchLoss]]], final: Sequence[Sequence[BatchLoss]],
    lags: Sequence[int], *, seed: int = 0,
) -> dict[str, Any]:
    """Rank correlation of the loss at each lag with the final one, over candidates.

    Args:
      at_lags: candidate -> lag -> held-out losses.
      final: candidate -> held-out losses at the end, of the same batches.
      lags: steps.
      seed: of the resampling.

    Returns:
      `curve`: per lag `spearman` and `kendall` (None where they are not defined), each with
      `_low` and `_high`, the interval from resampling held-out batches, the same for all
      candidates and both times; and `best_is_best`, whether the best then is the best in the
      end. `chance`: the Spearman correlation that a random order stays below with 95 %, and 1
      where none is beyond chance. Neither holds what other seeds or other candidates would say.
    """
    from scipy import stats

    ends = np.array([mean_loss(of) for of in final])
    draws = np.random.default_rng(seed)
    weights = weights_of(final[0])
    names = np.array([batch.source for batch in final[0]])
    samples = np.zeros((RESAMPLES, len(names)))
    for name in dict.fromkeys(names):
        mine = np.flatnonzero(names == name)
        drawn = draws.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), RESAMPLES)
        part = drawn * weights[mine]
        samples[:, mine] = part / part.sum(1, keepdims=True) * weights[mine].sum()
    ends_again = samples @ _per_batch(final).T
    curve = []
    for place, lag in enumerate(lags):
        now = [of[place] for of in at_lags]
        means = np.array([mean_loss(of) for of in now])
        again = samples @ _per_batch(now).T
        row: dict[str, Any] = {"lag": lag}
        for name, measure in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
            value = _rank(measure, means, ends)
            spread = [
                _rank(measure, one, other) for one, other in zip(again, ends_again, strict=True)
            ]
            known = [one for one in spread if one is not None]
            tail = (1 - CONFIDENCE) / 2
            low, high = (
                (float(q) for q in np.quantile(known, [tail, 1 - tail]))
                if known and value is not None and len(names) > 1 else (None, None)
            )
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        row["best_is_best"] = _first(means) is not None and _first(means) == _first(ends)
        curve.append(row)
    return {"curve": curve, "chance": chance(len(ends)), "resamples": RESAMPLES}


def _first(losses: np.ndarray) -> int | None:
    """The place of the lowest loss; None where none is finite."""
    finite = np.where(np.isfinite(losses), losses, np.inf)
    return int(np.argmin(finite)) if np.isfinite(finite).any() else None


def chance(count: int) -> float:
    """The Spearman correlation that a random order of `count` stays below with 95 %.

    By all orders up to 8, beyond by 20,000 of them. 1 where even the right order is as likely
    as that (three candidates: 1 in 6).
    """
    right = np.arange(count)
    if count <= _ENUMERATED:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        orders = np.array(
            [np.random.default_rng(i).permutation(count) for i in range(20000)]
        )
    squares = ((orders - right) ** 2).sum(1)
    found = np.sort(1 - 6 * squares / (count * (count**2 - 1)))
    return float(found[math.ceil(CONFIDENCE * len(found)) - 1])


def spaced(lag: int, points: int) -> list[int]:
    """0, 1, ... up to the lag: at most so many, evenly spaced in their logarithm."""
    if points < 2:
        raise UserError(f"--points is at least 2; got {points}")
    inner = np.round(np.geomspace(1, lag, points - 1)).astype(int) if lag > 1 else [lag]
    return sorted({0, lag, *(int(at) for at in inner)})


def _rank(measure, one: np.ndarray, other: np.ndarray) -> float | None:
    """None where a loss is not finite, or all are equal."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    if len(set(one.tolist())) < 2 or len(set(other.tolist())) < 2:
        return None
    return float(measure(one, other).statistic)


def _per_batch(losses: Sequence[Sequence[BatchLoss]]) -> np.ndarray:
    """Mean loss of each batch, `[candidates, batches]`."""
    return np.array([[batch.nats / max(batch.tokens, 1) for batch in of] for of in losses])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _key(start: Start, way: Candidate, lags: Sequence[int], batches: int | None) -> str:
    """Of everything that a trial depends on."""
    config = start.setup.config.to_dict()
    for name in ("name", "mesh", "compilation_cache", "log_every"):
        config.pop(name)
    plan = [stage.to_dict() for stage in start.setup.plan.stages]
    said = [
        str(start.setup.run_dir), start.step, way.name, way.growth, way.settings, list(lags),
        batches, config, plan, start.setup.data_digest, start.setup.held_out.digest,
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> list[tuple[int, list]] | None:
    """Steps and what each held-out batch gave then, as they stand in the file of a trial."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        return [(int(step), [list(BatchLoss(*batch)) for batch in of])
                for step, of in found["steps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
