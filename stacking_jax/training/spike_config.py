"""What a run does about a gradient that is far larger than those before it."""

from __future__ import annotations

import dataclasses

from stacking_jax.errors import UserError
from stacking_jax.training.settings import check_whole, is_number

ACTIONS = (None, "skip", "rewind")


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """The policy for loss spikes; off by default.

    A step is a spike if its gradient's global norm, before clipping, is more than
    `factor` times the median of the norms of the last `window` steps that were none. The
    first `window` steps, and as many after each growth, are never spikes.

    Attributes:
      action: None for no policy; 'skip' leaves parameters and optimiser state as they
        were; 'rewind' goes back to the last checkpoint of the schedule and leaves out the
        batches from there to the spike, as PaLM did by hand (Chowdhery et al. 2022, 5.1).
      window: steps that the median is taken over.
      factor: see above.
      limit: more spikes than this within `limit_steps` steps end the run.
      limit_steps: see there.
    """

    action: str | None = None
    window: int = 64
    factor: float = 5.0
    limit: int = 10
    limit_steps: int = 1000

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise UserError(f"SpikeConfig.action is None, 'skip' or 'rewind'; got {self.action!r}")
        for name in ("window", "limit", "limit_steps"):
            check_whole(f"SpikeConfig.{name}", getattr(self, name), least=1)
        if not (is_number(self.factor) and self.factor > 1):
            raise UserError(f"SpikeConfig.factor must be a number above 1; got {self.factor!r}")
