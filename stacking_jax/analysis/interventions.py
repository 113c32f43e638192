"""Depth maps that ask what a layer, or a block, is for: skip it, swap it, repeat it, reverse it.

All are maps at inference: no weight is copied or changed. Swapping and reversing are those of
Kapl et al. 2025 (arXiv 2512.08819), skipping that of Csordás et al. 2025 (arXiv 2505.13898).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stacking_jax.analysis.similarity import check_block

LAYER, BLOCK = "layer", "block"
KINDS = ("skip", "swap", "repeat", "reverse")


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One change of what runs.

    Attributes:
      kind: one of `KINDS`. A swap exchanges the unit with the one behind it; a reversal runs
        the layers of a block from its last to its first.
      unit: 'layer' or 'block'.
      at: number of the unit, nearest the input 0.
      sources: the stored layer of each position that then runs.
    """

    kind: str
    unit: str
    at: int
    sources: tuple[int, ...]


def interventions(sources: Sequence[int], block: int) -> list[Intervention]:
    """Every intervention on a network.

    Args:
      sources: the stored layer of each of its positions.
      block: positions of a block. Blocks of one layer are layers, and a single block leaves
        nothing to compare: both have no interventions of their own.

    Raises:
      UserError: if blocks do not fill the stack.
    """
    check_block(len(sources), block)
    found = _of_units([(layer,) for layer in sources], LAYER)
    if 1 < block < len(sources):
        units = [tuple(sources[i : i + block]) for i in range(0, len(sources), block)]
        found += _of_units(units, BLOCK)
    return found


def _of_units(units: list[tuple[int, ...]], unit: str) -> list[Intervention]:
    found = []

    def add(kind, at, changed):
        found.append(Intervention(kind, unit, at, tuple(i for part in changed for i in part)))

    for at, part in enumerate(units):
        before, behind = units[:at], units[at + 1 :]
        if len(units) > 1:
            add("skip", at, before + behind)
        if behind:
            add("swap", at, before + behind[:1] + [part] + behind[1:])
        add("repeat", at, before + [part, part] + behind)
        if len(part) > 1:
            add("reverse", at, before + [part[::-1]] + behind)
    return found
