"""Reads the text of an optimised XLA program: computations, instructions, loop lengths.

Only what planning needs: shapes in bytes, operands, which computation calls which, and how
often each runs. XLA's own cost analysis counts the body of a loop once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|f4\w+|[suf]\d+|c64|c128)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its bytes, and whether it lies in the chip's main memory."""

    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      arrays: of the result, a tuple's one after the other.
      operands: names of instructions of the same computation.
      attributes: the text behind the operands.
      called: role ('calls', 'body', 'condition', 'branch', ...) and name of computations.
      argument: what stands between the parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    called: tuple[tuple[str, str], ...]
    argument: str
    is_root: bool

    @functools.cached_property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Bytes of the result that lie in main memory, and not in fast memory on the chip."""
        return sum(array.bytes for array in self.arrays if array.in_hbm)


class Computation:
    """Instructions in order; the last word is `root`'s."""

    def __init__(self, name: str):
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self.root: Instruction | None = None

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> those that read it."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    def parameter(self, index: int) -> Instruction | None:
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.argument == str(index):
                return instruction
        return None


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction that runs, and how often.

    Attributes:
      times: executions in one run of the program.
      scope: the computation whose instructions run one by one (the entry, a loop's
        body); instructions within a fusion belong to the scope of the fusion.
      exact: False if the length of a loop around it could not be read.
    """

    instruction: Instruction
    computation: Computation
    times: int
    scope: str
    exact: bool = True


class Module:
    """A whole program."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in _whole_lines(text):
            if current is None or not line.startswith(" "):
                found = _HEADER.match(line)
                if found:
                    current = Computation(found[2])
                    self.computations[found[2]] = current
                    if found[1]:
                        self.entry = found[2]
                elif line == "}":
                    current = None
                continue
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
                if instruction.is_root:
                    current.root = instruction
        if not self.entry:
            raise ValueError("this text holds no HLO program: there is no ENTRY computation")

    def visits(self, into_fusions: bool = True) -> Iterator[Visit]:
        """Every instruction that runs, with the product of the loop lengths around it."""
        yield from self._visit(self.entry, 1, self.entry, True, into_fusions)

    def _visit(self, name, times, scope, exact, into_fusions) -> Iterator[Visit]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, scope, exact)
            # An asynchronous call names what it runs at its start, and again at its end.
            if instruction.opcode in ("async-update", "async-done"):
                continue
            for role, called in instruction.called:
                if called not in self.computations:
                    continue
                if role == "body":
                    length = self.trip_count(computation, instruction)
                    yield from self._visit(
                        called, times * (length or 1), called, exact and length is not None,
                        into_fusions,
                    )
                elif role == "branch" or instruction.opcode in ("call", "async-start"):
                    yield from self._visit(called, times, scope, exact, into_fusions)
                elif role == "calls" and into_fusions:
                    yield from self._visit(called, times, scope, exact, into_fusions)

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often the body of a `while` runs, None if the text does not say.

        XLA notes it beside some loops. For others it follows from the condition
        'counter < constant', the counter's first value and its increment.
        """
        noted = re.search(r'known_trip_count[":{ ]+n[": ]+(\d+)', loop.attributes)
        if noted:
            return int(noted[1])
        roles = dict(loop.called)
        condition = self.computations.get(roles.get("condition", ""))
        body = self.computations.get(roles.get("body", ""))
        if condition is None or body is None or condition.root is None or body.root is None:
            return None
        limit, index, inclusive = self._limit(condition)
        if limit is None or index is None:
            return None
        start = self._start(computation, loop, index)
        step = self._step(body, index)
        if start is None or not step or step < 0:
            return None
        return max(0, math.ceil((limit + inclusive - start) / step))

    def _limit(self, condition: Computation) -> tuple[int | None, int | None, int]:
        """(constant, place of the counter in the loop's tuple, 1 if <= else 0)."""
        root = condition.root
        compare, names = root, root.operands
        if root.opcode == "fusion":
            inner = self.computations.get(dict(root.called).get("calls", ""))
            if inner is None or inner.root is None or inner.root.opcode != "compare":
                return None, None, 0
            compare = inner.root
            places = [inner.instructions.get(name) for name in compare.operands]
            names = []
            for place in places:
                if place is None:
                    return None, None, 0
                if place.opcode == "parameter":
                    names.append(root.operands[int(place.argument)])
                elif place.opcode == "constant":
                    names.append(place)
                else:
                    return None, None, 0
        if compare.opcode != "compare" or len(names) != 2:
            return None, None, 0
        found = re.search(r"direction=(\w+)", compare.attributes)
        direction = found[1] if found else ""
        sides = [n if isinstance(n, Instruction) else _origin(condition, n) for n in names]
        if direction in ("GT", "GE"):
            sides.reverse()
        elif direction not in ("LT", "LE"):
            return None, None, 0
        counter, limit = sides
        if counter is None or counter.opcode != "get-tuple-element":
            return None, None, 0
        place = re.search(r"index=(\d+)", counter.attributes)
        return _integer(limit), int(place[1]) if place else None, int(direction in ("LE", "GE"))

    def _start(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        state = _origin(computation, loop.operands[0])
        if state is None or state.opcode != "tuple" or index >= len(state.operands):
            return None
        return _integer(_origin(computation, state.operands[index]))

    def _step(self, body: Computation, index: int) -> int | None:
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return None
        scope, add = body, _origin(body, body.root.operands[index])
        if add is not None and add.opcode == "fusion":
            inner = self.computations.get(dict(add.called).get("calls", ""))
            outer = [_origin(body, name) for name in add.operands]
            if inner is None or inner.root is None or inner.root.opcode != "add":
                return None
            values = []
            for name in inner.root.operands:
                place = _origin(inner, name)
                if place is not None and place.opcode == "parameter":
                    place = outer[int(place.argument)]
                values.append(place)
        elif add is not None and add.opcode == "add":
            values = [_origin(scope, name) for name in add.operands]
        else:
            return None
        steps = [_integer(value) for value in values]
        counters = [
            value for value in values
            if value is not None and value.opcode == "get-tuple-element"
            and re.search(rf"index={index}\b", value.attributes)
        ]
        known = [step for step in steps if step is not None]
        return known[0] if len(known) == 1 and len(counters) == 1 else None


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those of one instruction put together: a kernel's attributes go over several."""
    begun = None
    for line in text.splitlines():
        if begun is not None and not line.startswith(" ") and line != "}":
            begun += line
            continue
        if begun is not None:
            yield begun
        begun = line if line.startswith("  ") else None
        if begun is None:
            yield line
    if begun is not None:
        yield begun


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    is_root = left.startswith("ROOT ")
    opcode = _OPCODE.search(" " + right)
    if opcode is None:
        return None
    shape = right[: max(opcode.start() - 1, 0)]
    begin = opcode.end() - 1
    depth, end = 1, begin
    while depth and end < len(right):
        depth += {"(": 1, ")": -1}.get(right[end], 0)
        end += 1
    argument, attributes = right[begin : end - 1], right[end:]
    called = [(role, name) for role, name in _CALLED.findall(attributes)]
    for names in _BRANCHES.findall(attributes):
        called += [("branch", name.strip().lstrip("%")) for name in names.split(",")]
    called = [
        ("branch" if role.endswith("_computation") else role, name) for role, name in called
    ]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"), opcode=opcode[1], arrays=_arrays(shape),
        operands=tuple(_NAME.findall(argument)), attributes=attributes, called=tuple(called),
        argument=argument.strip(), is_root=is_root,
    )


def _arrays(shape: str) -> tuple[Array, ...]:
    arrays = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        count = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        bits = _BITS.get(kind, 8 if kind.startswith("f8") else 4)
        # A number other than 0 after S is fast memory, flags or the host's.
        in_hbm = not re.search(r"S\([1-9]\d*\)", layout)
        arrays.append(Array(-(-count * bits // 8), in_hbm))
    return tuple(arrays)


def _origin(computation: Computation, name: str) -> Instruction | None:
    """The instruction that a name stands for, behind copies."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "copy-done",
                                                             "copy-start", "convert"):
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction


def _integer(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument) else None
