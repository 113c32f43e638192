"""What `stacking-jax lab icl` measures, and how long."""

from __future__ import annotations

import dataclasses
from typing import Any

from stacking_jax.errors import UserError

CONTEXTS = ("whitened", "gaussian")
CONDITIONS = ("log_uniform", "uniform", "fixed")


@dataclasses.dataclass(frozen=True)
class IclSettings:
    """One session of measurements; the defaults are those of the command.

    Attributes:
      seeds: runs per cell; a seed fixes the tasks, their order and the initial values.
      dimension: d of the regression.
      pairs: n, pairs (x_i, y_i) in a prompt.
      kappas: tasks have covariances with condition numbers in [1, kappa].
      condition: how a task's condition number c is drawn: `log_uniform` or `uniform` in
        [1, kappa], or `fixed` at kappa. The largest eigenvalue is 1, the smallest 1/c, those
        between are log-uniform, the basis is random.
      context: `whitened`: the prompt's own second moment is the covariance, so that kappa is
        what the model meets; `gaussian`: x_i ~ N(0, covariance).
      depths: of the linear stacks.
      softmax_depths: of the softmax stacks and those with input injection.
      steps: of training, with a cosine schedule to zero.
      batch: prompts per step.
      learning_rate: of Adam, at its peak, after a tenth of the steps of warm-up.
      optimizer: `adam` or `sgd`, for the trained stacks.
      clip_norm: of the gradient of one model.
      cap: what one prompt may count for in a relative loss, trained on or reported. A full
        stack of ℓ layers is a polynomial of degree 3^ℓ in its prompt, so that single prompts
        out of thousands would else be all of the mean, or overflow.
      init_scale: standard deviation of initial values.
      test_prompts: held out, the same for every arm.
      target_losses: the relative losses (1: predicting nothing) whose smallest depth is looked
        for.
      wider: the test's kappa over the training's, for the shift to worse conditioning.
      larger: factor of the covariance, for the shift of scale.
      extra_loops: a tied stack is run up to this many times its depth.
      tolerance: an increase of the loss by this share or less is no violation of monotonicity.
      preconditioner_pairs: n of the prompts where the preconditioner is followed.
      preconditioner_loops: loops there.
      preconditioner_kappa: condition number of the one covariance of all those tasks.
      preconditioner_steps, preconditioner_rate: steps of training there, and their learning rate.
      dominance_loops: loops where gradient dominance is followed.
      dominance_pairs: n there; 0 is the limit of many pairs, where the population loss is exact.
      dominance_contexts: contexts in the estimate of the population loss for other n.
      dominance_steps: steps of plain gradient descent.
      dominance_rate: its step size.
      floor: the ratio is judged while the loss is above this many times its lowest value.
    """

    seeds: int = 4
    dimension: int = 5
    pairs: int = 10
    kappas: tuple[int, ...] = (4, 16, 64, 256)
    condition: str = "log_uniform"
    context: str = "whitened"
    depths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12)
    softmax_depths: tuple[int, ...] = (2, 4, 8)
    steps: int = 600
    batch: int = 64
    learning_rate: float = 0.01
    optimizer: str = "adam"
    clip_norm: float = 1.0
    cap: float = 20.0
    init_scale: float = 0.02
    test_prompts: int = 2048
    target_losses: tuple[float, ...] = (0.1, 0.2)
    wider: float = 4.0
    larger: float = 1.25
    extra_loops: int = 3
    tolerance: float = 0.01
    preconditioner_pairs: tuple[int, ...] = (10, 40, 160)
    preconditioner_loops: int = 2
    preconditioner_kappa: float = 4.0
    preconditioner_steps: int = 2000
    preconditioner_rate: float = 0.05
    dominance_loops: tuple[int, ...] = (1, 2, 4)
    dominance_pairs: tuple[int, ...] = (0, 40, 640)
    dominance_contexts: int = 512
    dominance_steps: int = 400
    dominance_rate: float = 0.01
    floor: float = 2.0

    def __post_init__(self):
        for name in ("seeds", "dimension", "pairs", "steps", "batch", "test_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"lab icl: {name} is at least 1; got {getattr(self, name)}")
        if self.cap <= 1:
            raise UserError(f"lab icl: cap is above 1, the loss of saying 0; got {self.cap}")
        if not self.target_losses or not 0 < min(self.target_losses) <= max(
            self.target_losses
        ) < 1:
            raise UserError(
                "lab icl: target_losses are one or more between 0 and 1, the loss of saying 0; "
                f"got {self.target_losses}"
            )
        if self.context not in CONTEXTS:
            raise UserError(f"lab icl: context is one of {CONTEXTS}; got {self.context!r}")
        if self.condition not in CONDITIONS:
            raise UserError(f"lab icl: condition is one of {CONDITIONS}; got {self.condition!r}")
        if self.context == "whitened" and self.pairs < self.dimension:
            raise UserError(
                f"lab icl: {self.pairs} pairs cannot have a second moment of full rank in "
                f"dimension {self.dimension}; take at least as many, or context 'gaussian'"
            )
        if self.optimizer not in ("adam", "sgd"):
            raise UserError(f"lab icl: optimizer is adam or sgd; got {self.optimizer!r}")
        if not set(self.depths) & set(self.softmax_depths) or len(self.depths) < 2:
            raise UserError(
                "lab icl: depths are two or more, and softmax_depths shares one of them; got "
                f"{self.depths} and {self.softmax_depths}"
            )
        if min(self.kappas) < 1:
            raise UserError(f"lab icl: a condition number is at least 1; got {min(self.kappas)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def quick(seeds: int = 2) -> IclSettings:
    """Every measurement at a size that proves nothing: for tests, and to see what there is."""
    return IclSettings(
        seeds=seeds, kappas=(4, 16, 64), depths=(1, 2, 4), softmax_depths=(2,), steps=60, batch=16,
        test_prompts=128, preconditioner_pairs=(10, 40), preconditioner_loops=2,
        preconditioner_steps=60, dominance_loops=(1, 2), dominance_pairs=(0, 40),
        dominance_contexts=64, dominance_steps=40,
    )  # fmt: skip
