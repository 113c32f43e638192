"""SALT_DS: which records are challenging yet learnable, by the word of a teacher.

The score of a sequence is the median of its tokens' losses under the teacher, after dropping
tokens whose truth is not among the teacher's k most probable (Rawat et al. 2024, arXiv
2410.18779, section 4; k = 10). The highest scores are kept.
"""

from __future__ import annotations

import hashlib

import numpy as np


def record_scores(
    tokens: np.ndarray, counted: np.ndarray, ids: np.ndarray, log_probs: np.ndarray
) -> np.ndarray:
    """The score of each record, in nats.

    Args:
      tokens: int `[B, L]`, the truth.
      counted: bool `[B, L]`, which tokens carry loss; the others are left out.
      ids: int `[B, L, K]`, the teacher's most probable tokens, all different.
      log_probs: float `[B, L, K]`, theirs.

    Returns:
      float32 `[B]`; −inf for a record of which no token is left.
    """
    hit = (ids == tokens[..., None]) & counted[..., None]
    learnable = hit.any(axis=-1)
    losses = -np.where(hit, log_probs, 0.0).sum(axis=-1, dtype=np.float32)
    scores = np.full(len(tokens), -np.inf, np.float32)
    for row in np.flatnonzero(learnable.any(axis=1)):
        scores[row] = np.median(losses[row, learnable[row]])
    return scores


def chosen_records(
    scores: np.ndarray, share: float, by: str = "score", seed: int = 0, name: str = ""
) -> np.ndarray:
    """The numbers of the records that are kept, rising.

    Args:
      scores: float `[N]`, of all records.
      share: of them that is kept, rounded, at least one.
      by: 'score' keeps the highest, of equal ones those that come first; 'random' as many,
        drawn without a look at the scores: the control.
      seed, name: of the draw.
    """
    count = max(round(share * len(scores)), 1)
    if by == "score":
        order = np.argsort(-scores.astype(np.float64), kind="stable")
    else:
        text = f"chosen records {seed} {name}".encode()
        dice = np.random.Generator(np.random.PCG64(list(hashlib.sha256(text).digest())))
        order = dice.permutation(len(scores))
    return np.sort(order[:count])
