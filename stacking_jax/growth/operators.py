"""Growth operators: short generators of depth maps.

Every operator takes the present depth and returns the map of the grown stack.
They are found by name through `operator(name)`, which is how a plan, gin and
the command line refer to them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap


def midas(depth: int, block: int) -> DepthMap:
    """MIDAS: duplicates the middle block in place.

    With n = depth / block blocks, counted from the input and from 1, block
    ⌈n/2⌉ runs twice in a row: M(f, b) = f_n ∘ ... ∘ f_⌈n/2⌉ ∘ f_⌈n/2⌉ ∘ ... ∘ f_1
    (Saunshi et al. 2024, "On the Inductive Bias of Stacking Towards Improving
    Reasoning", Eq. 1).

    Args:
      depth: the present number of layers.
      block: layers per block, b.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if the depth is not a multiple of the block.
    """
    blocks = _count_blocks("midas", depth, block)
    end = -(-blocks // 2) * block
    return DepthMap([*range(end), *range(end - block, depth)], stored=depth)


def gradstack(depth: int, block: int) -> DepthMap:
    """GradStack: duplicates the last block on top.

    Reddi et al. 2023, "Efficient Training of Language Models using Few-Shot
    Learning"; the baseline of the MIDAS paper.

    Args:
      depth: the present number of layers.
      block: layers per block, b.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if the depth is not a multiple of the block.
    """
    _count_blocks("gradstack", depth, block)
    return DepthMap([*range(depth), *range(depth - block, depth)], stored=depth)


OPERATORS: dict[str, Callable[[int, int], DepthMap]] = {"midas": midas, "gradstack": gradstack}


def operator(name: str) -> Callable[[int, int], DepthMap]:
    """The operator of that name.

    Raises:
      UserError: if there is none; the message shows the nearest names.
    """
    if name not in OPERATORS:
        near = difflib.get_close_matches(str(name), OPERATORS, n=3) or sorted(OPERATORS)
        raise UserError(f"there is no growth operator {name!r}; did you mean {', '.join(near)}?")
    return OPERATORS[name]


def _count_blocks(name: str, depth: int, block: int) -> int:
    if block < 1 or depth < 1:
        raise UserError(f"{name} needs a depth and a block of at least 1; got {depth} and {block}")
    if depth % block:
        raise UserError(
            f"{name} duplicates whole blocks, but depth {depth} is not a multiple of block {block}"
        )
    return depth // block
