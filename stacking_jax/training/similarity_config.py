"""The looping-inspired regulariser, as plain settings."""

from __future__ import annotations

import dataclasses

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.training.settings import check_layers, check_not_negative, layers_of

GROUPS = {
    "attn_q": ("attention", "query"), "attn_k": ("attention", "key"),
    "attn_v": ("attention", "value"), "attn_o": ("attention", "out"),
    "ffn_gate": ("mlp", "gate"), "ffn_w1": ("mlp", "up"), "ffn_w2": ("mlp", "down"),
}
"""Name of a parameter group -> where its matrix is in a layer: Attn-Q ... FFN-W2 of the paper, and
the gate that a gated MLP has beside them."""


@dataclasses.dataclass(frozen=True)
class SimilarityConfig:
    """Layers a block apart are pulled towards each other (Saunshi et al. 2025, Eq. 3-4).

    The objective has λ · (1 − R) beside the cross-entropy, where R is the mean over parameter
    groups and pairs of layers (l, l + k) of the cosine of their matrices; see
    `similarity.similarity`. A stage of fewer than 2k layers has no such pair of blocks, and no
    such term.

    Attributes:
      weight: λ; 0: off. The paper's best is 10.
      block: k, the layers of a block: a number of them, or a share of `num_layers` (below 1,
        rounded up).
      groups: the names of parameter groups, of `GROUPS`; None: all.

    Raises:
      UserError: for settings outside their range.
    """

    weight: float = 0.0
    block: int | float = 4
    groups: list[str] | None = None

    def __post_init__(self):
        check_not_negative("SimilarityConfig.weight", self.weight)
        check_layers("SimilarityConfig.block", self.block, least=1)
        groups = self.groups
        if groups is not None and not (
            isinstance(groups, list | tuple) and groups and set(groups) <= set(GROUPS)
            and len(set(groups)) == len(groups)
        ):
            raise UserError(
                f"SimilarityConfig.groups is None for all, or some of {', '.join(GROUPS)}; got "
                f"{groups!r}"
            )

    @property
    def method(self) -> str | None:
        """What tables call this; None where it is off."""
        return "loop regularised" if self.weight else None

    def period(self, depth: int) -> int:
        """k of a model that has `depth` layers at the end."""
        return layers_of(self.block, depth)

    def check_plan(self, plan: Plan) -> None:
        """Raises UserError where the blocks do not divide a stage, or its layers are tied."""
        if not self.weight:
            return
        block = self.period(plan.final_depth)
        if plan.final_depth < 2 * block:
            raise UserError(
                f"SimilarityConfig.block = {block} has no second block in {plan.final_depth} layers"
            )
        for number, stage in enumerate(plan.stages, start=1):
            if stage.run_map is not None:
                raise UserError(
                    "SimilarityConfig.weight pulls layers together that a looped model has tied: "
                    "set it to 0, or LoopConfig.loops to None"
                )
            if stage.depth >= 2 * block and stage.depth % block:
                raise UserError(
                    f"stage {number} has {stage.depth} layers, which blocks of "
                    f"SimilarityConfig.block = {block} do not divide"
                )
