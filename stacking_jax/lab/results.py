"""The measured cells as arrays, and what is read off them: divergence, steps, depths, laws."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stacking_jax.lab.settings import IclSettings
from stacking_jax.lab.statistics import Reached, depth_to_reach, fit_law

FAMILIES = ("linear restricted", "linear full", "softmax restricted", "softmax full")
AT_CAP = 0.99  # From this share of the cap on a mean of capped losses says no more than: diverged.
DIVERGED = 1e6  # What such a loss counts as, and what is not finite: above all that is capped.


class Steps(NamedTuple):
    """Steps from one position to the next, `[depths, kappas, seeds]` each.

    Attributes:
      raised: how many raise the loss.
      judged: how many could.
      left_out: how many lead from one diverged loss to another, which says nothing of either.
    """

    raised: np.ndarray
    judged: np.ndarray
    left_out: np.ndarray

    def totals(self) -> dict[str, int]:
        return {name: int(counts.sum()) for name, counts in self._asdict().items()}

    def shares(self) -> np.ndarray:
        """Of the judged steps those that raise the loss, per seed; nan where none is judged."""
        raised, judged = self.raised.sum(axis=(0, 1)), self.judged.sum(axis=(0, 1))
        return np.where(judged > 0, raised / np.maximum(judged, 1), np.nan)


class Results:
    """The measured cells, by arm and depth."""

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
        """Relative losses `[kappas, seeds]`, or `[kappas, seeds, positions]` of by_position.

        Cells hold means over prompts of which each counts for `cap` at the most. One at
        `AT_CAP` of it or above is given as `DIVERGED`.
        """
        losses = finite(self.cells[f"stack/{arm}/{depth}"][what])
        return np.where(losses >= AT_CAP * self.settings.cap, DIVERGED, losses)

    def final(self, arm: str, depth: int) -> np.ndarray:
        """Relative losses at the stack's own depth: `[kappas, seeds]`."""
        return self.read(arm, depth, "by_position")[:, :, depth - 1]

    def reached(self, arm: str, target: float) -> list[list[Reached]]:
        """The smallest depth that reaches the target loss: `[kappas][seeds]`."""
        depths = self.arms()[arm]
        losses = np.stack([self.final(arm, depth) for depth in depths], axis=-1)
        return [[depth_to_reach(depths, row, target) for row in of_kappa] for of_kappa in losses]


def finite(nested) -> np.ndarray:
    """Nested lists as an array in which None, and what is above it, is `DIVERGED`."""
    found = np.array(nested, dtype=float)  # None becomes nan.
    return np.minimum(np.where(np.isfinite(found), found, DIVERGED), DIVERGED)


def steps(results: Results, arm: str) -> Steps:
    """What each further position does to the loss.

    One raises it by more than the tolerance, or makes it diverge. Positions past the stack's own
    depth count too, where the cell has them: further loops.
    """
    counted = []
    for depth in results.arms()[arm]:
        losses = results.read(arm, depth, "by_position")
        before, after = losses[..., :-1], losses[..., 1:]
        out = (before >= DIVERGED) & (after >= DIVERGED)
        worse = (after > before * (1 + results.settings.tolerance)) | (after >= DIVERGED)
        counted.append([(worse & ~out).sum(-1), (~out).sum(-1), out.sum(-1)])
    return Steps(*np.swapaxes(counted, 0, 1))


def law_fits(results: Results, arm: str, target: float) -> list[dict[str, Any]]:
    """Both laws fitted to the depths that reach the target, for every seed with three of them.

    A depth of which only a bound is known ('<= 1', '> 12') is no point of a fit.
    """
    reached, kappas = results.reached(arm, target), results.settings.kappas
    found = []
    for seed in range(results.settings.seeds):
        known = [
            (kappa, row[seed].depth)
            for kappa, row in zip(kappas, reached, strict=True) if row[seed].known
        ]  # fmt: skip
        if len(known) >= 3:
            found.append({"seed": seed, "kappas": len(known)} | {
                law: fit_law(*zip(*known, strict=True), law) for law in ("sqrt", "log")
            })  # fmt: skip
    return found
