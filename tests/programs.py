"""Random StableHLO programs, by seed: elementwise, dots, reductions, movement, selects, control flow."""

from __future__ import annotations

import numpy as np

_UNARY = ["negate", "abs", "tanh", "exponential", "logistic", "floor"]
_BINARY = ["add", "subtract", "multiply", "maximum", "minimum"]


class Program:
    """Grows a function of a few arguments, op by op; `text` is the module."""

    def __init__(self, seed: int, length: int = 14):
        self.rng = np.random.default_rng(seed)
        self.lines: list[str] = []
        self.values: list[tuple[str, tuple[int, ...]]] = []
        self.count = 0
        shapes = [tuple(int(n) for n in self.rng.integers(1, 5, self.rng.integers(0, 4))) for _ in range(3)]
        self.arguments = [(f"%a{i}", shape) for i, shape in enumerate(shapes)]
        self.values += self.arguments
        steps = [
            self.unary, self.binary, self.binary, self.transpose, self.transpose, self.reshape, self.broadcast,
            self.reduce, self.dot, self.slice, self.concatenate, self.pad, self.select, self.constant,
            self.identity, self.loop, self.branch, self.convert, self.reverse, self.integers,
        ]  # fmt: skip
        for _ in range(length):
            steps[self.rng.integers(len(steps))]()

    @property
    def text(self) -> str:
        results = self.values[-3:]
        arguments = ", ".join(f"{name}: {tensor(shape)}" for name, shape in self.arguments)
        types = ", ".join(tensor(shape) for _, shape in results)
        names = ", ".join(name for name, _ in results)
        body = "\n  ".join(self.lines)
        return f"func.func @main({arguments}) -> ({types}) {{\n  {body}\n  return {names} : {types}\n}}"

    def emit(self, shape, right: str) -> str:
        name = self.bare(right)
        self.values.append((name, tuple(int(n) for n in shape)))
        return name

    def bare(self, right: str) -> str:
        name = f"%v{self.count}"
        self.count += 1
        self.lines.append(f"{name} = {right}")
        return name

    def pick(self) -> tuple[str, tuple[int, ...]]:
        return self.values[self.rng.integers(len(self.values))]

    def number(self) -> str:
        return str(self.rng.choice(["0.0", "-0.0", "1.0", "2.0", "4.0", "-1.0", "0.3", "0.5"]))

    def full(self, shape, number: str) -> str:
        return self.bare(f"stablehlo.constant dense<{number}> : {tensor(shape)}")

    # Steps

    def unary(self):
        name, shape = self.pick()
        self.emit(shape, f"stablehlo.{self.rng.choice(_UNARY)} {name} : {tensor(shape)}")

    def binary(self):
        a, shape = self.pick()
        same = [n for n, s in self.values if s == shape]
        b = str(self.rng.choice(same)) if self.rng.random() < 0.6 else self.full(shape, self.number())
        a, b = (a, b) if self.rng.random() < 0.5 else (b, a)
        kind = "divide" if b.startswith("%v") and self.rng.random() < 0.2 else self.rng.choice(_BINARY)
        self.emit(shape, f"stablehlo.{kind} {a}, {b} : {tensor(shape)}")

    def constant(self):
        shape = self.pick()[1]
        self.emit(shape, f"stablehlo.constant dense<{self.number()}> : {tensor(shape)}")

    def identity(self):
        """What a canonicalizer removes: an operation with its neutral number."""
        name, shape = self.pick()
        kind, number = [("multiply", "1.0"), ("add", "-0.0"), ("subtract", "0.0"), ("divide", "1.0")][
            self.rng.integers(4)
        ]
        self.emit(shape, f"stablehlo.{kind} {name}, {self.full(shape, number)} : {tensor(shape)}")

    def transpose(self):
        name, shape = self.pick()
        order = [int(d) for d in self.rng.permutation(len(shape))]
        result = [shape[d] for d in order]
        self.emit(result, f"stablehlo.transpose {name}, dims = {order} : ({tensor(shape)}) -> {tensor(result)}")

    def reshape(self):
        name, shape = self.pick()
        total = int(np.prod(shape))
        options = [(total,), (1, total), (total, 1), (*shape, 1), (1, *shape)]
        options += [(k, total // k) for k in (2, 3, 4) if total % k == 0]
        result = options[self.rng.integers(len(options))]
        self.emit(result, f"stablehlo.reshape {name} : ({tensor(shape)}) -> {tensor(result)}")

    def broadcast(self):
        name, shape = self.pick()
        rank = min(len(shape) + int(self.rng.integers(0, 2)), 4)
        if rank < len(shape):
            return
        along = sorted(int(d) for d in self.rng.choice(rank, len(shape), replace=False))
        if self.rng.random() < 0.3:
            along = [int(d) for d in self.rng.permutation(along)]
        result = [int(self.rng.integers(1, 4)) for _ in range(rank)]
        for d, n in zip(along, shape, strict=True):
            result[d] = n if n != 1 else int(self.rng.integers(1, 4))
        if np.prod(result) > 512:
            return
        self.emit(result, f"stablehlo.broadcast_in_dim {name}, dims = {along} : ({tensor(shape)}) -> {tensor(result)}")

    def reduce(self):
        name, shape = self.pick()
        if not shape:
            return
        count = int(self.rng.integers(1, len(shape) + 1))
        dims = sorted(int(d) for d in self.rng.choice(len(shape), count, replace=False))
        result = [n for d, n in enumerate(shape) if d not in dims]
        kind, start = [("add", "0.0"), ("maximum", "0xFF800000"), ("minimum", "0x7F800000")][self.rng.integers(3)]
        initial = self.full((), start)
        self.emit(
            result,
            f"stablehlo.reduce({name} init: {initial}) applies stablehlo.{kind} across dimensions = {dims} : "
            f"({tensor(shape)}, {tensor(())}) -> {tensor(result)}",
        )

    def dot(self):
        a, lhs = self.pick()
        b, rhs = self.pick()
        pairs = [(i, j) for i, n in enumerate(lhs) for j, k in enumerate(rhs) if n == k]
        if not pairs:
            return
        i, j = pairs[self.rng.integers(len(pairs))]
        result = [n for d, n in enumerate(lhs) if d != i] + [n for d, n in enumerate(rhs) if d != j]
        if len(result) > 4 or np.prod(result) > 512:
            return
        self.emit(
            result,
            f"stablehlo.dot_general {a}, {b}, contracting_dims = [{i}] x [{j}] : "
            f"({tensor(lhs)}, {tensor(rhs)}) -> {tensor(result)}",
        )

    def slice(self):
        name, shape = self.pick()
        if not shape:
            return
        parts, result = [], []
        for n in shape:
            start = int(self.rng.integers(0, n))
            stop = int(self.rng.integers(start + 1, n + 1))
            step = int(self.rng.integers(1, 3))
            parts.append(f"{start}:{stop}:{step}")
            result.append(-(-(stop - start) // step))
        self.emit(result, f"stablehlo.slice {name} [{', '.join(parts)}] : ({tensor(shape)}) -> {tensor(result)}")

    def concatenate(self):
        a, shape = self.pick()
        if not shape:
            return
        dim = int(self.rng.integers(len(shape)))
        fits = [(n, s) for n, s in self.values if len(s) == len(shape) and _without(s, dim) == _without(shape, dim)]
        b, other = fits[self.rng.integers(len(fits))]
        result = list(shape)
        result[dim] += other[dim]
        if np.prod(result) > 512:
            return
        self.emit(
            result,
            f"stablehlo.concatenate {a}, {b}, dim = {dim} : ({tensor(shape)}, {tensor(other)}) -> {tensor(result)}",
        )

    def pad(self):
        name, shape = self.pick()
        if not shape:
            return
        low, high = ([int(n) for n in self.rng.integers(0, 3, len(shape))] for _ in range(2))
        inside = [int(n) for n in self.rng.integers(0, 2, len(shape))]
        result = [a + n + (n - 1) * k + b for n, a, b, k in zip(shape, low, high, inside, strict=True)]
        if np.prod(result) > 512:
            return
        self.emit(
            result,
            f"stablehlo.pad {name}, {self.full((), self.number())}, low = {low}, high = {high}, interior = {inside} : "
            f"({tensor(shape)}, {tensor(())}) -> {tensor(result)}",
        )

    def select(self):
        a, shape = self.pick()
        b = str(self.rng.choice([n for n, s in self.values if s == shape]))
        mask = tensor(shape, "i1")
        if self.rng.random() < 0.3:
            chosen = self.bare(f"stablehlo.constant dense<{self.rng.choice(['true', 'false'])}> : {mask}")
        else:
            chosen = self.bare(f"stablehlo.compare GT, {a}, {b} : ({tensor(shape)}, {tensor(shape)}) -> {mask}")
        if self.rng.random() < 0.4:
            chosen = self.bare(f"stablehlo.not {chosen} : {mask}")
        self.emit(shape, f"stablehlo.select {chosen}, {a}, {b} : {mask}, {tensor(shape)}")

    def convert(self):
        name, shape = self.pick()
        wide, kind = tensor(shape, "f64"), tensor(shape)
        middle = self.bare(f"stablehlo.convert {name} : ({kind}) -> {wide}")
        self.emit(shape, f"stablehlo.convert {middle} : ({wide}) -> {kind}")

    def reverse(self):
        name, shape = self.pick()
        if shape:
            dims = [int(self.rng.integers(len(shape)))]
            self.emit(shape, f"stablehlo.reverse {name}, dims = {dims} : {tensor(shape)}")

    def integers(self):
        """Counts computed upon, as masks and positions are, and made floats."""
        shape = self.pick()[1]
        if not shape:
            return
        kind = tensor(shape, "i32")
        dims = self.rng.integers(0, len(shape), 2)
        a, b = (self.bare(f"stablehlo.iota dim = {d} : {kind}") for d in dims)
        c = self.bare(f"stablehlo.{self.rng.choice(['add', 'subtract', 'multiply', 'maximum'])} {a}, {b} : {kind}")
        self.emit(shape, f"stablehlo.convert {c} : ({kind}) -> {tensor(shape)}")

    def loop(self):
        name, shape = self.pick()
        zero = self.bare("stablehlo.constant dense<0> : tensor<i32>")
        k, kind = self.count, tensor(shape)
        self.count += 1
        trips = int(self.rng.integers(0, 4))
        self.lines.append(f"""%v{k}:2 = stablehlo.while(%i{k} = {zero}, %c{k} = {name}) : tensor<i32>, {kind}
  cond {{
    %n{k} = stablehlo.constant dense<{trips}> : tensor<i32>
    %p{k} = stablehlo.compare LT, %i{k}, %n{k} : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %p{k} : tensor<i1>
  }} do {{
    %o{k} = stablehlo.constant dense<1> : tensor<i32>
    %j{k} = stablehlo.add %i{k}, %o{k} : tensor<i32>
    %m{k} = stablehlo.constant dense<1.0> : {kind}
    %s{k} = stablehlo.multiply %c{k}, %m{k} : {kind}
    %t{k} = stablehlo.tanh %s{k} : {kind}
    stablehlo.return %j{k}, %t{k} : tensor<i32>, {kind}
  }}""")
        self.values.append((f"%v{k}#1", shape))

    def branch(self):
        name, shape = self.pick()
        k, kind = self.count, tensor(shape)
        self.count += 1
        index = int(self.rng.integers(-1, 3))
        chosen = self.bare(f"stablehlo.constant dense<{index}> : tensor<i32>")
        self.lines.append(f"""%v{k} = "stablehlo.case"({chosen}) ({{
    %x{k} = stablehlo.negate {name} : {kind}
    stablehlo.return %x{k} : {kind}
  }}, {{
    %y{k} = stablehlo.add {name}, {name} : {kind}
    stablehlo.return %y{k} : {kind}
  }}) : (tensor<i32>) -> {kind}""")
        self.values.append((f"%v{k}", shape))


def _without(shape, dim):
    return shape[:dim] + shape[dim + 1 :]


def tensor(shape, element: str = "f32") -> str:
    """A tensor type in StableHLO's text."""
    return f"tensor<{''.join(f'{n}x' for n in shape)}{element}>"
