"""The part of a stack that repeats, and what happens between its turns.

A depth map says which layers run; a `Loop` also says where a turn begins and ends, which three
methods need: input injection (Dehghani et al. 2018; Giannou et al. 2023), a loss on the states
after the last turns with back-propagation through no more than those (Yang et al. 2024,
"Looped Transformers are Better at Learning Learning Algorithms"), and more turns at inference
than in training. k ⊗ L and middle looping are Saunshi et al. 2025, arXiv 2502.17416.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap, Segment

INJECTIONS = ("input", "stream")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Layers `start` to `start + block` of a stack run `turns` times; the others once.

    Immutable and hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      start: stored layers before the loop.
      block: stored layers of one turn.
      turns: how often they run.
      inject: what is added to the carry at the start of every turn but the first, which begins
        with it: 'input', what the whole stack was given (a decoder's embeddings); 'stream', the
        carry before the loop; or None.
      backprop: gradients go through the last so many turns and stop before them; None: through
        all. What is injected into those turns has its gradient.
      exits: the stack is left after each of the last so many turns, and `run_stack` gives the
        carry of each exit.

    Raises:
      UserError: for numbers that do not fit together.
    """

    start: int
    block: int
    turns: int
    inject: str | None = None
    backprop: int | None = None
    exits: int = 1

    def __post_init__(self):
        for name, least in (("start", 0), ("block", 1), ("turns", 1), ("exits", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(
                    f"{name} of a loop is a whole number of at least {least}; got {value!r}"
                )
        if self.inject not in (None, *INJECTIONS):
            raise UserError(
                f"a loop injects {' or '.join(map(repr, INJECTIONS))}, or None; got "
                f"{self.inject!r}"
            )
        through = self.turns if self.backprop is None else self.backprop
        if isinstance(through, bool) or not isinstance(through, int) or not (
            1 <= through <= self.turns
        ):
            raise UserError(
                f"gradients go through 1 to {self.turns} turns of this loop; got {through!r}"
            )
        if self.exits > through:
            raise UserError(
                f"a loop of {self.turns} turns with gradients through the last {through} has its "
                f"loss on at most so many states; got {self.exits}"
            )

    @property
    def stop(self) -> int:
        """The first stored layer after the loop."""
        return self.start + self.block

    @property
    def is_plain(self) -> bool:
        """Whether the loop is no more than its depth map: nothing happens between turns."""
        return self.inject is None and self.exits == 1 and self.backprop in (None, self.turns)

    def depth_map(self, stored: int) -> DepthMap:
        """The map that runs over so many stored layers.

        Raises:
          UserError: if there are fewer layers than the loop takes.
        """
        if stored < self.stop:
            raise UserError(
                f"a loop over layers {self.start} to {self.stop - 1} needs {self.stop} stored "
                f"layers; there are {stored}"
            )
        if self.turns == 1:
            return DepthMap.identity(stored)
        parts = (
            Segment(tuple(range(self.start))),
            Segment(tuple(range(self.start, self.stop)), self.turns),
            Segment(tuple(range(self.stop, stored))),
        )
        return DepthMap(parts, stored=stored)

    def spans(self) -> list[tuple[int, int]]:
        """The turns as (first, end), cut where gradients begin and where states are given."""
        through = self.turns if self.backprop is None else self.backprop
        states = self.exits if self.exits > 1 else 0
        cuts = sorted({0, self.turns - through, self.turns - states, self.turns})
        return list(zip(cuts, cuts[1:], strict=False))

    def with_turns(self, turns: int) -> Loop:
        """The same loop with another number of turns, for inference: one exit."""
        return dataclasses.replace(self, turns=turns, backprop=None, exits=1)

    def exit_positions(self, stored: int) -> int:
        """Positions that run in a training step beside those of the map, for the further exits."""
        return (self.exits - 1) * (stored - self.stop)

    @property
    def forward_only(self) -> int:
        """Positions that a training step runs forward, but not backward."""
        if self.backprop in (None, self.turns):
            return 0
        before = 0 if self.inject == "stream" else self.start
        return before + (self.turns - self.backprop) * self.block

    @classmethod
    def of_dict(cls, values: dict[str, Any] | None) -> Loop | None:
        """From plain data, as a checkpoint holds it."""
        return None if values is None else cls(**values)
