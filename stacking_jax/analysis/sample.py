"""The held-out tokens on which a stack is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from stacking_jax.data import open_cache
from stacking_jax.data.ul2_config import CAUSAL
from stacking_jax.models.kernels import check_documents
from stacking_jax.training import sharding
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.held_out import HeldOut, Part
from stacking_jax.training.mesh import LogicalMesh

ROWS = 16
"""Rows of a batch, where the run's own batches are larger: every batch is one term of an
interval, and a hundred rows are one term no better than sixteen."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The first held-out batches of every source, of causal language modelling.

    Attributes:
      parts: of the sources.
      rows: of a batch.
      mesh: the devices over which its rows are dealt out.
      digest: of the rows, see `HeldOut`.
      max_documents: of a row, `DecoderConfig.max_documents`.
    """

    parts: tuple[Part, ...]
    rows: int
    mesh: LogicalMesh
    digest: str
    max_documents: int | None

    @classmethod
    def open(
        cls, config: TrainConfig, mesh: LogicalMesh, batches: int, rows: int | None = None
    ) -> Sample:
        """Opens the held-out data of a run.

        Args:
          config: of the run.
          mesh: the devices.
          batches: of each source, or as many as it has.
          rows: of a batch; None for those of the run, `ROWS` at most. Rounded up to what the
            devices divide.

        Raises:
          UserError: if the data are not there, or hold nothing out.
        """
        parts = mesh.parts("batch")
        rows = min(config.batch_size, ROWS) if rows is None else rows
        rows = -(-rows // parts) * parts
        config = dataclasses.replace(
            config, batch_size=rows, microbatches=1, eval_batches=batches
        )
        held_out = HeldOut.open(open_cache(config.data), config)
        causal = tuple(part for part in held_out.parts if part.objective == CAUSAL)
        return cls(causal, rows, mesh, held_out.digest, held_out.max_documents)

    @property
    def rates(self) -> dict[str, float]:
        """Source -> its share of the training records."""
        return {part.source: part.rate for part in self.parts}

    @property
    def count(self) -> int:
        """Batches in all."""
        return sum(part.count for part in self.parts)

    def batches(
        self, start: int = 0, every: int = 1
    ) -> Iterator[tuple[str, int, dict[str, jax.Array]]]:
        """(source, number within it, batch on the devices), always the same and in order.

        Args:
          start, every: of each source the batches start, start + every, ...
        """
        rows = sharding.local_rows(self.rows, self.mesh)
        for part in self.parts:
            for number in range(start, part.count, every):
                batch = part.batches.batch(number, rows=rows)
                where = f"held-out batch {number} of {part.source}"
                check_documents(batch["segment_ids"], self.max_documents, where)
                yield part.source, number, sharding.place_batch(batch, self.mesh)
