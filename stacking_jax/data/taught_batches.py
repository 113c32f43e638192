"""Batches of the steps that have a teacher: with its labels, or of chosen records alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stacking_jax.data.batches import PackedBatches
from stacking_jax.data.cache import PackedCache
from stacking_jax.data.mixture import MixedCache
from stacking_jax.data.records import Batch
from stacking_jax.data.teacher_cache import TeacherCache
from stacking_jax.data.teacher_scores import chosen_records


class TaughtBatches(PackedBatches):
    """Shuffled training batches with the labels of a `TeacherCache`.

    Args:
      cache: from `open_cache`.
      labels: of its records.
      batch_size, seed: as `PackedBatches` takes them.
      select, select_by: the share of each source's records that is read, see
        `teacher_scores.chosen_records`; None for all, in the very order of `PackedBatches`.

    Raises:
      UserError: the labels belong to other records.
    """

    def __init__(
        self, cache: PackedCache | MixedCache, labels: TeacherCache, *, batch_size: int,
        seed: int, select: float | None = None, select_by: str = "score",
        total_steps: int | None = None,
    ):
        labels.check(cache)
        chosen = None
        if select is not None:
            chosen = {
                name: lambda number, name=name: chosen_records(
                    labels.scores(name, number), select, select_by, seed, f"{name} {number}"
                ).tolist()
                for name in cache.sources
            }
        super().__init__(
            cache, "train", batch_size=batch_size, seed=seed, chosen=chosen,
            total_steps=total_steps,
        )
        self.labels = labels
        self._varies = {name: source.varies for name, source in cache.sources.items()}

    def passes(self, steps: int) -> dict[str, float]:
        """As `PackedBatches.passes`; labels of every pass are there afterwards.

        Raises:
          UserError: they are not.
        """
        found = super().passes(steps)
        for name, times in found.items():
            if self._varies[name]:
                for number in range(math.ceil(times)):
                    self.labels.check_pass(name, number)
        return found

    def batch(self, step: int, rows: slice | Sequence[int] | None = None) -> Batch:
        """As `PackedBatches.batch`, with `teacher_ids` and `teacher_log_probs`."""
        batch = super().batch(step, rows)
        if rows is None or isinstance(rows, slice):
            rows = range(self.batch_size)[slice(None) if rows is None else rows]
        return batch | self.labels.labels([self.place_of(step, row) for row in rows])
