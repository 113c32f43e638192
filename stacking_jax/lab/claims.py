"""What the papers say of in-context regression, and whether it was found.

A verdict is `holds` or `does not hold` where the 95 % interval over seeds lies on one side of
what is claimed, and `no evidence` where it does not or where fewer than two seeds tell. A loss
that diverged counts as `results.DIVERGED`: left out, it would speak for what diverges. Where two
diverged losses would be compared, neither is better: such pairs are left out, and counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stacking_jax.lab import population
from stacking_jax.lab.results import DIVERGED, FAMILIES, Results, finite, law_fits, steps
from stacking_jax.lab.statistics import Interval, interval

LOOPED = "Gatmiry et al. 2024, arXiv:2410.08292"
DIVERSE = "Gatmiry et al. 2024, arXiv:2410.21698"
_LAWS = {"sqrt": "√κ", "log": "log κ"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence of a paper, and what was measured of it.

    Attributes:
      key: a short name.
      text: the claim.
      source: the paper.
      measure: what the interval is of, with its unit.
      value: over seeds.
      bound: the claim holds above it (or below, with `below`).
      reason: why nothing was found, where the interval does not say it.
    """

    key: str
    text: str
    source: str
    measure: str
    value: Interval
    bound: float = 0.0
    below: bool = False
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.value.low is None:
            return "no evidence"
        if self.value.low > self.bound:
            return "does not hold" if self.below else "holds"
        if self.value.high < self.bound:
            return "holds" if self.below else "does not hold"
        return "no evidence"

    @property
    def said(self) -> str:
        """The verdict, and its reason where it has one."""
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.key, "text": self.text, "source": self.source, "verdict": self.verdict,
            "reason": self.reason, "measure": self.measure, "bound": self.bound, "below": self.below,
            **{name: getattr(self.value, name) for name in ("mean", "low", "high")},
            "seeds": self.value.count,
        }  # fmt: skip


def judge(results: Results) -> list[Claim]:
    """Every claim, in the order of the report."""
    claims = [_depth_helps(results, f"{family} untied") for family in FAMILIES]
    claims += [
        _law(results, f"{family} untied", "log" if family.endswith("full") else "sqrt", target)
        for target in results.settings.target_losses for family in FAMILIES
    ]  # fmt: skip
    claims += [_expressive(results, family) for family in FAMILIES]
    for shift in ("wider", "larger"):
        claims += [_robust(results, family, shift) for family in FAMILIES]
    for arm in results.arms():
        if " tied" in arm:
            claims.append(_monotone(results, arm))
    claims += [_only_looped(results, family) for family in FAMILIES]
    claims += _preconditioner(results)
    claims += _dominance(results)
    return claims


def _depth_helps(results: Results, arm: str) -> Claim:
    depths = results.arms()[arm]
    slopes = []
    if len(depths) > 1:
        log_losses = np.log(np.stack([results.final(arm, depth) for depth in depths]))
        slopes = [_slope(np.log(depths), row) for row in log_losses.mean(axis=1).T]
    return Claim(
        f"depth/{arm}", f"Depth lowers the loss on diverse tasks ({arm}).", DIVERSE,
        "slope of log loss against log depth", interval(slopes), below=True,
        reason="" if slopes else "there is one depth",
    )  # fmt: skip


def _law(results: Results, arm: str, law: str, target: float) -> Claim:
    other = "log" if law == "sqrt" else "sqrt"
    fits = law_fits(results, arm, target)
    gains = [fit[other]["residual"] - fit[law]["residual"] for fit in fits]
    have = f"{len(fits)} of {results.settings.seeds} seeds"
    reason = ""
    if len(fits) < 2:
        reached = results.reached(arm, target)
        down = [row for row in reached if all(of.sign != ">" for of in row)]
        bounds = sum(all(of.sign == "<=" for of in row) for row in down)
        reason = (
            f"every seed reaches the loss at {len(down)} of {len(reached)} κ, at {bounds} of "
            f"them with the smallest depth already, which is a bound; {have} have the three "
            "depths of a fit"
        )
    return Claim(
        f"{law}_kappa/{arm}/{target:g}",
        f"The depth needed for a loss of {target:g} grows as {_LAWS[law]} ({arm}).", DIVERSE,
        f"RMS residual of {_LAWS[other]} less that of {_LAWS[law]} [layers], {have}",
        interval(gains), reason=reason,
    )  # fmt: skip


def _expressive(results: Results, family: str) -> Claim:
    """Within a factor of two of the untied stack's loss, over all depths, kappas and seeds."""
    tied, untied = (
        np.stack([results.final(f"{family} {kind}", depth)
                  for depth in results.arms()[f"{family} untied"]])
        for kind in ("tied", "untied")
    )  # fmt: skip
    gaps, left_out = _of_pairs(np.log(tied / untied), tied, untied)
    return Claim(
        f"expressive/{family}", "A looped stack fits as well as a multilayer one of its depth "
        f"({family}; within a factor of 2).", DIVERSE,
        f"log of the loss, tied over untied{left_out}", interval(gaps),
        bound=math.log(2), below=True,
    )  # fmt: skip


def _of_pairs(gaps: np.ndarray, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, str]:
    """Per seed the mean of `gaps` `[depths, kappas, seeds]`, but for pairs that both diverged.

    Returns:
      (`[seeds]`, how many pairs are left out, in words; nothing for none).
    """
    out = (one >= DIVERGED) & (other >= DIVERGED)
    count = (~out).sum(axis=(0, 1))
    total = np.where(out, 0.0, gaps).sum(axis=(0, 1))
    said = f"; {out.sum()} of {out.size} pairs left out, both diverged" if out.any() else ""
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), said


