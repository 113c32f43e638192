"""Numbers as people write them: 1.23 PFLOP, 12.3 M tokens, 1 m 32 s.

Every function answers with a dash where there is no number, so that a table
of a run that has just begun needs no special cases.
"""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
_SI = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")
_COUNT = ("", "K", "M", "B", "T", "Q")
_GROUPS = {"gsm8k": "GSM8K", "superglue": "SuperGLUE"}


def group_title(group: str) -> str:
    """The name of a group of tasks as its papers write it, or readable at least."""
    if group in _GROUPS:
        return _GROUPS[group]
    text = group.replace("_", " ") or "tasks"
    return text[0].upper() + text[1:]


def known(value: Any) -> bool:
    """Whether there is a finite number to show."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _scaled(value: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Three significant digits and the prefix that goes with them."""
    power = 0
    # 999.5 would be shown as "1000", which belongs to the next prefix.
    while abs(value) >= 999.5 and power + 1 < len(prefixes):
        value /= 1000.0
        power += 1
    if power == 0 and float(value).is_integer():
        return f"{value:.0f}", ""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}", prefixes[power]


def flops(value: float | None, rate: bool = False) -> str:
    """'1.23 PFLOP', or '1.23 PFLOP/s' for a rate."""
    if not known(value):
        return MISSING
    number, prefix = _scaled(value, _SI)
    return f"{number} {prefix}FLOP{'/s' if rate else ''}"


def count(value: float | None) -> str:
    """Tokens, parameters, steps: '614 K', '12.3 M', '1.48 B'; small numbers in full."""
    if not known(value):
        return MISSING
    number, prefix = _scaled(value, _COUNT)
    return f"{number} {prefix}".rstrip()


def integer(value: float | None) -> str:
    """'1,234': a number to be read exactly."""
    return f"{value:,.0f}" if known(value) else MISSING


def duration(seconds: float | None) -> str:
    """'4.2 s', '1 m 32 s', '2 h 05 m', '3 d 04 h'."""
    if not known(seconds):
        return MISSING
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} m"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def loss(value: float | None) -> str:
    """Nats per token or bits per byte, to four decimals; a loss that has diverged says so."""
    if known(value):
        return f"{value:.4f}"
    return "NaN" if isinstance(value, float) else MISSING


def ratio(value: float | None) -> str:
    """A speed-up: '1.24×'."""
    return f"{value:.2f}×" if known(value) else MISSING


def percent(share: float | None) -> str:
    """A share of one: '12.3 %'."""
    return f"{100 * share:.1f} %" if known(share) else MISSING


def axis_scale(largest: float, unit: str) -> tuple[float, str]:
    """The divisor and the unit's name for an axis whose largest value is `largest`.

    Args:
      largest: in seconds for the unit "time", in FLOPs for "FLOP", otherwise a count.
      unit: "time", "FLOP", or the name of what is counted.
    """
    largest = largest if known(largest) else 0.0
    if unit == "time":
        for divisor, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
            if largest >= 2 * divisor:
                return divisor, name
        return 1.0, "seconds"
    prefixes = _SI if unit == "FLOP" else _COUNT
    power = 0
    while largest / 1000.0**power >= 1000.0 and power + 1 < len(prefixes):
        power += 1
    # Above a few quadrillion a count gets no further prefix and matplotlib's own exponent.
    return 1000.0**power, f"{prefixes[power]}{unit}" if unit == "FLOP" else (
        f"{prefixes[power]} {unit}".strip()
    )


def difference(value: float | None, endpoint: str, sign: bool = True) -> str:
    """A difference in 'loss' [nats per token] or 'score' [points of 100]."""
    if not known(value):
        return MISSING
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if endpoint == "loss" else f"{value:{plus}.1f}"


def p_value(value: float | None) -> str:
    """The p value of a test."""
    if not known(value):
        return MISSING
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
