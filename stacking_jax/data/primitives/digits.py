"""What the primitives over small numbers share: the range of those numbers, and their name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stacking_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DigitRange:
    """The settings of a primitive that draws numbers from a range, by default 1 to 9.

    Attributes:
      low, high: the numbers, both included.

    Raises:
      UserError: for a range that is empty or below 0.
    """

    low: int = 1
    high: int = 9

    FAMILY: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]] = (r"range_(?P<low>\d+)_(?P<high>\d+)",)

    def __post_init__(self):
        if not 0 <= self.low <= self.high:
            raise UserError(
                f"{self.FAMILY} draws from 0 upwards; got the range {self.low} to {self.high}"
            )

    @property
    def name(self) -> str:
        wide = (self.low, self.high) != (1, 9)
        return self.FAMILY + (f"/range_{self.low}_{self.high}" if wide else "")

    @property
    def stream(self) -> str:
        return self.name
