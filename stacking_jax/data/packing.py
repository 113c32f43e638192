"""Packing token documents into records of one length.

A document longer than a record is cut into pieces of exactly that length and
a rest; pieces are never dropped. The rests and the short documents, kept
whole, are put together by best-fit decreasing: longest first, each into the
fullest record that still has room for it (as Ding et al., "Fewer Truncations
Improve Language Modeling", arXiv:2404.10830, do for the same reason). Pure
NumPy, deterministic.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of document number `document`."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut(lengths: Sequence[int], record_length: int) -> list[Piece]:
    """Pieces of at most `record_length` tokens that cover every document, in order."""
    return [
        Piece(document, start, min(start + record_length, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, record_length)
    ]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing.

    Args:
      lengths: sizes of the items, each in 1 .. capacity.
      capacity: room of a bin.

    Returns:
      The items (indices into `lengths`) of each bin. Ties go to the item that
      comes first and to the bin opened last.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not (1 <= sizes.min() and sizes.max() <= capacity):
        raise ValueError(f"items must have 1 to {capacity} tokens.")
    bins: list[list[int]] = []
    bins_with_room: dict[int, list[int]] = collections.defaultdict(list)
    # Bit r is set while some bin has room for exactly r more: the tightest fit
    # is then the lowest set bit at or above the size, found without a search.
    rooms = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = bins_with_room[room].pop()
            if not bins_with_room[room]:
                rooms &= ~(1 << room)
            bins[number].append(item)
        else:
            room = capacity
            number = len(bins)
            bins.append([item])
        left = room - size
        if left:
            bins_with_room[left].append(number)
            rooms |= 1 << left
    return bins


def pack(lengths: Sequence[int], record_length: int) -> list[list[Piece]]:
    """Says which pieces of which documents make up each record.

    Args:
      lengths: tokens of each document; documents without tokens vanish.
      record_length: tokens of a record.

    Returns:
      The pieces of each record, in the order in which they stand in it: at
      most `record_length` tokens in all. Every token of every document is in
      exactly one piece.
    """
    pieces = cut(lengths, record_length)
    return [
        [pieces[item] for item in sorted(items)]
        for items in best_fit([len(piece) for piece in pieces], record_length)
    ]
