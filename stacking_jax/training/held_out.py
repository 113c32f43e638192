"""Held-out cross-entropy: the number that tables show.

Always that of causal language modelling, of each source of a mixture and of all
together at the mixture's rates; under UL2, the loss of each objective beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax

from stacking_jax.data import MixedCache, PackedBatches, PackedCache
from stacking_jax.data.building import objective_split
from stacking_jax.data.ul2_config import CAUSAL, OBJECTIVES
from stacking_jax.models.kernels import check_documents
from stacking_jax.training import sharding
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.paired import BatchLoss


@dataclasses.dataclass(frozen=True)
class Part:
    """The held-out batches of one source under one objective.

    Attributes:
      source: its name.
      objective: 'causal', 'prefix' or 'span'.
      batches: the split in its own order, never shuffled.
      count: how many of them are used.
      rate: the source's share of the training records.
      bytes_per_token: of the whole split; tokens that carry loss.
    """

    source: str
    objective: str
    batches: PackedBatches
    count: int
    rate: float
    bytes_per_token: float


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out batches of a run: the same rows, in the same order, every time.

    Attributes:
      parts: those of causal language modelling first.
      shares: of the objectives in the tokens that carry loss; {} for plain text.
      digest: of the rows that are used, to tell whether two runs can be compared.
      max_documents: of a row, `DecoderConfig.max_documents`.
    """

    parts: tuple[Part, ...]
    shares: dict[str, float]
    digest: str
    max_documents: int | None = None

    @property
    def batches(self) -> PackedBatches:
        """Those of the first source."""
        return self.parts[0].batches

    @property
    def count(self) -> int:
        """Batches of one evaluation."""
        return sum(part.count for part in self.parts)

    @classmethod
    def open(cls, cache: PackedCache | MixedCache, config: TrainConfig) -> HeldOut:
        """The validation splits of every source.

        `config.eval_batches` limits each source and objective on its own.

        Raises:
          UserError: a source holds nothing out.
        """
        objectives = OBJECTIVES if config.data.is_ul2 else (CAUSAL,)
        parts, used = [], []
        for objective in objectives:
            for name, source in cache.sources.items():
                split = objective_split(objective)
                if objective != CAUSAL and not source.num_records(split):
                    continue  # examples with a prompt of their own have one objective
                batches = PackedBatches(
                    source, split=split, batch_size=config.batch_size, shuffle=False,
                    prompts=cache.manifest.prompts,
                )
                count = batches.num_batches
                if config.eval_batches is not None:
                    count = min(count, config.eval_batches)
                info = source.manifest.splits[split]
                rows = min(count * config.batch_size, info.records)
                used.append(f"{source.manifest.digest}:{split}:{rows}")
                parts.append(
                    Part(
                        name, objective, batches, count, cache.rates[name],
                        info.text_bytes / max(info.loss_tokens, 1),
                    )
                )
        digest = hashlib.sha256("\n".join(used).encode()).hexdigest()
        shares = loss_shares(cache) if config.data.is_ul2 else {}
        return cls(tuple(parts), shares, digest, config.model.max_documents)

    def evaluate(
        self, eval_step: Callable[[Any, dict], tuple[Any, Any]], params: Any,
        mesh: sharding.LogicalMesh,
    ) -> dict[str, float]:
        """Mean cross-entropy over the held-out tokens that carry loss.

        Returns:
          `eval_loss` in nats per token and `bits_per_byte`. Of a mixture also
          `eval_loss/SOURCE` and `bits_per_byte/SOURCE`, and the first two are those
          of the sources weighted by their rates. Under UL2 also `ul2_loss/OBJECTIVE`
          and `ul2_loss`, weighted by the tokens that carry loss in training.
        """
        losses = {
            (part.objective, part.source): self._loss(part, eval_step, params, mesh)
            for part in self.parts
        }
        causal = [part for part in self.parts if part.objective == CAUSAL]
        scores = {"eval_loss": _mean(causal, losses)}
        scores["bits_per_byte"] = _bits(
            scores["eval_loss"],
            math.fsum(part.rate * part.bytes_per_token for part in causal)
            / math.fsum(part.rate for part in causal),
        )
        if len(causal) > 1:
            for part in causal:
                loss = losses[CAUSAL, part.source]
                scores[f"eval_loss/{part.source}"] = loss
                scores[f"bits_per_byte/{part.source}"] = _bits(loss, part.bytes_per_token)
        if self.shares:
            for objective in OBJECTIVES:
                parts = [part for part in self.parts if part.objective == objective]
                if parts:
                    scores[f"ul2_loss/{objective}"] = _mean(parts, losses)
            present = {
                name: share for name, share in self.shares.items() if f"ul2_loss/{name}" in scores
            }
            scores["ul2_loss"] = math.fsum(
                share * scores[f"ul2_loss/{name}"] for name, share in present.items()
            ) / math.fsum(present.values())
        return scores

    def batch_losses(
        self, eval_step: Callable[[Any, dict], tuple[Any, Any]], params: Any,
        mesh: sharding.LogicalMesh, limit: int | None = None,
    ) -> list[BatchLoss]:
        """What each batch of causal language modelling gives, at most `limit` of each source."""
        return [
            BatchLoss(part.source, part.rate, nats, tokens)
            for part in self.parts if part.objective == CAUSAL
            for nats, tokens in self._sums(part, eval_step, params, mesh, limit)
        ]

    def _loss(self, part: Part, eval_step, params, mesh) -> float:
        sums = self._sums(part, eval_step, params, mesh)
        return math.fsum(nats for nats, _ in sums) / max(sum(tokens for _, tokens in sums), 1)

    def _sums(
        self, part: Part, eval_step, params, mesh, limit: int | None = None
    ) -> list[tuple[float, int]]:
        """Summed cross-entropy and tokens of each batch."""
        rows = sharding.local_rows(part.batches.batch_size, mesh)
        sums = []
        for i in range(part.count if limit is None else min(part.count, limit)):
            here = part.batches.batch(i, rows=rows)
            check_documents(
                here["segment_ids"], self.max_documents, f"held-out batch {i} of {part.source}"
            )
            sums.append(eval_step(params, sharding.place_batch(here, mesh)))
            # Waiting for the one before keeps the device busy, and two batches on it at most.
            jax.block_until_ready(sums[-2:-1])
        return [(float(loss), int(count)) for loss, count in sums]


def loss_shares(cache: PackedCache | MixedCache) -> dict[str, float]:
    """Share of each objective in the training tokens that carry loss, at the rates."""
    totals: dict[str, float] = {}
    for name, source in cache.sources.items():
        info = source.manifest.splits["train"]
        for objective, counts in info.objectives.items():
            # An example's own prompt is evaluated as the causal split holds it.
            objective = objective if objective in OBJECTIVES else CAUSAL
            share = cache.rates[name] * counts["loss_tokens"] / info.tokens
            totals[objective] = totals.get(objective, 0.0) + share
    whole = math.fsum(totals.values())
    return {name: total / whole for name, total in totals.items()}


def _mean(parts: list[Part], losses: dict[tuple[str, str], float]) -> float:
    weighted = math.fsum(part.rate * losses[part.objective, part.source] for part in parts)
    return weighted / math.fsum(part.rate for part in parts)


def _bits(loss: float, bytes_per_token: float) -> float:
    return loss / math.log(2) / bytes_per_token
