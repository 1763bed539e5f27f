"""Reading a compiled program: which collectives it runs, over which axes, how often, how large.

An HLO module is a list of computations; instructions call others. `collectives` walks from the
entry and multiplies: the body of a `while` counts as often as XLA says that the loop runs
(`known_trip_count`), so the scan over layers and the one over micro-batches come out as they are.
Where a loop ends on data, or a branch is chosen by it, no one knows: its collectives are counted
for one time through and marked `dynamic`.

Instructions stand in the order in which they are launched. A collective that is split into `-start`
and `-done` travels while whatever stands between the two runs: `meanwhile` counts the products.

Devices of a group are named by the axes of the mesh along which they differ. XLA writes groups
down in three ways, as names of axes, as lists of devices, and as a list reshaped and transposed;
devices are numbered along the mesh, its last axis fastest.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute")  # fmt: skip
COPIES = ("copy", "copy-start")
HOST = "S(5)"  # in a type: what lies in the host's memory
HOST_THREAD = 'async_execution_thread="host"'  # of what the host computes
# Asynchronous halves whose type is (operand, result, ...); of the others it is the result, unless
# XLA has wrapped an operation to make it asynchronous: ((operands), result, ...).
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
_FIRST = re.compile(r"\(%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]+)\}")
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
    meanwhile: float = 0.0  # FLOP of the products that are launched before it is waited for

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


class Transfer(NamedTuple):
    """A copy between a device's memory and its host's."""

    to_host: bool
    bytes: int
    times: int  # a step
    meanwhile: float  # as of a collective


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    called: tuple[str, ...]
    trips: int | None  # of a while; None where the program does not know
    flops: float  # of a product
    to_host: bool | None  # of a copy; None where it stays in one memory
    line: str


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that a step of the program `text` (`Compiled.as_text()`) runs on `mesh`.

    `mesh` maps its axes to their sizes, in order. Groups of one device are left out.
    """
    found = []
    for one, times, dynamic, meanwhile in _walked(text, lambda one: _kind(one.opcode)):
        axes, group = _group(one.line, mesh)
        kind = one.opcode.removesuffix("-start")
        if group > 1:
            found.append(Collective(kind, axes, group, one.shapes, times, dynamic, meanwhile))
    return found


def transfers(text: str) -> list[Transfer]:
    """Every copy between device and host that a step of the program runs."""
    return [
        Transfer(bool(one.to_host), one.shapes[0].bytes, times, meanwhile)
        for one, times, _, meanwhile in _walked(text, lambda one: one.to_host is not None)
    ]


def host_work(text: str) -> list[float]:
    """For each thing that the host computes: the FLOP of products that devices do meanwhile."""
    found = _walked(text, lambda one: one.opcode.endswith("-start") and HOST_THREAD in one.line)
    return [meanwhile for *_, meanwhile in found]


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry, and what calls, communicates or multiplies in every computation."""
    entry, here, program, types = "", "", {}, {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here, types = start[2], {}
            program[here] = []
            entry = here if start[1] else entry
        elif named := _INSTRUCTION.match(line):
            name, end = named[1], _end_of_type(line, named.end())
            types[name] = line[named.end() : end]
            if one := _instruction(name, line[end:], types):
                program[here].append(one)
    return entry, program


def _instruction(name: str, line: str, types: Mapping[str, str]) -> Instruction | None:
    opcode = line[: line.index("(")].strip()
    called = _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
        called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
    multiplies = opcode == "dot"
    travels = _kind(opcode) or opcode in COPIES or HOST_THREAD in line or opcode.endswith("-done")
    if not (called or multiplies or travels):
        return None
    trips = _TRIPS.search(line)
    shapes = _results(opcode, types[name])
    flops = _flops(shapes[0], line, types) if multiplies else 0.0
    to_host = _to_host(opcode, line, types[name], types) if opcode in COPIES else None
    number = int(trips[1]) if trips else None
    return Instruction(name, opcode, shapes, tuple(called), number, flops, to_host, line)


def _to_host(opcode: str, line: str, kind: str, types: Mapping[str, str]) -> bool | None:
    into, *source = _elements(kind) if opcode == "copy-start" else [kind]
    [origin, *_] = source or [types.get(_FIRST.findall(line)[0], "")]
    there, here = HOST in into, HOST in origin
    return None if there == here else there


def _flops(product: Shape, line: str, types: Mapping[str, str]) -> float:
    contracted = _CONTRACTED.search(line)
    if not contracted:
        return 0.0
    [shape] = _results("", types[_FIRST.findall(line)[0]])
    over = math.prod(shape.dims[int(d)] for d in contracted[1].split(","))
    return 2.0 * math.prod(product.dims) * over


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
    if opcode.endswith("-start"):
        first, *rest = _elements(kind)
        if opcode in WITH_OPERAND or first.startswith("("):
            kind = rest[0]
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


def _walked(
    text: str, wanted: Callable[[Instruction], Any]
) -> Iterator[tuple[Instruction, int, bool, float]]:
    """The instructions that are `wanted`: how often, whether that is known, FLOP meanwhile."""
    entry, program = computations(text)
    return _Walk(program, wanted).through(entry, 1, False)


class _Walk:
    """Through the computations that matter, each as often as it is called."""

    def __init__(self, program: Mapping[str, list[Instruction]], wanted: Callable):
        self.program, self.wanted = program, wanted
        self.flops = functools.cache(self._flops)
        self.matters = functools.cache(self._matters)

    def through(self, name: str, times: int, dynamic: bool) -> Iterator[tuple]:
        instructions = self.program[name]
        for place, one in enumerate(instructions):
            if self.wanted(one):
                yield one, times, dynamic, self._meanwhile(one, instructions[place + 1 :])
                continue
            unknown = one.opcode == "conditional" or (one.opcode == "while" and one.trips is None)
            for inner in one.called:
                if one.trips != 0 and self.matters(inner):
                    yield from self.through(inner, times * _trips(one), dynamic or unknown)

    def _matters(self, name: str) -> bool:
        return any(
            self.wanted(one) or any(map(self.matters, one.called)) for one in self.program[name]
        )

    def _meanwhile(self, start: Instruction, later: Sequence[Instruction]) -> float:
        """FLOP between a `-start` and its `-done`; 0 for what is waited for at once."""
        total = 0.0
        for one in later:
            if one.opcode.endswith("-done") and _FIRST.findall(one.line)[0] == start.name:
                return total
            total += self._work(one)
        return 0.0

    def _work(self, one: Instruction) -> float:
        return one.flops + _trips(one) * sum(map(self.flops, one.called))

    def _flops(self, name: str) -> float:
        return sum(map(self._work, self.program[name]))


def _trips(one: Instruction) -> int:
    return one.trips or 1 if one.opcode == "while" else 1


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
