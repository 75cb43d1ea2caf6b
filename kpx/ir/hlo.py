"""A compiler's optimized program (HLO text), read: computations, instructions, loops and how often they run."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

_BITS = {
    "pred": 8, "s2": 2, "s4": 4, "s8": 8, "s16": 16, "s32": 32, "s64": 64, "u2": 2, "u4": 4, "u8": 8, "u16": 16,
    "u32": 32, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """An array: its element type (HLO's name for it), its shape, and the memory it lies in (0: the device's own)."""

    element: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.element, 4 if self.element.startswith("f4") else 8)  # f8 in all its forms
        return (self.size * bits + 7) // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        results: its result, or a tuple's elements, flat.
        operands: names of what it takes.
        arguments: the text between its parentheses.
        attributes: the text after them.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of its results."""
        return sum(a.bytes for a in self.results)

    def attribute(self, name: str) -> str:
        """An attribute's text, braces left out; empty where it has none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.attributes)
        return (found[1] if found[1] is not None else found[2]) if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute's numbers."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(name))))

    @functools.cached_property
    def operation(self) -> str:
        """The path of names that it comes from: `jit(f)/layer/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def callees(self) -> tuple[str, ...]:
        """Names of the computations that it runs (a reduction's combiner, and the like, included)."""
        found = re.findall(
            r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", self.attributes
        )
        branches = self.attribute("branch_computations")
        return (*found, *re.findall(r"%?([\w.\-]+)", branches))

    def callee(self, name: str) -> str | None:
        """The computation of one attribute, as `body`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order in which they are scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


class Program:
    """An HLO module.

    Attributes:
        computations: by name.
        entry: the one that runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry, name, lines = None, None, []
        self._frames = _Frames()
        for line in text.splitlines():
            if name is None:
                self._frames.read(line)
                header = _HEADER.match(line)
                if header and " -> " in line:
                    name, lines = header[2], []
                    entry = name if header[1] else entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, tuple(filter(None, map(_instruction, lines))))
                name = None
            else:
                lines.append(line)
        self.entry = self.computations[entry] if entry else Computation("", ())

    def source(self, instruction: Instruction) -> tuple[str, str]:
        """The function that an instruction was written in, and `file:line`; empty where its compiler does not say."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self._frames.source(int(found[1])) if found else ("", "")

    def trip_count(self, loop: Instruction, within: Computation) -> int:
        """How often a while loop's body runs: as its compiler says, or by its counter; 1 where neither tells."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition = self.computations.get(loop.callee("condition") or "")
        if condition is None:
            return 1
        compared = self._inside(condition, condition.root)
        if compared is None:
            return 1
        computation, root = compared
        limit = next((c for c in (_constant(computation, o) for o in root.operands) if c is not None), None)
        if limit is None and computation is not condition:  # the limit is handed to the fusion that compares
            limit = next((c for c in (_constant(condition, o) for o in condition.root.operands) if c is not None), None)
        direction = root.attribute("direction")
        if limit is None or direction not in ("LT", "LE", "GT", "NE"):
            return 1
        start = self._start(loop, within, condition)
        return max(abs(limit - start) + (direction == "LE"), 1)

    def _inside(self, computation: Computation, root: Instruction) -> tuple[Computation, Instruction] | None:
        """A comparison, looked for inside the fusions that wrap it."""
        while root.opcode == "fusion" and (inner := self.computations.get(root.callee("calls") or "")):
            computation, root = inner, inner.root
        return (computation, root) if root.opcode == "compare" else None

    def _start(self, loop: Instruction, within: Computation, condition: Computation) -> int:
        """A loop's counter before its first round; 0 where it cannot be told."""
        read = next((i for i in condition.instructions if i.opcode == "get-tuple-element"), None)
        given = within.by_name.get(loop.operands[0]) if loop.operands else None
        if read is None or given is None or given.opcode != "tuple":
            return 0
        index = read.numbers("index")
        return _constant(within, given.operands[index[0]]) or 0 if index else 0


class _Frames:
    """The tables of source places in front of a module's computations."""

    def __init__(self):
        self._table = ""
        self._names: dict[tuple[str, int], str] = {}
        self._numbers: dict[tuple[str, int], dict[str, int]] = {}

    def read(self, line: str) -> None:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            self._table = line
        elif self._table and (named := re.match(r'(\d+) "(.*)"$', line)):
            self._names[self._table, int(named[1])] = named[2]
        elif self._table and (numbered := re.match(r"(\d+) \{(.*)\}$", line)):
            pairs = re.findall(r"(\w+)=(\d+)", numbered[2])
            self._numbers[self._table, int(numbered[1])] = {name: int(n) for name, n in pairs}

    def source(self, frame: int) -> tuple[str, str]:
        place = self._numbers.get(("StackFrames", frame), {}).get("file_location_id", 0)
        location = self._numbers.get(("FileLocations", place), {})
        file = self._names.get(("FileNames", location.get("file_name_id", 0)), "")
        function = self._names.get(("FunctionNames", location.get("function_name_id", 0)), "")
        return function, f"{file}:{location.get('line', 0)}" if file else ""


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\))?[^}S]*\})?")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    results = tuple(_arrays(rest[:end]))
    opcode, _, rest = rest[end:].lstrip().partition("(")
    close = _closing("(" + rest) - 1
    arguments, attributes = rest[:close], rest[close + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(head[2], opcode, results, operands, arguments, attributes, bool(head[1]))


def _closing(text: str) -> int:
    """Where the parenthesis closes that a text begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text) - 1


def _arrays(text: str) -> list[Array]:
    found = []
    for element, dims, space in _ARRAY.findall(text):
        if element not in ("token", "opaque"):
            found.append(
                Array(element, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n), int(space or 0))
            )
    return found


def _constant(computation: Computation, name: str) -> int | None:
    """An integer constant, looked for behind copies."""
    found = computation.by_name.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
        found = computation.by_name.get(found.operands[0])
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.arguments.strip()):
        return None
    return int(found.arguments)
