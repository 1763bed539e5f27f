"""Reading a compiled program: which collectives it runs, over which axes, how often, how large.

An HLO module is a list of computations; instructions call others. `collectives` walks from the
entry and multiplies: the body of a `while` counts as often as XLA says that the loop runs
(`known_trip_count`), so the scan over layers and the one over micro-batches come out as they are.
Where a loop ends on data, or a branch is chosen by it, no one knows: its collectives are counted
for one time through and marked `dynamic`.

Devices of a group are named by the axes of the mesh along which they differ. XLA writes groups
down in three ways, as names of axes, as lists of devices, and as a list reshaped and transposed;
devices are numbered along the mesh, its last axis fastest.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute")  # fmt: skip
# Asynchronous halves whose type is (operand, result, ...); of the others it is the result.
WITH_OPERAND = ("all-gather-start", "collective-permute-start", "ragged-all-to-all-start")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BY_NAME = re.compile(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}")
_BY_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_BY_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BITS = re.compile(r"^[a-z]+(\d+)")


class Shape(NamedTuple):
    """An array in the program."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS.match(self.dtype)
        return math.prod(self.dims) * (int(bits[1]) if bits else 8) // 8


class Collective(NamedTuple):
    """One instruction; `shapes` are what it leaves on a device."""

    kind: str  # of KINDS
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
    group: int  # devices that take part together
    shapes: tuple[Shape, ...]
    times: int  # a step; one time through where `dynamic`
    dynamic: bool

    @property
    def dtype(self) -> str:
        return self.shapes[0].dtype

    @property
    def whole(self) -> int:
        """Bytes of the array that the group works on, once; of a device's own for all-to-all."""
        left = sum(shape.bytes for shape in self.shapes)
        return left * self.group if self.kind == "reduce-scatter" else left

    @property
    def sent(self) -> float:
        """Bytes that each device must send, once: the least that any algorithm does."""
        others = 1 - 1 / self.group
        factor = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return factor * self.whole

    @property
    def rows(self) -> int:
        """Rows of the buffer that an exchange of rows fills: [n, m, ...] or, ragged, [m, ...]."""
        leading = 1 if self.kind == "ragged-all-to-all" else 2
        return sum(math.prod(shape.dims[:leading]) for shape in self.shapes)


class Instruction(NamedTuple):
    opcode: str
    shapes: tuple[Shape, ...]
    called: tuple[str, ...]
    trips: int | None  # of a while; None where the program does not know
    line: str


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that a step of the program `text` (`Compiled.as_text()`) runs on `mesh`.

    `mesh` maps its axes to their sizes, in order. Groups of one device are left out.
    """
    entry, program = computations(text)
    found = [*_walk(program, entry, 1, False, _with_collectives(program), mesh)]
    return [one for one in found if one.group > 1]


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry, and the instructions of every computation that call or communicate."""
    entry, here, program = "", "", {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = start[2]
            program[here] = []
            entry = here if start[1] else entry
        elif (named := _INSTRUCTION.match(line)) and (one := _instruction(line, named.end())):
            program[here].append(one)
    return entry, program


def _instruction(line: str, start: int) -> Instruction | None:
    end = _end_of_type(line, start)
    opcode = line[end : line.index("(", end)].strip()
    called = _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
        called += [name.strip().lstrip("%") for name in branches[1].split(",")]
    if _kind(opcode) is None and not called:
        return None
    trips = _TRIPS.search(line)
    shapes = _results(opcode, line[start:end])
    return Instruction(opcode, shapes, tuple(called), int(trips[1]) if trips else None, line[end:])


def _end_of_type(line: str, start: int) -> int:
    """Where the type that begins at `start` ends: a word, or a tuple in parentheses."""
    if line[start] != "(":
        return line.index(" ", start)
    depth = 0
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"a type that does not end: {line[:80]}")


def _results(opcode: str, kind: str) -> tuple[Shape, ...]:
    if opcode in WITH_OPERAND:
        kind = _elements(kind)[1]
    found = _SHAPE.findall(kind)
    return tuple(Shape(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in found)


def _elements(kind: str) -> list[str]:
    """The types in a tuple."""
    parts, depth = [""], 0
    for letter in kind[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def _with_collectives(program: Mapping[str, list[Instruction]]) -> set[str]:
    """The computations that communicate, themselves or through those that they call."""
    found: set[str] = set()
    grown = True
    while grown:
        before = len(found)
        for name, instructions in program.items():
            if any(_kind(i.opcode) or found & set(i.called) for i in instructions):
                found.add(name)
        grown = len(found) > before
    return found


def _walk(
    program: Mapping[str, list[Instruction]], name: str, times: int, dynamic: bool,
    worthwhile: set[str], mesh: Mapping[str, int],
) -> Iterator[Collective]:  # fmt: skip
    for one in program[name]:
        if kind := _kind(one.opcode):
            axes, group = _group(one.line, mesh)
            yield Collective(kind, axes, group, one.shapes, times, dynamic)
            continue
        unknown = one.opcode == "conditional" or (one.opcode == "while" and one.trips is None)
        trips = one.trips or 1 if one.opcode == "while" else 1
        if one.opcode == "while" and one.trips == 0:
            continue
        for inner in one.called:
            if inner in worthwhile:
                inside = times * trips, dynamic or unknown
                yield from _walk(program, inner, *inside, worthwhile, mesh)


def _group(attributes: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the devices of a group differ, and how many they are."""
    if named := _BY_NAME.search(attributes):
        listed = re.findall(r"'(\w+)'", named[1])
        axes = tuple(axis for axis in mesh if axis in listed and mesh[axis] > 1)
        return axes, math.prod(mesh[axis] for axis in axes)
    ids = _devices(attributes, math.prod(mesh.values()))
    places = np.stack(np.unravel_index(ids, tuple(mesh.values())), axis=-1)  # [groups, n, axes]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(a for a, d in zip(mesh, differ, strict=True) if d), ids.shape[1]


def _devices(attributes: str, size: int) -> np.ndarray:
    """The groups as device numbers, [groups, n]."""
    if iota := _BY_IOTA.search(attributes):
        shape = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(shape))
        numbers = np.arange(size).reshape(shape).transpose(order)
        return numbers.reshape(int(iota[1]), int(iota[2]))
    listed = _BY_LIST.search(attributes)
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    if not groups:  # all devices together
        return np.arange(size)[None]
    return np.array([[int(n) for n in group.split(",")] for group in groups])
