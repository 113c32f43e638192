"""The held-out loss of a network whose layers are skipped, swapped, repeated or reversed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from stacking_jax.analysis.interventions import Intervention
from stacking_jax.analysis.sample import Sample
from stacking_jax.training import sharding
from stacking_jax.training.paired import BatchLoss, mean_loss, paired_difference
from stacking_jax.training.step import make_eval_step


def losses_of_maps(
    graph: Any, params: Any, sources: Sequence[int], changed: Sequence[Intervention],
    sample: Sample, advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs every map over the same batches, on one copy of the weights.

    The map is an argument of the program, so that there is one program per length of a map.

    Args:
      graph: of the decoder.
      params: its parameters.
      sources: the network as it is, a stored layer per position.
      changed: the interventions.
      sample: held-out batches.
      advance: is told of every batch that is done.

    Returns:
      `loss` of the network as it is, in nats per token, and `interventions`: for each `kind`,
      `unit`, `at`, `map`, and the `change` of the loss with its paired 95 % `interval`.
    """
    # An evaluation step hands on what it is given in place of the number of the step.
    step = jax.jit(
        make_eval_step(
            graph, lambda indices: {"depth_map": indices}, sharding.constrainer(sample.mesh)
        )
    )
    maps = [np.asarray(sources, np.int32)]
    maps += [np.asarray(each.sources, np.int32) for each in changed]
    losses: list[list[BatchLoss]] = [[] for _ in maps]
    for source, _, batch in sample.batches():
        found = []
        for each in maps:
            found.append(step(params, batch, each))
            # Waiting for the one before keeps the device busy, and its queue short.
            jax.block_until_ready(found[-2:-1])
        for of, (nats, tokens) in zip(losses, found, strict=True):
            of.append(BatchLoss(source, sample.rates[source], float(nats), int(tokens)))
        advance()
    rows = []
    for each, moved in zip(changed, losses[1:], strict=True):
        change = paired_difference(moved, losses[0])
        known = change["low"] is not None
        rows.append({
            "kind": each.kind, "unit": each.unit, "at": each.at, "map": list(each.sources),
            "change": change["difference"],
            "interval": [change["low"], change["high"]] if known else None,
        })  # fmt: skip
    return {"loss": mean_loss(losses[0]), "interventions": rows}
