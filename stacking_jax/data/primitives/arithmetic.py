"""Signed single-digit arithmetic (MIDAS, appendix B.1): -3+2=-1."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from stacking_jax.data.primitives.digits import DigitRange
from stacking_jax.data.primitives.problem import Problem, coincidence


def write(first: int, second: int, signs: str) -> tuple[str, str]:
    """Prompt and target of two digits and their two signs, such as (3, 2, "-+")."""
    total = sum(n if sign == "+" else -n for n, sign in zip((first, second), signs, strict=True))
    return f"{signs[0]}{first}{signs[1]}{second}=", str(total)


@dataclasses.dataclass(frozen=True)
class Arithmetic(DigitRange):
    """Two digits, each with a sign; the answer bears one only if it is negative.

    Of the default range there are 324 problems in all: they come again and again.
    """

    FAMILY: ClassVar[str] = "arithmetic"
    # As printed: the demonstrations of this one stand on consecutive lines.
    separator: ClassVar[str] = "\n"

    @property
    def chance(self) -> float:
        size = self.high - self.low + 1
        signed = np.zeros(2 * self.high + 1)
        signed[self.low + self.high :] += 1
        signed[: size] += 1
        return coincidence(np.convolve(signed, signed))

    @property
    def longest_target(self) -> int:
        return len(str(-2 * self.high))

    def draw(self, rng: np.random.Generator) -> Problem:
        first, second = rng.integers(self.low, self.high + 1, 2).tolist()
        signs = "".join("+-"[i] for i in rng.integers(0, 2, 2))
        prompt, target = write(first, second, signs)
        return Problem(prompt, target, key=prompt)
