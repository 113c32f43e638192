"""Intervals over seeds, and the two laws of depth against condition number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its 95 % t interval; the ends are None with fewer than two values."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


def interval(values: Sequence[float | None]) -> Interval:
    """Of the values that are finite numbers."""
    from scipy import stats

    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not known:
        return Interval(None, None, None, 0)
    mean = float(np.mean(known))
    if len(known) < 2:
        return Interval(mean, None, None, 1)
    half = stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known))
    return Interval(mean, float(mean - half), float(mean + half), len(known))


class Reached(NamedTuple):
    """A depth [layers] that reaches a loss, or a bound on it.

    Attributes:
      depth: interpolated, or the depth that bounds it.
      sign: `=`, or `<=` where the smallest depth that was trained reaches the loss already, or
        `>` where the largest does not.
    """

    depth: float
    sign: str

    @property
    def known(self) -> bool:
        return self.sign == "="


def depth_to_reach(depths: Sequence[int], losses: Sequence[float], target: float) -> Reached:
    """The depth at which the loss comes down to `target`.

    Between two depths the logarithm of the loss is taken as a line; a deeper network that was
    trained worse than a shallower one does not count against the shallower one.
    """
    best = np.minimum.accumulate(np.where(np.isfinite(losses), losses, np.inf))
    if best[0] <= target:
        return Reached(float(depths[0]), "<=")
    for i in range(1, len(depths)):
        if best[i] <= target:
            upper, lower = math.log(min(best[i - 1], 1e30)), math.log(max(best[i], 1e-30))
            share = (upper - math.log(target)) / (upper - lower)
            return Reached(depths[i - 1] + share * (depths[i] - depths[i - 1]), "=")
    return Reached(float(depths[-1]), ">")


def fit_law(kappas: Sequence[float], depths: Sequence[float], law: str) -> dict[str, float]:
    """Least squares of depth = offset + slope · f(kappa), f being `sqrt` or `log`.

    Returns:
      offset, slope and `residual`, the root mean square of what it leaves, in layers.
    """
    f = {"sqrt": np.sqrt, "log": np.log}[law](np.asarray(kappas, float))
    design = np.stack([np.ones_like(f), f], axis=1)
    (offset, slope), *_ = np.linalg.lstsq(design, np.asarray(depths, float), rcond=None)
    left = np.asarray(depths) - design @ (offset, slope)
    return {
        "offset": float(offset), "slope": float(slope),
        "residual": float(np.sqrt(np.mean(left**2))),
    }  # fmt: skip
