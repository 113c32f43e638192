"""What the values of settings are checked for."""

from __future__ import annotations

import math
from typing import Any

from stacking_jax.errors import UserError


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises UserError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}; got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """Raises UserError unless it is a finite number of at least 0."""
    if not (is_number(value) and value >= 0):
        raise UserError(f"{name} must be a number of at least 0; got {value!r}")


def check_layers(name: str, value: Any, least: int) -> None:
    """Raises UserError unless it is a number of layers, or a share of them below 1."""
    share = isinstance(value, float) and 0 <= value < 1 and (value > 0 or not least)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not (share or whole):
        raise UserError(
            f"{name} is a number of layers from {least}, or a share of them below 1; got {value!r}"
        )


def layers_of(value: int | float, depth: int) -> int:
    """A number of layers as it is, a share of `depth` rounded up."""
    return math.ceil(value * depth - 1e-6) if isinstance(value, float) else value
