"""Random PyTorch modules, by seed: views, writes through views, indexing, casts, reductions, elementwise ops.

A program is Python source, a line a step, grown while it runs in eager PyTorch: a step that eager refuses is not taken.
Inputs hold NaN, inf and -0.0 and are permuted, sliced, expanded or aliased. Finite numbers are multiples of 1/4, so that a
few sums and products are exact. What follows rounding never decides a branch: comparisons, sorts and casts to integers
take exact values only.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Steps whose result depends on the sign of a zero.
_READS_SIGNS = re.compile(r"copysign|signbit|atan2|div|reciprocal|rsqrt|/|\*\*|remainder|fmod|%|logaddexp")
GROUPS, LENGTH = 3, 9  # groups of steps, and steps of each
MOST = 400  # elements of a value
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NAMES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b1",
}  # fmt: skip
_WEIGHTS = {"write": 3, "view": 2, "take": 5}
STEPS: dict[str, list[Callable]] = {}  # by kind: functions of a program that give a line, or None


@dataclass
class Value:
    """A tensor that the program has so far.

    Attributes:
        error: the largest relative rounding error of the steps that it was computed by; 0 where none rounds.
        zeros: the sign of its zeros is not defined: of a maximum of 0.0 and -0.0, or after a sum.
    """

    name: str
    tensor: torch.Tensor
    error: float = 0.0
    zeros: bool = False

    @property
    def exact(self) -> bool:
        return not self.error

    @property
    def is_float(self) -> bool:
        return self.tensor.is_floating_point()

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


@dataclass
class Line:
    """A line of source, the names that it defines, and whether what it gives is exact where its operands are.

    Attributes:
        rounds: the result of floats is not exact.
        needs_exact: the operands must be exact.
        zeros: it chooses one of two values that compare equal, 0.0 and -0.0.
        writes: the value whose memory it writes.
    """

    text: str
    operands: Sequence[Value]
    results: int = 1
    rounds: bool = False
    needs_exact: bool = False
    writes: Value | None = None
    zeros: bool = False


@dataclass
class _Input:
    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def steps(kind: str):
    """Register a function as a step of a kind."""

    def register(function: Callable) -> Callable:
        STEPS.setdefault(kind, []).append(function)
        return function

    return register


def namespace(wide: bool = False) -> dict[str, Any]:
    """What a program's source refers to; with `wide`, every float dtype is f64."""
    names = {name: torch.float64 if wide and dtype.is_floating_point else dtype for dtype, name in NAMES.items()}
    return {"torch": torch, "F": torch.nn.functional, "nan": math.nan, "inf": math.inf, **names}


