"""Products, convolutions and attention are computed in another precision; all that is around them stays as it is.

What is rounded are the operands, as they are read; sums stay wide. Norms, softmax, losses, reductions, routers and the residual
stream are never touched, nor are a model's parameters: what is made of them is made at load.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.ir.rewrite import Fuel
from kpx.ir.split import depends_on_weights_alone
from kpx.passes import int8_products, narrow_composites, weights_only
from kpx.passes.composites import Device
from kpx.passes.few_bits import SCHEMES, FewBits
from kpx.passes.provenance import FORWARD, Provenance
from kpx.precision import Policy, Rule

NAME = "lower_precision"
"""What the rewrite is called where rewrites are disabled, counted, or bisected."""

_ELEMENT = {"bf16": "bf16", "f16": "f16", "int8": "bf16", **dict.fromkeys(SCHEMES, "bf16")}  # of what has no other form
_FLOATS = ("f32", "bf16", "f16")
_BITS = {"int8-weights": 8, "int4-weights": 4}
_MOST_EXPERTS = 1024
_TOLD_APART = {"f16", *SCHEMES}  # precisions for which it matters what a product computes


@dataclass
class Site:
    """An op that has a precision.

    Attributes:
        kind: of `kpx.precision.OPS`.
        path: where in the model, by names.
        nth: of those of its kind at its place; products by weights are counted apart from others.
        sizes: rows, columns, inner size.
        by_weight: whether it is a product by a matrix of weights.
        role, gradient: of a product, see `Provenance.of`; forward where nobody asked.
    """

    op: Any
    kind: str
    path: str
    nth: int
    sizes: tuple[int, int, int]
    by_weight: bool = False
    role: str = FORWARD
    gradient: int | None = None

    @property
    def flops(self) -> int:
        """Of a product, a multiplication and an addition counted as two."""
        rows, columns, inner = self.sizes
        batch = m.size(self.op.results[0]) // max(rows * columns, 1) if self.kind == "product" else 1
        return 2 * rows * columns * inner * max(batch, 1)


def sites(module: ir.Module) -> list[Site]:
    """The ops of a module that have a precision, in order."""
    found, counts = [], collections.Counter()
    for op in list(m.walk(m.main(module))):
        kind, sizes = _described(module, op)
        if not kind:
            continue
        path, by_weight = path_of(m.source_path(op)), isinstance(op, stablehlo.DotGeneralOp) and is_by_weight(op)
        found.append(Site(op, kind, path, counts[kind, path, by_weight], sizes, by_weight))
        counts[kind, path, by_weight] += 1
    return found


def lower(
    module: ir.Module,
    policy: Policy,
    device: Device,
    features: frozenset[str],
    fuel: Fuel,
    *,
    convolutions: bool,
) -> tuple[collections.Counter[str], dict[str, str]]:
    """Computes ops as a policy says, in place; gives how many are computed in which precision, and what is emulated, how.

    Those of a model in bf16 or f16 are not computed in more bits than that, but in fewer where a policy says so.

    Args:
        features: of the target: `onednn` where it can be called, units for few bits (see `Target.features`).
        convolutions: whether those are meant, which comes before their layout is chosen, or the others.
    """
    lowering = _Lowering(module, policy, device, "onednn" in features, FewBits(module, device, features))
    with module.context, ir.Location.unknown():
        found = sites(module)
        if _TOLD_APART & {policy.default, *(rule.precision for rule in policy.rules)}:
            tell_apart(module, found)
        tables = (_source(site.op.operand) for site in found if site.kind == "embedding")
        lowering.tables = {table for table in tables if isinstance(table.owner, ir.Block)}  # which stay where they are
        for site in found:
            if (site.kind == "convolution") != convolutions:
                continue
            rule = policy.rule(site.kind, site.path, site.sizes, site.nth, by_weight=site.by_weight)
            if site.kind == "embedding" and rule.precision not in _BITS:
                continue  # rows are taken, and nothing is computed
            own = m.element_type(site.op.operands[0])
            stays = rule.precision in _FLOATS and (rule.precision == "f32" or own != "f32")
            if stays or _is_router(site) or not fuel.burn(NAME, site.op):
                lowering.counts[own] += 1
                continue
            with ir.InsertionPoint(site.op), site.op.location:
                lowering.counts[lowering.lower(site, rule)] += 1
    m.inline_calls(module)
    return lowering.counts, lowering.few.emulated


def tell_apart(module: ir.Module, found: Sequence[Site]) -> None:
    """Notes of products what each computes; before anything is changed, for values are told by what they are now."""
    provenance = Provenance(module)
    for site in found:
        if site.kind == "product" and isinstance(site.op, stablehlo.DotGeneralOp) and not site.by_weight:
            site.role, site.gradient = provenance.of(site.op)


def path_of(names: str) -> str:
    """Where in the model an op is, without its own name, the functions around it, and what differentiated them."""
    return "/".join(_names([part for part in names.split("/") if part][:-1]))


def _names(parts: list[str]) -> Iterator[str]:
    for part in parts:
        if part == "composite":
            continue  # what a fused op is made of stands where it stood
        if "(" not in part:
            yield part
        elif not part.startswith(("jit(", "pjit(")) and (inner := re.search(r"\(([^()]+)\)", part)):
            yield inner[1]  # transpose(jvp(name))


def _described(module: ir.Module, op: Any) -> tuple[str, tuple[int, int, int]]:
    """Which of the ops that have a precision it is, and its rows, columns and inner size; "" for any other."""
    if not len(op.operands) or m.element_type(op.operands[0]) not in _FLOATS:
        return "", (0, 0, 0)
    if isinstance(op, stablehlo.DotGeneralOp) and op.algorithm is None:
        numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
        inner = math.prod(m.shape(op.lhs)[d] for d in numbers.lhs_contracting_dimensions)
        batch = math.prod(m.shape(op.lhs)[d] for d in numbers.lhs_batching_dimensions)
        rows, columns = (m.size(v) // max(inner * batch, 1) for v in (op.lhs, op.rhs))
        return "product", (rows, columns, inner)
    if isinstance(op, stablehlo.ConvolutionOp):
        columns = m.shape(op.rhs)[stablehlo.ConvDimensionNumbers(op.dimension_numbers).kernel_output_feature_dimension]
        return "convolution", (m.size(op.result) // max(columns, 1), columns, m.size(op.rhs) // max(columns, 1))
    if isinstance(op, stablehlo.GatherOp) and m.rank(op.operand) == 2:
        rows, columns = m.shape(op.operand)
        return "embedding", (m.size(op.start_indices), columns, rows)
    if narrow_composites.is_composite(op) and narrow_composites.factors(module, op):
        if "attention" in narrow_composites.label(op):
            query, key = op.operands[0], op.operands[1]
            return "attention", (m.shape(query)[-2], m.shape(key)[-2], m.shape(query)[-1])
        depth = m.shape(op.operands[0])[-1]
        rows = m.size(op.operands[0]) // max(depth, 1)
        return "product", (rows, m.size(op.operands[1]) // max(depth, 1), depth)
    return "", (0, 0, 0)


def _is_router(site: Site) -> bool:
    """Whether a product's result decides, by being among the largest, which of some experts take part."""
    if site.kind != "product" or site.sizes[1] > _MOST_EXPERTS:
        return False
    seen: set[Value] = set()
    left = list(site.op.results)
    while left and len(seen) < 64:
        for user in m.users(left.pop()):
            name = user.operation.name
            if name in ("chlo.top_k", "stablehlo.sort"):
                return True
            if name.endswith(("dot_general", "convolution", "composite", "while", "gather", "scatter")):
                continue
            found = [r for r in user.operation.results if r not in seen]
            seen.update(found)
            left += found
    return False


