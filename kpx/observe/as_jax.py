"""A region of a module as JAX source: a fusion pattern's `search`, to be completed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.passes.regions import Region

_ELEMENTWISE = {
    "abs": "lax.abs", "add": "{} + {}", "and": "{} & {}", "atan2": "jnp.arctan2", "cbrt": "lax.cbrt", "ceil": "lax.ceil",
    "clamp": "jnp.clip({1}, {0}, {2})", "cosine": "lax.cos", "divide": "{} / {}", "exponential": "lax.exp",
    "exponential_minus_one": "lax.expm1", "floor": "lax.floor", "is_finite": "lax.is_finite", "log": "lax.log",
    "log_plus_one": "lax.log1p", "logistic": "lax.logistic", "maximum": "jnp.maximum", "minimum": "jnp.minimum",
    "multiply": "{} * {}", "negate": "-{}", "not": "~{}", "or": "{} | {}", "power": "{} ** {}", "remainder": "jnp.fmod",
    "round_nearest_afz": "lax.round", "rsqrt": "lax.rsqrt", "select": "jnp.where", "sign": "lax.sign", "sine": "lax.sin",
    "sqrt": "lax.sqrt", "subtract": "{} - {}", "tan": "lax.tan", "tanh": "lax.tanh", "xor": "{} ^ {}", "erf": "lax.erf",
}  # fmt: skip
_SUMS = {"add": "jnp.sum", "maximum": "jnp.max", "minimum": "jnp.min", "multiply": "jnp.prod", "and": "jnp.all",
         "or": "jnp.any"}  # fmt: skip
_ONE_OVER = "(1 / "
_LEAST_COUNT = 8  # of a dimension: smaller numbers may mean something else
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_DTYPES = {"i1": "bool_", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "i32": "int32",
           "i64": "int64", "i8": "int8", "i16": "int16", "ui8": "uint8", "ui32": "uint32"}  # fmt: skip


def pattern_source(region: Region, name: str, comment: Sequence[str] = ()) -> str | None:
    """A module that registers a region as a pattern, whose replacement is what it replaces until it is written.

    Dimensions are told by those of the inputs that they equal, so that other shapes are found too.

    Returns:
        The source, or None where an op of the region has no form in it.
    """
    writer = _Writer(region)
    lines = [line for op in region.ops if (line := writer.line(op)) is not None]
    if writer.failed:
        return None
    arguments = ", ".join(writer.names[v] for v in region.inputs)
    results = ", ".join(writer.names[v] for v in region.outputs)
    examples = ",\n    ".join(f"jax.ShapeDtypeStruct({m.shape(v)}, jnp.{_dtype(v)})" for v in region.inputs)
    return "\n".join(
        [
            f'"""A fusion pattern: {name}."""',
            "",
            "import jax",
            "import jax.numpy as jnp",
            "from jax import lax",
            "",
            "import kpx",
            "",
            *(f"# {text}" for text in comment),
            "",
            "",
            f"def search({arguments}):",
            *(f"    {line}" for line in lines),
            f"    return {results}",
            "",
            "",
            f"def replace({arguments}):",
            "    # Better: what reads each input once (a kernel; see kpx.kernels). Checked against `search` before it is used.",
            f"    return search({arguments})",
            "",
            "",
            f"EXAMPLE = (\n    {examples},\n)",
            f'kpx.fusion.pattern(search, replace, example=EXAMPLE, name="{name}")',
            "",
        ]
    )


def _dtype(value: Value) -> str:
    return _DTYPES.get(m.element_type(value), "float32")


class _Writer:
    """Writes ops as JAX, a line each."""

    def __init__(self, region: Region):
        self.names: dict[Value, str] = {value: f"x{i}" for i, value in enumerate(region.inputs)}
        self.failed = False
        self._dimensions: dict[float, str] = {}
        for value, name in self.names.items():
            for axis, size in enumerate(m.shape(value)):
                if size > 1:
                    self._dimensions.setdefault(size, f"{name}.shape[{axis}]")
        self._numbers: dict[Value, str] = {}
        self._count = 0

    def line(self, op: Any) -> str | None:
        """The assignment of an op's result; None for a number, which is written where it is used."""
        kind = op.operation.name.partition(".")[2]
        result = op.results[0]
        if kind == "constant":
            self._numbers[result] = self._number(m.splat(result))
            return None
        written = _WRITERS.get(kind, _Writer._elementwise)(self, op, kind)
        if written is None:
            self.failed = True
            return None
        self._count += 1
        self.names[result] = f"v{self._count}"
        return f"{self.names[result]} = {written}"

    def _number(self, number: Any) -> str:
        """A number, by a dimension where it is one, or one over one: the count of a mean."""
        if isinstance(number, float) and number:
            for form, size in (("float({})", number), (_ONE_OVER + "{})", 1 / number)):
                if size >= _LEAST_COUNT and size in self._dimensions:
                    return form.format(self._dimensions[size])
            return {float("inf"): "jnp.inf", float("-inf"): "-jnp.inf"}.get(
                number, "jnp.nan" if number != number else repr(number)
            )
        return repr(number)

    def _name(self, value: Value) -> str:
        """A value's name; a number is made an array, for what does not take it as such."""
        if value in self._numbers:
            return f"jnp.full({self._shape(value)}, {self._numbers[value]}, jnp.{_dtype(value)})"
        return self.names[value]

    def _shape(self, value: Value) -> str:
        sizes = [self._dimensions.get(n, str(n)) for n in m.shape(value)]
        return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"

    def _operands(self, op: Any) -> list[str]:
        """Of an elementwise op: numbers are of the other operands' dtype, whatever it is."""
        if all(o in self._numbers for o in op.operands):
            return [self._name(o) for o in op.operands]
        return [self._numbers.get(o) or self.names[o] for o in op.operands]

    def _elementwise(self, op: Any, kind: str) -> str | None:
        form, operands = _ELEMENTWISE.get(kind), self._operands(op)
        if form is None:
            return None
        if kind == "multiply":  # by one over a count is what dividing by a power of two has become
            for operand, other in (operands, operands[::-1]):
                if operand.startswith(_ONE_OVER):
                    return f"{other} / {operand.removeprefix(_ONE_OVER).removesuffix(')')}"
        return form.format(*operands) if "{" in form else f"{form}({', '.join(operands)})"

    def _convert(self, op: Any, kind: str) -> str:
        return f"{self._name(op.operand)}.astype(jnp.{_dtype(op.result)})"

    def _compare(self, op: Any, kind: str) -> str | None:
        direction = stablehlo.ComparisonDirectionAttr(op.comparison_direction).value.lower()
        return f" {_COMPARED[direction]} ".join(self._operands(op))

    def _broadcast(self, op: Any, kind: str) -> str:
        along = tuple(m.integers(op.broadcast_dimensions))
        return f"lax.broadcast_in_dim({self._name(op.operand)}, {self._shape(op.result)}, {along})"

    def _reshape(self, op: Any, kind: str) -> str:
        return f"{self._name(op.operand)}.reshape{self._shape(op.result)}"

    def _transpose(self, op: Any, kind: str) -> str:
        return f"{self._name(op.operand)}.transpose({', '.join(map(str, m.integers(op.permutation)))})"

    def _iota(self, op: Any, kind: str) -> str:
        axis = ir.IntegerAttr(op.iota_dimension).value
        return f"lax.broadcasted_iota(jnp.{_dtype(op.results[0])}, {self._shape(op.results[0])}, {axis})"

    def _reduce(self, op: Any, kind: str) -> str | None:
        body = list(op.regions[0].blocks[0].operations)
        form = _SUMS.get(body[0].operation.name.partition(".")[2]) if len(body) == 2 else None
        axes = tuple(m.integers(op.dimensions))
        return None if form is None else f"{form}({self._name(op.operands[0])}, {axes})"


_WRITERS: Mapping[str, Callable[[_Writer, Any, str], str | None]] = {
    "convert": _Writer._convert,
    "compare": _Writer._compare,
    "broadcast_in_dim": _Writer._broadcast,
    "reshape": _Writer._reshape,
    "transpose": _Writer._transpose,
    "iota": _Writer._iota,
    "reduce": _Writer._reduce,
}
