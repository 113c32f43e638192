"""What a plan is made for, and what a chip costs."""

from __future__ import annotations

import dataclasses

from stacking_jax.errors import UserError
from stacking_jax.training.settings import is_number


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What `stacking-jax plan` knows beside the run itself. No number of a run depends on it.

    Attributes:
      topology: what `--topology` means when it is given without a value, such as
        'v5p:4x4x8'.
      chip_hour_price: of one chip for one hour, for the run's price; None: no price.
      currency: in which that is, for people.
    """

    topology: str | None = None
    chip_hour_price: float | None = None
    currency: str = "USD"

    def __post_init__(self):
        if self.topology is not None and not (isinstance(self.topology, str) and self.topology):
            raise UserError(
                f"PlanConfig.topology is a text such as 'v5p:4x4x8'; got {self.topology!r}"
            )
        price = self.chip_hour_price
        if price is not None and not (is_number(price) and price > 0):
            raise UserError(
                f"PlanConfig.chip_hour_price must be a positive number, or None; got {price!r}"
            )
        if not isinstance(self.currency, str):
            raise UserError(f"PlanConfig.currency is a text; got {self.currency!r}")