@dataclass
class _Lowering:
    """What is known while a module's ops are lowered."""

    module: ir.Module
    policy: Policy
    device: Device
    with_onednn: bool
    few: FewBits
    tables: set[Value] = field(default_factory=set)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def lower(self, site: Site, rule: Rule) -> str:
        """Computes an op in a precision, or in the one that this precision has for it; gives which."""
        op, wanted = site.op, rule.precision
        own = m.element_type(op.operands[0])
        if wanted in _BITS:
            # Of a table that the last layer reads too, one copy is held, and the rows that are taken need more bits.
            if site.kind == "embedding" or (site.by_weight and _source(op.rhs) in self.tables):
                wanted = "int8-weights"
            return wanted if self._keep_weight(site, _BITS[wanted]) else own
        if site.kind == "product" and isinstance(op, stablehlo.DotGeneralOp):
            if wanted == "int8" and site.by_weight:
                self._int8(site)
                return "int8"
            if wanted in SCHEMES and (done := self._few_bits(site, rule)):
                return done
        if own != "f32":
            return own
        return self._in_floats(site, _ELEMENT[wanted])

    def _int8(self, site: Site) -> None:
        wide = _in_f32(site.op)
        with ir.InsertionPoint(wide):
            wide, static = self._calibrated(wide, site, "int8")
        with ir.InsertionPoint(wide):
            _replace(wide, int8_products.product(wide, self.with_onednn, static))

    def _few_bits(self, site: Site, rule: Rule) -> str:
        op, static = site.op, None
        if site.by_weight:
            op, static = self._calibrated(op, site, rule.precision)
        done = self.few.lower(
            op, rule.precision, site.gradient, by_row=site.by_weight, stochastic=rule.stochastic, static=static
        )
        return (rule.precision if site.role == FORWARD else f"{rule.precision} {site.role}") if done else ""

    def _calibrated(self, op: Any, site: Site, precision: str) -> tuple[Any, float | None]:
        """A product by a weight with its channels balanced, and its first factor's scale, as far as they were calibrated."""
        found = self.policy.calibrated(site.path, site.nth, precision, site.sizes[2])
        if found is None:
            return op, None
        if found.balance is not None:
            (inner,) = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).rhs_contracting_dimensions
            by, back = (m.constant(b.astype("float32")) for b in (1 / found.balance, found.balance))
            x = stablehlo.multiply(
                op.lhs, m.convert(m.broadcast(by, m.shape(op.lhs), [m.rank(op.lhs) - 1]), m.element_type(op.lhs))
            )
            w = stablehlo.multiply(
                op.rhs, m.convert(m.broadcast(back, m.shape(op.rhs), [inner]), m.element_type(op.rhs))
            )
            made = stablehlo.DotGeneralOp(
                op.result.type, x, w, op.dot_dimension_numbers, precision_config=op.precision_config
            )
            _replace(op, made.result)
            op = made
        return op, found.scale

    def _in_floats(self, site: Site, element: str) -> str:
        """Computes an op over operands in bf16 or f16."""
        op = site.op
        if narrow_composites.is_composite(op):
            places = narrow_composites.factors(self.module, op)
            return element if narrow_composites.narrow(self.module, op, places, element, self.device) else "f32"
        if element == "f16" and site.gradient is not None:
            self.few.lower_f16(op, site.gradient)
            return element
        narrow = [m.convert(v, element) for v in (op.lhs, op.rhs)]
        if site.kind == "product":
            kind = op.result.type
            y = stablehlo.dot_general(kind, *narrow, op.dot_dimension_numbers, precision_config=op.precision_config)
        else:
            y = m.rebuild(op, narrow).results[0]
        _replace(op, y)
        return element

    def _keep_weight(self, site: Site, bits: int) -> bool:
        """Has an op read a weight that is kept in so many bits; False, and nothing changes, where it reads none that can be."""
        op = site.op
        if site.kind == "embedding":
            y = weights_only.rows_of(op) if depends_on_weights_alone(op.operand) else None
            if y is not None:
                _replace(op, y)
            return y is not None
        is_product = site.kind == "product" and isinstance(op, stablehlo.DotGeneralOp)
        if not is_product or not site.by_weight or not weights_only.can_be(m.shape(op.lhs)[-1], bits):
            return False
        wide = _in_f32(op)
        with ir.InsertionPoint(wide):
            wide, _ = self._calibrated(wide, site, "int8-weights" if bits == 8 else "int4-weights")
        with ir.InsertionPoint(wide):
            (inner,) = stablehlo.DotDimensionNumbers(wide.dot_dimension_numbers).rhs_contracting_dimensions
            _replace(wide, weights_only.product(wide, inner, bits, self.device.platform))
        return True


