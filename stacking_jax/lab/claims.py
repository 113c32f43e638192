"""What the papers say of in-context regression, and whether it was found.

A verdict is `holds` or `does not hold` where the 95 % interval over seeds lies on one side of
what is claimed, and `no evidence` where it does not or where fewer than two seeds tell. A loss
that diverged counts as `DIVERGED`: left out, it would speak for what diverges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stacking_jax.lab import population
from stacking_jax.lab.settings import IclSettings
from stacking_jax.lab.statistics import Interval, depth_to_reach, fit_law, interval

LOOPED = "Gatmiry et al. 2024, arXiv:2410.08292"
DIVERSE = "Gatmiry et al. 2024, arXiv:2410.21698"
DIVERGED = 1e6  # Relative loss; also what larger ones count as.


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
    """

    key: str
    text: str
    source: str
    measure: str
    value: Interval
    bound: float = 0.0
    below: bool = False

    @property
    def verdict(self) -> str:
        if self.value.low is None:
            return "no evidence"
        if self.value.low > self.bound:
            return "does not hold" if self.below else "holds"
        if self.value.high < self.bound:
            return "holds" if self.below else "does not hold"
        return "no evidence"

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.key, "text": self.text, "source": self.source, "verdict": self.verdict,
            "measure": self.measure, "bound": self.bound, "below": self.below,
            **{name: getattr(self.value, name) for name in ("mean", "low", "high")},
            "seeds": self.value.count,
        }  # fmt: skip


