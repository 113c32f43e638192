"""Operators that copy one block of layers: the stack grows by the block.

The layers are cut into blocks of b = `block`, counted from the input. Where a method
is defined by blocks the depth must be a whole number of them; where it is defined by
layers (GradStack's last b, LIDAS's central b, the first b) any depth of at least b
will do, and so will any b.
"""

from __future__ import annotations

import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap
from stacking_jax.growth.operators.guards import between, guarded, whole


def midas(depth: int, block: int, *, keep_first: int = 0, keep_last: int = 0) -> DepthMap:
    """MIDAS: duplicates the middle block in place.

    With n = depth / block blocks, counted from the input and from 1, block
    ⌈n/2⌉ runs twice in a row: M(f, b) = f_n ∘ ... ∘ f_⌈n/2⌉ ∘ f_⌈n/2⌉ ∘ ... ∘ f_1
    (Saunshi et al. 2024, "On the Inductive Bias of Stacking Towards Improving
    Reasoning", Eq. 1). Defined for whole blocks only.

    Args:
      depth: the present number of layers.
      block: layers per block, b.
      keep_first, keep_last: layers at the ends that are no part of any block.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if the layers between are not a whole number of blocks.
    """
    inner = between("midas", depth, keep_first, keep_last)
    blocks = _count_blocks("midas", inner, block, depth)
    start = (-(-blocks // 2) - 1) * block
    return guarded(_twice(inner, start, block), depth, keep_first, keep_last)


def gradstack(depth: int, block: int, *, keep_first: int = 0, keep_last: int = 0) -> DepthMap:
    """GradStack: duplicates the last `block` layers on top.

    Reddi et al. 2023, "Efficient Training of Language Models using Few-Shot
    Learning"; the baseline of the MIDAS paper. Defined for any block of at most
    the depth.

    Args:
      depth: the present number of layers.
      block: how many layers are copied, b.
      keep_first, keep_last: layers at the ends that are not copied; the copy stands
        below the last ones.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if there are fewer than `block` layers to copy.
    """
    inner = between("gradstack", depth, keep_first, keep_last)
    block = _check_block("gradstack", inner, block)
    return guarded(_twice(inner, inner - block, block), depth, keep_first, keep_last)


def lidas(
    depth: int, block: int, *, reading: str = "in_place", keep_first: int = 0, keep_last: int = 0
) -> DepthMap:
    """LIDAS: duplicates the central `block` layers, whatever blocks they belong to.

    Kapl et al. 2025, "Do Depth-Grown Models Overcome the Curse of Depth?" (arXiv
    2512.08819). Its formula was not to be had; a reviewer describes the new block B
    between B' and B'' as the last half of B' and the first half of B'', which are the
    central b layers of the network. Where B goes is read in two ways, which agree
    with each other and with MIDAS for an odd number of blocks:

    * 'in_place', the default: the central layers run twice in a row, as the middle
      block does in MIDAS. 0..7 with b = 4 becomes 0 1 2 3 4 5 | 2 3 4 5 | 6 7.
      One rule for every depth, of which MIDAS is the special case, and the
      'layer-wise middle duplication' that another reviewer calls it.
    * 'literal': B stands between B' and B'', as the sentence says:
      0 1 2 3 | 2 3 4 5 | 4 5 6 7. Defined for whole blocks only.

    With an odd number of layers left over there is no exact centre; the window then
    lies nearer the input, as ⌈n/2⌉ does (so LIDAS = MIDAS for b = 1).

    Args:
      depth: the present number of layers.
      block: how many layers are copied, b.
      reading: 'in_place' or 'literal'.
      keep_first, keep_last: layers at the ends; the centre is that of the others.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if there are fewer than `block` layers to copy, or the literal
        reading does not find whole blocks.
    """
    inner = between("lidas", depth, keep_first, keep_last)
    if reading not in ("in_place", "literal"):
        raise UserError(f"lidas: the reading is 'in_place' or 'literal'; got {reading!r}")
    block = _check_block("lidas", inner, block)
    start = (inner - block) // 2
    sources = _twice(inner, start, block)
    if reading == "literal" and _count_blocks("lidas (literal)", inner, block, depth) % 2 == 0:
        seam = inner // 2
        sources = [*range(seam), *range(start, start + block), *range(seam, inner)]
    return guarded(sources, depth, keep_first, keep_last)


def repeat_block(
    depth: int, block: int, index: int, *, keep_first: int = 0, keep_last: int = 0
) -> DepthMap:
    """Duplicates block `index` in place: MIDAS with the block chosen by hand.

    The control for where to grow. `index` 0 is the block at the input and -1 the one
    at the output (then it is GradStack). Defined for whole blocks only.

    Args:
      depth: the present number of layers.
      block: layers per block, b.
      index: which block, from 0; from the end if negative.
      keep_first, keep_last: layers at the ends that are no part of any block.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if the layers between are not a whole number of blocks, or there is
        no such block.
    """
    inner = between("repeat_block", depth, keep_first, keep_last)
    blocks = _count_blocks("repeat_block", inner, block, depth)
    index = whole("repeat_block: the index", index)
    if not -blocks <= index < blocks:
        raise UserError(
            f"repeat_block: {blocks} blocks of {block} layers are numbered 0 to {blocks - 1} "
            f"(or -1 to {-blocks} from the end); there is no block {index}"
        )
    return guarded(_twice(inner, index % blocks * block, block), depth, keep_first, keep_last)


def first_block(depth: int, block: int, *, keep_first: int = 0, keep_last: int = 0) -> DepthMap:
    """Duplicates the first `block` layers in place: GradStack at the other end.

    A control for where to grow; not a published method. Defined for any block of at
    most the depth.

    Args:
      depth: the present number of layers.
      block: how many layers are copied, b.
      keep_first, keep_last: layers at the ends that are not copied; the copy begins
        after the first ones.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if there are fewer than `block` layers to copy.
    """
    inner = between("first_block", depth, keep_first, keep_last)
    block = _check_block("first_block", inner, block)
    return guarded(_twice(inner, 0, block), depth, keep_first, keep_last)


def random_block(
    depth: int, block: int, seed: int, *, keep_first: int = 0, keep_last: int = 0
) -> DepthMap:
    """Duplicates one block in place, drawn at random: MIDAS without the middle.

    A control for where to grow; not a published method. The draw depends on the seed
    and the depth alone: every host and every restart draws the same block, and
    growths that follow each other draw anew. Defined for whole blocks only.

    Args:
      depth: the present number of layers.
      block: layers per block, b.
      seed: of the draw, at least 0.
      keep_first, keep_last: layers at the ends that are no part of any block.

    Returns:
      A map of length depth + block over `depth` stored layers.

    Raises:
      UserError: if the layers between are not a whole number of blocks.
    """
    inner = between("random_block", depth, keep_first, keep_last)
    blocks = _count_blocks("random_block", inner, block, depth)
    seed = whole("random_block: the seed", seed, least=0)
    # The raw bits: NumPy promises their stream for all its versions, and not that of
    # Generator.integers. The bias of the modulus is below 1e-16.
    index = int(np.random.PCG64([seed, depth]).random_raw()) % blocks
    return guarded(_twice(inner, index * block, block), depth, keep_first, keep_last)


def _twice(inner: int, start: int, size: int) -> list[int]:
    """Layers 0 to inner − 1, those from `start` on twice in a row."""
    return [*range(start + size), *range(start, inner)]


def _check_block(name: str, inner: int, block: int) -> int:
    block = whole(f"{name}: the block", block, least=1)
    if block > inner:
        raise UserError(
            f"{name} is to copy a block of {block} layers, but there are only {inner} to copy from"
        )
    return block


def _count_blocks(name: str, inner: int, block: int, depth: int) -> int:
    block = whole(f"{name}: the block", block, least=1)
    if inner % block:
        what = f"depth {inner}" if inner == depth else f"what lies between, {inner} layers,"
        fits = ", ".join(str(size) for size in range(1, inner + 1) if inner % size == 0)
        raise UserError(
            f"{name} works on whole blocks, but {what} is not a multiple of block {block}; "
            f"blocks that fit: {fits}"
        )
    return inner // block