def _source(value: Value) -> Value:
    """What a value is a conversion or transposition of."""
    while isinstance(op := m.producer(value), (stablehlo.TransposeOp, stablehlo.ConvertOp)):
        value = op.operand
    return value


def _replace(op: Any, value: Value) -> None:
    op.results[0].replace_all_uses_with(value)
    op.operation.erase()


def _in_f32(op: Any) -> Any:
    """A product in f32 in the place of one of other floating numbers: what is quantized is made of that."""
    if {m.element_type(v) for v in (op.lhs, op.rhs, op.result)} == {"f32"}:
        return op
    wide = [m.convert(v, "f32") for v in (op.lhs, op.rhs)]
    kind = m.tensor(m.shape(op.result), "f32")
    made = stablehlo.DotGeneralOp(kind, *wide, op.dot_dimension_numbers, precision_config=op.precision_config)
    _replace(op, m.convert(made.result, m.tensor_type(op.result).element_type))
    return made


def is_by_weight(op: Any) -> bool:
    """Whether a product is of an array by a matrix of weights, the array's last dimension by one of the matrix."""
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    inner = list(numbers.lhs_contracting_dimensions), list(numbers.rhs_contracting_dimensions)
    plain = not list(numbers.lhs_batching_dimensions) and m.rank(op.rhs) == 2 and len(inner[1]) == 1
    if not plain or inner[0] != [m.rank(op.lhs) - 1]:
        return False
    return depends_on_weights_alone(op.rhs) and not depends_on_weights_alone(op.lhs)