class Results:
    """The measured cells, by arm and depth, as arrays."""

    def __init__(self, cells: dict[str, Any], settings: IclSettings):
        self.cells, self.settings = cells, settings

    def arms(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name in self.cells:
            kind, _, rest = name.partition("/")
            if kind == "stack":
                arm, _, depth = rest.rpartition("/")
                found.setdefault(arm, []).append(int(depth))
        return {arm: sorted(depths) for arm, depths in found.items()}

    def read(self, arm: str, depth: int, what: str) -> np.ndarray:
        """`[kappas, seeds]`, or `[kappas, seeds, positions]` of by_position."""
        return _array(self.cells[f"stack/{arm}/{depth}"][what])

    def final(self, arm: str, depth: int) -> np.ndarray:
        return self.read(arm, depth, "by_position")[:, :, depth - 1]

    def reached(self, arm: str) -> list[list[float | None]]:
        """The smallest depth that reaches the target loss: `[kappas][seeds]`."""
        depths = self.arms()[arm]
        losses = np.stack([self.final(arm, depth) for depth in depths], axis=-1)
        return [
            [depth_to_reach(depths, row, self.settings.target_loss) for row in of_kappa]
            for of_kappa in losses
        ]


def _array(nested) -> np.ndarray:
    found = np.array(nested, dtype=float)  # None becomes nan.
    return np.minimum(np.where(np.isfinite(found), found, DIVERGED), DIVERGED)


def judge(results: Results) -> list[Claim]:
    """Every claim, in the order of the report."""
    claims = []
    for arm in ("linear restricted", "linear full"):
        claims.append(_depth_helps(results, f"{arm} untied"))
    claims += [
        _law(results, "linear restricted untied", "sqrt"),
        _law(results, "linear full untied", "log"),
        _expressive(results),
    ]
    for arm in ("linear restricted", "linear full"):
        claims += [_robust(results, arm, shift) for shift in ("wider", "larger")]
    for arm in ("linear restricted tied", "linear full tied", "linear full tied injected"):
        claims.append(_monotone(results, arm))
    claims.append(_only_looped(results))
    claims += _preconditioner(results)
    claims += _dominance(results)
    return claims


def _depth_helps(results: Results, arm: str) -> Claim:
    depths = results.arms()[arm]
    slopes = []
    log_losses = np.log(np.stack([results.final(arm, depth) for depth in depths]))
    for seed in range(results.settings.seeds):
        rows = log_losses[:, :, seed].mean(axis=1)
        slopes.append(_slope(np.log(depths), rows))
    return Claim(
        f"depth/{arm}", f"Depth lowers the loss on diverse tasks ({arm}).", DIVERSE,
        "slope of log loss against log depth", interval(slopes), below=True,
    )  # fmt: skip


def law_fits(results: Results, arm: str) -> list[dict[str, Any]]:
    """Per seed both laws fitted to the depths that reach the target; empty below three kappas."""
    reached, kappas = results.reached(arm), results.settings.kappas
    found = []
    for seed in range(results.settings.seeds):
        known = [(k, row[seed]) for k, row in zip(kappas, reached, strict=True)
                 if row[seed] is not None and math.isfinite(row[seed])]  # fmt: skip
        if len(known) >= 3:
            found.append({"seed": seed, "kappas": len(known)} | {
                law: fit_law(*zip(*known, strict=True), law) for law in ("sqrt", "log")
            })  # fmt: skip
    return found


def _law(results: Results, arm: str, law: str) -> Claim:
    other = "log" if law == "sqrt" else "sqrt"
    fits = law_fits(results, arm)
    gains = [fit[other]["residual"] - fit[law]["residual"] for fit in fits]
    shown = {"sqrt": "√κ", "log": "log κ"}
    return Claim(
        f"{law}_kappa", f"The depth needed grows as {shown[law]} ({arm}).", DIVERSE,
        f"RMS residual of {shown[other]} less that of {shown[law]} [layers]", interval(gains),
    )  # fmt: skip


def _expressive(results: Results) -> Claim:
    """Within a factor of two of the untied stack's loss, over all depths, kappas and seeds."""
    tied, untied = "linear full tied", "linear full untied"
    gaps = [
        np.log(results.final(tied, depth) / results.final(untied, depth)).mean(axis=0)
        for depth in results.arms()[untied]
    ]
    return Claim(
        "expressive", "A looped stack fits as well as a multilayer one of its depth (linear full; "
        "within a factor of 2).", DIVERSE,
        "log of the loss, tied over untied", interval(np.mean(gaps, axis=0)),
        bound=math.log(2), below=True,
    )  # fmt: skip


def _robust(results: Results, arm: str, shift: str) -> Claim:
    settings = results.settings
    said = {
        "wider": f"condition numbers up to {settings.wider:g} κ",
        "larger": f"covariances {settings.larger:g} times as large",
    }[shift]
    gaps = []
    for depth in results.arms()[f"{arm} tied"]:
        if depth == 1:
            continue
        worse = [
            np.log(results.read(f"{arm} {kind}", depth, shift) / results.final(
                f"{arm} {kind}", depth))
            for kind in ("untied", "tied")
        ]  # fmt: skip
        gaps.append(worse[0] - worse[1])
    return Claim(
        f"robust/{arm}/{shift}", f"A looped stack loses less under shift than a multilayer one "
        f"({arm}; {said}).", DIVERSE,
        "log of (loss under shift / loss), untied less tied",
        interval(np.concatenate(gaps).mean(axis=0)),
    )  # fmt: skip


def violations(results: Results, arm: str) -> np.ndarray:
    """Share of positions after which the loss is higher than before: `[depths, kappas, seeds]`."""
    shares = []
    for depth in results.arms()[arm]:
        losses = results.read(arm, depth, "by_position")
        if losses.shape[-1] > 1:
            before, after = losses[..., :-1], losses[..., 1:]
            worse = (after > before * (1 + results.settings.tolerance)) | (after >= DIVERGED)
            shares.append(worse.mean(axis=-1))
    return np.stack(shares)


def _monotone(results: Results, arm: str) -> Claim:
    shares = violations(results, arm).mean(axis=(0, 1))
    return Claim(
        f"monotone/{arm}", "The loss falls with every further loop, up to "
        f"{results.settings.extra_loops} times those of training ({arm}).", DIVERSE,
        "share of loops that raise the loss; holds below 5 %",
        interval(shares), bound=0.05, below=True,
    )  # fmt: skip


def _only_looped(results: Results) -> Claim:
    tied = violations(results, "linear restricted tied").mean(axis=(0, 1))
    untied = violations(results, "linear restricted untied").mean(axis=(0, 1))
    return Claim(
        "monotone/only", "Multilayer stacks, read after every layer, violate monotonicity more "
        "often than looped ones (linear restricted).", DIVERSE,
        "share of violations, untied less tied", interval(untied - tied),
    )  # fmt: skip


def _preconditioner(results: Results) -> list[Claim]:
    settings = results.settings
    few, many = min(settings.preconditioner_pairs), max(settings.preconditioner_pairs)
    cells = {n: results.cells[f"preconditioner/{n}"] for n in settings.preconditioner_pairs}
    far = _array(cells[many]["distance"])
    closer = _array(cells[few]["distance"])[:, -1] - far[:, -1]
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
            LOOPED, "last norm; holds below 0.05", interval(_array(cells[many]["u"])[:, -1]),
            bound=0.05, below=True,
        ),
    ]  # fmt: skip


def smallest_ratio(cell: dict[str, Any], floor: float, exact: bool) -> np.ndarray:
    """Per seed the smallest ratio while the loss is above `floor` times its lowest value.

    An exact loss falls to zero, and so has no floor: down to 1e-5 it is judged throughout, below
    that float32 says little.
    """
    loss, ratio = _array(cell["loss"]), _array(cell["ratio"])
    low = np.full(len(loss), 1e-5) if exact else floor * loss.min(axis=1)
    return np.where(loss > low[:, None], ratio, np.inf).min(axis=1)


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