def _robust(results: Results, family: str, shift: str) -> Claim:
    """Growth under shift, from the loss before it or from 1, whichever is smaller.

    What does no better than predicting zero has little left to lose: its loss would hardly grow,
    and it would look robust.
    """
    settings = results.settings
    said = {
        "wider": f"condition numbers up to {settings.wider:g} κ",
        "larger": f"covariances {settings.larger:g} times as large",
    }[shift]
    depths = [depth for depth in results.arms()[f"{family} tied"] if depth > 1]
    gaps, left_out = np.array([]), ""
    if depths:
        shifted, growth = [], []
        for arm in (f"{family} untied", f"{family} tied"):
            loss = np.stack([results.read(arm, depth, shift) for depth in depths])
            before = np.stack([results.final(arm, depth) for depth in depths])
            shifted.append(loss)
            growth.append(np.log(loss / np.minimum(before, 1.0)))
        gaps, left_out = _of_pairs(growth[0] - growth[1], *shifted)
    return Claim(
        f"robust/{family}/{shift}", f"A looped stack loses less under shift than a multilayer one "
        f"({family}; {said}).", DIVERSE,
        f"log of (loss under shift / loss, at most 1), untied less tied{left_out}",
        interval(gaps), reason="" if depths else "there is one depth",
    )  # fmt: skip


def _monotone(results: Results, arm: str) -> Claim:
    found = steps(results, arm)
    return Claim(
        f"monotone/{arm}", "The loss falls with every further loop, up to "
        f"{results.settings.extra_loops} times those of training ({arm}).", DIVERSE,
        f"share of loops that raise the loss ({_counts(found.totals())}); holds below 5 %",
        interval(found.shares()), bound=0.05, below=True,
    )  # fmt: skip


def _only_looped(results: Results, family: str) -> Claim:
    tied, untied = (steps(results, f"{family} {kind}") for kind in ("tied", "untied"))
    return Claim(
        f"monotone/only/{family}", "Multilayer stacks, read after every layer, violate "
        f"monotonicity more often than looped ones ({family}).", DIVERSE,
        f"share of violations, untied ({_counts(untied.totals())}) less tied "
        f"({_counts(tied.totals())})", interval(untied.shares() - tied.shares()),
    )  # fmt: skip


def _counts(totals: dict[str, int]) -> str:
    said = f"{totals['raised']:,} of {totals['judged']:,}"
    if totals["left_out"]:
        said += f", {totals['left_out']:,} between diverged losses left out"
    return said


def _preconditioner(results: Results) -> list[Claim]:
    settings = results.settings
    few, many = min(settings.preconditioner_pairs), max(settings.preconditioner_pairs)
    cells = {n: results.cells[f"preconditioner/{n}"] for n in settings.preconditioner_pairs}
    far = finite(cells[many]["distance"])
    closer = finite(cells[few]["distance"])[:, -1] - far[:, -1]
    return [
        Claim(
            "preconditioner", f"The learnt preconditioner tends to the inverse covariance (n = "
            f"{many}).", LOOPED, "last distance over the first; holds below 0.1",
            interval(far[:, -1] / far[:, 0]), bound=0.1, below=True,
        ),
        Claim(
            "preconditioner/pairs", f"It comes closer with more pairs (n = {few} to {many}).",
            LOOPED, "distance at few pairs less that at many", interval(closer),
        ),
        Claim(
            "preconditioner/u", f"u, which gradient descent does not need, vanishes (n = {many}).",
            LOOPED, "last norm; holds below 0.05", interval(finite(cells[many]["u"])[:, -1]),
            bound=0.05, below=True,
        ),
    ]  # fmt: skip


def smallest_ratio(cell: dict[str, Any], floor: float, exact: bool) -> np.ndarray:
    """Per seed the smallest ratio while the loss is above `floor` times its lowest value.

    An exact loss falls to zero, and so has no floor: down to 1e-5 it is judged throughout, below
    that float32 says little. A descent that diverged followed no gradient flow: nan.
    """
    loss, ratio = finite(cell["loss"]), finite(cell["ratio"])
    low = np.full(len(loss), 1e-5) if exact else floor * loss.min(axis=1)
    smallest = np.where(loss > low[:, None], ratio, np.inf).min(axis=1)
    return np.where((loss >= DIVERGED).any(axis=1), np.nan, smallest)


def _dominance(results: Results) -> list[Claim]:
    settings = results.settings
    found = []
    for pairs in settings.dominance_pairs:
        ratios = [
            smallest_ratio(results.cells[f"dominance/{loops}/{pairs}"], settings.floor, pairs == 0)
            for loops in settings.dominance_loops
        ]
        where = "n → ∞, exact loss" if pairs == 0 else f"n = {pairs}, estimated loss"
        above = "" if pairs == 0 else f", above {settings.floor:g} × its floor"
        found.append(Claim(
            f"dominance/{pairs}", f"‖∇L‖² ≥ (1/16) L^((2ℓ−1)/ℓ) along gradient descent ({where}).",
            LOOPED, f"smallest ratio over ℓ{above}; holds above 1/16",
            interval(np.min(ratios, axis=0)), bound=population.BOUND,
        ))  # fmt: skip
    return found


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.asarray(x), np.asarray(y), 1)[0])
