"""What a stack costs, in numbers: the plan's arithmetic, free of any model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelCosts:
    """Parameters and forward FLOPs of one layer and of everything around the stack.

    A multiply-add counts as 2 FLOPs; a training step costs 3 forward passes
    (one forward, two backward). Attention is counted in full, without the
    saving of a causal mask, as most published MFU figures do.

    Attributes:
      layer_params: parameters of one layer.
      other_params: embedding, final norm, and the head where it is not tied.
      layer_flops: forward FLOPs per token of one layer's matrix products.
      attention_flops: forward FLOPs per token of one layer's scores and
        weighted values, at the training sequence length.
      head_flops: forward FLOPs per token of the output projection.
      teacher_flops: forward FLOPs per token of a teacher, head and attention included, in the
        stages that have one (`Stage.taught`).
    """

    layer_params: int
    other_params: int
    layer_flops: float
    attention_flops: float
    head_flops: float
    teacher_flops: float = 0.0

    def params(self, depth: int) -> int:
        """All parameters of a model that stores `depth` layers."""
        return depth * self.layer_params + self.other_params

    def flops_per_token(
        self, depth: int, *, head: bool = True, attention: bool = True, taught: bool = False
    ) -> float:
        """Forward and backward FLOPs per token of a model that runs `depth` layers.

        Where it is `taught`, the teacher's forward pass is added, whole in any case.
        """
        layer = self.layer_flops + (self.attention_flops if attention else 0.0)
        own = 3.0 * (depth * layer + (self.head_flops if head else 0.0))
        return own + (self.teacher_flops if taught else 0.0)
