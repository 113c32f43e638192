"""Held-out losses of several networks on the same batches, and how sure their order is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95


class BatchLoss(NamedTuple):
    """What one held-out batch gave.

    Attributes:
      source: that it comes from.
      rate: the source's share in the loss of all together.
      nats: summed cross-entropy.
      tokens: that carried loss.
    """

    source: str
    rate: float
    nats: float
    tokens: int


def mean_loss(batches: Sequence[BatchLoss]) -> float:
    """Nats per token: of each source, then weighted by their rates, as `HeldOut.evaluate`."""
    sources = _sources(batches)
    rates = {batch.source: batch.rate for batch in batches}
    weighted = math.fsum(
        rates[name] * math.fsum(batch.nats for batch in of) / max(sum(b.tokens for b in of), 1)
        for name, of in sources.items()
    )
    return weighted / math.fsum(rates.values())


def weights_of(batches: Sequence[BatchLoss]) -> np.ndarray:
    """The weight of each batch's mean loss in `mean_loss`; they add up to 1."""
    tokens: dict[str, int] = {}
    for batch in batches:
        tokens[batch.source] = tokens.get(batch.source, 0) + batch.tokens
    rates = {batch.source: batch.rate for batch in batches}
    whole = math.fsum(rates.values())
    return np.array(
        [b.rate / whole * b.tokens / max(tokens[b.source], 1) for b in batches]
    )


def paired_difference(
    one: Sequence[BatchLoss], other: Sequence[BatchLoss], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """How much higher the loss of `one` is than that of `other` on the same batches.

    A t interval of the mean over batches, each weighted by its tokens, the sources of a mixture
    by their rates (a ratio of sums over clusters, in strata: Cochran 1977, §6.3, §11.1; tokens
    of a batch are not independent). It holds what other held-out batches could have
    said; what other seeds could have said it does not hold.

    Returns:
      `difference` in nats per token, `low`, `high` (None where a source has a single batch) and
      `batches`.
    """
    from scipy import stats

    difference = mean_loss(one) - mean_loss(other)
    pairs = list(zip(one, other, strict=True))
    apart = np.array(
        [a.nats / max(a.tokens, 1) - b.nats / max(b.tokens, 1) for a, b in pairs]
    )
    found = {"difference": difference, "low": None, "high": None, "batches": len(apart)}
    weights, variance, freedom = weights_of(one), 0.0, 0
    names = np.array([batch.source for batch in one])
    for name in dict.fromkeys(names):
        mine = names == name
        count, share = int(mine.sum()), float(weights[mine].sum())
        if not share:  # A source for a later data stage.
            continue
        if count < 2 or not np.isfinite(apart[mine]).all():
            return found
        mean = float((weights[mine] * apart[mine]).sum()) / share
        residuals = weights[mine] * (apart[mine] - mean)
        variance += count / (count - 1) * float((residuals**2).sum())
        freedom += count - 1
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    return found | {"low": difference - reach, "high": difference + reach}


def ranking(losses: Mapping[str, Sequence[BatchLoss]]) -> list[dict[str, Any]]:
    """Networks by their loss, lowest first, each held against the first.

    The intervals hold together (Bonferroni over the comparisons with the first); that the
    first was picked because it looked best is not taken into account.

    Returns:
      Rows with `name`, `loss` in nats per token (None where it is not finite; these come last),
      and for all but the first `difference`, `low`, `high`, `batches` and `distinguishable`.
    """
    means = {name: mean_loss(batches) for name, batches in losses.items()}
    order = sorted(losses, key=lambda name: means[name] if math.isfinite(means[name]) else math.inf)
    confidence = 1 - (1 - CONFIDENCE) / max(len(order) - 1, 1)
    rows = []
    for name in order:
        finite = math.isfinite(means[name])
        row: dict[str, Any] = {"name": name, "loss": means[name] if finite else None}
        if rows and finite and rows[0]["loss"] is not None:
            row |= paired_difference(losses[name], losses[order[0]], confidence)
            row["distinguishable"] = row["low"] is not None and row["low"] > 0
        rows.append(row)
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a ranking says, in one sentence.

    A row may say by `same_as` that it is another one under a second name.
    """
    best = rows[0]
    alike = [
        row["name"] for row in rows[1:]
        if row["loss"] is not None and not row["distinguishable"] and not row.get("same_as")
    ]
    same = [row["name"] for row in rows[1:] if row.get("same_as") == best["name"]]
    lost = [row["name"] for row in rows if row["loss"] is None]
    called = best["name"] + (f" (here the same growth as {', '.join(same)})" if same else "")
    said = f"{called} has the lowest held-out loss"
    if alike:
        counts = {row["batches"] for row in rows[1:] if "batches" in row}
        said += (
            f", but {max(counts)} held-out batches cannot tell it from {', '.join(alike)} "
            f"({CONFIDENCE:.0%} intervals)"
        )
    elif len(rows) - len(lost) - len(same) > 1:
        said += f", below every other one ({CONFIDENCE:.0%} intervals)"
    if lost:
        said += f"; {', '.join(lost)} diverged"
    return said


def _sources(batches: Sequence[BatchLoss]) -> dict[str, list[BatchLoss]]:
    sources: dict[str, list[BatchLoss]] = {}
    for batch in batches:
        sources.setdefault(batch.source, []).append(batch)
    return sources
