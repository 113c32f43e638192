"""Warming the learning rate up again after each growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]


def rewarm(
    schedule: Schedule | float,
    growth_steps: Sequence[int],
    steps: int,
    *,
    initial: float = 0.1,
    shape: Literal["linear", "cosine"] = "linear",
) -> Schedule:
    """An optax schedule that falls to a part of `schedule` at each growth and climbs back.

    At a growth, moments that have just been copied or reset meet a network that they do
    not know, which is when a long step does harm. The schedule itself goes on: nothing
    is shifted, and away from the growths the value is that of `schedule` to the bit.

    Args:
      schedule: step -> learning rate, or a constant.
      growth_steps: the count of the first update after each growth, as `schedule` counts
        (`Plan.growth_steps` for a schedule that counts from 0).
      steps: how many updates the climb takes; 0 leaves the schedule as it is.
      initial: the part of the rate with which the climb begins, from 0 to 1.
      shape: of the climb.

    Returns:
      A function of the step, traced or not, for any optax optimiser.

    Raises:
      UserError: if a number is out of range.
    """
    if steps < 0:
        raise UserError(f"rewarm takes 0 or more steps; got {steps}")
    if not math.isfinite(initial) or not 0 <= initial <= 1:
        raise UserError(f"rewarm(initial=...) is a part of the rate, from 0 to 1; got {initial}")
    if shape not in ("linear", "cosine"):
        raise UserError(f"rewarm(shape=...) is 'linear' or 'cosine'; got {shape!r}")
    begins = np.array(sorted(growth_steps), np.int32)

    def rewarmed(step):
        rate = schedule(step) if callable(schedule) else schedule
        if not len(begins) or not steps:
            return rate
        passed = jnp.asarray(step) - begins
        # Since the latest growth: of climbs that overlap, the last one counts.
        passed = jnp.min(jnp.where(passed >= 0, passed, steps))
        climbed = jnp.clip(passed / steps, 0.0, 1.0)
        if shape == "cosine":
            climbed = 0.5 - 0.5 * jnp.cos(jnp.pi * climbed)
        return rate * jnp.where(passed >= steps, 1.0, initial + (1.0 - initial) * climbed)

    return rewarmed
