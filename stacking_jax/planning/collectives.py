"""What devices send each other in one run of an optimised program.

Read from the program and not from the plan of the shardings: the compiler may turn a gather
into an all-reduce, merge several, or keep a value whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from stacking_jax.planning.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ALSO = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one form.

    Attributes:
      kind: one of `KINDS`.
      group: ids of the devices of one group, as the program numbers them.
      group_size: devices that take part together.
      calls: how often one is carried out, loops multiplied out.
      bytes: payload of each device over all calls: what an all-gather yields, what
        the others take in.
    """

    kind: str
    group: tuple[int, ...]
    group_size: int
    calls: int
    bytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends, by the algorithms that move the fewest.

        Rings, n devices: (n − 1)/n of the payload; twice that for an all-reduce, which is a
        reduce-scatter and an all-gather; a permutation sends it once.
        """
        if self.kind == "collective-permute":
            return float(self.bytes)
        share = (self.group_size - 1) / self.group_size
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


def collectives(module: Module, num_devices: int) -> tuple[list[Collective], bool]:
    """The collectives of one run of a program.

    An asynchronous pair counts once, and so do the pieces into which TPUs cut one to weave
    it into matrix products.

    Args:
      module: the optimised program.
      num_devices: that it runs on.

    Returns:
      The collectives, and whether all loop lengths around them could be read.
    """
    found: dict[tuple, list[int]] = {}
    woven: set[tuple[str, str]] = set()
    exact = True
    for visit in module.visits():
        instruction = visit.instruction
        kind = kind_of(instruction)
        if kind is None:
            continue
        chain = re.search(r'chain_id="(\w+)"', instruction.attributes)
        if chain is not None:
            if (visit.scope, chain[1]) in woven:
                continue
            woven.add((visit.scope, chain[1]))
        between = _SLICES.search(instruction.attributes)
        if between is not None:
            group, size = _one_of_each_slice(between[1], num_devices)
        else:
            group, size = group_of(instruction.attributes, num_devices)
        if size == 1 and kind != "collective-permute":
            continue  # Nobody else takes part.
        taken_in = _operand_bytes(visit.computation, instruction)  # A token has no bytes.
        payload = taken_in * size if kind == "all-gather" else taken_in
        total = found.setdefault((kind, group, size), [0, 0])
        total[0] += visit.times
        total[1] += visit.times * payload
        exact = exact and visit.exact
    rows = [
        Collective(kind, group, size, calls, payload)
        for (kind, group, size), (calls, payload) in found.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes), exact


def bytes_by_kind(rows: Sequence[Collective]) -> dict[str, int]:
    """Payload of each device in bytes, for every kind that there is."""
    return {
        kind: total for kind in KINDS
        if (total := sum(row.bytes for row in rows if row.kind == kind))
    }


def kind_of(instruction: Instruction) -> str | None:
    """Which collective an instruction is or begins; None for others and for the end of one."""
    name = instruction.opcode.removesuffix("-start")
    if name == "send":
        # Between slices a TPU's program hands its data to the host and names what is to be done.
        asked = _TRANSFER.search(instruction.attributes)
        if asked is None:
            return None
        kind = asked[1].lower().replace("_", "-")
        return kind if kind in KINDS else "collective-permute"
    return name if name in KINDS else _ALSO.get(name)


def group_of(attributes: str, num_devices: int) -> tuple[tuple[int, ...], int]:
    """(devices of the first group, their number), from a collective's attributes."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2])), 2
    everyone = tuple(range(num_devices))
    text = re.search(r"replica_groups=(.*)", attributes)
    if text is None:
        return everyone, num_devices
    listed = re.match(r"\{\{([\d,]+)\}", text[1])
    if listed:
        group = tuple(int(number) for number in listed[1].split(","))
        return group, len(group)
    # [groups, size]<=[dimensions], perhaps transposed: an iota, cut into rows.
    iota = re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text[1])
    if iota:
        ids = _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
        return tuple(map(int, ids[0])), ids.shape[1]
    axes = re.match(
        r"mesh\[([^\]]*)\](?:, ?device_ids=\(?\[[\d,]+\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)? "
        r"\{([^}]*)\}",
        text[1],
    )
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes[4])
        shape, over = [], []
        for name, size in sizes.items():
            part = [(int(pre), int(n)) for axis, pre, n in taken if axis == name and pre]
            if part:  # A part of an axis: the axis is (before, part, behind).
                before, within = part[0]
                over.append(len(shape) + 1)
                shape += [before, within, size // (before * within)]
            else:
                if name in [axis for axis, _, _ in taken]:
                    over.append(len(shape))
                shape.append(size)
        ids = _iota(axes[2] or str(int(np.prod(shape))), axes[3]).reshape(shape)
        rest = [axis for axis in range(len(shape)) if axis not in over]
        size = int(np.prod([shape[axis] for axis in over], dtype=int))
        return tuple(map(int, ids.transpose(rest + over).reshape(-1, size)[0])), size
    return everyone, num_devices


def _one_of_each_slice(slices: str, num_devices: int) -> tuple[tuple[int, ...], int]:
    """The first device of each slice: '1,2' or '1:2'. Slices are the mesh's outermost axis."""
    count = 0
    for part in slices.split(","):
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    return tuple(number * (num_devices // count) for number in range(count)), count


def _iota(dimensions: str, transposed: str | None) -> np.ndarray:
    sizes = [int(size) for size in dimensions.split(",")]
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    if transposed:
        ids = ids.transpose([int(axis) for axis in transposed.split(",")])
    return ids.reshape(-1)


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    operands = [computation.instructions.get(name) for name in instruction.operands]
    known = sum(operand.bytes for operand in operands if operand is not None)
    if instruction.opcode == "ragged-all-to-all" and operands[0] is not None:
        return operands[0].bytes
    return known
