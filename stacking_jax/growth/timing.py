"""When a small model should grow, by a law that was fitted to published runs."""

from __future__ import annotations

import math

from stacking_jax.errors import UserError


def g_stack_tokens(params: float, flops: float) -> float:
    """Tokens after which G_stack grows: log10 d = 0.88 log10 N + 163.27 / log10 C − 5.74.

    Du et al. 2024, "Stacking Your Transformers" (arXiv 2405.15319). Fitted to runs of models
    from some hundred million parameters on: of a run much smaller it asks for more tokens than
    the run has.

    Args:
      params: N, parameters of the grown model.
      flops: C, training FLOPs of the whole run, such as 6 N D of D tokens.

    Raises:
      UserError: if one of them is not large enough to have a logarithm above 0.
    """
    if not (params > 1 and flops > 1):
        raise UserError(
            f"the law of G_stack needs parameters and FLOPs above 1; got {params!r} and {flops!r}"
        )
    return 10 ** (0.88 * math.log10(params) + 163.27 / math.log10(flops) - 5.74)
