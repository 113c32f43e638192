"""Held-out cross-entropy: the number that tables show."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from stacking_jax.data import PackedBatches, PackedCache
from stacking_jax.training import sharding
from stacking_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out batches of a run: the same rows, in the same order, every time.

    Attributes:
      batches: the validation split in its own order, never shuffled.
      count: how many of them are used.
      bytes_per_token: of the whole split, which turns nats per token into bits
        per byte whatever the vocabulary.
      digest: of the rows that are used, to tell whether two runs can be compared.
    """

    batches: PackedBatches
    count: int
    bytes_per_token: float
    digest: str

    @classmethod
    def open(cls, cache: PackedCache, config: TrainConfig) -> HeldOut:
        batches = PackedBatches(
            cache, split="validation", batch_size=config.batch_size, shuffle=False
        )
        count = batches.num_batches
        if config.eval_batches is not None:
            count = min(count, config.eval_batches)
        split = cache.manifest.splits["validation"]
        rows = min(count * config.batch_size, split.records)
        digest = hashlib.sha256(f"{cache.manifest.digest}:validation:{rows}".encode()).hexdigest()
        return cls(batches, count, split.text_bytes / split.tokens, digest)

    def evaluate(
        self, eval_step: Callable[[Any, dict], tuple[Any, Any]], params: Any, mesh: Mesh
    ) -> dict[str, float]:
        """Mean cross-entropy over the held-out tokens.

        Returns:
          `eval_loss` in nats per token and `bits_per_byte`.
        """
        rows = sharding.local_rows(self.batches.batch_size)
        sums = []
        for i in range(self.count):
            batch = sharding.place_batch(self.batches.batch(i, rows=rows), mesh)
            sums.append(eval_step(params, batch))
            # Waiting for the one before keeps the device busy, and two batches on it at most.
            jax.block_until_ready(sums[-2:-1])
        nats = math.fsum(float(loss) for loss, _ in sums)
        tokens = sum(int(count) for _, count in sums)
        loss = nats / max(tokens, 1)
        return {
            "eval_loss": loss,
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
        }
