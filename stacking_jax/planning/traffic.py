"""How many bytes an optimised program reads from and writes to a chip's main memory.

What fusions keep in registers and what the compiler placed in fast memory on the chip does
not count; a slice of a larger array counts for itself; loops are multiplied out.
"""

from __future__ import annotations

from stacking_jax.planning.hlo import Computation, Instruction, Module

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-start",
    "async-update", "async-done", "add-dependency", "domain", "get-dimension-size",
}
_SLICES = {"dynamic-slice", "slice", "gather"}


def hbm_bytes(module: Module) -> int:
    """Bytes of main memory that one run reads and writes, per device."""
    reader = _Reader(module)
    total = 0
    for visit in module.visits(into_fusions=False):
        instruction = visit.instruction
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
            continue
        total += visit.times * reader.moved(visit.computation, instruction)
    return total


class _Reader:
    """Bytes per instruction; what it finds out of a fusion it finds out once."""

    def __init__(self, module: Module):
        self._module = module
        self._read: dict[tuple[str, int], int | None] = {}

    def moved(self, computation: Computation, instruction: Instruction) -> int:
        return self._written(computation, instruction) + sum(
            self._taken(computation, instruction, index)
            for index in range(len(instruction.operands))
        )

    def _taken(self, computation: Computation, instruction: Instruction, index: int) -> int:
        """What an instruction reads of one operand."""
        operand = computation.instructions.get(instruction.operands[index])
        if operand is None or not operand.hbm_bytes:
            return 0
        opcode = instruction.opcode
        if opcode in _SLICES and index == 0:
            return min(operand.hbm_bytes, instruction.bytes)
        if opcode in ("dynamic-update-slice", "scatter") and index == 0:
            return 0  # In place.
        if opcode == "fusion":
            part = self._of_parameter(dict(instruction.called).get("calls", ""), index)
            if part is not None:
                return min(operand.hbm_bytes, part)
        return operand.hbm_bytes

    def _of_parameter(self, name: str, index: int) -> int | None:
        """Bytes that a fusion reads of a parameter; None for all of it."""
        key = (name, index)
        if key not in self._read:
            self._read[key] = None  # A guard; programs do not call themselves.
            computation = self._module.computations.get(name)
            parameter = computation.parameter(index) if computation else None
            if parameter is not None:
                self._read[key] = self._of_value(computation, parameter)
        return self._read[key]

    def _of_value(self, computation: Computation, value: Instruction) -> int | None:
        total = 0
        for user in computation.users[value.name]:
            place = user.operands.index(value.name)
            if user.opcode in _SLICES and place == 0:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue
            elif user.opcode == "bitcast":
                part = self._of_value(computation, user)
                if part is None:
                    return None
                total += part
            elif user.opcode == "fusion":
                part = self._of_parameter(dict(user.called).get("calls", ""), place)
                if part is None:
                    return None
                total += part
            else:
                return None
        return total

    def _written(self, computation: Computation, instruction: Instruction) -> int:
        if not instruction.hbm_bytes:
            return 0
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            place = 1 if instruction.opcode == "dynamic-update-slice" else -1
            update = computation.instructions.get(instruction.operands[place])
            return instruction.hbm_bytes if update is None else update.bytes
        if instruction.opcode == "fusion":
            part = self._of_root(dict(instruction.called).get("calls", ""))
            if part is not None:
                return min(instruction.hbm_bytes, part)
        if instruction.opcode == "copy-start":  # (to, from, context)
            return instruction.arrays[0].bytes if instruction.arrays[0].in_hbm else 0
        return instruction.hbm_bytes

    def _of_root(self, name: str) -> int | None:
        """Bytes that a fusion writes, where its root updates a part of an array."""
        computation = self._module.computations.get(name)
        root = computation.root if computation else None
        if root is None:
            return None
        parts = [root.name] if root.opcode != "tuple" else list(root.operands)
        return sum(self._of_result(computation, part) for part in parts)

    def _of_result(self, computation: Computation, name: str) -> int:
        value = computation.instructions.get(name)
        while value is not None and value.opcode == "bitcast":
            value = computation.instructions.get(value.operands[0])
        if value is None:
            return 0
        if value.opcode == "dynamic-update-slice":
            update = computation.instructions.get(value.operands[1])
            return update.bytes if update is not None else value.bytes
        if value.opcode == "fusion":
            part = self._of_root(dict(value.called).get("calls", ""))
            return value.bytes if part is None else part
        return value.bytes