class Program:
    """A random program.

    Attributes:
        lines: the body, without the return.
        returned: names of what it gives.
        differentiable: inputs are finite floats, and gradients with respect to them exist.
    """

    def __init__(self, seed: int, *, differentiable: bool = False, without: Collection[str] = ()):
        """Grow a program.

        Args:
            without: kinds of steps to leave out (see `STEPS`); "aliased" inputs, and "layouts" but row-major ones.
        """
        self.rng = random.Random(seed)
        self.differentiable = differentiable
        self.bases: list[torch.Tensor] = []
        self.inputs: list[_Input] = []
        self.lines: list[str] = []
        self.values: list[Value] = []  # of the group that is growing
        self._live: list[torch.Tensor] = []
        self._numbers = torch.Generator().manual_seed(seed)
        self._count = 0
        self.returned: list[str] = []
        self._errors: dict[str, float] = {}
        self._unsigned: set[str] = set()
        for _ in range(GROUPS):
            self._grow([f for kind, functions in STEPS.items() if kind not in without for f in functions], without)

    def _grow(self, functions: Sequence[Callable], without: Collection[str]) -> None:
        """Grow a group of steps, of inputs of its own: groups share what capturing a module costs."""
        self.values, self._consumed, self._most_inputs = [], set(), len(self.inputs) + 8
        for _ in range(self.rng.randint(1, 3)):
            self._first_input(without)
        weights = [_WEIGHTS.get(f.__name__.split("_")[0], 2) for f in functions]
        end = len(self.lines) + LENGTH
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(LENGTH * 8):
                line = self.rng.choices(functions, weights)[0](self) if len(self.lines) < end else None
                if line is not None:
                    self._try(line)
        self.returned += self._results()
        self._errors |= {v.name: v.error for v in self.values}
        self._unsigned |= {v.name for v in self.values if v.zeros}

    def has_room(self) -> bool:
        """Return whether the group may have another input."""
        return len(self.inputs) < self._most_inputs

    @property
    def source(self) -> str:
        """The program as a function of `self` and its inputs."""
        return source(self.all_lines, self.returned, len(self.inputs))

    @property
    def all_lines(self) -> list[str]:
        """The body: where inputs require gradients, they are copied first, so that they can be written."""
        return [*(f"a{i} = a{i}.clone()" for i in self.leaves()), *self.lines]

    def leaves(self) -> list[int]:
        """Return the inputs that gradients are taken with respect to."""
        places = enumerate(self.inputs) if self.differentiable else []
        return [i for i, place in places if self.bases[place.base].is_floating_point()]

    def make_inputs(self, wide: bool = False) -> list[torch.Tensor]:
        """Return fresh inputs; with `wide`, floats are f64. Those that share memory share it here too."""
        bases = [b.double() if wide and b.is_floating_point() else b.clone() for b in self.bases]
        return [bases[i.base].as_strided(i.size, i.stride, i.offset) for i in self.inputs]

    # Inputs

    def _first_input(self, without: Collection[str]) -> None:
        dtype = self.rng.choices([*FLOATS, *INTEGERS, torch.bool], [6, 2, 1, 1, 2, 1, 1, 1, 1, 2])[0]
        if self.differentiable:
            dtype = self.rng.choices(FLOATS[:2], [4, 1])[0]
        shape = self.shape()
        if self.values and "aliased" not in without and self.rng.random() < 0.1:
            other = self.inputs[int(self.values[0].name[1:])]
            return self.add_input(None, _Input(other.base, other.size[::-1], other.stride[::-1], other.offset))
        kind = self.rng.random()
        if kind < 0.5 or not shape or "layouts" in without:
            return self.add_input(self.numbers(shape, dtype))
        if kind < 0.7:  # permuted
            order = self.rng.sample(range(len(shape)), len(shape))
            view = self.numbers([shape[d] for d in order], dtype).permute([order.index(d) for d in range(len(shape))])
        elif kind < 0.9:  # sliced, with steps
            steps = [self.rng.randint(1, 2) for _ in shape]
            starts = [self.rng.randint(0, 1) for _ in shape]
            wide = [a + n * k for a, n, k in zip(starts, shape, steps, strict=True)]
            key = tuple(slice(a, w, k) for a, w, k in zip(starts, wide, steps, strict=True))
            view = self.numbers(wide, dtype)[key]
        else:
            view = self.numbers([n if self.rng.random() < 0.5 else 1 for n in shape], dtype).expand(shape)
        size, stride, offset = tuple(view.shape), view.stride(), view.storage_offset()
        self.add_input(view, _Input(len(self.bases), size, stride, offset))

    def add_input(self, tensor: torch.Tensor | None, place: _Input | None = None) -> Value:
        """Add an input: a tensor whose storage becomes a base, or a view of a base there is."""
        if tensor is not None:
            whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            place = place or _Input(len(self.bases), tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            self.bases.append(whole.clone())
            self._live.append(whole.clone())
        assert place is not None
        self.inputs.append(place)
        live = self._live[place.base].as_strided(place.size, place.stride, place.offset)
        value = Value(f"a{len(self.inputs) - 1}", live)
        self.values.append(value)
        return value

    def shape(self) -> list[int]:
        """Return a random shape of up to four dimensions."""
        sizes = [
            self.rng.choices([1, 2, 3, 4, 5, 0], [3, 6, 6, 4, 2, 0.2])[0]
            for _ in range(self.rng.choices(range(5), [1, 3, 5, 4, 1])[0])
        ]
        return sizes if math.prod(sizes) <= MOST else sizes[:2]

    def numbers(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return random numbers, special ones among them."""
        shape = tuple(shape)
        if dtype == torch.bool:
            return torch.rand(shape, generator=self._numbers) < 0.5
        if not dtype.is_floating_point:
            low = 0 if dtype == torch.uint8 else -9
            drawn = torch.randint(low, 10, shape, generator=self._numbers).to(dtype)
            if self.rng.random() < 0.15:
                bounds = torch.iinfo(dtype)
                drawn = self._sprinkled(drawn, [bounds.max, bounds.min, bounds.max - 1])
            return drawn
        drawn = torch.randint(-16, 17, shape, generator=self._numbers).to(torch.float64) / 4
        if not self.differentiable and self.rng.random() < 0.5:
            drawn = self._sprinkled(drawn, [math.nan, math.inf, -math.inf, -0.0, 0.0])
        return drawn.to(dtype)

    def _sprinkled(self, tensor: torch.Tensor, specials: Sequence[Any]) -> torch.Tensor:
        where = torch.rand(tensor.shape, generator=self._numbers) < 0.15
        which = torch.randint(len(specials), tensor.shape, generator=self._numbers)
        return torch.where(where, torch.tensor(specials, dtype=tensor.dtype)[which], tensor)

    # Choices for steps

    def pick(self, test: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """Return a value that passes a test, of late ones more often; None where there is none."""
        values = [v for v in self.values if test(v) and v.tensor.dtype != torch.float8_e5m2]
        return self.rng.choices(values, range(1, len(values) + 1))[0] if values else None

    def partner(self, x: Value, test: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """Return a value that broadcasts with another: one there is, or a new input."""
        values = [v for v in self.values if test(v) and _broadcasts(v.shape, x.shape)]
        if values and self.rng.random() < 0.7:
            return self.rng.choice(values)
        shape = [n if self.rng.random() < 0.7 else 1 for n in x.shape[self.rng.randint(0, x.tensor.ndim) :]]
        dtype = x.tensor.dtype if self.rng.random() < 0.5 else self.rng.choice([*FLOATS, *INTEGERS, torch.bool])
        value = Value("", self.numbers(shape, dtype))
        return self.add_input(value.tensor) if test(value) and self.has_room() else None

    def dim(self, x: Value) -> int:
        """Return a dimension, counted from the front or from the end."""
        return self.rng.randrange(-x.tensor.ndim, x.tensor.ndim)

    def index(self, shape: Sequence[int], size: int, *, negative: bool = True) -> Value | None:
        """Return a new input of indices below a size."""
        if not size or not self.has_room():
            return None
        low = -size if negative and self.rng.random() < 0.5 else 0
        return self.add_input(torch.randint(low, size, tuple(shape), generator=self._numbers))

    def distinct(self, count: int, size: int) -> Value | None:
        """Return a new input of distinct indices below a size."""
        if count > size or not self.has_room():
            return None
        return self.add_input(torch.randperm(size, generator=self._numbers)[:count])

    def scalar(self, x: Value) -> str:
        """Return a Python number for an operand: now and then of another kind than the tensor's."""
        if self.rng.random() < 0.1:
            return self.rng.choice(["True", "2", "0.5", "-0.0"])
        if x.is_float:
            special = [] if self.differentiable else ["nan", "inf", "-inf", "-0.0"]
            return self.rng.choice(["0.5", "-1.5", "2", "0", "1.0", "-3", *special])
        return self.rng.choice(["True", "False"] if x.tensor.dtype == torch.bool else ["1", "2", "3", "5", "7"])

    # Growing

    def _try(self, line: Line) -> None:
        if line.needs_exact and not all(v.exact for v in line.operands):
            return
        if _READS_SIGNS.search(line.text) and any(v.zeros for v in line.operands):
            return
        if line.writes is not None and not _is_defined(line):
            return
        names = [f"v{self._count + i}" for i in range(line.results)]
        text = f"{', '.join(names)} = {line.text}" if names else line.text
        scope = {**namespace(), **{v.name: v.tensor for v in self.values}}
        try:
            exec(text, scope)
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, ZeroDivisionError):
            return
        results = [scope[name] for name in names]
        if any(not isinstance(r, torch.Tensor) or r.numel() > MOST or r.dtype not in NAMES for r in results):
            return  # (a write that was refused has changed nothing)
        error, zeros = (
            max(v.error for v in line.operands),
            any(v.zeros for v in line.operands) or line.zeros or line.rounds,
        )
        self._count += line.results
        self.lines.append(text)
        self._consumed |= {v.name for v in line.operands}
        for name, result in zip(names, results, strict=True):
            own = _error(result) * line.rounds
            self.values.append(Value(name, result, max(error, own), zeros and result.is_floating_point()))
        if line.writes is not None:
            error = max(error, _error(line.writes.tensor) * line.rounds)
            memory = line.writes.tensor.untyped_storage().data_ptr()
            for value in self.values:
                if value.tensor.untyped_storage().data_ptr() == memory:
                    value.error, value.zeros = max(value.error, error), value.zeros or zeros

    def _results(self) -> list[str]:
        computed = [v.name for v in self.values if v.name.startswith("v")]
        last = [n for n in computed if n not in self._consumed]
        some = self.rng.sample(computed, min(2, len(computed)))
        return list(dict.fromkeys([*last, *some]))[-4:]

    def errors(self) -> dict[str, float]:
        """Return the rounding errors of values, by name."""
        return self._errors

    def unsigned(self) -> set[str]:
        """Return the names of values whose zeros have no defined sign."""
        return self._unsigned


def _error(tensor: torch.Tensor) -> float:
    """A dtype's relative rounding error."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def _broadcasts(a: Sequence[int], b: Sequence[int]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def _addresses(tensor: torch.Tensor) -> list[int]:
    """Where a tensor's elements lie, in bytes."""
    place = torch.tensor(tensor.data_ptr())
    for n, s in zip(tensor.shape, tensor.stride(), strict=True):
        place = place[..., None] + torch.arange(n) * s * tensor.element_size()
    return place.flatten().tolist()


def _is_defined(line: Line) -> bool:
    """Return whether a write's result is defined: no element lies twice, and none is read at another place of the target."""
    assert line.writes is not None
    written = _addresses(line.writes.tensor)
    if len(set(written)) < len(written):
        return False
    for value in line.operands[1:]:
        if value is not line.writes and not set(written).isdisjoint(places := _addresses(value.tensor)):
            return places == written
    return True


def source(lines: Sequence[str], returned: Sequence[str], count: int) -> str:
    """Return a program as a function of `self` and its inputs."""
    arguments = ", ".join(["self", *(f"a{i}" for i in range(count))])
    body = "\n    ".join([*lines, f"return ({', '.join(returned)}{',' if returned else ''})"])
    return f"def forward({arguments}):\n    {body}\n"


def as_module(text: str, wide: bool = False) -> torch.nn.Module:
    """Return a program's source as a module."""
    scope = namespace(wide)
    exec(compile(text, "<program>", "exec"), scope)
    return type("Program", (torch.nn.Module,), {"forward": scope["forward"]})()
