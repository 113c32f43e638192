"""What differences between arms may be called: intervals over pairs, corrected for their number.

A seed fixes the order of the data and the initial values of all arms, so what two arms reach
is compared within each seed, and the interval is that of a mean of paired differences
(Student's t). Several comparisons that are to be relied on share one error rate by Holm's
step-down correction (Holm 1979, Scandinavian Journal of Statistics 6:65-70).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

LEVEL = 0.95
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, a − b.

    Attributes:
      pairs: how many.
      mean: of them.
      deviation: their standard deviation, over n − 1; None of one pair.
      low, high: the 95 % t interval of the mean; None of one pair.
      p: two-sided, of a mean of zero; None of one pair.
    """

    pairs: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    p: float | None


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """The difference a − b over the seeds that both have; None where there is no such seed.

    Args:
      a, b: seed -> value, finite.
    """
    return mean_of([a[seed] - b[seed] for seed in sorted(set(a) & set(b))])


def mean_of(values: Sequence[float]) -> Difference | None:
    """The same of values that are differences already; None of no value."""
    if not values:
        return None
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Difference(n, mean, None, None, None, None)
    deviation = statistics.stdev(values)
    error = deviation / math.sqrt(n)
    half = t_quantile((1 + LEVEL) / 2, n - 1) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 2 * t_tail(abs(mean) / error, n - 1)
    return Difference(n, mean, deviation, mean - half, mean + half, p)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down method, in the order given."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, running = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = running
    return adjusted


def halves(values: Mapping[int, float]) -> Difference | None:
    """The A/A row: the seeds of one arm as if they were two arms, pair by pair in their order.

    The first half of the seeds against the second (a seed that is left over is left out): what
    it shows is noise, of seeds that share neither data nor initial values. None of one seed.
    """
    seeds = sorted(values)
    half = len(seeds) // 2
    pairs = zip(seeds[:half], seeds[half : 2 * half], strict=True)
    return mean_of([values[a] - values[b] for a, b in pairs])


def smallest_detectable(
    deviation: float, pairs: int, alpha: float = 1 - LEVEL, power: float = POWER
) -> float | None:
    """The mean difference that a two-sided paired t test finds with this power.

    Args:
      deviation: standard deviation of the paired differences.
      pairs: how many there are; None is answered of fewer than two.
      alpha: error rate of the test.
    """
    if pairs < 2:
        return None
    if deviation == 0:
        return 0.0
    from scipy.optimize import brentq

    effect = brentq(lambda d: t_power(d, pairs, alpha) - power, 1e-6, _enough(pairs, alpha, power))
    return effect * deviation


def t_power(effect: float, pairs: int, alpha: float = 1 - LEVEL) -> float:
    """Power of a two-sided paired t test for an effect in standard deviations of a pair."""
    from scipy.special import nctdtr

    critical, shift = t_quantile(1 - alpha / 2, pairs - 1), effect * math.sqrt(pairs)
    below = float(nctdtr(pairs - 1, shift, critical))
    # Significant in the wrong direction: SciPy answers NaN where that is too rare for it.
    wrong = float(nctdtr(pairs - 1, shift, -critical))
    return 1 - below + (0.0 if math.isnan(wrong) else wrong)


def _enough(pairs: int, alpha: float, power: float) -> float:
    high = 1.0
    while t_power(high, pairs, alpha) < power:
        high *= 2
    return high


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def t_tail(value: float, freedom: int) -> float:
    """Probability of a Student's t above `value`."""
    from scipy.special import stdtr

    return float(stdtr(freedom, -value))


def words(found: Difference | None, adjusted: float | None = None) -> str:
    """What may be said of a difference: never a direction without an interval that excludes zero.

    Args:
      found: the difference.
      adjusted: its p value after the correction for several comparisons, where it is one of
        those that are to be relied on.
    """
    if found is None:
        return "no pair of seeds"
    if found.low is None:
        return "one pair of seeds: no interval"
    p = found.p if adjusted is None else adjusted
    if p >= 1 - LEVEL:
        after = found.p < 1 - LEVEL
        return "not distinguishable" + (" after the correction" if after else "")
    return "lower" if found.mean < 0 else "higher"
