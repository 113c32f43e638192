"""Learning rates over the global step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from stacking_jax.training.config import OptimizerConfig


def learning_rate(
    config: OptimizerConfig, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """The rate of update number n, counted from 1 and over all stages.

    Warm-up ends, and the decay reaches `final_fraction` of the peak, exactly at
    the last update; growth does not restart anything.

    Args:
      config: schedule, peak and shares.
      total_steps: updates in all.

    Returns:
      A function from n (traced or not) to the rate.
    """
    peak = config.peak_learning_rate
    warmup = round(config.warmup_fraction * total_steps)
    rest = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = min(max(round(config.decay_fraction * total_steps), 1), rest)
        after = optax.join_schedules(
            [
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, peak * config.final_fraction, decay),
            ],
            [rest - decay],
        )
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
