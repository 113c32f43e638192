"""Pre-school math: put two values into an expression, then work it out (MIDAS, appendix B.1)."""

from __future__ import annotations

import dataclasses
import string
from typing import ClassVar

import numpy as np

from stacking_jax.data.primitives.digits import DigitRange
from stacking_jax.data.primitives.problem import Problem, coincidence


def write(
    values: list[tuple[str, int]], result: str, terms: list[tuple[str, str]]
) -> tuple[str, str]:
    """Prompt and target.

    Args:
      values: two variables and their numbers, in the order of the lines.
      result: the variable that the expression defines.
      terms: two pairs of a sign and a variable.
    """
    number = dict(values)
    lines = "".join(f"{name}={value}\n" for name, value in values)
    expression = "".join(sign + name for sign, name in terms)
    chain = "".join(f"{sign}{number[name]}" for sign, name in terms)
    total = sum(number[name] if sign == "+" else -number[name] for sign, name in terms)
    prompt = f"Fill in blank:\n\n{lines}{result}={expression}\n{result}=___. ->"
    return prompt, f"{chain}={total}"


def chain(text: str) -> str:
    """The reasoning alone: what stands before the final sum."""
    return text.rpartition("=")[0] if "=" in text else text


@dataclasses.dataclass(frozen=True)
class PreschoolMath(DigitRange):
    """Two values and an expression of two signed terms; the target shows the chain of thought.

    The first sign is minus, as in all examples that the paper prints; the second is drawn.
    """

    FAMILY: ClassVar[str] = "preschool_math"
    separator: ClassVar[str] = "\n\n"

    @property
    def chance(self) -> float:
        return coincidence(np.ones(2 * (self.high - self.low + 1) ** 2))

    @property
    def longest_target(self) -> int:
        digits = len(str(self.high))
        return 2 * (1 + digits) + 1 + len(str(-2 * self.high))

    def draw(self, rng: np.random.Generator) -> Problem:
        first, second, result = (
            string.ascii_lowercase[i] for i in rng.choice(26, 3, replace=False)
        )
        numbers = rng.integers(self.low, self.high + 1, 2).tolist()
        values = list(zip((first, second), numbers, strict=True))
        order = [first, second] if rng.integers(2) else [second, first]
        terms = [("-", order[0]), ("+-"[rng.integers(2)], order[1])]
        prompt, target = write(values, result, terms)
        return Problem(prompt, target, key=prompt, facts={"chain": chain(target)})
